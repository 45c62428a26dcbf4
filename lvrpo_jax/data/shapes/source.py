"""The data source of the shapes world; `data.examples` has the protocols that it implements."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from lvrpo_jax.data import examples
from lvrpo_jax.data import loader
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.data.shapes import plans
from lvrpo_jax.data.shapes import questions
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import wording
from lvrpo_jax.data.shapes import world

ALIGN_OFFSET = 1 << 30
"""First index of the prompts for alignment; none of them is a row of pretraining."""

THINK_OFFSET = 1 << 27
"""Distance between the training captions without a plan and those with one.

Held-out captions are the same for both.
"""

_SALTS = {'pretrain': 1, 'pair': 2, 'kind': 3}


class ShapesData:
  """Random access to examples of the shapes world; the index is the seed.

  Args:
    seed: seed of the world's items.
    generate_kinds, question_kinds: relative frequency of every kind in training.
    wrong, chatty: fractions of pretraining answers that are wrong, and that are off-format.
    plan: fraction of pretraining answers that begin with a plan, where one exists.
    describe: fraction of pretraining questions that ask for a description of the whole image.
    drop: probability of leaving the text out, to train guidance.
    tokenizer: tokenizer of the model; None makes one of the world's words.

  Raises:
    ValueError: a fraction is not between 0 and 1.
  """

  def __init__(
    self,
    seed: int,
    generate_kinds: dict[str, float],
    question_kinds: dict[str, float],
    wrong: float,
    chatty: float,
    plan: float,
    describe: float,
    drop: float,
    tokenizer: tokenizer_lib.Tokenizer | None = None,
  ):
    fractions = dict(wrong=wrong, chatty=chatty, plan=plan, describe=describe, drop=drop)
    for name, fraction in fractions.items():
      if not 0 <= fraction <= 1:
        raise ValueError(f'config.data.options.{name} is {fraction}; allowed: between 0 and 1')
    self.world = world.World(seed)
    self.seed = seed
    self._kinds = {
      tasks.GENERATE: _shares(generate_kinds),
      tasks.THINK_GENERATE: _shares(generate_kinds),
      tasks.UNDERSTAND: _shares(question_kinds),
      tasks.EDIT: _shares(dict.fromkeys(world.EDIT_KINDS, 1.0)),
    }
    self._wrong, self._chatty, self._plan = wrong, chatty, plan
    self._describe, self._drop = describe, drop
    self.tokenizer = tokenizer or tokenizer_lib.from_words(wording.vocabulary())

  @property
  def answers(self) -> tuple[str, ...]:
    """All words that answer a question."""
    return wording.ANSWERS

  @property
  def key_words(self) -> frozenset[str]:
    """Words with a visual meaning."""
    return wording.CONTENT_WORDS

  def read_answer(self, text: str) -> str | None:
    """Returns the answer that a reply states, or None."""
    return wording.read_answer(text)[0]

  def well_formed(self, text: str) -> bool:
    """Whether a reply has the form that the rules reward asks for: a word, or a plan and a word."""
    return wording.read_answer(text)[1]

  @property
  def image_size(self) -> int:
    """Pixels along each side of the images."""
    return render.SIZE

  def images(self, count: int) -> np.ndarray:
    """Renders uint8 (count, Y, X, 3) training images, to fit the autoencoder."""
    return np.stack([render.render(self.world.generate(i, 'train').scene) for i in range(count)])

  def size(self, task: str, split: str) -> int:
    """Returns a size that is above the rows that any run reads.

    Pretraining has twice as many, of which continued pretraining reads the second half.
    """
    del task
    return loader.EPOCH_ROWS * (2 if split == examples.PRETRAIN else 1)

  def example(self, task: str, split: str, index: int, category: str = '') -> examples.Example:
    """Returns an example; those of `ALIGN` are never examples of pretraining or evaluation."""
    if split == examples.PRETRAIN:
      return self._pretraining(task, index)
    if split == examples.ALIGN:
      index += ALIGN_OFFSET + (THINK_OFFSET if task == tasks.THINK_GENERATE else 0)
      return self._example(task, index, 'train', self._kind(task, index))
    return self._example(task, index, split, category)

  def categories(self, task: str, split: str) -> tuple[str, ...]:
    """Returns the kinds of held-out prompts of a task in a split."""
    if task == tasks.GENERATE:
      return world.UNSEEN_GENERATE_KINDS if split == examples.UNSEEN else world.GENERATE_KINDS
    if split == examples.UNSEEN:
      return ()
    if task == tasks.THINK_GENERATE:
      return world.GENERATE_KINDS
    return world.QUESTION_KINDS if task == tasks.UNDERSTAND else world.EDIT_KINDS

  def _pretraining(self, task: str, index: int) -> examples.Example:
    """Returns a row of pretraining: answers as found, and conditions sometimes left out."""
    if task == tasks.THINK_GENERATE:
      return self._example(task, index + THINK_OFFSET, 'train', self._kind(task, index))
    rng = self._rng('pretrain', index)
    example = self._example(task, index, 'train', self._kind(task, index))
    if task != tasks.UNDERSTAND:
      return dataclasses.replace(example, drop_text=bool(rng.random() < self._drop))
    item = self.world.question(index, 'train', example.kind)
    if rng.random() < self._describe:
      prompt, answer = questions.describe(item.scene, rng)
      return dataclasses.replace(example, prompt=prompt, answer=answer)
    answer = questions.web_answer(item, rng, self._wrong, self._chatty)
    if item.plan and rng.random() < self._plan:
      answer = f'think : {item.plan} ; {item.answer}'
    return dataclasses.replace(example, answer=answer)

  def image_text_pair(self, index: int) -> tuple[np.ndarray, str]:
    """Returns an image and a text that is true of it: a reading, statement, caption or phrase.

    Colours alone identify most images, so most readings leave them out: shapes are learned too.
    """
    rng = self._rng('pair', index)
    kind, attributes = rng.random(2)
    if kind < 0.65:
      item = self.world.question(index, 'train')
      image = render.render(item.scene)
      if kind < 0.15:
        return image, questions.statement(item.record, item.answer)
      if attributes < 0.55:
        words = ('shape',)
      elif attributes < 0.7:
        words = ('color',)
      else:
        words = ('color', 'shape')
      return image, plans.reading(item.scene.objects, words)
    item = self.world.generate(index, 'train')
    image = render.render(item.scene)
    if kind < 0.8:
      return image, item.caption
    one = item.scene.objects[rng.integers(len(item.scene.objects))]
    return image, str(rng.choice([one.color, one.shape, f'{one.color} {one.shape}']))

  def _rng(self, salt: str, index: int) -> np.random.Generator:
    return np.random.default_rng((self.seed, _SALTS[salt], index))

  def _kind(self, task: str, index: int) -> str:
    """Draws the kind of a training example by the configured frequencies."""
    names, bounds = self._kinds[task]
    return names[int(np.searchsorted(bounds, self._rng('kind', index).random(), side='right'))]

  def _example(self, task: str, index: int, split: str, kind: str) -> examples.Example:
    """Returns an item of the world, in one of its own splits, as an example of a task."""
    if task in (tasks.GENERATE, tasks.THINK_GENERATE):
      item = self.world.generate(index, split, kind)
      return examples.Example(
        index=index,
        prompt=item.caption,
        target=render.render(item.scene),
        kind=kind,
        meaning=item.meaning,
        answer=plans.reading(item.scene.objects) if task == tasks.THINK_GENERATE else None,
        spec=item.spec,
        questions=tuple(questions.derived_questions(item.spec)),
      )
    if task == tasks.EDIT:
      item = self.world.edit(index, split, kind)
      return examples.Example(
        index=index,
        prompt=item.instruction,
        source=render.render(item.scene),
        target=render.render(item.target),
        kind=kind,
        meaning=item.meaning,
        spec=item.spec,
        questions=tuple(questions.derived_questions(item.spec)),
      )
    item = self.world.question(index, split, kind)
    return examples.Example(
      index=index,
      prompt=item.question,
      source=render.render(item.scene),
      answer=item.answer,
      kind=kind,
      meaning=item.meaning,
      spec=item.record,
      statement=functools.partial(questions.statement, item.record),
    )


def _shares(weights: dict[str, float]) -> tuple[tuple[str, ...], np.ndarray]:
  """Returns names, and the upper bounds of all but the last of their shares of [0, 1)."""
  total = sum(weights.values())
  return tuple(weights), np.cumsum([weight / total for weight in weights.values()][:-1])
