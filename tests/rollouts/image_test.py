"""Tests of lvrpo_jax.rollouts.image, and of the steps that are cut out of trajectories."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import replay as replay_lib
from lvrpo_jax.rollouts import schedule as schedule_lib

SHAPE = (4, 3)
GRID = flow.time_grid(7, 2.2)
ETA = schedule_lib.noise_levels(0.7, 6, 0.3, 1.0, GRID)


def keys(*shape, seed=0):
  return ops.fold_rows(jax.random.key(seed), shape)


def velocity(x, time):
  """A cheap non-linear velocity that mixes tokens and depends on time."""
  return jnp.sin(2.0 * x + time[..., None, None]) + 0.3 * jnp.mean(x, axis=-2, keepdims=True)


class ImageTest(parameterized.TestCase):
  def rollout(self, key_BG, eta=ETA, sampler='sde'):
    return jax.jit(lambda k: image_rollout.sample_sde(velocity, k, SHAPE, GRID, eta, sampler))(
      key_BG
    )

  def test_without_noise_it_is_the_ode(self):
    for sampler in flow.STEPS:
      out = self.rollout(keys(2, 3), jnp.zeros(6), sampler)
      want = image_rollout.sample_ode(velocity, keys(2, 3), SHAPE, GRID)
      np.testing.assert_allclose(out.latents_BGNC, want, atol=1e-5)
      np.testing.assert_array_equal(out.std_T, 0.0)

  def test_ode_by_hand(self):
    x = np.asarray(image_rollout.initial_noise(keys(2, 3), SHAPE))
    for t, t_next in zip(GRID[:-1], GRID[1:]):
      x = x + np.asarray(velocity(x, jnp.full((2, 3), t))) * (float(t_next) - float(t))
    np.testing.assert_allclose(
      image_rollout.sample_ode(velocity, keys(2, 3), SHAPE, GRID), x, atol=1e-5
    )

  @parameterized.parameters(*flow.STEPS)
  def test_trajectory_hangs_together(self, sampler):
    out = self.rollout(keys(2, 3), sampler=sampler)
    wide = np.asarray(out.std_T)[:, None, None, None, None]
    after = np.asarray(out.mean_TBGNC) + wide * np.asarray(out.noise_TBGNC)
    np.testing.assert_allclose(out.x_TBGNC[1:], after[:-1], atol=1e-6)
    np.testing.assert_allclose(out.latents_BGNC, after[-1], atol=1e-6)
    np.testing.assert_array_equal(out.x_TBGNC[0], image_rollout.initial_noise(keys(2, 3), SHAPE))
    np.testing.assert_array_equal(np.asarray(out.std_T) > 0, np.asarray(ETA) > 0)
    np.testing.assert_allclose(np.append(out.time_T, 0.0), GRID)
    np.testing.assert_allclose(np.append(1.0, out.next_time_T), GRID)

  @parameterized.parameters(*flow.STEPS)
  def test_replay_is_exact(self, sampler):
    out = self.rollout(keys(2, 3), sampler=sampler)
    steps = np.array([1, 2])
    cut = replay_lib.transitions(out, steps, GRID, ETA)
    np.testing.assert_array_equal(cut.x_BKGNC[:, 1], out.x_TBGNC[2])
    np.testing.assert_array_equal(cut.x_BKGNC[:, 0], out.x_TBGNC[1])
    np.testing.assert_array_equal(cut.time_BKG[0].T, [np.asarray(out.time_T)[steps]] * 3)
    replay = jax.jit(
      lambda s: replay_lib.transition(sampler, velocity(s.x_BKGNC, s.time_BKG), s).mean
    )
    # One rounding of float32 apart: rollout and replay are separate programs.
    np.testing.assert_allclose(replay(cut), cut.mean_BKGNC, atol=1e-6, rtol=1e-6)

  @parameterized.parameters(*flow.STEPS)
  def test_last_step_is_free_of_noise(self, sampler):
    eta = schedule_lib.noise_levels(0.7, 6, 0.0, 1.0, GRID)
    np.testing.assert_array_equal(np.asarray(eta) > 0, [1, 1, 1, 1, 1, 0])
    out = self.rollout(keys(2, 3), eta, sampler)
    self.assertEqual(float(out.std_T[-1]), 0.0)
    np.testing.assert_array_equal(out.latents_BGNC, out.mean_TBGNC[-1])

  def test_row_depends_on_its_own_key_alone(self):
    key_BG = keys(2, 3)
    whole = self.rollout(key_BG)
    alone = self.rollout(key_BG[1:, 2:])
    np.testing.assert_allclose(alone.latents_BGNC, whole.latents_BGNC[1:, 2:], atol=1e-6)
    np.testing.assert_array_equal(alone.noise_TBGNC, whole.noise_TBGNC[:, 1:, 2:])
    flat = np.asarray(whole.noise_TBGNC).reshape(6 * 6, -1)
    self.assertLess(np.abs(np.corrcoef(flat) - np.eye(36)).max(), 0.999)
    part = image_rollout.slice_prompts(whole, 1, 2)
    np.testing.assert_array_equal(part.x_TBGNC, whole.x_TBGNC[:, 1:2])
    np.testing.assert_array_equal(part.latents_BGNC, whole.latents_BGNC[1:2])


if __name__ == '__main__':
  absltest.main()
