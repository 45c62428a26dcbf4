"""What is kept of rollouts: texts with their log-probabilities, images with some of their steps."""

from __future__ import annotations

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types

Array = jax.Array


def sampled_texts(prompts: types.Prompts, rollout: types.TextTrajectory) -> types.SampledTexts:
  """Texts with what is needed to score them again."""
  return types.SampledTexts(
    prompts=prompts,
    tokens_BGT=rollout.tokens_BGT,
    logp_BGT=rollout.logp_BGT,
    mask_BGT=rollout.mask_BGT,
    temperature_B=jnp.broadcast_to(rollout.temperature, rollout.mask_BGT.shape[:1]),
  )


def sampled_images(
  prompts: types.Prompts, rollout: types.ImageTrajectory, steps: types.Transitions
) -> types.SampledImages:
  """Images with the steps that are scored again."""
  return types.SampledImages(
    prompts=prompts,
    latents_BGNC=rollout.latents_BGNC,
    steps=steps,
    scale_BKG=jnp.broadcast_to(rollout.guidance, steps.time_BKG.shape),
  )


def transitions(
  rollout: types.ImageTrajectory, steps: np.ndarray, grid: Array, levels_T: Array
) -> types.Transitions:
  """Cuts steps out of a trajectory.

  Args:
    steps: K indices of steps.
    grid: times of the rollout, see `flow.time_grid`.
    levels_T: noise level of every step.
  """
  B, G = rollout.latents_BGNC.shape[:2]
  shape = B, len(steps), G

  def cut(x_KBGNC):
    return jnp.moveaxis(x_KBGNC, 0, 1)

  def wide(x_T):
    return jnp.broadcast_to(x_T[steps][:, None], shape)

  last = len(rollout.x_TBGNC) - 1
  after_KBGNC = jnp.stack(
    [rollout.latents_BGNC if step == last else rollout.x_TBGNC[step + 1] for step in steps]
  )
  return types.Transitions(
    x_BKGNC=cut(rollout.x_TBGNC[steps]),
    next_BKGNC=cut(after_KBGNC),
    time_BKG=wide(rollout.time_T),
    next_time_BKG=wide(rollout.next_time_T),
    first_time_BKG=jnp.broadcast_to(grid[1], shape),
    eta_BKG=wide(levels_T),
    noise_BKGNC=cut(rollout.noise_TBGNC[steps]),
    mean_BKGNC=cut(rollout.mean_TBGNC[steps]),
    std_BKG=wide(rollout.std_T),
  )


def step_query(images: types.SampledImages, guided: bool) -> types.FlowQuery:
  """The steps of images as a query.

  Args:
    guided: whether velocities are asked for under the guidance that sampled.
  """
  points = dict(
    prompts=images.prompts, x_BKGNC=images.steps.x_BKGNC, time_BKG=images.steps.time_BKG
  )
  if guided:
    return types.GuidedFlowQuery(**points, scale_BKG=images.scale_BKG)
  return types.FlowQuery(**points)
