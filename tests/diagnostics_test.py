"""Tests of lvrpo_jax.diagnostics: a loss whose gradients are known."""

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import diagnostics
from lvrpo_jax import step as step_lib


def make_params(rng):
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  proj = lambda: {name: {'kernel': normal(2, 3)} for name in ('q_proj', 'o_proj', 'up_proj')}
  return {'trunk': {'layers': {'und': proj(), 'gen': proj()}}, 'lm_head': {'kernel': normal(3)},
          'llm2vae': {'kernel': normal(4)}, 'other': normal(2)}


def linear_loss(slopes, coefficients, weights):
  """Every term is a product with a tree, so that its gradient is that tree."""
  dot = lambda a, b: sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  return step_lib.Loss(
      lambda batch: weights, lambda params, state, frozen, batch: (
          {name: dot(params, slope) for name, slope in slopes.items()}, {}), coefficients)


class GradientsTest(absltest.TestCase):

  def test_by_hand(self):
    rng = np.random.default_rng(0)
    params = make_params(rng)
    names = ('understand', 'understand_penalty', 'generate', 'edit_penalty')
    slopes = {name: make_params(rng) for name in names}
    coefficients = dict(zip(names, (1., .5, 2., .1)))
    weights = dict(zip(names, (np.float32(4), np.float32(2), np.float32(1), np.float32(8))))
    loss = linear_loss(slopes, coefficients, weights)
    gradient = jax.jit(lambda p, a, b: diagnostics.part(loss, p, None, None, None, a, b))
    got = jax.jit(diagnostics.report)(gradient(params, 1., 0.), gradient(params, 0., 1.))

    def vector(picked, *path):
      """The weighted sum of some terms' slopes as one vector of the named parts."""
      total = 0.
      for name in picked:
        parts = slopes[name]
        for key in path[0]:
          parts = parts[key]
        kept = [parts[k]['kernel'] for k in path[1]] if len(path) > 1 else jax.tree.leaves(parts)
        total += coefficients[name] / weights[name] * np.concatenate([np.ravel(x) for x in kept])
      return total
    und, gen = ('trunk', 'layers', 'und'), ('trunk', 'layers', 'gen')
    norm = np.linalg.norm
    everything = lambda trunk, head: norm(np.concatenate([vector(names, trunk),
                                                          vector(names, (head,))]))
    answers = vector(names[:2], und, ('q_proj', 'o_proj'))
    images = vector(names[2:], und, ('q_proj', 'o_proj'))
    want = {'gradient/understanding_expert': everything(und, 'lm_head'),
            'gradient/generation_expert': everything(gen, 'llm2vae'),
            'gradient/answers_on_shared': norm(answers), 'gradient/images_on_shared': norm(images),
            'gradient/cosine': answers @ images / norm(answers) / norm(images)}
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)

  def test_one_task_alone(self):
    rng = np.random.default_rng(1)
    params = make_params(rng)
    loss = linear_loss({'generate': make_params(rng)}, {'generate': 1.}, {'generate': 1.})
    got = diagnostics.report(*(diagnostics.part(loss, params, None, None, None, a, b)
                               for a, b in ((1., 0.), (0., 1.))))
    self.assertEqual((float(got['gradient/cosine']), float(got['gradient/answers_on_shared'])),
                     (0., 0.))
    self.assertGreater(float(got['gradient/images_on_shared']), 0.)


if __name__ == '__main__':
  absltest.main()
