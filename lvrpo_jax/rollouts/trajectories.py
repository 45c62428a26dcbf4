"""What was sampled as the update reads it, without advantages."""

from __future__ import annotations

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types

Array = jax.Array


def text_train_batch(prompts: types.Prompts, rollout: types.TextTrajectory) -> types.TextTrainBatch:
  """Sampled texts as the update reads them, without advantages."""
  temperature_B = jnp.broadcast_to(rollout.temperature, rollout.mask_BGT.shape[:1])
  return types.TextTrainBatch(
    prompts, rollout.tokens_BGT, rollout.logp_BGT, rollout.mask_BGT, temperature_B, None, None, None
  )


def image_train_batch(
  prompts: types.Prompts, rollout: types.ImageTrajectory, steps: types.Transitions
) -> types.ImageTrainBatch:
  """Sampled images as the update reads them, at the replayed steps and without advantages."""
  guidance_BM = (
    None if rollout.guidance is None else jnp.broadcast_to(rollout.guidance, steps.time_BM.shape)
  )
  return types.ImageTrainBatch(
    prompts,
    rollout.latents_BGNC,
    steps,
    steps.x_BMNC,
    steps.time_BM,
    None,
    None,
    None,
    None,
    guidance_BM,
  )


def transitions(
  rollout: types.ImageTrajectory, steps: np.ndarray, grid: Array, eta_T: Array
) -> types.Transitions:
  """Cuts steps out of a trajectory; row m = k * G + g."""
  rows, group = rollout.latents_BGNC.shape[:2]
  count = len(steps)

  def cut(x_KBGNC):
    x_BKGNC = jnp.moveaxis(x_KBGNC, 0, 1)
    return x_BKGNC.reshape(rows, count * group, *x_BKGNC.shape[3:])

  wide = lambda x_T: jnp.broadcast_to(jnp.repeat(x_T[steps], group), (rows, count * group))
  last = len(rollout.x_TBGNC) - 1
  after_KBGNC = jnp.stack(
    [rollout.latents_BGNC if step == last else rollout.x_TBGNC[step + 1] for step in steps]
  )
  return types.Transitions(
    x_BMNC=cut(rollout.x_TBGNC[steps]),
    next_BMNC=cut(after_KBGNC),
    time_BM=wide(rollout.time_T),
    next_time_BM=wide(rollout.next_time_T),
    first_time_BM=jnp.broadcast_to(grid[1], (rows, count * group)),
    eta_BM=wide(eta_T),
    noise_BMNC=cut(rollout.noise_TBGNC[steps]),
    mean_BMNC=cut(rollout.mean_TBGNC[steps]),
    std_BM=wide(rollout.std_T),
  )
