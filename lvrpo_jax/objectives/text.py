"""Text objectives: clipped policy ratio over tokens, and penalties to the reference."""

from __future__ import annotations

import jax
from jax import numpy as jnp

Array = jax.Array


def clipped(log_ratio: Array, advantage: Array, low: float, high: float) -> Array:
  """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, the PPO surrogate (arXiv 1707.06347, eq. 7).

  `high > low` is DAPO's clip-higher (arXiv 2503.14476). Arguments broadcast.
  """
  ratio = jnp.exp(log_ratio)
  return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def k1(logp: Array, reference_logp: Array) -> Array:
  """`log p - log p_ref`: unbiased, may be negative (http://joschu.net/blog/kl-approx.html)."""
  return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
  """`(log p - log p_ref)^2 / 2` (same source)."""
  return jnp.square(logp - reference_logp) / 2


def k3(logp: Array, reference_logp: Array, bound: float = 20.) -> Array:
  """`e^d - d - 1` with `d = log p_ref - log p` (same source): unbiased and never negative.

  `d` is bounded from above: a token that the policy all but excludes and the reference does not
  gives a large finite penalty without a gradient instead of an overflow.
  """
  d = jnp.minimum(reference_logp - logp, bound)
  return jnp.exp(d) - d - 1


KL = {'k1': k1, 'k2': k2, 'k3': k3}


def token_weights(mask_BGT: Array, valid_BG: Array, aggregation: str) -> Array:
  """Weight of every token in the loss; divide by the sum over the whole batch.

  Args:
    mask_BGT: tokens of the answers.
    valid_BG: samples that have an advantage.
    aggregation: 'token' gives all tokens the same weight (DAPO), 'sequence' all answers
      (GRPO: 1 / |o_i|).

  Raises:
    ValueError: unknown aggregation.
  """
  mask = mask_BGT.astype(jnp.float32) * valid_BG.astype(jnp.float32)[..., None]
  if aggregation == 'token':
    return mask
  if aggregation == 'sequence':
    return mask / jnp.maximum(jnp.sum(mask_BGT, axis=-1, keepdims=True), 1)
  raise ValueError(f"text aggregation is {aggregation!r}; allowed: 'token', 'sequence'")
