"""Supervised losses: next token and flow matching."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from lvrpo_jax import ops

Array = jax.Array


def next_token(logits_V: Array, labels: Array, mask: Array) -> tuple[Array, Array]:
  """(sum, weight) of the cross entropy at masked places."""
  return ops.masked_sum(-ops.token_logp(logits_V, labels), mask)


def flow_matching(v: Array, target: Array) -> tuple[Array, Array]:
  """(sum, weight) over image tokens of the squared velocity error, averaged over channels."""
  error = jnp.mean(jnp.square(v - target), axis=-1)
  return jnp.sum(error), jnp.float32(error.size)
