"""Mutual reward: how much an image tells about its text, by a frozen model's own understanding."""

from __future__ import annotations

import math

import jax
from jax import numpy as jnp

Array = jax.Array

SHARE = .05
"""Of a guess among the possible answers in q: one sure mistake should not drown a group."""


def log_q(logits_V: Array, token: Array, candidates: int) -> Array:
  """`log q(answer)` in nats: the model's, mixed with a guess.

  `q = (1 - SHARE) p + SHARE / candidates` on the answers. That is a distribution as well, of values
  that are bounded from below, which a bound on the logarithm alone would not be.

  Args:
    logits_V: of the answer's first token.
    token: its id, (...).
    candidates: number of possible answers, which differ in their first tokens.
  """
  logp = jax.nn.log_softmax(logits_V.astype(jnp.float32), axis=-1)
  p = jnp.exp(jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0])
  return jnp.log((1 - SHARE) * p + SHARE / candidates)


def gain(seen_V: Array, blind_V: Array, token: Array, candidates: int) -> Array:
  """`log q(answer | image, question) - log q(answer | question)`, in nats.

  Where the answer follows from the text T of a prompt and the image V was drawn for it, the mean of
  `log q(T | V)` plus the entropy of T is a lower bound on I(T; V) for any q (Barber and Agakov
  2003, eq. 3). Answers to questions about T are functions of T, and q may be a product over them.
  For answers that the policy chose this is a pointwise information, and no bound.

  Args:
    seen_V: logits (..., V) of the answer's first token after image and question.
    blind_V: the same after the question alone; broadcasts.
    token: ids (...) of the answer's first token; negative where there is no answer, which is worth
      the least.
    candidates: see `log_q`.
  """
  known = jnp.maximum(token, 0)
  blind_V = jnp.broadcast_to(blind_V, seen_V.shape)
  value = log_q(seen_V, known, candidates) - log_q(blind_V, known, candidates)
  return jnp.where(token < 0, math.log(SHARE / candidates), value)


def total(gain_QBG: Array, asked_BQ: Array, number_B: Array) -> Array:
  """Information (B, G) of all of a prompt's questions, from those that were asked.

  With all of them asked it is the sum; with some, by turns, its mean over iterations is.

  Args:
    asked_BQ: False where a prompt has fewer questions.
    number_B: questions that a prompt has.
  """
  weight_QB1 = asked_BQ.T[..., None].astype(jnp.float32)
  found_BG = jnp.sum(gain_QBG * weight_QB1, axis=0)
  return found_BG * (number_B[:, None] / jnp.maximum(jnp.sum(weight_QB1, axis=0), 1.))
