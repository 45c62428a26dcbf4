"""Tests of lvrpo_jax.diagnostics: a loss whose gradients are known."""

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np
import optax

from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib


def make_params(rng):
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  proj = lambda: {name: {'kernel': normal(2, 3)} for name in ('q_proj', 'o_proj', 'up_proj')}
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
    got = jax.jit(diagnostics.report)(answers, images)
    norm = np.linalg.norm

    def vector(tree, *path):
      """The named part of a gradient as one vector, or only some kernels of it."""
      for key in path[0]:
        tree = tree[key]
      kept = [tree[k]['kernel'] for k in path[1]] if len(path) > 1 else jax.tree.leaves(tree)
      return np.concatenate([np.ravel(x) for x in kept])

    und, gen = ('trunk', 'layers', 'und'), ('trunk', 'layers', 'gen')
    both = jax.tree.map(np.add, answers, images)
    everything = lambda trunk, head: norm(
      np.concatenate([vector(both, trunk), vector(both, (head,))])
    )
    a, b = (vector(tree, und, ('q_proj', 'o_proj')) for tree in (answers, images))
    want = {
      'gradient/understanding_expert': everything(und, 'lm_head'),
      'gradient/generation_expert': everything(gen, 'llm2vae'),
      'gradient/answers_on_shared': norm(a),
      'gradient/images_on_shared': norm(b),
      'gradient/cosine': a @ b / norm(a) / norm(b),
    }
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6, err_msg=name)

  def test_one_modality_alone(self):
    params = make_params(np.random.default_rng(1))
    got = diagnostics.report(jax.tree.map(np.zeros_like, params), params)
    self.assertEqual(
      (float(got['gradient/cosine']), float(got['gradient/answers_on_shared'])), (0.0, 0.0)
    )
    self.assertGreater(float(got['gradient/images_on_shared']), 0.0)


class ProbeTest(absltest.TestCase):
  def test_reads_the_gradients_out_of_the_update(self):
    rng = np.random.default_rng(2)
    params, slopes = make_params(rng), {name: make_params(rng) for name in ('answers', 'images')}
    dot = lambda a, b: sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))

    def sums(params, state, frozen, batch):
      return {
        name: frozen['factors'][name] * dot(params, slope) for name, slope in slopes.items()
      }, {}

    loss = step_lib.Loss(
      lambda batch: dict.fromkeys(slopes, jnp.float32(2)), sums, {'answers': 1.0, 'images': 3.0}
    )
    clip = 4.0  # Below the norms: gradients are clipped before the momentum sees them.
    optimizer = optimizer_lib.build(
      'adamw', optax.constant_schedule(0.1), 0.9, 0.98, 1e-8, 0.0, clip
    )
    step = jax.jit(step_lib.make_step(loss, optimizer), donate_argnums=0)
    frozen = {'factors': {name: np.float32(1) for name in slopes}}
    state = step_lib.init(jax.tree.map(jnp.asarray, params), optimizer)
    for _ in range(2):  # A momentum of the past is taken off.
      state, metrics = step(state, frozen, None)
    self.assertGreater(float(metrics['grad_norm']), clip)
    got = diagnostics.probe(step, state, frozen, None, 0.9, clip)
    want = diagnostics.report(
      jax.tree.map(lambda x: x / 2, slopes['answers']),
      jax.tree.map(lambda x: x * 1.5, slopes['images']),
    )
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    step(state, frozen, None)  # The state was copied, not given away.


if __name__ == '__main__':
  absltest.main()
