"""Tests of lvrpo_jax.objectives.flow: values and gradients against NumPy."""

import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import stats as scipy_stats

from lvrpo_jax import flow
from lvrpo_jax.objectives import flow as flow_objectives


def finite_difference(f, x, step=1e-6):
  """Gradient of a scalar function of a float64 array by central differences."""
  grad = np.zeros_like(x)
  for index in np.ndindex(*x.shape):
    up, down = x.copy(), x.copy()
    up[index] += step
    down[index] -= step
    grad[index] = (f(up) - f(down)) / (2 * step)
  return grad


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def nft_oracle(v, v_old, x0, x_t, t, A, beta, scale, weights=None):
  """DiffusionNFT by loops: (loss of every row, the weights that carry no gradient)."""
  out, used = [], []
  for i in range(len(v)):
    r = min(max(0.5 + A[i] / (2 * scale), 0.0), 1.0)
    positive = beta * v[i] + (1 - beta) * v_old[i]
    negative = (1 + beta) * v_old[i] - beta * v[i]
    errors = []
    for j, mixed in enumerate((positive, negative)):
      off = x_t[i] - t[i] * mixed - x0[i]
      w = weights[i][j] if weights else max(np.abs(off).mean(), 1e-5)
      errors.append(((off**2).mean() / w, w))
    out.append((r * errors[0][0] + (1 - r) * errors[1][0]) / beta)
    used.append([w for _, w in errors])
  return np.array(out), used


class NftTest(parameterized.TestCase):
  def case(self, same=False):
    R, N, C = 4, 3, 2
    x0, noise = random(R, N, C), random(R, N, C, seed=1)
    t = np.array([0.2, 0.5, 0.8, 0.95])
    v_old = noise - x0 + 0.3 * random(R, N, C, seed=2)
    v = v_old if same else v_old + 0.2 * random(R, N, C, seed=3)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    return v, v_old, x0, x_t, t, np.array([-1.0, 0.3, 2.0, -5.0])

  @parameterized.product(beta=(1.0, 0.1, 0.5), scale=(2.0, 5.0))
  def test_value_and_gradient_against_loops(self, beta, scale):
    v, *rest = self.case()
    expected, weights = nft_oracle(v, *rest, beta, scale)
    gradient = finite_difference(lambda v: nft_oracle(v, *rest, beta, scale, weights)[0].sum(), v)
    with jax.enable_x64(True):

      def f(v):
        return flow_objectives.nft(v, *map(jnp.asarray, rest), beta, scale)

      np.testing.assert_allclose(f(jnp.asarray(v)), expected, rtol=1e-10)
      np.testing.assert_allclose(
        jax.grad(lambda v: f(v).sum())(jnp.asarray(v)), gradient, rtol=1e-6, atol=1e-8
      )

  def test_good_samples_are_approached_and_bad_ones_left(self):
    v, v_old, x0, x_t, t, _ = self.case(same=True)

    def error(v):
      return ((x_t - t[:, None, None] * v - x0) ** 2).mean((1, 2))

    def total(v, A):
      return flow_objectives.nft(v, v_old, x0, x_t, t, A, 1.0, 2.0).sum()

    with jax.enable_x64(True):
      for A, sign in ((1.0, -1), (-1.0, 1), (0.0, 0)):
        grad = jax.grad(total)(jnp.asarray(v), jnp.full(4, A))
        moved = error(v - 1e-3 * np.asarray(grad)) - error(v)
        np.testing.assert_array_equal(np.sign(np.where(np.abs(moved) < 1e-12, 0, moved)), sign)

  def test_saturation(self):
    v, v_old, x0, x_t, t, _ = map(jnp.asarray, self.case())

    def at(A):
      return flow_objectives.nft(v, v_old, x0, x_t, t, jnp.full(4, A), 1.0, 2.0)

    np.testing.assert_array_equal(at(2.0), at(50.0))
    np.testing.assert_array_equal(at(-2.0), at(-50.0))
    self.assertFalse(np.array_equal(at(1.9), at(2.0)))

  def test_the_old_policy_gets_no_gradient(self):
    v, v_old, *rest = map(jnp.asarray, self.case())
    grad = jax.grad(lambda old: flow_objectives.nft(v, old, *rest, 0.5, 2.0).sum())(v_old)
    np.testing.assert_array_equal(grad, np.zeros(grad.shape))

  def test_a_perfect_velocity_is_finite(self):
    x0, noise = random(2, 3, 2), random(2, 3, 2, seed=1)
    v, t = noise - x0, np.array([0.3, 0.6])
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    loss, grad = jax.jit(
      jax.value_and_grad(
        lambda v: flow_objectives.nft(v, v, x0, x_t, t, np.ones(2), 1.0, 2.0).sum()
      )
    )(v)
    self.assertTrue(bool(jnp.isfinite(loss)) and bool(jnp.all(jnp.isfinite(grad))))


