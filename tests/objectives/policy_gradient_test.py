"""Tests of lvrpo_jax.objectives.policy_gradient: values and gradients against NumPy."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.objectives import policy_gradient


class ClippedTest(parameterized.TestCase):
  @parameterized.product(low=(0.2, 0.1), high=(0.2, 0.28), A=(-1.5, 0.0, 2.0))
  def test_value_and_gradient_against_numpy(self, low, high, A):
    log_ratio = np.linspace(-0.6, 0.6, 40)
    ratio = np.exp(log_ratio)
    with jax.enable_x64(True):
      value = policy_gradient.clipped_surrogate(jnp.asarray(log_ratio), A, low, high)
      grad = jax.grad(lambda x: policy_gradient.clipped_surrogate(x, A, low, high).sum())(
        jnp.asarray(log_ratio)
      )
    expected = [-min(r * A, min(max(r, 1 - low), 1 + high) * A) for r in ratio]
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    # Only a step that has gone far enough in the wanted direction is stopped.
    stopped = (ratio > 1 + high) if A > 0 else (ratio < 1 - low)
    np.testing.assert_allclose(grad, np.where(stopped, 0.0, -A * ratio), rtol=1e-12)

  def test_clip_higher_lets_good_tokens_rise_further(self):
    grad = jax.grad(lambda x, A: policy_gradient.clipped_surrogate(x, A, 0.2, 0.28))
    rise, fall = math.log(1.25), math.log(0.75)
    self.assertNotEqual(float(grad(rise, 1.0)), 0.0)
    self.assertEqual(
      float(jax.grad(lambda x: policy_gradient.clipped_surrogate(x, 1.0, 0.2, 0.2))(rise)), 0.0
    )
    self.assertEqual(float(grad(fall, -1.0)), 0.0)
    self.assertNotEqual(float(grad(fall, 1.0)), 0.0)

  def test_before_any_update_it_is_the_policy_gradient(self):
    A = jnp.array([2.0, -3.0, 0.0])
    value = policy_gradient.clipped_surrogate(jnp.zeros(3), A, 0.2, 0.28)
    grad = jax.grad(lambda x: policy_gradient.clipped_surrogate(x, A, 0.2, 0.28).sum())(
      jnp.zeros(3)
    )
    np.testing.assert_array_equal(value, -A)
    np.testing.assert_array_equal(grad, -A)

  @parameterized.product(log_ratio=(-1e3, -100.0, 100.0, 1e3), advantage=(-1.0, 1.0))
  def test_far_ratios_have_finite_gradients(self, log_ratio, advantage):
    for function in (
      lambda x: policy_gradient.clipped_surrogate(x, advantage, 0.2, 0.28),
      lambda x: policy_gradient.cispo_surrogate(x, x, advantage, 5.0),
    ):
      value, grad = jax.value_and_grad(function)(log_ratio)
      self.assertTrue(np.isfinite(value) and np.isfinite(grad), (value, grad))


if __name__ == '__main__':
  absltest.main()
