"""Tests of the supervised objectives: values and gradients against NumPy."""

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from lvrpo_jax.objectives import sft


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


class SftTest(absltest.TestCase):
  def test_next_token(self):
    logits, labels = random(2, 3, 5), np.array([[0, 4, 2], [1, 1, 3]])
    mask = np.array([[True, True, False], [True, False, False]])
    logp = special.log_softmax(logits, -1)
    picked = np.take_along_axis(logp, labels[..., None], -1)[..., 0]
    total, weight = jax.jit(sft.next_token)(np.float32(logits), labels, mask)
    self.assertAlmostEqual(float(total), -picked[mask].sum(), places=5)
    self.assertEqual(float(weight), 3.0)
    grad = jax.jit(jax.grad(lambda x: sft.next_token(x, labels, mask)[0]))(np.float32(logits))
    expected = (special.softmax(logits, -1) - np.eye(5)[labels]) * mask[..., None]
    np.testing.assert_allclose(grad, expected, rtol=2e-6, atol=2e-7)

  def test_flow_matching(self):
    v, target = random(2, 3, 4, 5), random(2, 3, 4, 5, seed=1)
    with jax.enable_x64(True):

      def f(v):
        return sft.flow_matching(v, jnp.asarray(target))

      total, weight = f(jnp.asarray(v))
      grad = jax.grad(lambda v: f(v)[0])(jnp.asarray(v))
    self.assertEqual(float(weight), 2 * 3 * 4)
    self.assertAlmostEqual(float(total), ((v - target) ** 2).sum() / 5, places=9)
    np.testing.assert_allclose(grad, 2 * (v - target) / 5, rtol=1e-12)


if __name__ == '__main__':
  absltest.main()
