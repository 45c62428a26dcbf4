"""Clipped policy-gradient losses of ratios, for texts and for images."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from lvrpo_jax import types

Array = types.Array

BOUND = 20.0
"""Bound on log-ratios; beyond it they have no gradient.

e^89 overflows float32, and infinity times 0 is NaN.
"""


def ratio_of(log_ratio: Array) -> Array:
  """Computes `e^x` with x limited to [-BOUND, BOUND]."""
  return jnp.exp(jnp.clip(log_ratio, -BOUND, BOUND))


def clipped_surrogate(log_ratio: Array, advantage: Array, low: float, high: float) -> Array:
  """Computes the PPO loss `-min(rho A, clip(rho, 1 - low, 1 + high) A)` (arXiv 1707.06347, eq. 7).

  `high > low` is DAPO's clip-higher (arXiv 2503.14476). Arguments broadcast.
  """
  ratio = ratio_of(log_ratio)
  return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def sequence_log_ratio(log_ratio_BGT: Array, mask_BGT: Array) -> Array:
  """Computes the mean log-ratio (B, G, 1) of a text's tokens, as GSPO does (arXiv 2507.18071)."""
  total = jnp.sum(jnp.where(mask_BGT, log_ratio_BGT, 0.0), axis=-1, keepdims=True)
  return total / jnp.maximum(jnp.sum(mask_BGT, axis=-1, keepdims=True), 1)


def cispo_surrogate(log_ratio: Array, logp: Array, advantage: Array, cap: float) -> Array:
  """Computes CISPO's loss `-sg(min(rho, cap)) A log p` (MiniMax-M1, arXiv 2506.13585).

  The weights are capped, and every token keeps its gradient.
  """
  weight = jax.lax.stop_gradient(jnp.minimum(ratio_of(log_ratio), cap))
  return -weight * advantage * logp
