"""Selects from rollouts what updates read: texts with log-probabilities, images with some steps."""

from __future__ import annotations

from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types

Array = types.Array


def sampled_texts(prompts: types.Prompts, rollout: types.TextTrajectory) -> types.SampledTexts:
  """Returns the texts of a rollout with the quantities that are needed to score them again."""
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
  """Returns the images of a rollout with the steps that are scored again."""
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
    rollout: the trajectory.
    steps: indices (K,) of the steps.
    grid: times of the rollout, see `flow.time_grid`.
    levels_T: noise level of every step.
  """
  B, G = rollout.latents_BGNC.shape[:2]
  shape = B, len(steps), G

  def cut(x_KBGNC: Array) -> Array:
    return jnp.moveaxis(x_KBGNC, 0, 1)

  def wide(x_T: Array) -> Array:
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
  """Makes a query at the replayed steps of images.

  Args:
    images: the samples.
    guided: True for velocities under the guidance of the rollout.
  """
  prompts, steps = images.prompts, images.steps
  if guided:
    return types.GuidedFlowQuery(
      prompts=prompts, x_BKGNC=steps.x_BKGNC, time_BKG=steps.time_BKG, scale_BKG=images.scale_BKG
    )
  return types.FlowQuery(prompts=prompts, x_BKGNC=steps.x_BKGNC, time_BKG=steps.time_BKG)
