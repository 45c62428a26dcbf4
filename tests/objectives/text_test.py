"""Tests of lvrpo_jax.objectives.text: values and gradients against NumPy and loops."""

import math
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from lvrpo_jax.objectives import policy_gradient
from lvrpo_jax.objectives import text as text_objectives

LOW, HIGH = 0.2, 1.5
B, G, T = 3, 4, 5


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def loss_of(name, log_ratio_BGT, logp_BGT, mask_BGT, advantage_BG, low, high):
  """Loss and clipped log-ratio of every token under an objective."""
  points = text_objectives.TextPoints(
    log_ratio_BGT=log_ratio_BGT, logp_BGT=logp_BGT, mask_BGT=mask_BGT, advantage_BG=advantage_BG
  )
  settings = types.SimpleNamespace(clip_low=low, clip_high=high)
  return text_objectives.OBJECTIVES[name].loss(points, settings)


def case(seed=0):
  """(log p, log p of the rollout, mask, valid, advantages), ratios on both sides of the range."""
  rng = np.random.default_rng(seed)
  old = -rng.uniform(0.5, 3.0, (B, G, T))
  mask = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
  valid = rng.random((B, G)) < 0.8
  return old + rng.normal(size=old.shape), old, mask, valid, rng.normal(size=(B, G))


def oracle(name, logp, old, mask, valid, advantage, held=None):
  """The loss, sample by sample. `held` has CISPO's weights, which carry no gradient."""
  total = weight = 0.0
  for b, g in np.ndindex(B, G):
    if not valid[b, g]:
      continue
    length, A = int(mask[b, g].sum()), advantage[b, g]
    ratio = np.exp(logp[b, g, :length] - old[b, g, :length])
    if name == 'gspo':
      ratio = np.full(length, np.exp(np.mean(logp[b, g, :length] - old[b, g, :length])))
    if name == 'cispo':
      fixed = np.exp((logp if held is None else held)[b, g, :length] - old[b, g, :length])
      losses = -np.minimum(fixed, 1 + HIGH) * A * logp[b, g, :length]
    else:
      losses = -np.minimum(ratio * A, np.clip(ratio, 1 - LOW, 1 + HIGH) * A)
    if name in ('dapo', 'cispo'):  # Every token counts the same.
      total, weight = total + losses.sum(), weight + length
    elif name == 'dr_grpo':  # By the longest answer there may be.
      total, weight = total + losses.sum() / T, weight + 1
    else:  # Every answer counts the same.
      total, weight = total + losses.mean(), weight + 1
  return total / weight


class ObjectivesTest(parameterized.TestCase):
  @parameterized.product(name=tuple(text_objectives.OBJECTIVES), seed=(0, 1))
  def test_value_and_gradient(self, name, seed):
    logp, old, mask, valid, advantage = case(seed)
    objective = text_objectives.OBJECTIVES[name]

    def loss(x):
      values, _ = loss_of(name, jnp.where(mask, x - old, 0.0), x, mask, advantage, LOW, HIGH)
      weights = text_objectives.token_weights(mask, valid, objective.aggregation)
      return jnp.sum(values * weights) / text_objectives.total_weight(
        mask, valid, objective.aggregation
      )

    with jax.enable_x64(True):
      value, slope = jax.jit(jax.value_and_grad(loss))(jnp.asarray(logp))
    self.assertAlmostEqual(float(value), oracle(name, *case(seed)), delta=1e-6)
    want = np.zeros_like(logp)
    for index in np.ndindex(*logp.shape):
      step = np.zeros_like(logp)
      step[index] = 1e-6
      rise = [
        oracle(name, logp + sign * step, old, mask, valid, advantage, logp) for sign in (1, -1)
      ]
      want[index] = (rise[0] - rise[1]) / 2e-6
    np.testing.assert_allclose(slope, want, rtol=1e-6, atol=1e-8)
    self.assertGreater(np.abs(want).max(), 0.01)
    np.testing.assert_array_equal(np.asarray(slope)[~mask | ~valid[..., None]], 0.0)


class SequenceTest(absltest.TestCase):
  def test_one_ratio_an_answer(self):
    mask = np.array([[[1, 1, 1], [1, 0, 0]]], bool)
    log_ratio = np.array([[[0.1, 0.2, 0.3], [-0.4, 9.0, 9.0]]], np.float32)
    np.testing.assert_allclose(
      policy_gradient.sequence_log_ratio(log_ratio, mask), [[[0.2], [-0.4]]], rtol=1e-6
    )
    loss, used = loss_of(
      'gspo', jnp.asarray(log_ratio), None, mask, jnp.array([[1.0, -1.0]]), 0.1, 0.1
    )
    np.testing.assert_allclose(used[mask], [0.2, 0.2, 0.2, -0.4], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(loss)[mask], [-1.1, -1.1, -1.1, 0.9], rtol=1e-6)

  def test_a_token_beyond_the_cap_keeps_its_gradient(self):
    logp, old = jnp.array([-1.0, -1.0]), jnp.array([-1.1, -4.0])

    def f(x):
      return loss_of(
        'cispo', (x - old)[None, None], x[None, None], None, jnp.array([[2.0]]), 0.0, 4.0
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

        def f(x, k=text_objectives.KL[name]):
          return k(x, jnp.asarray(reference)).sum()

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


class FindTest(absltest.TestCase):
  def test_by_name_or_path(self):
    path = 'lvrpo_jax.objectives.text:TextObjective'
    self.assertIs(text_objectives.find('gspo'), text_objectives.OBJECTIVES['gspo'])
    self.assertIs(text_objectives.find(path), text_objectives.TextObjective)
    with self.assertRaisesRegex(ValueError, "config.align.text.objective is 'ppo'.*'dr_grpo'"):
      text_objectives.find('ppo')


if __name__ == '__main__':
  absltest.main()