class SdeTest(parameterized.TestCase):
  @parameterized.parameters(1e-2, 1e-3)
  def test_is_the_clipped_ratio_of_gaussian_densities(self, clip):
    R, N, C = 6, 4, 2
    noise, old, std = random(R, N, C), random(R, N, C, seed=1), np.linspace(0.1, 0.5, R)
    mean = old + 0.02 * random(R, N, C, seed=2)
    A = np.array([1.0, -1.0, 2.0, -0.5, 0.0, 3.0])
    wide = std[:, None, None]
    x = old + wide * noise

    def log_ratio(mean):
      log = scipy_stats.norm.logpdf
      return (log(x, mean, wide) - log(x, old, wide)).mean((1, 2))

    def loss(mean):
      ratio = np.exp(log_ratio(mean))
      return np.maximum(-A * ratio, -A * np.clip(ratio, 1 - clip, 1 + clip))

    with jax.enable_x64(True):

      def f(m):
        return flow_objectives.sde(m, *map(jnp.asarray, (old, noise, std, A)), clip)

      value, ratio = f(jnp.asarray(mean))
      np.testing.assert_allclose(ratio, log_ratio(mean), rtol=1e-8, atol=1e-13)
      np.testing.assert_allclose(value, loss(mean), rtol=1e-8)
      grad = jax.grad(lambda m: f(m)[0].sum())(jnp.asarray(mean))
    np.testing.assert_allclose(
      grad, finite_difference(lambda m: loss(m).sum(), mean), rtol=1e-6, atol=1e-8
    )

  def test_replay_has_ratio_one(self):
    mean, noise = jnp.float32(random(3, 4, 2)), jnp.float32(random(3, 4, 2, seed=1))
    A = jnp.array([1.0, -2.0, 0.5])
    loss, log_ratio = flow_objectives.sde(mean, mean, noise, jnp.full(3, 0.3), A, 1e-3)
    np.testing.assert_array_equal(log_ratio, np.zeros(3))
    np.testing.assert_array_equal(loss, -A)


