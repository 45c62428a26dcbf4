"""Text objectives: policy ratios of tokens or answers, and penalties to the reference."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import numpy as jnp

Array = jax.Array


BOUND = 20.0
"""Log-ratios beyond this have no gradient: e^89 overflows float32, and infinity times 0 is no
number."""


def ratio_of(log_ratio: Array) -> Array:
  """`e^x` with x kept in (-BOUND, BOUND)."""
  return jnp.exp(jnp.clip(log_ratio, -BOUND, BOUND))


def clipped(log_ratio: Array, advantage: Array, low: float, high: float) -> Array:
  """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, the PPO surrogate (arXiv 1707.06347, eq. 7).

  `high > low` is DAPO's clip-higher (arXiv 2503.14476). Arguments broadcast.
  """
  ratio = ratio_of(log_ratio)
  return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def sequence_log_ratio(log_ratio_BGT: Array, mask_BGT: Array) -> Array:
  """Mean log-ratio of an answer's tokens, (B, G, 1): that of GSPO (arXiv 2507.18071)."""
  total = jnp.sum(jnp.where(mask_BGT, log_ratio_BGT, 0.0), axis=-1, keepdims=True)
  return total / jnp.maximum(jnp.sum(mask_BGT, axis=-1, keepdims=True), 1)


def cispo(log_ratio: Array, logp: Array, advantage: Array, cap: float) -> Array:
  """`-sg(min(rho, cap)) A log p`: weights are cut, no token loses its gradient (MiniMax-M1,
  arXiv 2506.13585)."""
  weight = jax.lax.stop_gradient(jnp.minimum(ratio_of(log_ratio), cap))
  return -weight * advantage * logp


class Objective(NamedTuple):
  """How a text loss is made.

  Attributes:
    aggregation: see `token_weights`.
    sequence: one ratio an answer (GSPO) instead of one a token.
    cut: weights are cut (CISPO) instead of the surrogate being clipped.
  """

  aggregation: str
  sequence: bool = False
  cut: bool = False


OBJECTIVES = {
  'grpo': Objective('sequence'),  # arXiv 2402.03300
  'dr_grpo': Objective('constant'),  # arXiv 2503.20783; with align.scope = 'none'
  'dapo': Objective('token'),  # arXiv 2503.14476
  'gspo': Objective('sequence', sequence=True),
  'cispo': Objective('token', cut=True),
}
"""Text objectives by config name."""


def loss(
  objective: Objective,
  log_ratio_BGT: Array,
  logp_BGT: Array,
  mask_BGT: Array,
  advantage_BG: Array,
  low: float,
  high: float,
) -> tuple[Array, Array]:
  """(loss, log-ratio that was clipped), per token; for GSPO every token carries its answer's.

  Args:
    low, high: the ratio is kept in (1 - low, 1 + high); CISPO cuts it at 1 + high only.
  """
  advantage = advantage_BG[..., None]
  if objective.cut:
    return cispo(log_ratio_BGT, logp_BGT, advantage, 1 + high), log_ratio_BGT
  if objective.sequence:
    log_ratio_BGT = jnp.broadcast_to(
      sequence_log_ratio(log_ratio_BGT, mask_BGT), log_ratio_BGT.shape
    )
  return clipped(log_ratio_BGT, advantage, low, high), log_ratio_BGT


def k1(logp: Array, reference_logp: Array) -> Array:
  """`log p - log p_ref`: unbiased, may be negative (http://joschu.net/blog/kl-approx.html)."""
  return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
  """`(log p - log p_ref)^2 / 2` (same source)."""
  return jnp.square(logp - reference_logp) / 2


def k3(logp: Array, reference_logp: Array, bound: float = BOUND) -> Array:
  """`e^d - d - 1` with `d = log p_ref - log p` (same source): unbiased and never negative.

  `d` is bounded from above: a token that the policy all but excludes and the reference does not
  gives a large finite penalty without a gradient instead of an overflow.
  """
  d = jnp.minimum(reference_logp - logp, bound)
  return jnp.exp(d) - d - 1


KL = {'k1': k1, 'k2': k2, 'k3': k3}


def token_weights(mask_BGT: Array, valid_BG: Array, aggregation: str) -> Array:
  """Weight of every token in the loss; divide by `total_weight` of the whole batch.

  Args:
    mask_BGT: tokens of the answers.
    valid_BG: samples that have an advantage.
    aggregation: 'token' gives all tokens the same weight (DAPO), 'sequence' all answers
      (GRPO: 1 / |o_i|), 'constant' divides by the longest possible answer (Dr. GRPO: 1 / T).

  Raises:
    ValueError: unknown aggregation.
  """
  mask = mask_BGT.astype(jnp.float32) * valid_BG.astype(jnp.float32)[..., None]
  if aggregation == 'token':
    return mask
  if aggregation == 'sequence':
    return mask / jnp.maximum(jnp.sum(mask_BGT, axis=-1, keepdims=True), 1)
  if aggregation == 'constant':
    return mask / mask_BGT.shape[-1]
  raise ValueError(f"text aggregation is {aggregation!r}; allowed: 'token', 'sequence', 'constant'")


def total_weight(mask_BGT: Array, valid_BG: Array, aggregation: str) -> Array:
  """What the weighted sum of a loss is divided by: tokens ('token'), or answers that count."""
  if aggregation == 'constant':
    return jnp.sum(valid_BG.astype(jnp.float32))
  return jnp.sum(token_weights(mask_BGT, valid_BG, aggregation))
