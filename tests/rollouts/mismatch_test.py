"""Gaps between rollout and replay: none for what was drawn, against NumPy, and what opens them."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import base
from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.rollouts import replay
from lvrpo_jax.rollouts import schedule
from lvrpo_jax.rollouts import trajectories

B, G, N, C, STEPS = 2, 3, 4, 5, 6
GRID = flow.time_grid(STEPS + 1, 2.2)
ETA = schedule.noise_levels(0.7, STEPS, 0.3, 1.0, GRID)
KEPT = np.array([0, 2, STEPS - 1])
"""The first, where the grid's second time matters, one in the middle, and the last, without noise.
"""
LIMITS = base.get_config().align.gap_limit
GAP = jax.jit(mismatch.image_mismatch, static_argnums=(0, 3))


def velocity(x, time):
  return jnp.sin(2.0 * x + time[..., None, None])


@functools.cache
def drawn(sampler):
  """The kept steps of a rollout, and velocities there."""
  key_BG = ops.fold_rows(jax.random.key(0), (B, G))
  rollout = jax.jit(
    lambda key: image_rollout.sample_sde(velocity, key, (N, C), GRID, ETA, sampler)
  )(key_BG)
  steps = trajectories.transitions(rollout, KEPT, GRID, ETA)
  return steps, velocity(steps.x_BMNC, steps.time_BM), rollout


class ImagesTest(parameterized.TestCase):
  @parameterized.parameters(*flow.STEPS)
  def test_there_is_none(self, sampler):
    steps, v, rollout = drawn(sampler)
    np.testing.assert_array_equal(steps.next_BMNC[:, :G], rollout.x_TBGNC[1])
    np.testing.assert_array_equal(steps.next_BMNC[:, -G:], rollout.latents_BGNC)
    self.assertLess(float(GAP(sampler, v, steps, G).max()), 1e-6)

  @parameterized.parameters(*flow.STEPS)
  def test_against_densities(self, sampler):
    steps, v, _ = drawn(sampler)
    rng = np.random.default_rng(1)
    v = v + 0.1 * rng.normal(size=v.shape).astype(np.float32)
    found = np.asarray(GAP(sampler, v, steps, G)).astype(np.float64)
    s = jax.tree.map(np.float64, steps)
    mean, std = (np.asarray(x, np.float64) for x in replay.transition(sampler, v, steps))
    want = np.zeros(len(KEPT))
    for b, m in np.ndindex(B, len(KEPT) * G):
      if s.std_BM[b, m] == 0:
        continue

      # Of the sampled latents, under what is replayed and under what was recorded.
      def density(mu, sigma):
        return (-((s.next_BMNC[b, m] - mu) ** 2) / (2 * sigma**2)).mean()

      gap = abs(density(mean[b, m], s.std_BM[b, m]) - density(s.mean_BMNC[b, m], s.std_BM[b, m]))
      want[m // G] = max(want[m // G], gap)
    np.testing.assert_allclose(found[:-1], want[:-1], rtol=2e-3)
    self.assertGreater(want[:-1].min(), 1e-3)
    # The last step ends in the image; 1 stands for the deviation that it lacks.
    d = mean[:, -G:] - s.mean_BMNC[:, -G:]
    last = np.abs((s.noise_BMNC[:, -G:] * d).mean((-1, -2)) - (d**2).mean((-1, -2)) / 2)
    np.testing.assert_allclose(found[-1], last.max(), rtol=2e-3)

  @parameterized.product(
    sampler=tuple(flow.STEPS),
    change=(
      ('x_BMNC', lambda x: x + 0.1),
      ('next_BMNC', lambda x: x + 0.1),
      ('next_BMNC', lambda x: x[:, ::-1]),
      ('time_BM', lambda x: x - 0.05),
      ('next_time_BM', lambda x: x - 0.05),
      ('eta_BM', lambda x: x * 1.1),
      ('noise_BMNC', lambda x: 0 * x),
      ('noise_BMNC', lambda x: -x),
      ('noise_BMNC', lambda x: x[:, :, ::-1]),
      ('mean_BMNC', lambda x: x + 0.1),
      ('std_BM', lambda x: x * 1.1),
    ),
  )
  def test_every_field_that_is_not_the_rollouts_opens_it(self, sampler, change):
    steps, v, _ = drawn(sampler)
    field, move = change
    other = steps.replace(**{field: move(getattr(steps, field))})
    with self.assertRaisesRegex(
      ValueError, 'gap/generate is .*align.checks.mismatch.image_max is 1e-05'
    ):
      mismatch.check(1, {'gap/generate': float(GAP(sampler, v, other, G).max())}, LIMITS)

  def test_the_second_time_of_the_grid_counts_at_the_first_step(self):
    steps, v, _ = drawn('sde')
    gap = GAP('sde', v, steps.replace(first_time_BM=steps.first_time_BM - 0.02), G)
    self.assertGreater(float(gap[0]), 1e-3)
    self.assertLess(float(gap[1:].max()), 1e-6)

  def test_final_latents_are_those_of_the_last_step(self):
    steps, v, _ = drawn('sde')
    # Rounded to 16 bits, and those of a sibling.
    rounded = steps.next_BMNC.astype(jnp.bfloat16).astype(jnp.float32)
    for latents, least in ((rounded, LIMITS.images), (jnp.roll(steps.next_BMNC, 1, axis=1), 0.1)):
      last = steps.next_BMNC.at[:, -G:].set(latents[:, -G:])
      gap = GAP('sde', v, steps.replace(next_BMNC=last), G)
      self.assertGreater(float(gap[-1]), least)
      self.assertLess(float(gap[:-1].max()), 1e-6)


class TextsTest(absltest.TestCase):
  def test_against_loops(self):
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, (B, G, 1))
    logp, old = (np.where(mask, -rng.uniform(0.5, 3, mask.shape), 0.0) for _ in range(2))
    b = types.TextTrainBatch(None, None, old, mask, None, None, None, None)
    off = np.abs(logp - old)[mask]
    np.testing.assert_allclose(
      mismatch.text_mismatch(jnp.asarray(logp), b), (off.max(), off.mean()), rtol=1e-6
    )
    outside = mismatch.text_mismatch(
      jnp.asarray(logp), b.replace(mask_BGT=mask, logp_BGT=old - ~mask)
    )
    np.testing.assert_allclose(outside[0], max(1.0, off.max()), rtol=1e-6)


class CheckTest(parameterized.TestCase):
  LIMITS = dict(texts=0.1, texts_mean=0.05, images=0.01, decode=0.2)

  @parameterized.parameters(
    ('gap/generate', 'images', 0.02),
    ('gap/edit', 'images', 0.02),
    ('gap/plan', 'texts', 0.15),
    ('gap/think_generate', 'images', 0.02),
    ('gap/understand', 'texts', np.nan),
    ('gap/decode', 'decode', 0.25),
    ('gap/understand/mean', 'texts_mean', 0.06),
    ('gap/plan/mean', 'texts_mean', 0.06),
  )
  def test_each_has_its_limit(self, name, kind, gap):
    with self.assertRaisesRegex(
      ValueError,
      f'iteration 7: {name} is {gap:g}, config.align.gap_limit.{kind} is {self.LIMITS[kind]:g}: ',
    ):
      mismatch.check(7, {name: gap}, self.LIMITS)
    mismatch.check(7, {name: gap}, {**self.LIMITS, kind: 0.0})  # None.
    mismatch.check(7, {name: self.LIMITS[kind]}, self.LIMITS)

  def test_other_metrics_have_none(self):
    mismatch.check(1, {'gap/generate/step0': 9.0, 'gap/edit/mean': 9.0, 'loss': 9.0}, self.LIMITS)


if __name__ == '__main__':
  absltest.main()
