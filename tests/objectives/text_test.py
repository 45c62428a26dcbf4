"""Text objectives of whole batches in float64: values and gradients against loops."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.objectives import text as text_objectives

LOW, HIGH = 0.2, 1.5
B, G, T = 3, 4, 5


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
      values, _ = text_objectives.loss(
        objective, jnp.where(mask, x - old, 0.0), x, mask, advantage, LOW, HIGH
      )
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


if __name__ == '__main__':
  absltest.main()
