"""Replays: densities of samples under any policy, by the functions that sampled them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jax import numpy as jnp

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
