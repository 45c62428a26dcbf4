"""One prompt and what is known about it."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt and all that is known about it.

  Attributes:
    index: its number; random draws for the row depend on it alone.
    prompt: caption, question or instruction.
    source: uint8 (Y, X, 3), the image shown, or None.
    target: uint8 (Y, X, 3), an image to draw, or None.
    answer: an answer, in pretraining as found, elsewhere the right one; of `THINK`, in pretraining,
      a plan of the image.
    kind: category for scores.
    meaning: canonical text of what is meant; prompts of one meaning count as one cluster.
    spec: record for rule rewards, JSON-able (GenEval's format for images).
    questions: (question, answer) pairs a judge may be asked about an image drawn for the prompt.
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
