"""Tests of the text, flow and supervised objectives: values and gradients against NumPy."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special
from scipy import stats as scipy_stats

from lvrpo_jax import flow
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import sft
from lvrpo_jax.objectives import text as text_objectives


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


class ClippedTest(parameterized.TestCase):
  @parameterized.product(low=(0.2, 0.1), high=(0.2, 0.28), A=(-1.5, 0.0, 2.0))
  def test_value_and_gradient_against_numpy(self, low, high, A):
    log_ratio = np.linspace(-0.6, 0.6, 40)
    ratio = np.exp(log_ratio)
    with jax.enable_x64(True):
      value = text_objectives.clipped(jnp.asarray(log_ratio), A, low, high)
      grad = jax.grad(lambda x: text_objectives.clipped(x, A, low, high).sum())(
        jnp.asarray(log_ratio)
      )
    expected = [-min(r * A, min(max(r, 1 - low), 1 + high) * A) for r in ratio]
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    # Only a step that has gone far enough in the wanted direction is stopped.
    stopped = (ratio > 1 + high) if A > 0 else (ratio < 1 - low)
    np.testing.assert_allclose(grad, np.where(stopped, 0.0, -A * ratio), rtol=1e-12)

  def test_clip_higher_lets_good_tokens_rise_further(self):
    grad = jax.grad(lambda x, A: text_objectives.clipped(x, A, 0.2, 0.28))
    rise, fall = math.log(1.25), math.log(0.75)
    self.assertNotEqual(float(grad(rise, 1.0)), 0.0)
    self.assertEqual(
      float(jax.grad(lambda x: text_objectives.clipped(x, 1.0, 0.2, 0.2))(rise)), 0.0
    )
    self.assertEqual(float(grad(fall, -1.0)), 0.0)
    self.assertNotEqual(float(grad(fall, 1.0)), 0.0)

  def test_before_any_update_it_is_the_policy_gradient(self):
    A = jnp.array([2.0, -3.0, 0.0])
    value = text_objectives.clipped(jnp.zeros(3), A, 0.2, 0.28)
    grad = jax.grad(lambda x: text_objectives.clipped(x, A, 0.2, 0.28).sum())(jnp.zeros(3))
    np.testing.assert_array_equal(value, -A)
    np.testing.assert_array_equal(grad, -A)

  @parameterized.product(log_ratio=(-1e3, -100.0, 100.0, 1e3), advantage=(-1.0, 1.0))
  def test_far_ratios_have_finite_gradients(self, log_ratio, advantage):
    for function in (
      lambda x: text_objectives.clipped(x, advantage, 0.2, 0.28),
      lambda x: text_objectives.cispo(x, x, advantage, 5.0),
    ):
      value, grad = jax.value_and_grad(function)(log_ratio)
      self.assertTrue(np.isfinite(value) and np.isfinite(grad), (value, grad))


class SequenceTest(absltest.TestCase):
  def test_one_ratio_an_answer(self):
    mask = np.array([[[1, 1, 1], [1, 0, 0]]], bool)
    log_ratio = np.array([[[0.1, 0.2, 0.3], [-0.4, 9.0, 9.0]]], np.float32)
    np.testing.assert_allclose(
      text_objectives.sequence_log_ratio(log_ratio, mask), [[[0.2], [-0.4]]], rtol=1e-6
    )
    loss, used = text_objectives.loss(
      text_objectives.OBJECTIVES['gspo'],
      jnp.asarray(log_ratio),
      None,
      mask,
      jnp.array([[1.0, -1.0]]),
      0.1,
      0.1,
    )
    np.testing.assert_allclose(used[mask], [0.2, 0.2, 0.2, -0.4], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(loss)[mask], [-1.1, -1.1, -1.1, 0.9], rtol=1e-6)

  def test_a_token_beyond_the_cap_keeps_its_gradient(self):
    logp, old = jnp.array([-1.0, -1.0]), jnp.array([-1.1, -4.0])

    def f(x):
      return text_objectives.loss(
        text_objectives.OBJECTIVES['cispo'],
        (x - old)[None, None],
        x[None, None],
        None,
        jnp.array([[2.0]]),
        0.0,
        4.0,
      )[0].sum()

    np.testing.assert_allclose(jax.grad(f)(logp), [-2 * math.exp(0.1), -2 * 5.0], rtol=1e-5)


class KlTest(parameterized.TestCase):
  p = special.softmax(random(6))
  q = special.softmax(random(6) + 0.5 * random(6, seed=1))

  def exact(self):
    return float((self.p * np.log(self.p / self.q)).sum())

  @parameterized.parameters('k1', 'k3')
  def test_unbiased(self, name):
    with jax.enable_x64(True):
      k = text_objectives.KL[name](jnp.log(self.p), jnp.log(self.q))
      self.assertAlmostEqual(float((self.p * k).sum()), self.exact(), places=12)

  def test_samples_agree_and_k3_has_the_smaller_spread(self):
    tokens = np.random.default_rng(0).choice(6, size=40_000, p=self.p)
    logp, reference = jnp.log(self.p)[tokens], jnp.log(self.q)[tokens]
    k1, k3 = (
      np.asarray(text_objectives.k1(logp, reference)),
      np.asarray(text_objectives.k3(logp, reference)),
    )
    for k in (k1, k3):
      self.assertAlmostEqual(k.mean(), self.exact(), delta=4 * k.std() / 200)
    self.assertLess(k3.std(), k1.std())

  def test_k2_against_numpy_and_close_to_kl_for_close_policies(self):
    with jax.enable_x64(True):
      near = special.softmax(np.log(self.p) + 1e-3 * random(6, seed=2))
      k2 = text_objectives.k2(jnp.log(self.p), jnp.log(near))
      np.testing.assert_allclose(k2, (np.log(self.p) - np.log(near)) ** 2 / 2, rtol=1e-9)
      kl = (self.p * np.log(self.p / near)).sum()
      self.assertAlmostEqual(float((self.p * k2).sum()) / kl, 1.0, delta=1e-2)

  def test_gradients(self):
    logp, reference = random(20), random(20, seed=3)
    d = reference - logp
    expected = {'k1': np.ones(20), 'k2': -d, 'k3': 1 - np.exp(d)}
    with jax.enable_x64(True):
      for name, gradient in expected.items():
        f = lambda x, k=text_objectives.KL[name]: k(x, jnp.asarray(reference)).sum()
        np.testing.assert_allclose(jax.grad(f)(jnp.asarray(logp)), gradient, rtol=1e-10)

  def test_k3_is_never_negative_and_never_overflows(self):
    d = jnp.array([-100.0, -30.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 19.0, 21.0, 30.0, 100.0])
    value, grad = jax.vmap(jax.value_and_grad(lambda x, r: text_objectives.k3(x, r)))(
      jnp.zeros(11), d
    )
    self.assertTrue(np.all(np.isfinite(value)) and np.all(np.isfinite(grad)))
    self.assertTrue(np.all(np.asarray(value) >= -1e-6))
    self.assertAlmostEqual(float(value[0]), 99.0, places=3)
    # The penalty never pushes a token further from the reference.
    self.assertTrue(np.all(np.asarray(grad) * np.asarray(d) <= 0))


class TokenWeightTest(absltest.TestCase):
  mask_BGT = jnp.array([[[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]], bool)
  valid_BG = jnp.array([[True, True, True]])

  def test_token(self):
    np.testing.assert_array_equal(
      text_objectives.token_weights(self.mask_BGT, self.valid_BG, 'token'),
      np.asarray(self.mask_BGT, np.float32),
    )

  def test_sequence(self):
    np.testing.assert_array_equal(
      text_objectives.token_weights(self.mask_BGT, self.valid_BG, 'sequence'),
      [[[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.0] * 4]],
    )

  def test_the_two_aggregations_of_a_loss(self):
    loss = np.array([[[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 99.0, 99.0], [99.0] * 4]])

    def mean(aggregation):
      w = np.asarray(text_objectives.token_weights(self.mask_BGT, self.valid_BG, aggregation))
      return (loss * w).sum() / w.sum()

    self.assertAlmostEqual(mean('token'), 40 / 6)
    self.assertAlmostEqual(mean('sequence'), (2.5 + 15.0) / 2)

  def test_invalid_samples_weigh_nothing(self):
    for aggregation in ('token', 'sequence'):
      w = text_objectives.token_weights(
        self.mask_BGT, jnp.array([[False, True, True]]), aggregation
      )
      self.assertEqual(float(w[0, 0].sum()), 0.0)
      self.assertGreater(float(w[0, 1].sum()), 0.0)

  def test_constant_divides_by_the_longest_answer(self):
    mask, valid = self.mask_BGT, jnp.array([[True, True, False]])
    w = text_objectives.token_weights(mask, valid, 'constant')
    np.testing.assert_array_equal(w, [[[0.25] * 4, [0.25, 0.25, 0.0, 0.0], [0.0] * 4]])
    self.assertEqual(float(text_objectives.total_weight(mask, valid, 'constant')), 2.0)
    self.assertEqual(float(text_objectives.total_weight(mask, valid, 'token')), 6.0)
    self.assertEqual(float(text_objectives.total_weight(mask, valid, 'sequence')), 2.0)

  def test_unknown_aggregation(self):
    with self.assertRaisesRegex(ValueError, "'batch'"):
      text_objectives.token_weights(self.mask_BGT, self.valid_BG, 'batch')


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
      f = lambda v: flow_objectives.nft(v, *map(jnp.asarray, rest), beta, scale)
      np.testing.assert_allclose(f(jnp.asarray(v)), expected, rtol=1e-10)
      np.testing.assert_allclose(
        jax.grad(lambda v: f(v).sum())(jnp.asarray(v)), gradient, rtol=1e-6, atol=1e-8
      )

  def test_good_samples_are_approached_and_bad_ones_left(self):
    v, v_old, x0, x_t, t, _ = self.case(same=True)
    error = lambda v: ((x_t - t[:, None, None] * v - x0) ** 2).mean((1, 2))
    with jax.enable_x64(True):
      for A, sign in ((1.0, -1), (-1.0, 1), (0.0, 0)):
        grad = jax.grad(
          lambda v: flow_objectives.nft(v, v_old, x0, x_t, t, jnp.full(4, A), 1.0, 2.0).sum()
        )(jnp.asarray(v))
        moved = error(v - 1e-3 * np.asarray(grad)) - error(v)
        np.testing.assert_array_equal(np.sign(np.where(np.abs(moved) < 1e-12, 0, moved)), sign)

  def test_saturation(self):
    v, v_old, x0, x_t, t, _ = map(jnp.asarray, self.case())
    at = lambda A: flow_objectives.nft(v, v_old, x0, x_t, t, jnp.full(4, A), 1.0, 2.0)
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
      f = lambda m: flow_objectives.sde(m, *map(jnp.asarray, (old, noise, std, A)), clip)
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
        density = lambda m: scipy_stats.norm(m, std[i]).logpdf(x).mean()
        centre = ((mean[i] - old[i]) ** 2).mean() / (2 * std[i] ** 2)
        ratio = np.exp(std[i] * (density(mean[i]) - density(old[i]) + centre))
        total += max(-A[i] * ratio, -A[i] * np.clip(ratio, 1 - clip, 1 + clip)) / abs(dt)
      return total

    with jax.enable_x64(True):
      fixed = jnp.asarray(old), jnp.asarray(noise), dt, jnp.asarray(A), clip
      f = lambda m: flow_objectives.guard(m, *fixed)[0].sum()
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
        likelihood = lambda u: -((u - (noise[i] - x0[i])) ** 2).mean()
        ratio = np.exp(likelihood(v[i]) - likelihood(old[i]))
        total += max(-A[i] * ratio, -A[i] * np.clip(ratio, 1 - clip, 1 + clip))
      return total

    with jax.enable_x64(True):
      f = lambda u: flow_objectives.awm(u, *map(jnp.asarray, (old, x0, x_t, t, A)), clip)[0].sum()
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
      f = lambda v, r: flow_objectives.velocity_mse(v, r).sum()
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
      f = lambda m: flow_objectives.gaussian_kl(m, jnp.asarray(other), jnp.asarray(std))
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
      f = lambda v: sft.flow_matching(v, jnp.asarray(target))
      total, weight = f(jnp.asarray(v))
      grad = jax.grad(lambda v: f(v)[0])(jnp.asarray(v))
    self.assertEqual(float(weight), 2 * 3 * 4)
    self.assertAlmostEqual(float(total), ((v - target) ** 2).sum() / 5, places=9)
    np.testing.assert_allclose(grad, 2 * (v - target) / 5, rtol=1e-12)


if __name__ == '__main__':
  absltest.main()
