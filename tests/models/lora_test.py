"""Tests of lvrpo_jax.models.lora."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import bagel_7b
from lvrpo_jax.models import lora
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel


def tree(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  return {
    'layers': {
      'und': {'q_proj': {'kernel': draw(3, 6, 4), 'bias': draw(3, 4)}},
      'gen': {'q_proj': {'kernel': draw(3, 6, 4)}},
    },
    'head': {'kernel': draw(6, 8)},
  }


class LoraTest(parameterized.TestCase):
  def test_fresh_adapters_change_nothing(self):
    params = tree()
    adapters = lora.init(params, 2, 'kernel$', jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapters, 3.0), params)

  def test_merge_against_numpy(self):
    params = tree()
    adapters = lora.init(params, 2, r'und/.*kernel$|head', jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.5, adapters)
    merged = lora.merge(params, adapters, 1.5)
    before, after = (np.float64(t['layers']['und']['q_proj']['kernel']) for t in (params, merged))
    a, b = (np.float64(adapters['layers']['und']['q_proj']['kernel'][name]) for name in 'ab')
    for layer in range(3):
      np.testing.assert_allclose(after[layer], before[layer] + 1.5 * a[layer] @ b[layer], rtol=1e-5)
    np.testing.assert_array_equal(
      merged['layers']['gen']['q_proj']['kernel'], params['layers']['gen']['q_proj']['kernel']
    )
    self.assertFalse(np.array_equal(merged['head']['kernel'], params['head']['kernel']))

  def test_every_layer_has_its_own_factors_of_the_documented_deviation(self):
    kernel = jnp.zeros((4, 400, 300))
    a = lora.init({'kernel': kernel}, 8, 'kernel', jax.random.key(1))['kernel']['a']
    self.assertEqual(a.shape, (4, 400, 8))
    np.testing.assert_allclose(np.std(a), 400**-0.5, rtol=0.05)
    self.assertFalse(np.array_equal(a[0], a[1]))

  def test_gradients_reach_the_second_factor_first(self):
    params = tree()
    adapters = lora.init(params, 2, 'head', jax.random.key(0))
    grads = jax.grad(lambda x: jnp.sum(jnp.square(lora.merge(params, x, 1.0)['head']['kernel'])))(
      adapters
    )
    self.assertGreater(np.abs(grads['head']['kernel']['b']).max(), 0)
    np.testing.assert_array_equal(grads['head']['kernel']['a'], 0.0)

  def test_merge_adapters_returns_plain_parameters_unchanged(self):
    params = tree()
    adapters = jax.tree.map(lambda x: x + 0.5, lora.init(params, 2, 'kernel$', jax.random.key(0)))
    self.assertIs(lora.merge_adapters(params), params)
    jax.tree.map(
      np.testing.assert_array_equal,
      lora.merge_adapters(lora.AdaptedParams(params, adapters, 1.5)),
      lora.merge(params, adapters, 1.5),
    )

  def test_adapters_of_a_large_model_are_small(self):
    model = bagel_config.model_config(bagel_7b.get_config().architecture.to_dict())
    params = jax.eval_shape(lambda: bagel.init(model, jax.random.key(0)))
    adapters = jax.eval_shape(
      lambda p: lora.init(p, 32, bagel_7b.get_config().align.lora.target, jax.random.key(0)), params
    )
    added, whole = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapters, params))
    self.assertBetween(added / whole, 0.005, 0.02)

  @parameterized.parameters(
    (2, 'nothing', 'matches no kernel'),
    (2, 'bias', 'matches no kernel'),
    (5, 'q_proj/kernel', 'at most 4, the smaller side of layers/gen'),
  )
  def test_bad_settings(self, rank, target, message):
    with self.assertRaisesRegex(ValueError, message):
      lora.init(tree(), rank, target, jax.random.key(0))


if __name__ == '__main__':
  absltest.main()
