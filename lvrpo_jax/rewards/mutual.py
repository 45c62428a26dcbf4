"""Mutual reward: how much an image tells about its text, by a frozen model's own understanding."""

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
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array

SHARE = 0.05
"""Of a guess among the possible answers in q: one sure mistake should not drown a group."""


def log_q(logits_A: Array, answer: Array) -> Array:
  """`log q(answer)` in nats: the model's, mixed with a guess.

  `q = (1 - SHARE) p + SHARE / A`, where p is the model's among the A answers there may be. That is
  a distribution as well, and one of values that are bounded from below, which a bound on the
  logarithm alone would not be. Among all tokens p would also tell whether the model answers at once
  or thinks first, and images would be rewarded for that.

  Args:
    logits_A: of the first tokens of the answers, in which these differ.
    answer: its index, (...).
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
    answer: index (...) of the answer; negative where there is none, which is worth the least.
  """
  known = jnp.maximum(answer, 0)
  value = log_q(seen_A, known) - log_q(jnp.broadcast_to(blind_A, seen_A.shape), known)
  return jnp.where(answer < 0, math.log(SHARE / seen_A.shape[-1]), value)


def total(gain_QBG: Array, asked_BQ: Array, count_B: Array) -> Array:
  """Information (B, G) of all of a prompt's questions, from those that were asked.

  With all of them asked it is the sum; with some, by turns, its mean over iterations is.

  Args:
    asked_BQ: False where a prompt has fewer questions.
    count_B: questions that a prompt has.
  """
  weight_QB1 = asked_BQ.T[..., None].astype(jnp.float32)
  found_BG = jnp.sum(gain_QBG * weight_QB1, axis=0)
  return found_BG * (count_B[:, None] / jnp.maximum(jnp.sum(weight_QB1, axis=0), 1.0))


class Mutual:
  """Information that an image gives about its prompt, or about the answer, under the reference.

  Of an image, `total` over the questions of its prompt; of a text, the `gain` of the answer that it
  states.
  """

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.DEVICE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    self._task, self._experiment, self._questions = task, experiment, settings.questions
    self._answer_ids = reference_qa.answer_ids(experiment, f'config.align.rewards.{task}.mutual')

  def load(self, frozen: base.RewardParams) -> types.Params:
    """The reference is shared."""
    del frozen
    return ()

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Questions with and without images; of texts, the answers (B, G) and the blind questions."""
    if samples.are_texts:
      blind = reference_qa.mask_images(self._experiment, samples.examples)
      return base.Prepared((knowledge.stated_answers(self._experiment, samples), blind))
    asked = reference_qa.prompt_questions(
      self._experiment, samples.examples, samples.iteration, self._questions, blind=True
    )
    return base.Prepared(asked, np.array([bool(e.questions) for e in samples.examples]))

  def __call__(
    self,
    params: types.Params,
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: types.Tree,
  ) -> Array:
    """Nats (B, G)."""
    del params
    if tasks.BY_NAME[self._task].output == tasks.TEXT:
      return self._of_answers(frozen, samples.prompts, *inputs)
    B, G = samples.outputs.shape[:2]

    def one(questions, blind, answer_B):
      seen_RV = reference_qa.seen_logits(self._experiment, frozen, samples.outputs, questions)
      blind_BV = reference_qa.blind_logits(self._experiment, frozen, samples.outputs, blind)
      return gain(
        seen_RV[:, self._answer_ids].reshape(B, G, -1),
        blind_BV[:, None, self._answer_ids],
        jnp.broadcast_to(answer_B[:, None], (B, G)),
      )

    return total(reference_qa.map_questions(one, inputs), inputs.asked_BQ, inputs.count_B)

  def _of_answers(
    self,
    frozen: base.RewardParams,
    prompts: types.Prompts,
    answer_BG: Array,
    blind: types.Prompts,
  ) -> Array:
    shape = *answer_BG.shape, len(self._answer_ids)
    seen_BV, blind_BV = (
      reference_qa.first_token(self._experiment, frozen, asked) for asked in (prompts, blind)
    )
    return gain(
      jnp.broadcast_to(seen_BV[:, None, self._answer_ids], shape),
      jnp.broadcast_to(blind_BV[:, None, self._answer_ids], shape),
      answer_BG,
    )
