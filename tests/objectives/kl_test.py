"""Tests of lvrpo_jax.objectives.kl against NumPy and Monte Carlo."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.objectives import kl

ORACLES = {
  'k1': lambda p, q, old: p - q,
  'k2': lambda p, q, old: (p - q) ** 2 / 2,
  'k3': lambda p, q, old: np.exp(q - p) - (q - p) - 1,
  'k3_ratio': lambda p, q, old: np.exp(p - old) * (np.exp(q - p) - (q - p) - 1),
}


def slopes(function, x, step=1e-6):
  return np.array(
    [(function(x + step * e) - function(x - step * e)) / (2 * step) for e in np.eye(len(x))]
  )


class TextTest(parameterized.TestCase):
  @parameterized.parameters(*kl.TEXT)
  def test_value_and_gradient(self, kind):
    rng = np.random.default_rng(0)
    logp, reference, old = -rng.uniform(0.1, 4, (3, 7))
    with jax.enable_x64(True):

      def run(p):
        return jnp.sum(kl.of_text(kind, p, jnp.asarray(reference), p - old))

      value, grad = jax.value_and_grad(run)(jnp.asarray(logp))

    def oracle(p):
      return ORACLES[kind](p, reference, old).sum()

    np.testing.assert_allclose(value, oracle(logp), rtol=1e-6)
    np.testing.assert_allclose(grad, slopes(oracle, logp), rtol=1e-6, atol=1e-8)

  @parameterized.parameters('k1', 'k3')
  def test_mean_is_the_divergence(self, kind):
    """Over samples of the policy both estimate KL(policy || reference)."""
    rng = np.random.default_rng(1)
    p, q = (x / x.sum() for x in rng.uniform(0.1, 1.0, (2, 6)))
    tokens = rng.choice(6, 200_000, p=p)
    got = kl.of_text(kind, np.log(p)[tokens], np.log(q)[tokens], 0.0)
    np.testing.assert_allclose(np.mean(got), np.sum(p * np.log(p / q)), rtol=0.02)

  @parameterized.product(kind=kl.TEXT, logp=(-100.0, -1e4), sampled=(-100.0, 100.0))
  def test_far_apart_is_finite(self, kind, logp, sampled):
    value, grad = jax.value_and_grad(lambda p: kl.of_text(kind, p, 0.0, p - logp + sampled))(logp)
    self.assertTrue(np.isfinite(value) and np.isfinite(grad), (value, grad))
    if kind == 'k3':
      self.assertGreater(value, 1e8)

  def test_unknown(self):
    with self.assertRaisesRegex(ValueError, "align.text.kl is 'k4'; allowed"):
      kl.of_text('k4', 0.0, 0.0, 0.0)


class StepsTest(absltest.TestCase):
  def test_gaussian_is_the_divergence(self):
    rng = np.random.default_rng(2)
    mean, reference, std = rng.normal(size=(1, 4, 2)), rng.normal(size=(1, 4, 2)), np.array([0.7])
    x = mean + 0.7 * rng.normal(size=(100_000, 4, 2))

    def log(m):
      return -((x - m) ** 2) / (2 * 0.7**2)

    monte_carlo = np.mean(log(mean) - log(reference))  # A mean over values, as all losses here.
    got = kl.of_steps('gaussian', mean, reference, std, np.array([-0.1]))
    np.testing.assert_allclose(got, monte_carlo, rtol=0.02)
    per_time = kl.of_steps('gaussian_per_time', mean, reference, std, np.array([-0.1]))
    # Flow-GRPO's code divides by 2 s^2, where s = std / sqrt(|dt|).
    np.testing.assert_allclose(
      per_time, np.mean((mean - reference) ** 2) / (2 * 0.7**2 / 0.1), rtol=1e-5
    )

  def test_unknown(self):
    with self.assertRaisesRegex(ValueError, "align.image.kl is 'k3'; allowed"):
      kl.of_steps('k3', jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.ones(()), jnp.ones(()))


class AdaptedTest(absltest.TestCase):
  def test_by_hand(self):
    self.assertAlmostEqual(kl.adapted(2.0, 1.1, 1.0, 0.5), 2.0 * 1.05)
    self.assertAlmostEqual(kl.adapted(2.0, 9.0, 1.0, 0.5), 2.0 * 1.1)
    self.assertAlmostEqual(kl.adapted(2.0, 0.0, 1.0, 0.5), 2.0 * 0.9)
    self.assertEqual(kl.adapted(100.0, 9.0, 1.0, 0.5), 100.0)
    self.assertEqual(kl.adapted(0.01, 0.0, 1.0, 0.5), 0.01)

  def test_reaches_its_target(self):
    """A penalty that falls as its factor rises settles where it should be."""
    factor = 1.0
    for _ in range(400):
      factor = kl.adapted(factor, 1.0 / factor, 0.25, 0.5)
    self.assertAlmostEqual(1.0 / factor, 0.25, delta=1e-3)


if __name__ == '__main__':
  absltest.main()
