"""Densities of what was sampled, under any policy, by the functions that sampled it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.models import family
from lvrpo_jax.models import lora
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import text as text_rollout

Array = jax.Array


class NoisedLatents(NamedTuple):
  """Noised latents, their times, and the velocities that flow matching asks for."""

  x_t: Array
  t: Array
  target: Array


def noise_points(key: Array, x0: Array, shift: float) -> NoisedLatents:
  """Noises clean latents at logit-normal times; a row depends on its key.

  Args:
    key: of every noised copy, (...).
    x0: (..., N, C); axes of size 1 are copied.
    shift: time shift of the logit-normal times.
  """
  noise = ops.normal_rows(ops.fold_each(key, 0), x0.shape[-2:])
  t = flow.logit_normal_time(ops.normal_rows(ops.fold_each(key, 1), ()), shift)
  return NoisedLatents(
    flow.interpolate(x0, noise, t[..., None, None]), t, flow.velocity_target(x0, noise)
  )


def text_query(texts: types.SampledTexts, bos: int) -> types.TextQuery:
  """The query whose logits score sampled texts."""
  return types.TextQuery(texts.prompts, text_rollout.teacher_ids(texts.tokens_BGT, bos))


def token_logp(logits_BGTV: Array, texts: types.SampledTexts) -> Array:
  """Log-probabilities (B, G, T) of the tokens of texts, 0 outside the texts."""
  return jnp.where(texts.mask_BGT, ops.token_logp(logits_BGTV, texts.tokens_BGT), 0.0)


def forward(
  policy: family.Policy,
  params: types.Params,
  frozen: Mapping[str, types.Params],
  samples: Mapping[str, types.SampledTexts | types.FlowQuery],
) -> dict[str, Array]:
  """Tempered logits of sampled texts and velocities at queries, by task.

  The contexts of all tasks are encoded together, as in the rollout.
  """
  texts = {t: x for t, x in samples.items() if isinstance(x, types.SampledTexts)}
  queries = {t: text_query(texts[t], policy.bos) if t in texts else x for t, x in samples.items()}
  out = guidance.forward(policy, params, frozen['vae'], queries)
  for task, found in texts.items():
    out[task] = out[task] / found.temperature_B[:, None, None, None]
  return out


def transition(sampler: str, v_BKGNC: Array, steps: types.Transitions) -> flow.Transition:
  """Stored steps for other velocities, by the step function that sampled them.

  Means have shape (B, K, G, N, C), deviations (B, K, G, 1, 1).
  """

  def wide(x_BKG):
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
  """Velocities of any policy at queries, without gradients."""
  return guidance.forward(policy, lora.merge_adapters(params), frozen['vae'], queries)


def log_probabilities(
  policy: family.Policy,
  params: types.Params | lora.AdaptedParams,
  frozen: Mapping[str, types.Params],
  texts: Mapping[str, types.SampledTexts],
) -> dict[str, Array]:
  """Log-probabilities (B, G, T) of sampled texts under any policy, by the update's pass."""
  logits = forward(policy, lora.merge_adapters(params), frozen, texts)
  return {task: token_logp(found, texts[task]) for task, found in logits.items()}
