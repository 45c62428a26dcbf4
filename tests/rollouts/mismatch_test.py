"""Mismatch between rollout and replay: none for what was sampled, against NumPy, and its causes."""

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

B, G, N, C, STEPS = 2, 3, 4, 5, 6
GRID = flow.time_grid(STEPS + 1, 2.2)
ETA = schedule.noise_levels(0.7, STEPS, 0.3, 1.0, GRID)
KEPT = np.array([0, 2, STEPS - 1])
"""The first, where the grid's second time matters, one in the middle, and the last, without noise.
"""
LIMITS = mismatch.limits(base.get_config().align.checks.mismatch, 'float32')
MISMATCH = jax.jit(mismatch.image_mismatch, static_argnums=0)


def velocity(x, time):
  return jnp.sin(2.0 * x + time[..., None, None])


@functools.cache
def sampled(sampler):
  """The kept steps of a rollout, and velocities there."""
  key_BG = ops.fold_rows(jax.random.key(0), (B, G))
  rollout = jax.jit(
    lambda key: image_rollout.sample_sde(velocity, key, (N, C), GRID, ETA, sampler)
  )(key_BG)
  steps = replay.transitions(rollout, KEPT, GRID, ETA)
  return steps, velocity(steps.x_BKGNC, steps.time_BKG), rollout


class ImagesTest(parameterized.TestCase):
  @parameterized.parameters(*flow.STEPS)
  def test_there_is_none(self, sampler):
    steps, v, rollout = sampled(sampler)
    np.testing.assert_array_equal(steps.next_BKGNC[:, 0], rollout.x_TBGNC[1])
    np.testing.assert_array_equal(steps.next_BKGNC[:, -1], rollout.latents_BGNC)
    self.assertLess(float(MISMATCH(sampler, v, steps).max()), 1e-6)

  @parameterized.parameters(*flow.STEPS)
  def test_against_densities(self, sampler):
    steps, v, _ = sampled(sampler)
    rng = np.random.default_rng(1)
    v = v + 0.1 * rng.normal(size=v.shape).astype(np.float32)
    found = np.asarray(MISMATCH(sampler, v, steps)).astype(np.float64)
    s = jax.tree.map(np.float64, steps)
    mean, std = (np.asarray(x, np.float64) for x in replay.transition(sampler, v, steps))
    want = np.zeros(len(KEPT))
    for b, k, g in np.ndindex(B, len(KEPT), G):
      at = b, k, g
      if s.std_BKG[at] == 0:
        continue

      # Of the sampled latents, under what is replayed and under what was recorded.
      def density(mu, sigma, value=s.next_BKGNC[at]):
        return (-((value - mu) ** 2) / (2 * sigma**2)).mean()

      off = abs(density(mean[at], s.std_BKG[at]) - density(s.mean_BKGNC[at], s.std_BKG[at]))
      want[k] = max(want[k], off)
    np.testing.assert_allclose(found[:-1], want[:-1], rtol=2e-3)
    self.assertGreater(want[:-1].min(), 1e-3)
    # The last step ends in the image; 1 stands for the deviation that it lacks.
    d = mean[:, -1] - s.mean_BKGNC[:, -1]
    last = np.abs((s.noise_BKGNC[:, -1] * d).mean((-1, -2)) - (d**2).mean((-1, -2)) / 2)
    np.testing.assert_allclose(found[-1], last.max(), rtol=2e-3)

  @parameterized.product(
    sampler=tuple(flow.STEPS),
    change=(
      ('x_BKGNC', lambda x: x + 0.1),
      ('next_BKGNC', lambda x: x + 0.1),
      ('next_BKGNC', lambda x: x[:, ::-1, ::-1]),
      ('time_BKG', lambda x: x - 0.05),
      ('next_time_BKG', lambda x: x - 0.05),
      ('eta_BKG', lambda x: x * 1.1),
      ('noise_BKGNC', lambda x: 0 * x),
      ('noise_BKGNC', lambda x: -x),
      ('noise_BKGNC', lambda x: x[:, :, :, ::-1]),
      ('mean_BKGNC', lambda x: x + 0.1),
      ('std_BKG', lambda x: x * 1.1),
    ),
  )
  def test_every_field_that_is_not_the_rollouts_opens_it(self, sampler, change):
    steps, v, _ = sampled(sampler)
    field, move = change
    other = steps.replace(**{field: move(getattr(steps, field))})
    with self.assertRaisesRegex(
      ValueError, 'mismatch/generate is .*align.checks.mismatch.image_max is 1e-05'
    ):
      mismatch.check(1, {'mismatch/generate': float(MISMATCH(sampler, v, other).max())}, LIMITS)

  def test_the_second_time_of_the_grid_counts_at_the_first_step(self):
    steps, v, _ = sampled('sde')
    found = MISMATCH('sde', v, steps.replace(first_time_BKG=steps.first_time_BKG - 0.02))
    self.assertGreater(float(found[0]), 1e-3)
    self.assertLess(float(found[1:].max()), 1e-6)

  def test_final_latents_are_those_of_the_last_step(self):
    steps, v, _ = sampled('sde')
    # Rounded to 16 bits, and those of a sibling.
    final = steps.next_BKGNC[:, -1]
    rounded = final.astype(jnp.bfloat16).astype(jnp.float32)
    for latents, least in ((rounded, LIMITS['image_max']), (jnp.roll(final, 1, axis=1), 0.1)):
      last = steps.next_BKGNC.at[:, -1].set(latents)
      found = MISMATCH('sde', v, steps.replace(next_BKGNC=last))
      self.assertGreater(float(found[-1]), least)
      self.assertLess(float(found[:-1].max()), 1e-6)
      np.testing.assert_array_equal(MISMATCH('sde', v, steps, latents), found)
    self.assertLess(float(MISMATCH('sde', v, steps, final).max()), 1e-6)