class GuardTest(parameterized.TestCase):
  @parameterized.parameters(2e-6, 1e-2)
  def test_is_the_centred_and_scaled_ratio(self, clip):
    old, noise, A = random(4, 3, 2), random(4, 3, 2, seed=1), np.array([1.0, -1.0, 2.0, -0.5])
    mean, std, dt = old + 0.02 * random(4, 3, 2, seed=2), np.array([0.3, 0.05, 0.7, 0.2]), -0.1

    def oracle(mean):
      total = 0.0
      for i in range(4):
        x = old[i] + std[i] * noise[i]

        def density(m, x=x, std=std[i]):
          return scipy_stats.norm(m, std).logpdf(x).mean()

        centre = ((mean[i] - old[i]) ** 2).mean() / (2 * std[i] ** 2)
        ratio = np.exp(std[i] * (density(mean[i]) - density(old[i]) + centre))
        total += max(-A[i] * ratio, -A[i] * np.clip(ratio, 1 - clip, 1 + clip)) / abs(dt)
      return total

    with jax.enable_x64(True):
      fixed = jnp.asarray(old), jnp.asarray(noise), dt, jnp.asarray(A), clip

      def f(m):
        return flow_objectives.guard(m, *fixed)[0].sum()

      value, grad = jax.value_and_grad(f)(jnp.asarray(mean))
    np.testing.assert_allclose(value, oracle(mean), rtol=1e-9)
    np.testing.assert_allclose(grad, finite_difference(oracle, mean), rtol=1e-6, atol=1e-8)

  def test_replay_has_ratio_one(self):
    mean, noise = jnp.float32(random(2, 3, 2)), jnp.float32(random(2, 3, 2, seed=1))
    loss, log_ratio = flow_objectives.guard(mean, mean, noise, -0.25, jnp.array([1.0, -2.0]), 1e-4)
    np.testing.assert_array_equal(log_ratio, 0.0)
    np.testing.assert_array_equal(loss, [-4.0, 8.0])


class AwmTest(parameterized.TestCase):
  @parameterized.parameters(1e-4, 0.5)
  def test_value_and_gradient_against_loops(self, clip):
    x0, noise, t = random(4, 3, 2), random(4, 3, 2, seed=1), np.array([0.2, 0.5, 0.9, 1.0])
    x_t = (1 - t)[:, None, None] * x0 + t[:, None, None] * noise
    old, A = random(4, 3, 2, seed=2), np.array([1.0, -1.0, 2.0, -0.5])
    v = old + 0.03 * random(4, 3, 2, seed=3)

    def oracle(v):
      total = 0.0
      for i in range(4):

        def likelihood(u, target=noise[i] - x0[i]):
          return -((u - target) ** 2).mean()

        ratio = np.exp(likelihood(v[i]) - likelihood(old[i]))
        total += max(-A[i] * ratio, -A[i] * np.clip(ratio, 1 - clip, 1 + clip))
      return total

    with jax.enable_x64(True):

      def f(u):
        return flow_objectives.awm(u, *map(jnp.asarray, (old, x0, x_t, t, A)), clip)[0].sum()

      value, grad = jax.value_and_grad(f)(jnp.asarray(v))
    np.testing.assert_allclose(value, oracle(v), rtol=1e-9)
    np.testing.assert_allclose(grad, finite_difference(oracle, v), rtol=1e-6, atol=1e-8)

  def test_first_update_is_weighted_flow_matching(self):
    x0, noise, v = random(1, 3, 2), random(1, 3, 2, seed=1), random(1, 3, 2, seed=2)
    x_t, A = 0.5 * x0 + 0.5 * noise, 1.5
    with jax.enable_x64(True):
      arrays = [jnp.asarray(x) for x in (v, x0, x_t, np.array([0.5]), np.array([A]))]
      grad = jax.grad(lambda u: flow_objectives.awm(u, *arrays, 0.1)[0].sum())(arrays[0])
    np.testing.assert_allclose(grad, A * 2 * (v - (noise - x0)) / 6, rtol=1e-9)


