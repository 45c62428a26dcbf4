"""Knowledge reward: probability that the reference answers questions about an image correctly."""

from __future__ import annotations

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array


def answer_probabilities(logits_V: Array, candidates_A: Array | np.ndarray) -> Array:
  """Computes the probability of every candidate answer (..., A), renormalised over the candidates.

  Args:
    logits_V: the reference's logits for the first token of its answer.
    candidates_A: token ids of the answers it may give.
  """
  return jax.nn.softmax(logits_V[..., candidates_A].astype(jnp.float32), axis=-1)


def agreement(probability_BGQA: Array, answer_BQ: Array, asked_BQ: Array) -> Array:
  """Averages the probabilities of the right answers over the questions that were asked, (B, G).

  Args:
    probability_BGQA: of every candidate answer.
    answer_BQ: index of the right answer among the candidates.
    asked_BQ: False where a prompt has fewer questions.
  """
  right_BGQ = jnp.take_along_axis(probability_BGQA, answer_BQ[:, None, :, None], axis=-1)[..., 0]
  weight_B1Q = asked_BQ[:, None].astype(jnp.float32)
  return jnp.sum(right_BGQ * weight_B1Q, axis=-1) / jnp.maximum(jnp.sum(weight_B1Q, axis=-1), 1.0)


class Knowledge(reference_qa.ReferenceReward):
  """Scores samples by the answers of the frozen reference.

  An image gets the mean probability of the right answers to the questions that its prompt implies.
  A text gets the probability of the answer that it states.
  """

  def prepare(self, samples: base.Samples) -> base.Prepared:
    """Encodes questions about images, or finds the indices (B, G) of the answers of texts."""
    if samples.are_texts:
      return base.Prepared(stated_answers(self._experiment, samples))
    asked = reference_qa.prompt_questions(
      self._experiment, samples.examples, samples.iteration, self._questions, blind=False
    )
    return base.Prepared(asked, np.array([bool(x.questions) for x in samples.examples]))

  def __call__(
    self,
    params: types.Params,
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: types.Tree,
  ) -> Array:
    """Returns probabilities (B, G)."""
    del params
    if tasks.BY_NAME[self._task].output == tasks.TEXT:
      seen_BV = reference_qa.first_token(self._experiment, frozen, samples.prompts)
      probability_BA = answer_probabilities(seen_BV, self._answer_ids)
      stated = jnp.take_along_axis(probability_BA, jnp.maximum(inputs, 0), axis=-1)
      return jnp.where(inputs >= 0, stated, 0.0)
    B, G = samples.outputs.shape[:2]

    def probabilities(questions: types.Prompts, blind: types.Tree, answer_B: Array) -> Array:
      del blind, answer_B
      seen_RV = reference_qa.seen_logits(self._experiment, frozen, samples.outputs, questions)
      return answer_probabilities(seen_RV, self._answer_ids).reshape(B, G, -1)

    probability_QBGA = reference_qa.map_questions(probabilities, inputs)
    return agreement(jnp.moveaxis(probability_QBGA, 0, 2), inputs.answer_BQ, inputs.asked_BQ)


def stated_answers(experiment: experiment_lib.Experiment, samples: base.Samples) -> np.ndarray:
  """Finds the indices (B, G) of the answers that texts state; -1 for none of `data.answers`."""
  data = experiment.data
  index_of: dict[str | None, int] = {answer: index for index, answer in enumerate(data.answers)}
  return np.array(
    [[index_of.get(data.read_answer(text), -1) for text in row] for row in samples.texts_BG],
    np.int32,
  )
