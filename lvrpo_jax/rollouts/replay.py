"""Replays: what is kept of rollouts, and its densities under any policy.

The functions that sampled compute the densities again, so the first ratio of an update is 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.models import family
from lvrpo_jax.models import lora
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import text as text_rollout

Array = types.Array


class NoisedLatents(NamedTuple):
  """Noised latents for flow matching.

  Attributes:
    x_t: (..., N, C), latents noised to `t`.
    t: (...), flow times.
    target: (..., N, C), velocities that flow matching fits.
  """

  x_t: Array
  t: Array
  target: Array


def noise_points(key: Array, x0: Array, shift: float) -> NoisedLatents:
  """Noises clean latents at logit-normal times; a row depends on its own key alone.

  Args:
    key: PRNG keys (...) of the noised copies.
    x0: clean latents (..., N, C); axes of size 1 are broadcast.
    shift: time shift of the logit-normal times.
  """
  noise = ops.normal_rows(ops.fold_each(key, 0), x0.shape[-2:])
  t = flow.logit_normal_time(ops.normal_rows(ops.fold_each(key, 1), ()), shift)
  return NoisedLatents(
    x_t=flow.interpolate(x0, noise, t[..., None, None]),
    t=t,
    target=flow.velocity_target(x0, noise),
  )


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


def text_query(texts: types.SampledTexts, bos: int) -> types.TextQuery:
  """Makes the query whose logits score sampled texts."""
  return types.TextQuery(
    prompts=texts.prompts, ids_BML=text_rollout.teacher_ids(texts.tokens_BGT, bos)
  )


def token_logp(logits_BGTV: Array, texts: types.SampledTexts) -> Array:
  """Computes the log-probabilities (B, G, T) of the tokens of texts, 0 outside the texts."""
  return jnp.where(texts.mask_BGT, ops.token_logp(logits_BGTV, texts.tokens_BGT), 0.0)


def forward(
  policy: family.Policy,
  params: types.Params,
  frozen: Mapping[str, types.Params],
  samples: Mapping[str, types.SampledTexts | types.FlowQuery],
) -> dict[str, Array]:
  """Computes logits of sampled texts, divided by their temperature, and velocities at queries.

  The contexts of all tasks are encoded together, as in the rollout.

  Args:
    policy: the model.
    params: its parameters, merged.
    frozen: frozen parameters by name; those of the autoencoder are 'vae'.
    samples: sampled texts and queries, by task.
  """
  texts: dict[str, types.SampledTexts] = {}
  queries: dict[str, types.Query] = {}
  for task, sample in samples.items():
    if isinstance(sample, types.SampledTexts):
      texts[task] = sample
      queries[task] = text_query(sample, policy.bos)
    else:
      queries[task] = sample
  out = guidance.forward(policy, params, frozen['vae'], queries)
  for task, found in texts.items():
    out[task] = out[task] / found.temperature_B[:, None, None, None]
  return out


def transition(sampler: str, v_BKGNC: Array, steps: types.Transitions) -> flow.Transition:
  """Computes the transitions of stored steps for other velocities, by the rollout's step function.

  Means have shape (B, K, G, N, C), deviations have shape (B, K, G, 1, 1).
  """

  def wide(x_BKG: Array) -> Array:
    return x_BKG[..., None, None]

  return flow.STEPS[sampler](
    steps.x_BKGNC,
    v_BKGNC,
    wide(steps.time_BKG),
    wide(steps.next_time_BKG),
    wide(steps.first_time_BKG),
    wide(steps.eta_BKG),
  )


def velocities(
  policy: family.Policy,
  params: types.Params | lora.AdaptedParams,
  frozen: Mapping[str, types.Params],
  queries: Mapping[str, types.FlowQuery],
) -> dict[str, Array]:
  """Computes the velocities of any policy at queries; no gradients are taken through them."""
  return guidance.forward(policy, lora.merge_adapters(params), frozen['vae'], queries)


def log_probabilities(
  policy: family.Policy,
  params: types.Params | lora.AdaptedParams,
  frozen: Mapping[str, types.Params],
  texts: Mapping[str, types.SampledTexts],
) -> dict[str, Array]:
  """Computes log-probabilities (B, G, T) of sampled texts under any policy, as the update does."""
  logits = forward(policy, lora.merge_adapters(params), frozen, texts)
  return {task: token_logp(found, texts[task]) for task, found in logits.items()}
