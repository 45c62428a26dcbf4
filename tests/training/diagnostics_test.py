"""Tests of diagnostics: a loss whose gradients are known."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import base
from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib


def make_params(rng):
  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  def proj():
    return {name: {'kernel': normal(1, 2, 3)} for name in ('q_proj', 'o_proj', 'up_proj')}

  return {
    'trunk': {'layers': {'und': proj(), 'gen': proj()}},
    'lm_head': {'kernel': normal(3)},
    'llm2vae': {'kernel': normal(4)},
    'other': normal(2),
  }


class ReportTest(absltest.TestCase):
  def test_by_hand(self):
    rng = np.random.default_rng(0)
    answers, images = make_params(rng), make_params(rng)
    eps, clip = 0.1, 1.25  # The gradient is clipped, which moves the bound.
    got = jax.jit(diagnostics.report)(answers, images, clip, eps)
    norm = np.linalg.norm

    def vector(tree, *path):
      """The named part of a gradient as one vector, or only some kernels of it."""
      for key in path[0]:
        tree = tree[key]
      kept = [tree[k]['kernel'] for k in path[1]] if len(path) > 1 else jax.tree.leaves(tree)
      return np.concatenate([np.ravel(x) for x in kept])

    und, gen = ('trunk', 'layers', 'und'), ('trunk', 'layers', 'gen')
    both = jax.tree.map(np.add, answers, images)

    def everything(trunk, head):
      return norm(np.concatenate([vector(both, trunk), vector(both, (head,))]))

    bound = eps * norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(both)])) / clip

    def below(trunk, head):
      return np.mean(np.abs(np.concatenate([vector(both, trunk), vector(both, (head,))])) < bound)

    a, b = (vector(tree, und, ('q_proj', 'o_proj')) for tree in (answers, images))
    want = {
      'gradient/understanding_expert': everything(und, 'lm_head'),
      'gradient/generation_expert': everything(gen, 'llm2vae'),
      'gradient/below_eps/understanding_expert': below(und, 'lm_head'),
      'gradient/below_eps/generation_expert': below(gen, 'llm2vae'),
      'gradient/answers_on_shared': norm(a),
      'gradient/images_on_shared': norm(b),
      'gradient/cosine': a @ b / norm(a) / norm(b),
    }
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
      if 'below_eps' in name:
        self.assertBetween(value, 0.1, 0.9)
    self.assertNotEqual(*(want[f'gradient/below_eps/{x}_expert'] for x in diagnostics.EXPERTS))

  def test_one_modality_alone(self):
    params = make_params(np.random.default_rng(1))
    got = diagnostics.report(jax.tree.map(np.zeros_like, params), params, 1.0, 1e-8)
    self.assertEqual(
      (float(got['gradient/cosine']), float(got['gradient/answers_on_shared'])), (0.0, 0.0)
    )
    self.assertGreater(float(got['gradient/images_on_shared']), 0.0)


class BelowEpsTest(parameterized.TestCase):
  def share(self, values, clip_norm=1e9, eps=1e-8):
    """Share of the gradients of a kernel of either expert."""
    layers = {name: {'up_proj': {'kernel': np.float32(values)}} for name in ('und', 'gen')}
    tree = {'trunk': {'layers': layers}}
    got = diagnostics.report(tree, jax.tree.map(np.zeros_like, tree), clip_norm, eps)
    shares = [float(got[f'gradient/below_eps/{x}_expert']) for x in diagnostics.EXPERTS]
    self.assertEqual(shares[0], shares[1])
    return shares[0]

  @parameterized.parameters(
    ([1e-3, -1e-3, 1e-7, -1e-7], 0.0),
    ([1e-3, -1e-3, 1e-9, -1e-7], 0.25),
    ([1e-9, -1e-9, -1e-10, 2e-8], 0.75),
    ([1e-9, -1e-9], 1.0),
  )
  def test_magnitudes(self, values, want):
    self.assertEqual(self.share(values), want)

  def test_the_bound_is_of_clipped_gradients(self):
    values = [30.0, 3e-8, 2e-7, 5e-7]
    self.assertEqual(self.share(values), 0.0)
    # Both experts together have the norm 30 sqrt(2): all are divided by that.
    self.assertEqual(self.share(values, clip_norm=1.0), 0.5)
    self.assertEqual(self.share(values, clip_norm=10.0), 0.25)
    self.assertEqual(self.share(values, clip_norm=1.0, eps=1e-7), 0.75)

  def test_a_gradient_of_zero_is_not_below(self):
    self.assertEqual(self.share([0.0, 0.0, 0.0, 1e-9, 1e-3]), 0.5)
    self.assertEqual(self.share([0.0, 0.0]), 0.0)

  def test_an_expert_without_parameters(self):
    tree = {'trunk': {'layers': {'gen': {'q_proj': {'kernel': {'a': np.float32([1e-9, 1.0])}}}}}}
    got = diagnostics.report(tree, tree, 1e9, 1e-8)
    self.assertEqual(float(got['gradient/below_eps/understanding_expert']), 0.0)
    self.assertEqual(float(got['gradient/below_eps/generation_expert']), 0.5)
    self.assertEqual(float(got['gradient/understanding_expert']), 0.0)
    self.assertEqual(float(got['gradient/cosine']), 0.0)


class ProbeTest(parameterized.TestCase):
  @parameterized.parameters('adamw', 'muon')
  def test_reads_the_gradients_out_of_the_update(self, kind):
    rng = np.random.default_rng(2)
    params, slopes = make_params(rng), {name: make_params(rng) for name in ('answers', 'images')}

    def dot(a, b):
      return sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

    def sums(params, state, frozen, batch):
      return {
        name: frozen['factors'][name] * dot(params, slope) for name, slope in slopes.items()
      }, {}

    loss = step_lib.Loss(
      lambda batch: dict.fromkeys(slopes, jnp.float32(2)), sums, {'answers': 1.0, 'images': 3.0}
    )
    clip = 4.0  # Below the norms: gradients are clipped before the momentum sees them.
    settings = base.optimizer(
      kind=kind,
      schedule='constant',
      learning_rate=0.1,
      warmup=0,
      weight_decay=0.0,
      eps=0.4,
      clip_norm=clip,
    )
    optimizer = optimizer_lib.from_config(settings, 10)
    step = jax.jit(step_lib.make_step(loss, optimizer), donate_argnums=0)
    frozen = {'factors': {name: np.float32(1) for name in slopes}}
    state = step_lib.init(jax.tree.map(jnp.asarray, params), optimizer)
    for _ in range(2):  # A momentum of the past is taken off.
      state, metrics = step(state, frozen, None)
    self.assertGreater(float(metrics['grad_norm']), clip)
    got = diagnostics.probe(step, state, frozen, None, settings)
    want = diagnostics.report(
      jax.tree.map(lambda x: x / 2, slopes['answers']),
      jax.tree.map(lambda x: x * 1.5, slopes['images']),
      clip,
      settings.eps,
    )
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
      if 'below_eps' in name:
        self.assertBetween(float(value), 0.1, 0.9)
    step(state, frozen, None)  # The state was copied, not given away.


if __name__ == '__main__':
  absltest.main()
