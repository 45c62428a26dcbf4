"""Tests of lvrpo_jax.models.layers."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.models import layers


class LayersTest(parameterized.TestCase):
  def test_linear_is_a_matrix_product(self):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    params = layers.Linear(7).init(jax.random.key(0), x)['params']
    params['bias'] = jnp.arange(7.0)
    got = layers.Linear(7).apply({'params': params}, x)
    np.testing.assert_allclose(got, x @ np.asarray(params['kernel']) + np.arange(7), atol=1e-5)

  def test_linear_computes_in_its_dtype(self):
    x = jnp.ones((2, 3), jnp.float32)
    module = layers.Linear(4, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(0), x)['params']
    self.assertEqual(params['kernel'].dtype, jnp.float32)
    self.assertEqual(module.apply({'params': params}, x).dtype, jnp.bfloat16)

  @parameterized.parameters(layers.RMSNorm, layers.LayerNorm)
  def test_norms(self, norm):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 5, 8)) * 3 + 1).astype(np.float32)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    params = {'scale': scale} if norm is layers.RMSNorm else {'scale': scale, 'bias': bias}
    got = norm(1e-3).apply({'params': params}, x)
    centre = 0.0 if norm is layers.RMSNorm else x.mean(-1, keepdims=True)
    want = (x - centre) / np.sqrt(np.mean((x - centre) ** 2, -1, keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(got, want + (0.0 if norm is layers.RMSNorm else bias), atol=1e-5)

  def test_sincos_table(self):
    table = layers.sincos_table(3, 8)
    row, column = 2, 1
    frequency = np.array([10000.0 ** (-k / 2) for k in range(2)])
    want = np.concatenate(
      [f(place * frequency) for place in (column, row) for f in (np.sin, np.cos)]
    )
    np.testing.assert_allclose(table[row * 3 + column], want, atol=1e-6)
    with self.assertRaisesRegex(ValueError, '6.*multiple of 4'):
      layers.sincos_table(3, 6)

  def test_positions(self):
    np.testing.assert_array_equal(layers.grid_positions(2, 3, 5), [0, 1, 2, 5, 6, 7])
    np.testing.assert_array_equal(layers.spread_positions(1, 2, 4), [0, 2])
    for side in range(1, 33):
      for tokens in range(1, side + 1):
        self.assertLen(set(layers.spread_positions(tokens, tokens, side).tolist()), tokens**2)

  def test_time_features(self):
    got = layers.time_features(jnp.array([0.0, 0.5]), 8)
    angle = 0.5 * 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(got[0], [1.0] * 4 + [0.0] * 4, atol=1e-6)
    np.testing.assert_allclose(got[1], np.concatenate([np.cos(angle), np.sin(angle)]), atol=1e-6)


if __name__ == '__main__':
  absltest.main()
