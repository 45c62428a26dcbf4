"""Knowledge reward: a judge that answers questions agrees with what should be seen."""

from __future__ import annotations

import jax
from jax import numpy as jnp

Array = jax.Array


def answer_probabilities(logits_V: Array, candidates_A: Array) -> Array:
  """Probability of every candidate answer (..., A), renormalised over the candidates.

  Args:
    logits_V: the judge's logits for the first token of its answer.
    candidates_A: token ids of the answers it may give.
  """
  return jax.nn.softmax(logits_V[..., candidates_A].astype(jnp.float32), axis=-1)


def agreement(probability_BGQA: Array, answer_BQ: Array, asked_BQ: Array) -> Array:
  """Mean probability (B, G) of the right answers over the questions that were asked.

  Args:
    answer_BQ: number of the right answer among the candidates.
    asked_BQ: False where a prompt has fewer questions.
  """
  right_BGQ = jnp.take_along_axis(probability_BGQA, answer_BQ[:, None, :, None], axis=-1)[..., 0]
  weight_B1Q = asked_BQ[:, None].astype(jnp.float32)
  return jnp.sum(right_BGQ * weight_B1Q, axis=-1) / jnp.maximum(jnp.sum(weight_B1Q, axis=-1), 1.0)