class PenaltyTest(absltest.TestCase):
  def test_velocity_mse(self):
    v, reference = random(2, 3, 4), random(2, 3, 4, seed=1)
    with jax.enable_x64(True):
      np.testing.assert_allclose(
        flow_objectives.velocity_mse(jnp.asarray(v), jnp.asarray(reference)),
        ((v - reference) ** 2).mean((1, 2)),
        rtol=1e-12,
      )

      def f(v, r):
        return flow_objectives.velocity_mse(v, r).sum()

      mine, theirs = jax.grad(f, (0, 1))(jnp.asarray(v), jnp.asarray(reference))
    np.testing.assert_allclose(mine, 2 * (v - reference) / 12, rtol=1e-12)
    np.testing.assert_array_equal(theirs, np.zeros(v.shape))

  def test_gaussian_kl_against_monte_carlo(self):
    # Two velocities at one step of the sampler: the deviation is that of the whole step.
    x, v, w = random(16, 4), random(16, 4, seed=1), random(16, 4, seed=2)
    steps = [
      flow.sde_step(x, u, jnp.float32(0.7), jnp.float32(0.5), jnp.float32(0.9), 0.7) for u in (v, w)
    ]
    mean, other = (np.asarray(s.mean, np.float64) for s in steps)
    std = float(steps[0].std)
    draws = mean + std * random(20_000, 16, 4, seed=3)
    log = scipy_stats.norm.logpdf
    sampled = (log(draws, mean, std) - log(draws, other, std)).mean()
    kl = float(flow_objectives.gaussian_kl(steps[0].mean, steps[1].mean, steps[0].std))
    self.assertAlmostEqual(kl / sampled, 1.0, delta=0.02)

  def test_gaussian_kl_value_and_gradient(self):
    mean, other, std = random(2, 3, 4), random(2, 3, 4, seed=1), np.array([0.1, 0.4])
    with jax.enable_x64(True):

      def f(m):
        return flow_objectives.gaussian_kl(m, jnp.asarray(other), jnp.asarray(std))

      value, grad = f(mean), jax.grad(lambda m: f(m).sum())(jnp.asarray(mean))
    np.testing.assert_allclose(value, ((mean - other) ** 2).mean((1, 2)) / (2 * std**2), rtol=1e-12)
    np.testing.assert_allclose(grad, (mean - other) / (12 * std[:, None, None] ** 2), rtol=1e-12)


class OldPolicyTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 0, 0.0, 0.0, 0.0),
    (500, 0, 0.0, 0.0, 0.0),  # always a copy
    (0, 0, 0.001, 0.5, 0.0),
    (100, 0, 0.001, 0.5, 0.1),
    (900, 0, 0.001, 0.5, 0.5),
    (74, 75, 0.0075, 0.999, 0.0),
    (75, 75, 0.0075, 0.999, 0.0),
    (76, 75, 0.0075, 0.999, 0.0075),
    (1000, 75, 0.0075, 0.999, 0.999),
  )
  def test_schedule(self, iteration, flat, rise, hold, expected):
    self.assertAlmostEqual(flow_objectives.old_policy_decay(iteration, flat, rise, hold), expected)


class RegistryTest(parameterized.TestCase):
  def test_kinds(self):
    coupled = {name for name, found in flow_objectives.OBJECTIVES.items() if found.coupled}
    self.assertEqual(coupled, {'flow_grpo', 'flow_cps', 'grpo_guard', 'grpo_guard_plain'})
    self.assertEqual(set(flow_objectives.OBJECTIVES) - coupled, {'diffusion_nft', 'awm'})
    samplers = {name: found.sampler_policy for name, found in flow_objectives.OBJECTIVES.items()}
    self.assertEqual(samplers.pop('diffusion_nft'), 'old')
    self.assertEqual(set(samplers.values()), {'current'})

  def test_old_policies(self):
    settings = types.SimpleNamespace(
      old_policy_flat=75, old_policy_rise=0.0075, old_policy_max_decay=0.999
    )
    decays = {
      name: [found.old_decay(settings, iteration) for iteration in (75, 76, 1000)]
      for name, found in flow_objectives.OBJECTIVES.items()
      if not found.coupled
    }
    self.assertEqual(decays, {'diffusion_nft': [0.0, 0.0075, 0.999], 'awm': [0.0] * 3})

  def test_find(self):
    path = 'lvrpo_jax.objectives.flow:FlowObjective'
    self.assertIs(flow_objectives.find('awm'), flow_objectives.OBJECTIVES['awm'])
    self.assertIs(flow_objectives.find(path), flow_objectives.FlowObjective)
    with self.assertRaisesRegex(ValueError, "config.align.image.objective is 'sgd'.*'flow_grpo'"):
      flow_objectives.find('sgd')


if __name__ == '__main__':
  absltest.main()
