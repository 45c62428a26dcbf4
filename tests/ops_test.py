"""Tests of masked reductions, token log-probabilities and draws by key."""

import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from lvrpo_jax import ops


class MaskedTest(parameterized.TestCase):
  def test_sum_and_weight_against_numpy(self):
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(3, 5)), rng.random((3, 5)) < 0.6
    total, weight = ops.masked_sum(jnp.float32(x), jnp.asarray(mask))
    np.testing.assert_allclose(total, x[mask].sum(), rtol=1e-6)
    self.assertEqual(float(weight), mask.sum())
    np.testing.assert_allclose(ops.masked_mean(jnp.float32(x), mask), x[mask].mean(), rtol=1e-6)

  def test_fractional_weights(self):
    total, weight = ops.masked_sum(jnp.array([2.0, 4.0, 8.0]), jnp.array([0.5, 0.25, 0.0]))
    self.assertEqual((float(total), float(weight)), (2.0, 0.75))

  @parameterized.parameters(math.nan, math.inf, -math.inf)
  def test_a_masked_place_adds_nothing_even_where_it_is_not_finite(self, bad):
    x, mask = np.float32([1.0, bad, 3.0]), np.array([True, False, True])
    value, grad = jax.jit(jax.value_and_grad(ops.masked_mean))(x, mask)
    self.assertEqual(float(value), 2.0)
    np.testing.assert_array_equal(grad, [0.5, 0.0, 0.5])

  def test_an_empty_mask_gives_zero_with_zero_gradient(self):
    value, grad = jax.jit(jax.value_and_grad(ops.masked_mean))(np.ones(3), np.zeros(3))
    self.assertEqual(float(value), 0.0)
    np.testing.assert_array_equal(grad, np.zeros(3))

  def test_sums_add_up_over_parts_where_means_do_not(self):
    x, mask = jnp.arange(6.0), jnp.array([1, 1, 1, 1, 0, 1])
    parts = [ops.masked_sum(x[part], mask[part]) for part in (slice(4), slice(4, 6))]
    whole = ops.divide(sum(total for total, _ in parts), sum(weight for _, weight in parts))
    self.assertAlmostEqual(float(whole), (0 + 1 + 2 + 3 + 5) / 5, places=6)


class TokenTest(parameterized.TestCase):
  @parameterized.parameters(1.0, 0.5, 2.5)
  def test_log_probability_and_entropy_against_float64(self, temperature):
    rng = np.random.default_rng(1)
    logits, ids = 4 * rng.normal(size=(2, 3, 7)), rng.integers(0, 7, (2, 3))
    logp = special.log_softmax(logits / temperature, axis=-1)
    np.testing.assert_allclose(
      jax.jit(ops.token_logp)(np.float32(logits), ids, temperature),
      np.take_along_axis(logp, ids[..., None], -1)[..., 0],
      rtol=2e-6,
      atol=2e-6,
    )
    np.testing.assert_allclose(
      jax.jit(ops.token_entropy)(np.float32(logits), temperature),
      -(np.exp(logp) * logp).sum(-1),
      rtol=2e-6,
      atol=2e-6,
    )

  def test_gradient_is_one_hot_minus_softmax(self):
    logits, temperature = np.random.default_rng(2).normal(size=6), 0.7
    grad = jax.jit(jax.grad(ops.token_logp))(np.float32(logits), np.int32(4), temperature)
    expected = (np.eye(6)[4] - special.softmax(logits / temperature)) / temperature
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)

  def test_large_and_low_precision_logits(self):
    logp = ops.token_logp(jnp.array([3e4, 0.0, -3e4], jnp.bfloat16), jnp.array(2))
    self.assertEqual(logp.dtype, jnp.float32)
    self.assertTrue(bool(jnp.isfinite(logp)))
    self.assertAlmostEqual(float(ops.token_logp(jnp.array([3e4, 0.0]), jnp.array(0))), 0.0)

  def test_entropy_of_uniform_and_of_certain_tokens(self):
    self.assertAlmostEqual(float(ops.token_entropy(jnp.zeros(8))), math.log(8), places=6)
    self.assertAlmostEqual(float(ops.token_entropy(jnp.array([200.0, 0.0, 0.0]))), 0.0, places=6)


class DrawTest(absltest.TestCase):
  def test_a_row_depends_on_its_own_key_alone(self):
    key_BG = ops.fold_rows(jax.random.key(0), (3, 4))
    draw = jax.jit(functools.partial(ops.normal_rows, shape=(5,)))
    whole = np.asarray(draw(key_BG))
    self.assertEqual(whole.shape, (3, 4, 5))
    np.testing.assert_array_equal(whole[1:2, 2:], draw(key_BG[1:2, 2:]))
    np.testing.assert_array_equal(whole[2, 3], draw(key_BG[2, 3]))
    self.assertLen(np.unique(whole), 60)

  def test_moments(self):
    key_R = ops.fold_rows(jax.random.key(1), (200,))
    normal = ops.normal_rows(key_R, (50,))
    np.testing.assert_allclose([normal.mean(), normal.std()], [0.0, 1.0], atol=0.03)

  def test_a_folded_key_depends_on_its_index_alone(self):
    data = jax.random.key_data
    key = jax.random.key(3)
    small, flat, large = (ops.fold_rows(key, shape) for shape in ((2, 3), (6,), (9,)))
    np.testing.assert_array_equal(data(small).reshape(6, -1), data(flat))
    np.testing.assert_array_equal(data(large)[:6], data(flat))
    np.testing.assert_array_equal(data(flat)[4], data(jax.random.fold_in(key, 4)))

  def test_fold_each_is_fold_in_of_every_key(self):
    data = jax.random.key_data
    key_BG = ops.fold_rows(jax.random.key(4), (2, 2))
    folded = ops.fold_each(key_BG, 7)
    for index in np.ndindex(2, 2):
      np.testing.assert_array_equal(data(folded[index]), data(jax.random.fold_in(key_BG[index], 7)))
    self.assertFalse(np.array_equal(data(folded), data(ops.fold_each(key_BG, 8))))


class NormTest(absltest.TestCase):
  def test_norm_over_all_leaves_in_float32(self):
    tree = {'a': jnp.array([3.0, 0.0]), 'b': [jnp.full((16,), 1.0, jnp.bfloat16)]}
    norm = ops.global_norm(tree)
    self.assertEqual(norm.dtype, jnp.float32)
    self.assertAlmostEqual(float(norm), 5.0, places=6)
    # A sum in bfloat16 would stop growing at 256.
    self.assertEqual(float(ops.global_norm(jnp.ones(1024, jnp.bfloat16))), 32.0)


if __name__ == '__main__':
  absltest.main()