class TextsTest(absltest.TestCase):
  def test_against_loops(self):
    rng = np.random.default_rng(0)
    mask = np.arange(4) < rng.integers(1, 5, (B, G, 1))
    logp, old = (np.where(mask, -rng.uniform(0.5, 3, mask.shape), 0.0) for _ in range(2))
    texts = types.SampledTexts(
      prompts=None, tokens_BGT=None, logp_BGT=old, mask_BGT=mask, temperature_B=None
    )
    off = np.abs(logp - old)[mask]
    np.testing.assert_allclose(
      mismatch.text_mismatch(jnp.asarray(logp), texts), (off.max(), off.mean()), rtol=1e-6
    )
    outside = mismatch.text_mismatch(
      jnp.asarray(logp), texts.replace(mask_BGT=mask, logp_BGT=old - ~mask)
    )
    np.testing.assert_allclose(outside[0], max(1.0, off.max()), rtol=1e-6)


class CheckTest(parameterized.TestCase):
  LIMITS = dict(text_max=0.1, text_mean=0.05, image_max=0.01, decode_max=0.2)

  @parameterized.parameters(
    ('mismatch/generate', 'image_max', 0.02),
    ('mismatch/edit', 'image_max', 0.02),
    ('mismatch/plan', 'text_max', 0.15),
    ('mismatch/think_generate', 'image_max', 0.02),
    ('mismatch/understand', 'text_max', np.nan),
    ('mismatch/decode', 'decode_max', 0.25),
    ('mismatch/understand/mean', 'text_mean', 0.06),
    ('mismatch/plan/mean', 'text_mean', 0.06),
  )
  def test_each_has_its_limit(self, name, kind, found):
    with self.assertRaisesRegex(
      ValueError,
      f'iteration 7: {name} is {found:g}, config.align.checks.mismatch.{kind} is '
      f'{self.LIMITS[kind]:g}: ',
    ):
      mismatch.check(7, {name: found}, self.LIMITS)
    mismatch.check(7, {name: found}, {**self.LIMITS, kind: 0.0})  # None.
    mismatch.check(7, {name: self.LIMITS[kind]}, self.LIMITS)

  def test_other_metrics_have_none(self):
    mismatch.check(
      1, {'mismatch/generate/step0': 9.0, 'mismatch/edit/mean': 9.0, 'loss': 9.0}, self.LIMITS
    )

  @parameterized.parameters(
    ('float32', dict(text_max=1e-5, text_mean=1e-5, decode_max=1e-3, image_max=1e-5)),
    ('bfloat16', dict(text_max=0.0, text_mean=0.02, decode_max=0.0, image_max=1e-3)),
  )
  def test_limits_are_those_of_the_dtype_unless_the_config_says(self, dtype, default):
    settings = base.get_config().align.checks.mismatch
    self.assertEqual(mismatch.limits(settings, dtype), default)
    settings.update(text_max=0.0, image_max=3e-4)
    self.assertEqual(
      mismatch.limits(settings, dtype), {**default, 'text_max': 0.0, 'image_max': 3e-4}
    )


if __name__ == '__main__':
  absltest.main()
