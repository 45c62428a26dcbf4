"""Clipped policy gradients of ratios, for texts and images alike."""

from __future__ import annotations

import jax
from jax import numpy as jnp

Array = jax.Array

BOUND = 20.0
"""Log-ratios beyond this have no gradient: e^89 overflows float32, and infinity times 0 is
NaN."""


def ratio_of(log_ratio: Array) -> Array:
  """`e^x` with x kept in (-BOUND, BOUND)."""
  return jnp.exp(jnp.clip(log_ratio, -BOUND, BOUND))


def clipped_surrogate(log_ratio: Array, advantage: Array, low: float, high: float) -> Array:
  """`-min(rho A, clip(rho, 1 - low, 1 + high) A)`, the PPO surrogate (arXiv 1707.06347, eq. 7).

  `high > low` is DAPO's clip-higher (arXiv 2503.14476). Arguments broadcast.
  """
  ratio = ratio_of(log_ratio)
  return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def sequence_log_ratio(log_ratio_BGT: Array, mask_BGT: Array) -> Array:
  """Mean log-ratio of an answer's tokens, (B, G, 1): that of GSPO (arXiv 2507.18071)."""
  total = jnp.sum(jnp.where(mask_BGT, log_ratio_BGT, 0.0), axis=-1, keepdims=True)
  return total / jnp.maximum(jnp.sum(mask_BGT, axis=-1, keepdims=True), 1)


def cispo_surrogate(log_ratio: Array, logp: Array, advantage: Array, cap: float) -> Array:
  """`-sg(min(rho, cap)) A log p`: weights are cut, no token loses its gradient (MiniMax-M1,
  arXiv 2506.13585)."""
  weight = jax.lax.stop_gradient(jnp.minimum(ratio_of(log_ratio), cap))
  return -weight * advantage * logp
