"""Mutual reward: how much an image tells about its text, by a frozen model's own understanding."""

from __future__ import annotations

import jax
from jax import numpy as jnp

Array = jax.Array

BOUND = 5.
"""Nats beyond which a reward says nothing more: one sure mistake should not drown a group."""


def gain(seen_V: Array, blind_V: Array, token: Array) -> Array:
  """`log q(answer | image, question) - log q(answer | question)`, in nats, within `BOUND`.

  Where the answer follows from the text T of a prompt and the image V was drawn for it, the mean of
  `log q(T | V)` plus the entropy of T is a lower bound on I(T; V) for any q (Barber and Agakov
  2003, eq. 3), and answers to questions about T are functions of T. For answers that the policy
  chose this is a pointwise information, and no bound.

  Args:
    seen_V: logits (..., V) of the answer's first token after image and question.
    blind_V: the same after the question alone; broadcasts.
    token: ids (...) of the answer's first token; negative where there is no answer, which is worth
      -BOUND.
  """
  pick = lambda logits: jnp.take_along_axis(
      jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1),
      jnp.broadcast_to(jnp.maximum(token, 0), logits.shape[:-1])[..., None], axis=-1)[..., 0]
  value = jnp.clip(pick(seen_V) - pick(jnp.broadcast_to(blind_V, seen_V.shape)), -BOUND, BOUND)
  return jnp.where(token < 0, -BOUND, value)
