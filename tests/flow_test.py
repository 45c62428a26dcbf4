"""Tests of the rectified-flow mathematics against NumPy and against exact Gaussians."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import stats as scipy_stats

from lvrpo_jax import flow

MEAN, DEVIATION = 1.5, 0.5
"""Mean and deviation of one-dimensional Gaussian data, whose velocity is known."""


def exact_moments(t):
  """Mean and variance of `x_t = (1 - t) x_0 + t noise` for the Gaussian data."""
  return (1 - t) * MEAN, ((1 - t) * DEVIATION) ** 2 + t**2


def exact_velocity(x, t):
  """`E[noise - x_0 | x_t = x]` for the Gaussian data."""
  mean, variance = exact_moments(t)
  return (t - (1 - t) * DEVIATION**2) / variance * (x - mean) - MEAN


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


class TimeTest(parameterized.TestCase):
  @parameterized.parameters((2, 1.0), (11, 2.2), (15, 3.0), (50, 0.5))
  def test_grid(self, points, shift):
    grid = flow.time_grid(points, shift)
    self.assertEqual(grid.shape, (points,))
    self.assertLen(grid[1:], points - 1)
    self.assertEqual(float(grid[-1]), 0.0)
    self.assertTrue(np.all(np.diff(grid) < 0))
    u = np.linspace(1, 0, points)
    np.testing.assert_allclose(grid, shift * u / (1 + (shift - 1) * u), rtol=1e-6)

  def test_every_shift_starts_at_noise(self):
    for shift in np.random.default_rng(0).uniform(0.1, 8, 200):
      grid = flow.time_grid(5, float(shift))
      self.assertEqual(float(grid[0]), 1.0)

  @parameterized.parameters(0.3, 1.0, 2.2, 5.0)
  def test_shift_adds_its_logarithm_to_the_logit(self, shift):
    z = random(50)
    with jax.enable_x64(True):
      shifted = flow.shift_time(jax.nn.sigmoid(jnp.asarray(z)), shift)
      np.testing.assert_allclose(shifted, 1 / (1 + np.exp(-z - math.log(shift))), rtol=1e-12)
      np.testing.assert_array_equal(flow.logit_normal_time(jnp.asarray(z), shift), shifted)

  def test_minus_infinity_is_a_clean_latent(self):
    self.assertEqual(float(flow.logit_normal_time(jnp.array(-jnp.inf), 2.2)), 0.0)
    self.assertEqual(float(flow.logit_normal_time(jnp.array(jnp.inf), 2.2)), 1.0)

  def test_target_is_the_derivative_of_the_path(self):
    x0, noise, t = (jnp.float32(random(4, seed=i)) for i in range(3))
    value, slope = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (t,), (jnp.ones(4),))
    np.testing.assert_allclose(value, (1 - t) * x0 + t * noise, rtol=1e-6)
    np.testing.assert_allclose(slope, flow.velocity_target(x0, noise), rtol=1e-6)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, 0.0), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, 1.0), noise)


class StepTest(parameterized.TestCase):
  def test_straight_paths_are_walked_exactly(self):
    x0, noise = random(6), random(6, seed=1)
    x = jnp.float32(noise)
    grid = flow.time_grid(8, 3.0)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
      x = flow.ode_step(x, jnp.float32(noise - x0), t, t_next)
    np.testing.assert_allclose(x, x0, rtol=1e-5, atol=1e-5)

  @parameterized.product(sampler=('sde', 'cps', 'dance'), t=(1.0, 0.6, 0.2))
  def test_without_noise_every_sampler_is_the_euler_step(self, sampler, t):
    with jax.enable_x64(True):
      x, v = jnp.asarray(random(5)), jnp.asarray(random(5, seed=1))
      step = flow.STEPS[sampler](x, v, jnp.float64(t), jnp.float64(0.1), jnp.float64(0.9), 0.0)
      np.testing.assert_allclose(step.mean, flow.ode_step(x, v, t, 0.1), rtol=1e-12)
      self.assertEqual(float(step.std), 0.0)

  @parameterized.parameters((1.0, 0.8), (0.8, 0.5), (0.3, 0.0))
  def test_sde_against_the_published_formula(self, t, t_next):
    x, v, a, first = random(5), random(5, seed=1), 0.7, 0.8
    s = a * math.sqrt(t / (1 - (first if t == 1 else t)))
    dt = t_next - t
    mean = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    with jax.enable_x64(True):
      step = flow.sde_step(
        jnp.asarray(x), jnp.asarray(v), jnp.float64(t), jnp.float64(t_next), jnp.float64(first), a
      )
      np.testing.assert_allclose(step.mean, mean, rtol=1e-12)
      np.testing.assert_allclose(step.std, s * math.sqrt(-dt), rtol=1e-12)

  @parameterized.parameters((1.0, 0.8), (0.8, 0.5), (0.3, 0.0))
  def test_dance_against_the_published_formula(self, t, t_next):
    x, v, eta, dt = random(5), random(5, seed=1), 0.3, t_next - t
    x0 = x - t * v
    score = -(x - (1 - t) * x0) / t**2
    with jax.enable_x64(True):
      step = flow.dance_step(
        jnp.asarray(x), jnp.asarray(v), jnp.float64(t), jnp.float64(t_next), jnp.float64(0.8), eta
      )
      np.testing.assert_allclose(step.mean, x + v * dt - 0.5 * eta**2 * score * dt, rtol=1e-12)
      np.testing.assert_allclose(step.std, eta * math.sqrt(-dt), rtol=1e-12)

  def test_scale_of_ten_steps(self):
    # Published for shift 3 and a = 0.7: 0.70, 0.74, ..., and 0.20 at the last step.
    grid = flow.time_grid(11, 3.0)
    std = [
      float(flow.sde_step(jnp.zeros(()), jnp.zeros(()), *pair, grid[1], 0.7).std)
      for pair in zip(grid[:-1], grid[1:], strict=True)
    ]
    np.testing.assert_allclose([std[0], std[1], std[-1]], [0.70, 0.74, 0.20], atol=0.006)

  def test_sde_keeps_the_marginals_of_the_flow(self):
    grid, eta = flow.time_grid(201, 1.0), 0.7

    def step(carry, times):
      x, key = carry
      t, t_next = times
      out = flow.sde_step(x, exact_velocity(x, t), t, t_next, grid[1], eta)
      return (
        out.mean + out.std * jax.random.normal(jax.random.fold_in(key, 0), x.shape),
        jax.random.fold_in(key, 1),
      ), x.mean()

    key = jax.random.key(0)
    # With antithetic rows, the mean has no sampling error of the start.
    half = jax.random.normal(key, (8_000,))
    walk = jax.jit(lambda x: jax.lax.scan(step, (x, key), (grid[:-1], grid[1:]))[0][0])
    x = np.asarray(walk(jnp.concatenate([half, -half])))
    self.assertAlmostEqual(x.mean(), MEAN, delta=0.02 * MEAN)
    self.assertAlmostEqual(x.std(), DEVIATION, delta=0.02 * DEVIATION)

  def test_sde_marginals_without_sampling_error(self):
    # Steps are affine in x here, so mean and variance of the walk follow in closed form. It starts
    # below t = 1, where the published step has no marginals to keep.
    step = jax.jit(
      lambda t, t_next: flow.sde_step(
        jnp.array([0.0, 1.0]), exact_velocity(jnp.array([0.0, 1.0]), t), t, t_next, 0.0, 0.7
      )
    )

    def walk(steps):
      times = np.linspace(0.8, 0.05, steps + 1)
      mean, variance = exact_moments(times[0])
      for t, t_next in zip(times[:-1], times[1:], strict=True):
        (low, high), std = jax.device_get(step(t, t_next))
        mean, variance = low + (high - low) * mean, (high - low) ** 2 * variance + std**2
      wanted = exact_moments(times[-1])
      return abs(mean / wanted[0] - 1), abs(variance / wanted[1] - 1)

    with jax.enable_x64(True):
      coarse, fine = walk(50), walk(200)
    self.assertLess(max(coarse[0], fine[0]), 1e-9)
    self.assertLess(fine[1], 0.3 * coarse[1])
    self.assertLess(fine[1], 0.01)

  def test_cps_keeps_the_coefficients(self):
    # With x_0 and noise known, every step lands on the path: the noise terms add up to t_next.
    x0, noise, t, t_next, eta = random(5), random(5, seed=1), 0.7, 0.4, 0.8
    with jax.enable_x64(True):
      x = flow.interpolate(jnp.asarray(x0), jnp.asarray(noise), t)
      step = flow.cps_step(
        x, jnp.asarray(noise - x0), jnp.float64(t), jnp.float64(t_next), jnp.float64(0.9), eta
      )
      std = t_next * math.sin(eta * math.pi / 2)
      np.testing.assert_allclose(step.std, std, rtol=1e-12)
      np.testing.assert_allclose(
        step.mean, (1 - t_next) * x0 + math.sqrt(t_next**2 - std**2) * noise, rtol=1e-12
      )
      kept = (step.mean - (1 - t_next) * x0) / noise
      np.testing.assert_allclose(kept**2 + step.std**2, t_next**2, rtol=1e-12)

  def test_cps_ends_without_noise(self):
    x, v = jnp.float32(random(5)), jnp.float32(random(5, seed=1))
    step = flow.cps_step(x, v, jnp.float32(0.2), jnp.float32(0.0), jnp.float32(0.9), 0.8)
    self.assertEqual(float(step.std), 0.0)
    np.testing.assert_allclose(step.mean, x - 0.2 * v, rtol=1e-6)


class LogRatioTest(parameterized.TestCase):
  std, d = 0.05, 1e-5

  def case(self, dtype):
    old = random(2, 32, 16, seed=1).astype(dtype)
    noise = random(2, 32, 16).astype(dtype)
    new = (old + self.d * random(2, 32, 16, seed=2)).astype(dtype)
    return noise, new, old, np.array([self.std, 2 * self.std], dtype)

  def density_difference(self, noise, new, old, std):
    noise, new, old, std = (np.float64(x) for x in (noise, new, old, std))
    x, wide = old + std[:, None, None] * noise, std[:, None, None]
    log = scipy_stats.norm.logpdf
    return (log(x, new, wide) - log(x, old, wide)).mean((1, 2))

  def test_equals_the_difference_of_two_log_densities(self):
    case = self.case(np.float64)
    with jax.enable_x64(True):
      ratio = flow.log_ratio(*map(jnp.asarray, case), axes=(-2, -1))
    np.testing.assert_allclose(ratio, self.density_difference(*case), rtol=1e-8, atol=1e-12)

  def test_in_float32_it_beats_the_textbook_form(self):
    case = self.case(np.float32)
    expected = self.density_difference(*case)
    ratio = np.asarray(flow.log_ratio(*map(jnp.asarray, case), axes=(-2, -1)))
    error = np.abs(ratio - expected).max()
    noise, new, old, std = map(jnp.asarray, case)
    wide = std[:, None, None]
    x = old + wide * noise

    def density(mean):
      return jnp.mean(-jnp.square((x - mean) / wide) / 2 - jnp.log(wide), (1, 2))

    textbook = np.abs(np.asarray(density(new) - density(old)) - expected).max()
    self.assertLess(error, 1e-8)
    self.assertGreater(textbook, 10 * error)

  def test_equal_means_give_exactly_zero(self):
    noise, _, old, std = self.case(np.float32)
    np.testing.assert_array_equal(flow.log_ratio(noise, old, old, std, (-2, -1)), [0.0, 0.0])

  def test_gradient(self):
    noise, new, old, std = self.case(np.float64)
    with jax.enable_x64(True):
      grad = jax.grad(lambda m: flow.log_ratio(noise, m, old, std, (-2, -1)).sum())(new)
    wide = std[:, None, None]
    np.testing.assert_allclose(grad, (noise / wide - (new - old) / wide**2) / (32 * 16), rtol=1e-6)


class GuideTest(parameterized.TestCase):
  def branches(self, spread=1.0):
    return [random(6, 4, seed=i) * (1 if i == 0 else spread) for i in range(3)]

  def oracle(self, v, v_text, v_image, text, image, renorm, floor):
    if text <= 1:
      return v

    def norm(y):
      return np.sqrt((y**2).sum() if renorm == 'global' else (y**2).sum(-1, keepdims=True))

    y = v_text + text * (v - v_text)
    if renorm == 'text_channel':
      y = y * np.clip(norm(v) / (norm(y) + 1e-8), floor, 1)
      return v_image + image * (y - v_image) if image > 1 else y
    z = v_image + image * (y - v_image) if image > 1 else y
    return z * np.clip(norm(v) / (norm(z) + 1e-8), floor, 1)

  @parameterized.product(
    renorm=('global', 'channel', 'text_channel'),
    text=(1.0, 4.0),
    image=(1.0, 1.5),
    floor=(0.0, 0.6, 1.0),
  )
  def test_against_numpy(self, renorm, text, image, floor):
    v = self.branches()
    with jax.enable_x64(True):
      out = flow.guide(*map(jnp.asarray, v), text, image, renorm, floor)
    np.testing.assert_allclose(out, self.oracle(*v, text, image, renorm, floor), rtol=1e-10)

  def test_plain_guidance(self):
    v, empty, _ = self.branches()
    with jax.enable_x64(True):
      out = flow.classifier_free(jnp.asarray(v), jnp.asarray(empty), 4.0)
    # Ho & Salimans' w is 3: (1 + w) conditional - w unconditional.
    np.testing.assert_allclose(out, 4.0 * v - 3.0 * empty, rtol=1e-10)
    np.testing.assert_array_equal(flow.classifier_free(v, empty, 0.0), empty)

  @parameterized.parameters('global', 'channel', 'text_channel')
  def test_a_text_scale_of_one_or_less_leaves_the_velocity(self, renorm):
    v = [jnp.float32(x) for x in self.branches()]
    for scale in (1.0, 0.5):
      np.testing.assert_array_equal(flow.guide(*v, scale, 3.0, renorm, 0.0), v[0])

  @parameterized.parameters('global', 'channel', 'text_channel')
  def test_a_floor_of_one_is_plain_guidance(self, renorm):
    v, v_text, v_image = (jnp.float32(x) for x in self.branches())
    plain = v_image + 2.0 * (v_text + 4.0 * (v - v_text) - v_image)
    np.testing.assert_allclose(
      flow.guide(v, v_text, v_image, 4.0, 2.0, renorm, 1.0), plain, rtol=1e-5, atol=1e-5
    )

  @parameterized.parameters('global', 'channel', 'text_channel')
  def test_the_factor_never_exceeds_one(self, renorm):
    v = jnp.float32(self.branches()[0])
    # Guidance that halves the velocity is not scaled up again.
    np.testing.assert_allclose(flow.guide(v, 1.5 * v, v, 2.0, 1.0, renorm, 0.0), 0.5 * v, rtol=1e-5)
    # Guidance that lengthens it is scaled down to its length.
    longer = flow.guide(v, jnp.float32(random(6, 4, seed=5)), v, 8.0, 1.0, renorm, 0.0)
    axes = (0, 1) if renorm == 'global' else (1,)
    size, limit = (np.sqrt(np.square(np.asarray(y)).sum(axes)) for y in (longer, v))
    self.assertTrue(np.all(size <= limit * (1 + 1e-5)))

  def test_unknown_renorm(self):
    v = jnp.ones((2, 2))
    with self.assertRaisesRegex(ValueError, "renorm is 'none'"):
      flow.guide(v, v, v, 2.0, 1.0, 'none', 0.0)


if __name__ == '__main__':
  absltest.main()
