"""Tests of schedules, clipping, decay and learning rates by parameter name."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
import optax

from configs import base
from lvrpo_jax.training import optimizer as optimizer_lib


def tree(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.float32(rng.normal(size=shape))

  return {
    'trunk': {
      'layers': {
        side: {'q_proj': {'kernel': draw(1, 3, 2), 'bias': draw(2)}} for side in ('und', 'gen')
      }
    },
    'vit': {'pos_embed': draw(2)},
    'latent_pos_embed': draw(4),
    'vit_pos_embed': draw(4),
  }


def build(rules=(), decay=0.0, clip=1e9, kind='adamw'):
  def rate(peak):
    return optimizer_lib.schedule('constant', peak, 100, 0)

  return optimizer_lib.build(kind, rate(0.1), 0.9, 0.98, 1e-8, decay, clip, rate(0.3), rules)


def run(optimizer, params, grads, steps=1):
  """Parameters after steps with the same gradient."""
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for _ in range(steps):
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return params


class MasterTest(absltest.TestCase):
  def test_small_updates_need_float32_parameters(self):
    optimizer = optimizer_lib.build(
      'adamw', optimizer_lib.schedule('constant', 1e-6, 1000, 0), 0.9, 0.98, 1e-8, 0.0, 1e9
    )
    grads = {'w': jnp.ones((1,))}

    def moved(dtype):
      return float(run(optimizer, {'w': jnp.full((1,), 0.02, dtype)}, grads, 1000)['w'][0])

    # The scale of bfloat16 has steps of 1.2e-4 there; the updates add up to 1e-3.
    self.assertAlmostEqual(moved(jnp.float32), 0.019, places=5)
    self.assertEqual(moved(jnp.bfloat16), float(jnp.bfloat16(0.02)))


class ScheduleTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 0.1),
    (4, 0.5),
    (9, 1.0),
    (10, 1.0),
    (50, 1.0),
    (75, 0.5),
    (99, 0.02),
    (100, 0.0),
    (150, 0.0),
  )
  def test_linear(self, step, expected):
    rate = optimizer_lib.schedule('linear', 2.0, 100, 10)
    self.assertAlmostEqual(float(rate(jnp.int32(step))), 2.0 * expected, places=6)

  @parameterized.parameters((0, 0.25), (1, 0.5), (3, 1.0), (1000, 1.0))
  def test_constant(self, step, expected):
    rate = optimizer_lib.schedule('constant', 3e-4, 100, 4)
    self.assertAlmostEqual(float(rate(jnp.int32(step))), 3e-4 * expected, places=9)

  @parameterized.parameters(
    (0, 100, 10),
    (4, 100, 10),
    (9, 100, 10),
    (10, 100, 10),
    (50, 100, 10),
    (99, 100, 10),
    (100, 100, 10),
    (150, 100, 10),
    (0, 1, 0),
    (1, 1, 0),
  )
  def test_cosine(self, step, steps, warmup):
    expected = (
      0.5 * (1 + np.cos(np.pi * min(step / steps, 1))) * min(1, (step + 1) / max(warmup, 1))
    )
    rate = optimizer_lib.schedule('cosine', 2.0, steps, warmup)
    self.assertAlmostEqual(float(rate(jnp.int32(step))), 2.0 * expected, places=6)

  @parameterized.parameters('constant', 'linear', 'cosine')
  def test_without_warm_up(self, kind):
    self.assertAlmostEqual(float(optimizer_lib.schedule(kind, 1.0, 10, 0)(jnp.int32(0))), 1.0)

  @parameterized.parameters(1, 2, 3)
  def test_the_shortest_runs(self, steps):
    rate = optimizer_lib.schedule('linear', 1.0, steps, 0)
    self.assertEqual(float(rate(jnp.int32(0))), 1.0)
    self.assertEqual(float(rate(jnp.int32(steps))), 0.0)

  def test_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "'step'; allowed: 'constant', 'linear', 'cosine'"):
      optimizer_lib.schedule('step', 1.0, 10, 0)


def adamw_oracle(p, slopes, settings, factor, multiplier, steps):
  """AdamW after clipping, with a cosine schedule after a linear warm-up, in float64.

  Args:
    p: parameters as one vector.
    slopes: a gradient of every step, of the same length.
    multiplier: of the update of every parameter.
    steps: of the whole schedule.
  """
  m, v = np.zeros_like(p), np.zeros_like(p)
  for step, g in enumerate(slopes):
    g = g * min(1.0, settings.clip_norm / np.linalg.norm(g))
    m = settings.b1 * m + (1 - settings.b1) * g
    v = settings.b2 * v + (1 - settings.b2) * g**2
    first, second = m / (1 - settings.b1 ** (step + 1)), v / (1 - settings.b2 ** (step + 1))
    move = first / (np.sqrt(second) + settings.eps) + settings.weight_decay * p
    warm = min(1.0, (step + 1) / settings.warmup)
    rate = settings.learning_rate * factor * 0.5 * (1 + np.cos(np.pi * step / steps)) * warm
    p = p - rate * multiplier * move
  return p


class FromConfigTest(parameterized.TestCase):
  def settings(self, **changes):
    return base.optimizer(
      schedule='cosine',
      warmup=3,
      learning_rate=0.05,
      muon_rate=0.07,
      b1=0.8,
      b2=0.95,
      eps=1e-3,
      weight_decay=0.2,
      clip_norm=1.5,
      **changes,
    )

  def moved(self, settings, params, slopes, *args, **kwargs):
    """Parameters before and after an update for each of the slopes."""
    optimizer = optimizer_lib.from_config(settings, *args, **kwargs)
    state, out = optimizer.init(params), [params]
    for grads in slopes:
      updates, state = optimizer.update(grads, state, out[-1])
      out.append(optax.apply_updates(out[-1], updates))
    return out

  def test_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "'lion'; allowed: 'adamw', 'muon'"):
      optimizer_lib.from_config(self.settings(kind='lion'), 10)

  def test_adamw_with_cosine_against_numpy(self):
    draw = np.random.default_rng(0).normal
    params = {'kernel': jnp.float32(draw(size=6)), 'slow': {'kernel': jnp.float32(draw(size=4))}}
    # Some gradients are clipped, others are not.
    scales = (3.0, 0.1, 0.4, 2.0, 0.2, 1.0, 0.05)
    slopes = [
      jax.tree.map(lambda x, s=s: jnp.float32(s * draw(size=x.shape)), params) for s in scales
    ]

    def flat(tree):
      return np.float64(np.concatenate([tree['kernel'], tree['slow']['kernel']]))

    norms = [np.linalg.norm(flat(g)) for g in slopes]
    settings = self.settings()
    self.assertBetween(sum(norm > settings.clip_norm for norm in norms), 2, len(norms) - 2)
    found = self.moved(settings, params, slopes, 9, factor=0.5, rules=((r'slow', 0.3),))
    multiplier = np.repeat([1.0, 0.3], [6, 4])
    for count in range(1, len(slopes) + 1):
      want = adamw_oracle(
        flat(params), [flat(g) for g in slopes[:count]], settings, 0.5, multiplier, 9
      )
      np.testing.assert_allclose(flat(found[count]), want, rtol=1e-5, atol=1e-6)
    self.assertGreater(np.abs(flat(found[-1]) - flat(params)).min(), 1e-4)

  def test_both_rates_follow_the_schedule_and_the_factor(self):
    # Gradients of one direction: all orthogonalised steps have one length, times the rate.
    params, slope = tree(), tree(seed=1)
    settings = self.settings(kind='muon')
    settings.update(weight_decay=0.0, b1=0.0, b2=0.0, eps=1e-12)
    found = self.moved(settings, params, [slope] * 8, 8, factor=2.0)
    parts = {
      'muon_rate': lambda t: t['trunk']['layers']['und']['q_proj']['kernel'],
      'learning_rate': lambda t: t['vit']['pos_embed'],
    }
    warm = np.minimum(1.0, np.arange(1, 9) / 3)
    rates = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8)) * warm
    for name, part in parts.items():
      steps = [np.linalg.norm(part(b) - part(a)) for a, b in itertools.pairwise(found)]
      np.testing.assert_allclose(steps, steps[2] * rates / rates[2], rtol=1e-3, err_msg=name)
    # Adam without memory moves every parameter by the rate.
    step = np.abs(parts['learning_rate'](found[3]) - parts['learning_rate'](found[2]))
    np.testing.assert_allclose(step, 2.0 * settings.learning_rate * rates[2], rtol=1e-4)


class RateTest(absltest.TestCase):
  def test_the_first_rule_that_matches(self):
    rates = optimizer_lib.rates(tree(), ((r'layers/und/', 0.3), (r'kernel$', 0.5)))
    self.assertEqual(
      rates,
      {
        'trunk': {
          'layers': {
            'und': {'q_proj': {'kernel': 0.3, 'bias': 0.3}},
            'gen': {'q_proj': {'kernel': 0.5, 'bias': 1.0}},
          }
        },
        'vit': {'pos_embed': 1.0},
        'latent_pos_embed': 0.0,
        'vit_pos_embed': 0.0,
      },
    )

  def test_frozen_tables_come_before_all_rules(self):
    self.assertEqual(optimizer_lib.rates(tree(), ((r'.*', 7.0),))['latent_pos_embed'], 0.0)

  def test_names(self):
    names = []
    jax.tree_util.tree_map_with_path(
      lambda path, _: names.append(optimizer_lib.parameter_name(path)), tree()
    )
    self.assertIn('trunk/layers/und/q_proj/kernel', names)
    self.assertIn('vit_pos_embed', names)


class BuildTest(parameterized.TestCase):
  def test_adam_against_numpy(self):
    params, grads = tree(), tree(seed=1)
    optimizer = build()

    def kernel(t):
      return np.float64(t['trunk']['layers']['gen']['q_proj']['kernel'])

    p, g = kernel(params), kernel(grads)
    m = v = np.zeros_like(p)
    for step in range(1, 4):
      m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
      p = p - 0.1 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.98**step)) + 1e-8)
    np.testing.assert_allclose(kernel(run(optimizer, params, grads, 3)), p, rtol=1e-5)

  @parameterized.product(decay=(0.0, 0.1), kind=('adamw', 'muon'))
  def test_frozen_tables_never_move(self, decay, kind):
    params = tree()
    after = run(build(((r'pos_embed', 3.0),), decay, kind=kind), params, tree(seed=1), 5)
    for name in ('latent_pos_embed', 'vit_pos_embed'):
      np.testing.assert_array_equal(after[name], params[name])
    self.assertFalse(np.array_equal(after['vit']['pos_embed'], params['vit']['pos_embed']))

  @parameterized.parameters('adamw', 'muon')
  def test_a_rule_multiplies_the_update(self, kind):
    params, grads = tree(), tree(seed=1)
    plain, slow = (
      run(build(rules, decay=0.1, kind=kind), params, grads)
      for rules in ((), ((r'layers/und/', 0.25),))
    )
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), plain, params)
    slowed = jax.tree.map(lambda a, b: np.asarray(a - b), slow, params)
    for key in ('kernel', 'bias'):
      und, gen = (
        lambda t, s=s, key=key: t['trunk']['layers'][s]['q_proj'][key] for s in ('und', 'gen')
      )
      np.testing.assert_allclose(und(slowed), 0.25 * und(moved), rtol=1e-4, atol=1e-7)
      np.testing.assert_array_equal(gen(slowed), gen(moved))

  def test_a_rate_of_zero_freezes(self):
    params = tree()
    after = run(build(((r'layers/und/', 0.0),), decay=0.1), params, tree(seed=1), 3)
    jax.tree.map(
      np.testing.assert_array_equal,
      after['trunk']['layers']['und'],
      params['trunk']['layers']['und'],
    )

  def test_decay_is_on_kernels_only(self):
    params = tree()
    still = jax.tree.map(jnp.zeros_like, params)
    after = run(build(decay=0.5), params, still)
    for side in ('und', 'gen'):
      old, new = (t['trunk']['layers'][side]['q_proj'] for t in (params, after))
      np.testing.assert_allclose(new['kernel'], 0.95 * old['kernel'], rtol=1e-5)
      np.testing.assert_array_equal(new['bias'], old['bias'])
    np.testing.assert_array_equal(after['vit']['pos_embed'], params['vit']['pos_embed'])

  def test_muon_orthogonalises_the_kernels_of_the_trunk_only(self):
    params, grads = tree(), tree(seed=1)
    moved = jax.tree.map(
      lambda a, b: np.asarray(a - b), params, run(build(kind='muon'), params, grads)
    )
    for side in ('und', 'gen'):
      kernel, slope = (t['trunk']['layers'][side]['q_proj']['kernel'][0] for t in (moved, grads))
      values = np.linalg.svd(kernel, compute_uv=False)
      # Newton-Schulz brings singular values near one, not to it.
      self.assertLess(values.max() / values.min(), 2.0)
      self.assertGreater(np.vdot(kernel, slope), 0.0)
    # Adam's first step has one size for all elements, whatever their gradients.
    rest = [
      (t['vit']['pos_embed'], t['trunk']['layers']['gen']['q_proj']['bias']) for t in (moved, grads)
    ]
    step, slope = (np.concatenate(r) for r in rest)
    np.testing.assert_allclose(step, np.abs(step[0]) * np.sign(slope), rtol=1e-5)

  def test_unknown_kind(self):
    with self.assertRaisesRegex(ValueError, "'sgd'"):
      build(kind='sgd')

  def test_clip_by_the_norm_of_all_gradients(self):
    # Adam forgets the size of a constant gradient, so a large one is followed by a small one.
    params = {'kernel': jnp.zeros(2)}
    large, small = ({'kernel': jnp.array(g)} for g in ([300.0, 400.0], [0.3, 0.4]))

    def second_step(clip):
      optimizer = build(clip=clip)
      state = optimizer.init(params)
      _, state = optimizer.update(large, state, params)
      return np.asarray(optimizer.update(small, state, params)[0]['kernel'])

    def expected(first, second):
      m, v = 0.09 * first + 0.1 * second, 0.98 * 0.02 * first**2 + 0.02 * second**2
      return -0.1 * (m / (1 - 0.9**2)) / (np.sqrt(v / (1 - 0.98**2)) + 1e-8)

    g = np.array([0.6, 0.8])
    np.testing.assert_allclose(second_step(1.0), expected(g, g / 2), rtol=1e-5)
    np.testing.assert_allclose(second_step(1e9), expected(500 * g, g / 2), rtol=1e-5)


if __name__ == '__main__':
  absltest.main()
