"""Mutual reward: how much an image tells about its text, by a frozen model's own understanding."""

from __future__ import annotations

import math

import jax
from jax import numpy as jnp

Array = jax.Array

SHARE = 0.05
"""Of a guess among the possible answers in q: one sure mistake should not drown a group."""


def log_q(logits_A: Array, answer: Array) -> Array:
  """`log q(answer)` in nats: the model's, mixed with a guess.

  `q = (1 - SHARE) p + SHARE / A`, where p is the model's among the A answers there may be. That is
  a distribution as well, and one of values that are bounded from below, which a bound on the
  logarithm alone would not be. Among all tokens p would also tell whether the model answers at once
  or thinks first, and pictures would be paid for that.

  Args:
    logits_A: of the first tokens of the answers, in which these differ.
    answer: its number, (...).
  """
  p_A = jax.nn.softmax(logits_A.astype(jnp.float32), axis=-1)
  p = jnp.take_along_axis(p_A, answer[..., None], axis=-1)[..., 0]
  return jnp.log((1 - SHARE) * p + SHARE / logits_A.shape[-1])


def gain(seen_A: Array, blind_A: Array, answer: Array) -> Array:
  """`log q(answer | image, question) - log q(answer | question)`, in nats.

  Where the answers A to questions Q follow from the text T of a prompt, and the image V was drawn
  for it, the mean of `log q(A | V, Q)` plus the entropy of A given Q is at most I(A; V | Q), which
  is at most I(T; V), for any q, also a product over the questions (Barber and Agakov 2003, eq. 3).
  What is subtracted here is the model's own cross-entropy instead, no less than that entropy: a
  constant of the prompts, by which the mean may exceed the information. For answers that the policy
  chose this is a pointwise information, and no bound.

  Args:
    seen_A: logits (..., A) of the answers after image and question, see `log_q`.
    blind_A: the same after the question alone; broadcasts.
    answer: number (...) of the answer; negative where there is none, which is worth the least.
  """
  known = jnp.maximum(answer, 0)
  value = log_q(seen_A, known) - log_q(jnp.broadcast_to(blind_A, seen_A.shape), known)
  return jnp.where(answer < 0, math.log(SHARE / seen_A.shape[-1]), value)


def total(gain_QBG: Array, asked_BQ: Array, number_B: Array) -> Array:
  """Information (B, G) of all of a prompt's questions, from those that were asked.

  With all of them asked it is the sum; with some, by turns, its mean over iterations is.

  Args:
    asked_BQ: False where a prompt has fewer questions.
    number_B: questions that a prompt has.
  """
  weight_QB1 = asked_BQ.T[..., None].astype(jnp.float32)
  found_BG = jnp.sum(gain_QBG * weight_QB1, axis=0)
  return found_BG * (number_B[:, None] / jnp.maximum(jnp.sum(weight_QB1, axis=0), 1.0))
