"""Rule rewards: checks of images, edits and answers that can be verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.data import detection
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import geneval
from lvrpo_jax.runtime import experiment as experiment_lib

COUNTING_THRESHOLD = 0.6
"""Detection score above which an object counts in counting prompts.

GenEval uses 0.9 for its own detector. The detectors of this project score 0.8 on an object that the
small autoencoder has decoded.
"""

EDIT_TOLERANCE = 12.0
"""Mean difference in grey levels that untouched pixels may have; the autoencoder causes 8."""

SURPLUS_PENALTY = 0.25
"""Subtracted from the reward of an image for every object beyond the count that was asked for.

GenEval's rules allow such objects outside counting prompts. A policy that is trained on the rules
alone then draws ever more objects, as one of them is likely to stand in the right place.
"""

FORMAT_SHARE = 0.2
"""Weight of the format in the text reward; the answer has the rest."""

RECORDS = {
  'images': {
    'tag': 'colors',
    'include': [{'class': 'circle', 'count': 1, 'color': 'red'}],
    'exclude': [],
  },
  'edits': {
    'tag': 'recolor',
    'keep': [],
    'gone': [[4, 4, 12, 12]],
    'new': [{'class': 'circle', 'color': 'red', 'region': 'top left'}],
  },
}
"""Examples of specs for error messages; `geneval` documents all fields."""

Spec = types.Json
"""A record of what an image should show."""
Pair = tuple[np.ndarray, np.ndarray]
"""Two arrays (B, G)."""


def targets(task: str, examples: Sequence[examples_lib.Example], reader: str) -> list[types.Json]:
  """Returns what the rules of a task compare with: right answers, or records of images and edits.

  Args:
    task: one of `tasks.TASKS`.
    examples: the prompts.
    reader: setting or stage that needs the rules, for the message.

  Raises:
    ValueError: an example has no answer or record.
  """
  field, form = {
    tasks.UNDERSTAND: ('answer', "a text such as 'red'"),
    tasks.EDIT: ('spec', f'a record such as {RECORDS["edits"]}'),
  }.get(task, ('spec', f'a record such as {RECORDS["images"]}'))
  out = [example.answer if field == 'answer' else example.spec for example in examples]
  for example, target in zip(examples, out):
    if target is None:
      raise ValueError(
        f'example {example.index} of {task!r} has no {field}, which the rules read '
        f'({reader}); expected {form}'
      )
  return out


def images(
  detector: detection.Detector,
  images_BGYXC: np.ndarray,
  specs: Sequence[Spec],
  strict: bool = False,
) -> Pair:
  """Scores generated images by their GenEval records: (correct_BG, parts_BG).

  `parts` is the soft score minus `SURPLUS_PENALTY` for every surplus object, at least 0.
  """
  B, G = images_BGYXC.shape[:2]
  found = detector(images_BGYXC.reshape(B * G, *images_BGYXC.shape[2:]))
  surplus = np.array(
    [
      geneval.surplus(objects, specs[i // G], counting_threshold=COUNTING_THRESHOLD)
      for i, objects in enumerate(found)
    ],
    np.float32,
  )
  height, width = images_BGYXC.shape[2:4]
  verdicts = [
    geneval.evaluate(
      objects,
      specs[i // G],
      strict=strict,
      size=(width, height),
      counting_threshold=COUNTING_THRESHOLD,
    )
    for i, objects in enumerate(found)
  ]
  correct, parts = _arrays(verdicts, B, G)
  return correct, np.maximum(parts - SURPLUS_PENALTY * surplus.reshape(B, G), 0.0)


def edits(
  detector: detection.Detector,
  source_BYXC: np.ndarray,
  images_BGYXC: np.ndarray,
  specs: Sequence[Spec],
  strict: bool = False,
) -> Pair:
  """Scores edited images: (correct_BG, parts_BG).

  The requested change should be made, and everything else should be unchanged.
  """
  B, G = images_BGYXC.shape[:2]
  flat = images_BGYXC.reshape(B * G, *images_BGYXC.shape[2:])
  verdicts = [
    geneval.evaluate_edit(
      source_BYXC[i // G], flat[i], objects, specs[i // G], strict=strict, tolerance=EDIT_TOLERANCE
    )
    for i, objects in enumerate(detector(flat))
  ]
  return _arrays(verdicts, B, G)


def answers(
  texts_BG: Sequence[Sequence[str]],
  answer_B: Sequence[str],
  read: Callable[[str], str | None],
  well_formed: Callable[[str], bool],
) -> Pair:
  """Scores replies: (correct_BG, format_BG).

  The first is 1 where the stated answer is right, the second where the reply has the asked form.

  Args:
    texts_BG: replies.
    answer_B: right answers.
    read: gives the answer that a reply states, or None; `read_answer` of the data source.
    well_formed: tells whether a reply has the asked form; of the data source.
  """
  correct = [[read(text) == answer for text in row] for row, answer in zip(texts_BG, answer_B)]
  return (
    np.array(correct, np.float32),
    np.array([[well_formed(text) for text in row] for row in texts_BG], np.float32),
  )


def text_reward(correct_BG: np.ndarray, format_BG: np.ndarray) -> np.ndarray:
  """Returns `(1 - s) correct + s format` with s = `FORMAT_SHARE`."""
  return (1 - FORMAT_SHARE) * correct_BG + FORMAT_SHARE * format_BG


def _arrays(verdicts: Sequence[geneval.Verdict], B: int, G: int) -> Pair:
  return (
    np.array([verdict.correct for verdict in verdicts], np.float32).reshape(B, G),
    np.array([verdict.parts for verdict in verdicts], np.float32).reshape(B, G),
  )


class Rules:
  """Scores images and edits by a detector, and texts by their answer.

  Facts are 'correct', whether everything that was asked for holds, and for texts also 'format'.
  """

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.HOST

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    """Finds the detector.

    Raises:
      ValueError: there is no such detector.
    """
    key = base.key_of(task, settings, experiment)
    self._task, self._graded, self._data = task, settings.graded, experiment.data
    self._reader = f'{key}.weight is {settings.weight}'
    self._detector = symbols.find(settings.detector, f'{key}.detector', detection.TABLE)

  def __call__(self, samples: base.Samples) -> base.Scores:
    """Scores samples by the records or answers of their examples."""
    wanted = targets(self._task, samples.examples, self._reader)
    if samples.are_texts:
      correct, well_formed = answers(
        samples.texts_BG, wanted, self._data.read_answer, self._data.well_formed
      )
      graded, facts = text_reward(correct, well_formed), dict(correct=correct, format=well_formed)
    else:
      images_BGYXC = samples.images_BGYXC
      if self._task == tasks.EDIT:
        source_BYXC = np.stack([cast(np.ndarray, x.source) for x in samples.examples])
        correct, graded = edits(self._detector, source_BYXC, images_BGYXC, wanted)
      else:
        correct, graded = images(self._detector, images_BGYXC, wanted)
      facts = dict(correct=correct)
    value = graded if self._graded else correct
    return base.Scores(value, np.ones(samples.shape, bool), facts)
