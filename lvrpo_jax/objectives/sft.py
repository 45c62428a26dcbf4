"""Supervised losses: next-token prediction and flow matching."""

from __future__ import annotations

from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types

Array = types.Array


def next_token(logits_V: Array, labels: Array, mask: Array) -> tuple[Array, Array]:
  """Returns (sum, weight) of the cross entropy at the places where `mask` is True."""
  return ops.masked_sum(-ops.token_logp(logits_V, labels), mask)


def flow_matching(v: Array, target: Array) -> tuple[Array, Array]:
  """Returns (sum, weight) over image tokens of the squared velocity error, a mean over channels."""
  error = jnp.mean(jnp.square(v - target), axis=-1)
  return jnp.sum(error), jnp.float32(error.size)
