"""Examples, the sources that they come from, and the sources that have a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Protocol

import numpy as np

from lvrpo_jax.data import tokenizer as tokenizer_lib

TABLE = {'shapes': 'lvrpo_jax.data.shapes.source:ShapesData'}
"""Import paths of data sources by name."""

PRETRAIN, ALIGN, EVAL, UNSEEN = 'pretrain', 'align', 'eval', 'unseen'
"""Splits: two of training, with no row in common; held-out prompts, of the kinds of training or of
compositions that training leaves out."""


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt and all that is known about it.

  Attributes:
    index: its index in the source; random draws for the row depend on it alone.
    prompt: caption, question or instruction.
    source: uint8 (Y, X, 3), the image shown, or None.
    target: uint8 (Y, X, 3), an image to draw, or None.
    answer: an answer, in pretraining as found, elsewhere the right one; of `THINK`, in pretraining,
      a plan of the image.
    kind: category for scores.
    meaning: canonical text of what is meant; prompts of one meaning count as one cluster.
    spec: record for rule rewards, JSON-able (GenEval's format for images).
    questions: (question, answer) pairs about an image sampled for the prompt.
    statement: turns an answer into a statement about the source image.
    drop_text, drop_vit, drop_latents: conditions left out, to train guidance.
  """

  index: int
  prompt: str
  source: np.ndarray | None = None
  target: np.ndarray | None = None
  answer: str | None = None
  kind: str = ''
  meaning: str = ''
  spec: dict[str, Any] | None = None
  questions: tuple[tuple[str, str], ...] = ()
  statement: Callable[[str], str] | None = None
  drop_text: bool = False
  drop_vit: bool = False
  drop_latents: bool = False

  def asked(self, iteration: int) -> tuple[str, str]:
    """The (question, answer) of an iteration, one after the other; ('', '') if there is none."""
    return (self.inquiry(iteration, 1) or [('', '')])[0]

  def inquiry(self, iteration: int, most: int) -> list[tuple[str, str]]:
    """The (question, answer) pairs of an iteration: all, or `most` after those of the last one."""
    number = len(self.questions)
    return [self.questions[(iteration * most + i) % number] for i in range(min(most, number))]


class DataSource(Protocol):
  """Random access to examples: the index is all that an example depends on.

  Some rewards and stages ask for more, see `Answers`, `KeyWords`, `Pairs` and `Images`.

  Attributes:
    tokenizer: from texts to ids.
  """

  tokenizer: tokenizer_lib.Tokenizer

  @property
  def image_size(self) -> int:
    """Pixels along each side of the images."""
    ...

  def size(self, task: str, split: str) -> int:
    """Number of examples; indices run from 0."""
    ...

  def example(self, task: str, split: str, index: int, category: str = '') -> Example:
    """An example of a task; held-out ones of a category. In `PRETRAIN` answers are as found."""
    ...

  def categories(self, task: str, split: str) -> Sequence[str]:
    """Categories of the held-out examples of a task in a split."""
    ...


class Answers(Protocol):
  """A source that tells what a reply states; asked for by rules and knowledge of texts."""

  @property
  def answers(self) -> Sequence[str]:
    """All answers to questions."""
    ...

  def read_answer(self, text: str) -> str | None:
    """The answer that a reply states, or None."""
    ...

  def well_formed(self, text: str) -> bool:
    """Whether a reply has the form that was asked for."""
    ...


class KeyWords(Protocol):
  """A source whose texts have words with a visual meaning; asked for by the reward 'dense'."""

  @property
  def key_words(self) -> frozenset[str]:
    """Words with a visual meaning."""
    ...


class Pairs(Protocol):
  """A source of true pairs; asked for where a dual encoder is trained in the job."""

  def image_text_pair(self, index: int) -> tuple[np.ndarray, str]:
    """A uint8 image (Y, X, 3), and a text that is true of it."""
    ...


class Images(Protocol):
  """A source of images; asked for where an autoencoder is fitted in the job."""

  def images(self, count: int) -> np.ndarray:
    """uint8 (count, Y, X, 3) training images."""
    ...


class Source(DataSource, Answers, KeyWords, Pairs, Images, Protocol):
  """A source with all capabilities. One that lacks some serves what does not ask for them."""
