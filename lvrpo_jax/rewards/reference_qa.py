"""Asks the frozen reference questions about the images of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses

from flax import struct
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.rewards import base
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array


class ReferenceQuestions(struct.PyTreeNode):
  """Up to Q questions about each of the images that were sampled for B prompts.

  Attributes:
    questions: Q sets of one question a prompt, without images.
    blind: the same with the place of the image masked, or () where nothing reads them.
    answer_BQ: indices of the right answers.
    asked_BQ: False where a prompt has fewer questions.
    count_B: number of questions of a prompt.
  """

  questions: tuple[types.Prompts, ...]
  blind: tuple[types.Prompts, ...]
  answer_BQ: Array
  asked_BQ: Array
  count_B: Array


def answer_ids(experiment: experiment_lib.Experiment, key: str) -> np.ndarray:
  """Returns the first token of every possible answer, in the order of `data.answers`.

  Args:
    experiment: gives the tokenizer and the answers.
    key: config key of the reward that asks, for the message.

  Raises:
    ValueError: two answers begin with the same token, so that the first token cannot tell them
      apart.
  """
  encode, answers = experiment.data.tokenizer.encode, experiment.data.answers
  ids = np.array([encode(answer)[0] for answer in answers], np.int32)
  first: dict[int, str] = {}
  for token, answer in zip(ids.tolist(), answers):
    if token in first:
      raise ValueError(
        f'{key} reads the first token of an answer, and the answers {first[token]!r} and '
        f'{answer!r} of config.data.source begin with the same one; set {key}.weight to 0, or '
        'give answers that differ in their first token'
      )
    first[token] = answer
  return ids


class ReferenceReward:
  """What rewards that ask the frozen reference share: its answers, and no weights of their own."""

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.DEVICE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    """Looks up the first tokens of all answers.

    Raises:
      ValueError: two answers begin with the same token.
    """
    self._task, self._experiment, self._questions = task, experiment, settings.questions
    self._answer_ids = answer_ids(experiment, base.key_of(task, settings, experiment))

  def load(self, frozen: base.RewardParams) -> types.Params:
    """Returns (): the reference is shared."""
    del frozen
    return ()


def prompt_questions(
  experiment: experiment_lib.Experiment,
  examples: Sequence[examples_lib.Example],
  iteration: int,
  count: int,
  blind: bool,
) -> ReferenceQuestions:
  """Encodes `count` questions a prompt that its images should answer, see `Example.inquiry`.

  The arrays are NumPy arrays of this process's prompts.
  """
  asked = [example.inquiry(iteration, count) for example in examples]
  asked_BQ = np.array([[q < len(pairs) for q in range(count)] for pairs in asked])
  filled = [pairs + [('', '')] * (count - len(pairs)) for pairs in asked]
  source = np.zeros((experiment.policy.image_size,) * 2 + (3,), np.uint8)
  rows = [
    [
      examples_lib.Example(example.index, pairs[q][0], source=source, answer='')
      for example, pairs in zip(examples, filled)
    ]
    for q in range(count)
  ]
  answers = experiment.data.answers
  answer_BQ = np.array(
    [[answers.index(answer) if answer else 0 for _, answer in pairs] for pairs in filled], np.int32
  )
  return ReferenceQuestions(
    questions=tuple(_without_pixels(experiment, row) for row in rows),
    blind=tuple(_without_pixels(experiment, _masked(row)) for row in rows) if blind else (),
    answer_BQ=types.on_host(answer_BQ),
    asked_BQ=types.on_host(asked_BQ),
    count_B=types.on_host(np.array([len(example.questions) for example in examples], np.float32)),
  )


def mask_images(
  experiment: experiment_lib.Experiment, examples: Sequence[examples_lib.Example]
) -> types.Prompts:
  """Encodes questions whose images are masked."""
  return experiment.encoder(tasks.UNDERSTAND, _masked(examples)).prompts


def _without_pixels(
  experiment: experiment_lib.Experiment, row: Sequence[examples_lib.Example]
) -> types.Prompts:
  """Encodes questions and drops their blank images, whose place the sampled images take."""
  prompts = experiment.encoder(tasks.UNDERSTAND, row).prompts
  return prompts.replace(source_BYXC=np.zeros((len(row), 0, 0, 3), np.uint8))


def _masked(examples: Sequence[examples_lib.Example]) -> list[examples_lib.Example]:
  return [dataclasses.replace(example, drop_vit=True) for example in examples]


def first_token(
  experiment: experiment_lib.Experiment, frozen: base.RewardParams, prompts: types.Prompts
) -> Array:
  """Computes the reference's logits (B, V) of the first token of an answer."""
  policy = experiment.policy
  cache = policy.prefill(frozen.reference, frozen.vae, prompts)
  start = jnp.full((prompts.ids_BL.shape[0], 1, 1), policy.bos)
  return policy.text_logits(frozen.reference, cache, start)[:, 0, 0]


def seen_logits(
  experiment: experiment_lib.Experiment,
  frozen: base.RewardParams,
  images_BGYXC: Array,
  questions: types.Prompts,
) -> Array:
  """Computes logits (B * G, V) of the first token of the answers to one question a prompt.

  Each of the G images of a prompt is shown with its question.
  """
  G = images_BGYXC.shape[1]
  flat_RYXC = images_BGYXC.reshape(-1, *images_BGYXC.shape[2:])
  spread = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), questions)
  return first_token(experiment, frozen, spread.replace(source_BYXC=flat_RYXC))


def blind_logits(
  experiment: experiment_lib.Experiment,
  frozen: base.RewardParams,
  images_BGYXC: Array,
  blind: types.Prompts,
) -> Array:
  """Computes logits (B, V) of the first token of the answers to one question a prompt.

  The images are masked.
  """
  blank = jnp.zeros((images_BGYXC.shape[0], *images_BGYXC.shape[2:]), images_BGYXC.dtype)
  return first_token(experiment, frozen, blind.replace(source_BYXC=blank))


def _stack(*arrays: Array) -> Array:
  return jnp.stack(arrays)


def map_questions(
  function: Callable[[types.Prompts, types.Tree, Array], Array], asked: ReferenceQuestions
) -> Array:
  """Applies `function(questions, blind, answer_B)` to every question and stacks to (Q, ...).

  `blind` is () where there are none. Questions are asked one after the other and take the memory of
  one.
  """

  def stack(trees: tuple[types.Prompts, ...]) -> types.Tree:
    return jax.tree.map(_stack, *trees) if trees else ()

  inputs = stack(asked.questions), stack(asked.blind), asked.answer_BQ.T
  if len(asked.questions) > 1:
    return jax.lax.map(lambda question: function(*question), inputs)
  return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], inputs)))
