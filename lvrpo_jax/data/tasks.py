"""The tasks: modalities of their prompts and of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

TEXT, IMAGE = 'text', 'image'
"""Modalities."""

GENERATE, UNDERSTAND, EDIT, THINK_GENERATE = 'generate', 'understand', 'edit', 'think_generate'


class Task(NamedTuple):
  """A task.

  Attributes:
    name: as in the config.
    context: modalities of a prompt.
    output: modality that is scored.
    plans: True if a text stands between context and output and is sampled and trained with it.
  """

  name: str
  context: tuple[str, ...]
  output: str
  plans: bool = False


BY_NAME = {
  task.name: task
  for task in (
    Task(GENERATE, (TEXT,), IMAGE),
    Task(UNDERSTAND, (IMAGE, TEXT), TEXT),
    Task(EDIT, (IMAGE, TEXT), IMAGE),
    Task(THINK_GENERATE, (TEXT,), IMAGE, plans=True),
  )
}
"""Tasks by name, in the order in which they are sampled and logged."""

TASKS = tuple(BY_NAME)
"""Names of the tasks, in the same order."""

TEXT_FIRST = (UNDERSTAND, THINK_GENERATE)
"""Tasks whose rollouts start with a text, in the order in which they are sampled."""

PLAN = 'plan'
"""Name of the text half of `THINK_GENERATE`, where both halves of a trajectory are in one dict."""

TEXT_OUTPUTS = (UNDERSTAND, PLAN)
"""Names of outputs that are texts; all others are images."""


def writes_text(name: str) -> bool:
  """Whether a task samples a text, as its output or as a plan."""
  return BY_NAME[name].output == TEXT or BY_NAME[name].plans


def draws_image(name: str) -> bool:
  """Whether a task samples an image."""
  return BY_NAME[name].output == IMAGE


def active(counts: Mapping[str, int]) -> dict[str, int]:
  """Returns the tasks of a section such as `config.align.prompts` whose count is not 0."""
  return {task: counts[task] for task in TASKS if counts[task]}
