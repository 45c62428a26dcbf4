"""Mutual reward: information that an image gives about its text, as the reference reads it."""

from __future__ import annotations

import math

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import knowledge
from lvrpo_jax.rewards import reference_qa

Array = jax.Array

SHARE = 0.05
"""Weight in q of a uniform guess among the possible answers.

It bounds q from below, so that one confident mistake does not dominate a group.
"""


def log_q(logits_A: Array, answer: Array) -> Array:
  """Computes `log q(answer)` in nats, where q mixes the model's distribution with a uniform guess.

  `q = (1 - SHARE) p + SHARE / A`, where p is the model's probability among the A possible answers.
  q is a distribution with a lower bound; a bound on the logarithm alone would not leave one. A
  probability among all tokens would also measure whether the model answers at once or thinks first,
  and images would be rewarded for that.

  Args:
    logits_A: logits of the first tokens of the answers, which all differ.
    answer: index of the answer, (...).
  """
  p_A = jax.nn.softmax(logits_A.astype(jnp.float32), axis=-1)
  p = jnp.take_along_axis(p_A, answer[..., None], axis=-1)[..., 0]
  return jnp.log((1 - SHARE) * p + SHARE / logits_A.shape[-1])


def gain(seen_A: Array, blind_A: Array, answer: Array) -> Array:
  """Computes `log q(answer | image, question) - log q(answer | question)`, in nats.

  Let the answers A to questions Q follow from the text T of a prompt, and let the image V be drawn
  for it. The mean of `log q(A | V, Q)` plus the entropy of A given Q is then at most I(A; V | Q),
  which is at most I(T; V). This holds for any q, also for a product over the questions (Barber and
  Agakov 2003, eq. 3). Here the model's own cross-entropy takes the place of the entropy. It is no
  smaller, so the mean may exceed the information by a constant of the prompts. For answers that the
  policy chose, the value is a pointwise information and no bound.

  Args:
    seen_A: logits (..., A) of the answers after image and question, see `log_q`.
    blind_A: the same after the question alone; broadcasts.
    answer: index (...) of the answer; negative where there is none, which gets the least value.
  """
  known = jnp.maximum(answer, 0)
  value = log_q(seen_A, known) - log_q(jnp.broadcast_to(blind_A, seen_A.shape), known)
  return jnp.where(answer < 0, math.log(SHARE / seen_A.shape[-1]), value)


def total(gain_QBG: Array, asked_BQ: Array, count_B: Array) -> Array:
  """Estimates the information (B, G) of all questions of a prompt from those that were asked.

  If all questions are asked, it is their sum. If some are asked in turn, its mean over the
  iterations is that sum.

  Args:
    gain_QBG: see `gain`.
    asked_BQ: False where a prompt has fewer questions.
    count_B: number of questions of a prompt.
  """
  weight_QB1 = asked_BQ.T[..., None].astype(jnp.float32)
  found_BG = jnp.sum(gain_QBG * weight_QB1, axis=0)
  return found_BG * (count_B[:, None] / jnp.maximum(jnp.sum(weight_QB1, axis=0), 1.0))


class Mutual(reference_qa.ReferenceReward):
  """Scores samples by the information that an image gives about a text, under the reference.

  An image gets the `total` over the questions of its prompt. A text gets the `gain` of the answer
  that it states.
  """

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Encodes questions with and without images.

    For texts it gives the indices (B, G) of their answers, and the questions without images.
    """
    if samples.are_texts:
      blind = reference_qa.mask_images(self._experiment, samples.examples)
      return base.Prepared((knowledge.stated_answers(self._experiment, samples), blind))
    asked = reference_qa.prompt_questions(
      self._experiment, samples.examples, samples.iteration, self._questions, blind=True
    )
    return base.Prepared(asked, np.array([bool(x.questions) for x in samples.examples]))

  def __call__(
    self,
    params: types.Params,
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: types.Tree,
  ) -> Array:
    """Returns nats (B, G)."""
    del params
    if tasks.BY_NAME[self._task].output == tasks.TEXT:
      return self._of_answers(frozen, samples.prompts, *inputs)
    B, G = samples.outputs.shape[:2]

    def information(questions: types.Prompts, blind: types.Prompts, answer_B: Array) -> Array:
      seen_RV = reference_qa.seen_logits(self._experiment, frozen, samples.outputs, questions)
      blind_BV = reference_qa.blind_logits(self._experiment, frozen, samples.outputs, blind)
      return gain(
        seen_RV[:, self._answer_ids].reshape(B, G, -1),
        blind_BV[:, None, self._answer_ids],
        jnp.broadcast_to(answer_B[:, None], (B, G)),
      )

    return total(reference_qa.map_questions(information, inputs), inputs.asked_BQ, inputs.count_B)

  def _of_answers(
    self,
    frozen: base.RewardParams,
    prompts: types.Prompts,
    answer_BG: Array,
    blind: types.Prompts,
  ) -> Array:
    """Computes the `gain` of the answers that texts state."""
    shape = *answer_BG.shape, len(self._answer_ids)
    seen_BV, blind_BV = (
      reference_qa.first_token(self._experiment, frozen, asked) for asked in (prompts, blind)
    )
    return gain(
      jnp.broadcast_to(seen_BV[:, None, self._answer_ids], shape),
      jnp.broadcast_to(blind_BV[:, None, self._answer_ids], shape),
      answer_BG,
    )
