"""Examples, the protocols of data sources, and the table of named sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Protocol

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tokenizer as tokenizer_lib

TABLE = {'shapes': 'lvrpo_jax.data.shapes.source:ShapesData'}
"""Import paths of data sources by name."""

PRETRAIN, ALIGN, EVAL, UNSEEN = 'pretrain', 'align', 'eval', 'unseen'
"""Splits: two of training, which share no row, and two of held-out prompts.

The prompts of `EVAL` are of the kinds of training, those of `UNSEEN` are compositions that training
leaves out.
"""


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt, with the images, answers and records that belong to it.

  Attributes:
    index: index of the prompt in its source; random draws of the row depend on it alone.
    prompt: caption, question or instruction.
    source: uint8 (Y, X, 3), the image shown, or None.
    target: uint8 (Y, X, 3), the image to generate, or None.
    answer: the right answer; in pretraining an answer as found, which may be wrong, and for
      `THINK_GENERATE` a plan of the image; or None.
    kind: category for scores.
    meaning: canonical text of the prompt's content; prompts of one meaning count as one cluster.
    spec: JSON-able record for rule rewards (GenEval's format for images), or None.
    questions: (question, answer) pairs about an image generated for the prompt.
    statement: turns an answer into a statement about the source image, or None.
    drop_text, drop_vit, drop_latents: conditions that are left out, which trains guidance.
  """

  index: int
  prompt: str
  source: np.ndarray | None = None
  target: np.ndarray | None = None
  answer: str | None = None
  kind: str = ''
  meaning: str = ''
  spec: dict[str, types.Json] | None = None
  questions: tuple[tuple[str, str], ...] = ()
  statement: Callable[[str], str] | None = None
  drop_text: bool = False
  drop_vit: bool = False
  drop_latents: bool = False

  def asked(self, iteration: int) -> tuple[str, str]:
    """Returns the (question, answer) of an iteration, in turn; ('', '') if there is none."""
    return (self.inquiry(iteration, 1) or [('', '')])[0]

  def inquiry(self, iteration: int, most: int) -> list[tuple[str, str]]:
    """Returns the (question, answer) pairs of an iteration: all, or the next `most` in turn."""
    count = len(self.questions)
    return [self.questions[(iteration * most + i) % count] for i in range(min(most, count))]


class DataSource(Protocol):
  """Source of examples with random access; an example depends on its index alone.

  Some rewards and stages need further capabilities: `Answers`, `KeyWords`, `Pairs` and `Images`.

  Attributes:
    tokenizer: maps texts to ids.
  """

  tokenizer: tokenizer_lib.Tokenizer

  @property
  def image_size(self) -> int:
    """Pixels along each side of the images."""
    ...

  def size(self, task: str, split: str) -> int:
    """Returns the count of examples; indices start at 0."""
    ...

  def example(self, task: str, split: str, index: int, category: str = '') -> Example:
    """Returns an example of a task.

    Args:
      task: a name of `tasks.TASKS`.
      split: one of the splits above; answers of `PRETRAIN` may be wrong.
      index: from 0.
      category: of held-out examples, one of `categories`.
    """
    ...

  def categories(self, task: str, split: str) -> Sequence[str]:
    """Returns the categories of the held-out examples of a task in a split."""
    ...


class Answers(Protocol):
  """Source with a closed set of answers; rewards of texts by rules and knowledge need it."""

  @property
  def answers(self) -> Sequence[str]:
    """All answers to questions."""
    ...

  def read_answer(self, text: str) -> str | None:
    """Returns the answer that a reply states, or None."""
    ...

  def well_formed(self, text: str) -> bool:
    """Whether a reply has the form that its prompt demands."""
    ...


class KeyWords(Protocol):
  """Source whose texts have words with a visual meaning; the reward 'dense' needs it."""

  @property
  def key_words(self) -> frozenset[str]:
    """Words with a visual meaning."""
    ...


class Pairs(Protocol):
  """Source of true image-text pairs; the training of a dual encoder in the run needs it."""

  def image_text_pair(self, index: int) -> tuple[np.ndarray, str]:
    """Returns a uint8 image (Y, X, 3), and a text that is true of it."""
    ...


class Images(Protocol):
  """Source of images; the fit of an autoencoder in the run needs it."""

  def images(self, count: int) -> np.ndarray:
    """Returns uint8 training images (count, Y, X, 3)."""
    ...


class Source(DataSource, Answers, KeyWords, Pairs, Images, Protocol):
  """Source with all capabilities; a source that lacks some serves the stages that need none."""
