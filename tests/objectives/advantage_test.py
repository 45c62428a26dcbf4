"""Tests of group-relative advantages against loops in NumPy, and of their invariances."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.objectives import advantage as advantage_lib


def rewards(values, valid=None):
  """Components from arrays (B, G) by name; everything is valid unless stated."""
  valid = valid or {}
  return {
    name: types.Rewards(jnp.float32(v), jnp.asarray(valid.get(name, np.ones(v.shape, bool))))
    for name, v in values.items()
  }


def oracle(values, valid, weights, method, floor, ddof=0, scope='group', form='max', clip=5.0):
  """Advantages (B, G) by loops in float64; `valid` (B, G) holds for all components."""
  B, G = valid.shape
  total, raw = np.zeros((B, G)), np.zeros((B, G))

  def divided(x, everything):
    if scope == 'none':
      return 1.0
    sample = x if scope == 'group' else everything
    std = sample.std(ddof=ddof) if sample.size > ddof else 0.0
    return {'max': max(std, floor), 'add': std + floor, 'root': np.sqrt(std**2 + floor)}[form]

  for b, (name, weight) in itertools.product(range(B), weights.items()):
    rows = np.flatnonzero(valid[b])
    if not rows.size:
      continue
    x = np.float64(values[name][b][rows])
    scale = 1.0
    if method == 'gdpo':
      scale = divided(x, np.float64(values[name])[valid])
    total[b, rows] += weight * (x - x.mean()) / scale
    raw[b, rows] += weight * x
  for b in range(B):
    rows = np.flatnonzero(valid[b])
    if method == 'sum' and rows.size:
      total[b, rows] /= divided(raw[b, rows], raw[valid])
  if method == 'gdpo' and scope != 'none':
    scope = 'batch'
    total /= divided(None, total[valid])
  return np.clip(total, -clip, clip)


class NormaliseTest(parameterized.TestCase):
  @parameterized.parameters(0, 1)
  def test_statistics_of_valid_samples(self, ddof):
    rng = np.random.default_rng(0)
    x, valid = rng.random((5, 8)), rng.random((5, 8)) < 0.7
    mean, std = advantage_lib.group_statistics(jnp.float32(x), jnp.asarray(valid), ddof)
    self.assertEqual((mean.shape, std.shape), ((5, 1), (5, 1)))
    for b in range(5):
      np.testing.assert_allclose(mean[b, 0], x[b][valid[b]].mean(), rtol=1e-6)
      np.testing.assert_allclose(std[b, 0], x[b][valid[b]].std(ddof=ddof), rtol=1e-5)

  @parameterized.parameters(0, 1)
  def test_groups_above_the_floor_are_whitened(self, ddof):
    x = np.random.default_rng(1).random((4, 8))
    out = advantage_lib.normalise(jnp.float32(x), np.ones((4, 8), bool), 1e-3, ddof)
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=ddof, keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

  def test_bessel_at_eight_samples(self):
    x = jnp.float32(np.random.default_rng(2).random((1, 8)))
    everywhere = np.ones((1, 8), bool)
    ratio = advantage_lib.normalise(x, everywhere, 1e-6, 0) / advantage_lib.normalise(
      x, everywhere, 1e-6, 1
    )
    np.testing.assert_allclose(ratio, 1.069, atol=1e-3)

  @parameterized.parameters((0, 0), (1, 0), (1, 1), (0, 1))
  def test_too_few_valid_samples_give_zero(self, count, ddof):
    valid = np.arange(4)[None] < count
    x = jnp.where(valid, jnp.array([[3.0, 1.0, 4.0, 1.0]]), jnp.nan)
    np.testing.assert_array_equal(advantage_lib.normalise(x, valid, 0.05, ddof), np.zeros((1, 4)))


class CombineTest(parameterized.TestCase):
  weights = {'rule': 1.0, 'cosine': 0.5}

  def values(self, B=4, G=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
      'rule': (rng.random((B, G)) < 0.5).astype(np.float32),
      'cosine': 0.3 + 0.1 * rng.random((B, G)).astype(np.float32),
    }

  @parameterized.product(
    method=('sum', 'gdpo'),
    ddof=(0, 1),
    floor=(1e-4, 0.05),
    scope=('group', 'batch', 'none'),
    form=advantage_lib.FORMS,
  )
  def test_against_loops(self, method, ddof, floor, scope, form):
    values = self.values()
    valid = {
      'rule': np.random.default_rng(3).random((4, 8)) < 0.8,
      'cosine': np.random.default_rng(4).random((4, 8)) < 0.9,
    }
    both = valid['rule'] & valid['cosine']
    out = advantage_lib.combine(
      rewards(values, valid), self.weights, method, floor, ddof, scope, form
    )
    np.testing.assert_array_equal(out.valid_BG, both)
    np.testing.assert_allclose(
      out.value_BG,
      oracle(values, both, self.weights, method, floor, ddof, scope, form),
      rtol=1e-5,
      atol=2e-6,
    )

  def test_unknown_scope(self):
    with self.assertRaisesRegex(ValueError, "'prompt'"):
      advantage_lib.divisor(jnp.ones((2, 2)), jnp.ones((2, 2), bool), 0.1, scope='prompt')

  @parameterized.parameters(0, 1)
  def test_one_component_is_group_normalisation(self, ddof):
    x = self.values()['cosine']
    out = advantage_lib.combine(rewards({'cosine': x}), {'cosine': 3.0}, 'sum', 1e-4, ddof)
    expected = (x - x.mean(1, keepdims=True)) / x.std(1, ddof=ddof, keepdims=True)
    np.testing.assert_allclose(out.value_BG, expected, rtol=1e-4, atol=1e-5)

  @parameterized.parameters('sum', 'gdpo')
  def test_constant_groups_are_zero_and_dead(self, method):
    values = self.values()
    values['rule'][:3] = [[1.0], [0.0], [1.0]]
    values['cosine'][0] = 0.5
    out = advantage_lib.combine(rewards(values), self.weights, method, 0.05)
    np.testing.assert_array_equal(out.value_BG[0], np.zeros(8))
    self.assertTrue(np.all(np.abs(out.value_BG[1:]).sum(1) > 0))
    self.assertAlmostEqual(float(out.dead['rule']), 0.75)
    self.assertAlmostEqual(float(out.dead['cosine']), 0.25)

  @parameterized.product(method=('sum', 'gdpo'), value=(0.7, 0.1, 1 / 3, 100.7), G=(5, 8, 12))
  def test_equal_rewards_that_are_no_float32_are_zero(self, method, value, G):
    # Their mean is off by a rounding, which a small floor would blow up to a common push.
    values = {
      'rule': np.full((2, G), value, np.float32),
      'cosine': np.full((2, G), 0.3, np.float32),
    }
    out = advantage_lib.combine(rewards(values), self.weights, method, 1e-6)
    np.testing.assert_array_equal(out.value_BG, np.zeros((2, G)))
    self.assertEqual({k: float(v) for k, v in out.dead.items()}, {'rule': 1.0, 'cosine': 1.0})

  # The conventions of six codebases: deviation, what is added and how, scope.
  @parameterized.parameters(
    (0, 1e-4, 'add', 'batch'),  # Flow-GRPO and DiffusionNFT
    (1, 1e-4, 'add', 'batch'),  # verl-omni
    (0, 1e-8, 'root', 'group'),
    (1, 1e-8, 'root', 'batch'),  # UniRL
    (1, 1e-8, 'add', 'group'),  # MixGRPO
    (1, 1e-4, 'add', 'group'),  # TRL and CoRL
    (1, 1e-6, 'add', 'group'),
  )  # tunix
  def test_conventions_of_other_codebases(self, ddof, floor, form, scope):
    x = np.random.default_rng(5).random((3, 8))
    out = advantage_lib.combine(
      rewards({'cosine': x}), {'cosine': 1.0}, 'sum', floor, ddof, scope, form
    )
    centred = x - x.mean(1, keepdims=True)
    deviation = x.std(1, ddof=ddof, keepdims=True) if scope == 'group' else x.std(ddof=ddof)
    expected = centred / (np.sqrt(deviation**2 + floor) if form == 'root' else deviation + floor)
    np.testing.assert_allclose(out.value_BG, expected, rtol=0, atol=1e-6)

  def test_unknown_form(self):
    with self.assertRaisesRegex(ValueError, "'plus'.*'max', 'add', 'root'"):
      advantage_lib.divisor(jnp.ones((2, 2)), jnp.ones((2, 2), bool), 0.1, form='plus')

  @parameterized.product(method=('sum', 'gdpo'), bad=(0.0, 1e6, np.nan))
  def test_an_invalid_sample_changes_no_sibling(self, method, bad):
    values, name = self.values(), 'cosine'
    kept = np.delete(np.arange(8), 2)
    without = advantage_lib.combine(
      rewards({k: v[:, kept] for k, v in values.items()}), self.weights, method, 0.05
    )
    valid = np.ones((4, 8), bool)
    valid[:, 2] = False
    values[name][:, 2] = bad
    out = advantage_lib.combine(rewards(values, {name: valid}), self.weights, method, 0.05)
    np.testing.assert_array_equal(out.value_BG[:, 2], np.zeros(4))
    np.testing.assert_array_equal(out.valid_BG, valid)
    np.testing.assert_allclose(out.value_BG[:, kept], without.value_BG, rtol=1e-5, atol=1e-6)
    for component in values:
      np.testing.assert_allclose(out.share[component], without.share[component], rtol=1e-5)

  @parameterized.parameters('sum', 'gdpo')
  def test_permuting_a_group_permutes_its_advantages(self, method):
    values = self.values()
    order = np.random.default_rng(5).permutation(8)
    out = advantage_lib.combine(rewards(values), self.weights, method, 0.05)
    moved = advantage_lib.combine(
      rewards({k: v[:, order] for k, v in values.items()}), self.weights, method, 0.05
    )
    np.testing.assert_allclose(moved.value_BG, out.value_BG[:, order], rtol=1e-5, atol=1e-6)

  def test_sums_never_cross_groups(self):
    values = self.values()
    alone = [
      advantage_lib.combine(
        rewards({k: v[b : b + 1] for k, v in values.items()}), self.weights, 'sum', 0.05
      ).value_BG[0]
      for b in range(4)
    ]
    whole = advantage_lib.combine(rewards(values), self.weights, 'sum', 0.05)
    np.testing.assert_allclose(whole.value_BG, np.stack(alone), rtol=1e-6, atol=1e-7)

  def test_shares_of_orthogonal_components(self):
    # Every pair of levels once: the components are uncorrelated in each group, exactly.
    rule, cosine = np.array(list(itertools.product((0.0, 1.0), (0.45, 0.55)))).T
    values = {'rule': np.tile(rule, (3, 1)), 'cosine': np.tile(cosine, (3, 1))}
    variance = {'rule': 0.25, 'cosine': 0.0025}
    share = {
      m: advantage_lib.combine(rewards(values), self.weights, m, 1e-3).share
      for m in ('sum', 'gdpo')
    }
    added = {k: w**2 * variance[k] for k, w in self.weights.items()}
    for name, weight in self.weights.items():
      self.assertAlmostEqual(float(share['sum'][name]), added[name] / sum(added.values()), places=5)
      self.assertAlmostEqual(float(share['gdpo'][name]), weight**2 / 1.25, places=5)
    # Added up, the component of deviation 0.05 all but vanishes; normalised first, it does not.
    self.assertLess(float(share['sum']['cosine']), 0.003)
    self.assertAlmostEqual(float(share['gdpo']['cosine']), 0.2, places=5)

  def test_shares_of_independent_components(self):
    rng = np.random.default_rng(6)
    values = {
      'rule': (rng.random((8, 2000)) < 0.5).astype(np.float32),
      'cosine': 0.05 * rng.normal(size=(8, 2000)),
    }
    weights = {'rule': 1.0, 'cosine': 5.0}
    share = advantage_lib.combine(rewards(values), weights, 'sum', 1e-3).share
    self.assertAlmostEqual(float(share['rule']), 0.25 / (0.25 + 25 * 0.0025), delta=0.02)

  @parameterized.parameters('sum', 'gdpo')
  def test_shares_add_to_one(self, method):
    values = self.values() | {'third': np.random.default_rng(7).random((4, 8))}
    out = advantage_lib.combine(rewards(values), self.weights | {'third': 0.3}, method, 0.05)
    self.assertAlmostEqual(float(sum(out.share.values())), 1.0, places=5)

  def test_shares_of_nothing_are_zero(self):
    out = advantage_lib.combine(rewards({'rule': np.ones((2, 4))}), {'rule': 1.0}, 'gdpo', 0.05)
    self.assertEqual(float(out.share['rule']), 0.0)

  @parameterized.parameters('sum', 'gdpo')
  def test_the_floor_stops_noise_from_being_blown_up(self, method):
    values = self.values()
    values['rule'][0], values['cosine'][0] = 1.0, 0.3 + 1e-4 * np.arange(8) / 8
    floored, free = (
      advantage_lib.combine(rewards(values), self.weights, method, floor).value_BG
      for floor in (0.05, 1e-9)
    )
    self.assertLess(np.abs(floored[0]).max(), 0.01)
    self.assertGreater(np.abs(free[0]).max(), 0.2)
    self.assertGreater(np.abs(floored[1]).max(), 0.5)

  def test_clip(self):
    values = {'rule': np.eye(1, 64)}
    out = advantage_lib.combine(rewards(values), {'rule': 1.0}, 'sum', 0.01)
    self.assertEqual(float(out.value_BG.max()), 5.0)
    out = advantage_lib.combine(rewards(values), {'rule': 1.0}, 'sum', 0.01, clip=2.0)
    self.assertEqual(float(out.value_BG.max()), 2.0)

  def test_whitened_over_the_batch(self):
    value = advantage_lib.combine(rewards(self.values()), self.weights, 'gdpo', 0.01).value_BG
    np.testing.assert_allclose([value.mean(), value.std()], [0.0, 1.0], atol=1e-5)

  @parameterized.parameters(('gdpo', 'normalize_then_sum'), ('sum', 'sum_then_normalize'))
  def test_names_of_the_papers_are_aliases(self, alias, name):
    one, other = (
      advantage_lib.combine(rewards(self.values()), self.weights, method, 0.05)
      for method in (alias, name)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)

  def test_unknown_method(self):
    with self.assertRaisesRegex(ValueError, "'mean'"):
      advantage_lib.combine(rewards(self.values()), self.weights, 'mean', 0.05)


if __name__ == '__main__':
  absltest.main()
