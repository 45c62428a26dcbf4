"""Densities of what was sampled, under any policy, by the functions that sampled it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.models import lora
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import text as text_rollout

Array = jax.Array


class NoisedLatents(NamedTuple):
  """Noised latents, their times, and the velocities that flow matching asks for."""

  x_t: Array
  t: Array
  target: Array


def noise_points(key_BM: Array, x0_BMNC: Array, shift: float) -> NoisedLatents:
  """Noises clean latents (B, 1 or M, N, C) at logit-normal times; a row depends on its key."""
  noise = ops.normal_rows(ops.fold_each(key_BM, 0), x0_BMNC.shape[2:])
  t = flow.logit_normal_time(ops.normal_rows(ops.fold_each(key_BM, 1), ()), shift)
  return NoisedLatents(
    flow.interpolate(x0_BMNC, noise, t[..., None, None]), t, flow.velocity_target(x0_BMNC, noise)
  )


def token_logp(logits: Array, b: types.TextTrainBatch) -> Array:
  """Log-probabilities (B, G, T) of the answers' tokens, 0 outside the answers."""
  return jnp.where(b.mask_BGT, ops.token_logp(logits, b.tokens_BGT), 0.0)


def forward(
  policy, params, frozen, batch: dict[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
  """Velocities of all images and tempered logits of all texts.

  The contexts of all tasks are encoded together, as in the rollout.
  """
  images = {t: b for t, b in batch.items() if t not in tasks.TEXT_OUTPUTS}
  texts = {t: b for t, b in batch.items() if t in tasks.TEXT_OUTPUTS}
  v, logits = guidance.forward(
    policy,
    params,
    frozen['vae'],
    {t: b.prompts for t, b in batch.items()},
    {t: b.x_BMNC for t, b in images.items()},
    {t: b.time_BM for t, b in images.items()},
    {t: b.guidance_BM for t, b in images.items()},
    {t: text_rollout.teacher_ids(b.tokens_BGT, policy.bos) for t, b in texts.items()},
  )
  return v, {t: logits[t] / b.temperature_B[:, None, None, None] for t, b in texts.items()}


def transition(sampler: str, v_BMNC: Array, transitions: types.Transitions) -> flow.Transition:
  """Stored steps for other velocities, by the step function that sampled them: means (B, M, N, C)
  and deviations (B, M, 1, 1)."""
  s = transitions
  wide = lambda x_BM: x_BM[..., None, None]
  return flow.STEPS[sampler](
    s.x_BMNC, v_BMNC, wide(s.time_BM), wide(s.next_time_BM), wide(s.first_time_BM), wide(s.eta_BM)
  )


def velocities(
  policy,
  params,
  frozen,
  prompts: dict[str, types.Prompts],
  x: dict[str, Array],
  time: dict[str, Array],
  scales: dict[str, Array | None],
) -> dict[str, Array]:
  """Velocities of any policy at given points, without gradients; see `guidance.forward`."""
  return guidance.forward(
    policy, lora.merge_adapters(params), frozen['vae'], prompts, x, time, scales, {}
  )[0]


def replay(
  policy, params, frozen, batch: dict[str, Any]
) -> tuple[dict[str, Array], dict[str, Array]]:
  """What the forward pass of the update gives under any policy: velocities of the images, and
  log-probabilities of the texts' tokens."""
  v, logits = forward(policy, lora.merge_adapters(params), frozen, batch)
  return v, {task: token_logp(x, batch[task]) for task, x in logits.items()}
