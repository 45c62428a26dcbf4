"""Rule rewards: verifiable facts about images, edits and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
"""Detection score above which an object counts in counting prompts. GenEval takes 0.9 for its own
detector; ours scores 0.8 on an object that has been through the small autoencoder."""

EDIT_TOLERANCE = 12.0
"""Mean grey levels by which untouched pixels may differ; the autoencoder's round trip takes 8."""

SURPLUS_PENALTY = 0.25
"""Taken from the reward of an image for every object more than the number asked for. GenEval's
rules allow them outside counting, so a policy that is paid by the rules alone draws more and more
objects: one of them will stand in the right place."""

FORMAT_SHARE = 0.2
"""Share of the text reward that pays the format; the rest pays the answer."""


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
"""What a spec looks like; see `geneval` for all that may stand there."""


def targets(task: str, examples: Sequence[examples_lib.Example], reader: str) -> list[Any]:
  """What the rules of a task compare with: right answers, or records of images and edits.

  Args:
    reader: what asks for the rules, for the message.

  Raises:
    ValueError: an example has none.
  """
  field, form = {
    tasks.UNDERSTAND: ('answer', "a text such as 'red'"),
    tasks.EDIT: ('spec', f'a record such as {RECORDS["edits"]}'),
  }.get(task, ('spec', f'a record such as {RECORDS["images"]}'))
  out = [e.answer if field == 'answer' else e.spec for e in examples]
  for e, target in zip(examples, out):
    if target is None:
      raise ValueError(
        f'example {e.index} of {task!r} has no {field}, which the rules read '
        f'({reader}); expected {form}'
      )
  return out


def images(
  detector: detection.Detector,
  images_BGYXC: np.ndarray,
  specs: Sequence[dict[str, Any]],
  strict: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """(correct_BG, parts_BG) of generated images under their GenEval records.

  `parts` is the soft score less `SURPLUS_PENALTY` for every surplus object, at least 0.
  """
  B, G = images_BGYXC.shape[:2]
  found = detector(images_BGYXC.reshape(B * G, *images_BGYXC.shape[2:]))
  surplus = np.array(
    [
      geneval.surplus(d, specs[i // G], counting_threshold=COUNTING_THRESHOLD)
      for i, d in enumerate(found)
    ],
    np.float32,
  )
  height, width = images_BGYXC.shape[2:4]
  verdicts = [
    geneval.evaluate(
      d, specs[i // G], strict=strict, size=(width, height), counting_threshold=COUNTING_THRESHOLD
    )
    for i, d in enumerate(found)
  ]
  correct, parts = _arrays(verdicts, B, G)
  return correct, np.maximum(parts - SURPLUS_PENALTY * surplus.reshape(B, G), 0.0)


def edits(
  detector: detection.Detector,
  source_BYXC: np.ndarray,
  images_BGYXC: np.ndarray,
  specs: Sequence[dict[str, Any]],
  strict: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """(correct_BG, parts_BG) of edited images: the asked change made and the rest unchanged."""
  B, G = images_BGYXC.shape[:2]
  flat = images_BGYXC.reshape(B * G, *images_BGYXC.shape[2:])
  verdicts = [
    geneval.evaluate_edit(
      source_BYXC[i // G], flat[i], d, specs[i // G], strict=strict, tolerance=EDIT_TOLERANCE
    )
    for i, d in enumerate(detector(flat))
  ]
  return _arrays(verdicts, B, G)


def answers(
  texts_BG: Sequence[Sequence[str]],
  answer_B: Sequence[str],
  read: Callable[[str], str | None],
  well_formed: Callable[[str], bool],
) -> tuple[np.ndarray, np.ndarray]:
  """(correct_BG, format_BG): the stated answer is right; the reply has the asked form.

  Args:
    read: the answer that a reply states, or None; `read_answer` of the data class.
    well_formed: whether a reply has the asked form; of the data class.
  """
  correct = [[read(text) == answer for text in row] for row, answer in zip(texts_BG, answer_B)]
  return (
    np.array(correct, np.float32),
    np.array([[well_formed(text) for text in row] for row in texts_BG], np.float32),
  )


def text_reward(correct_BG: np.ndarray, format_BG: np.ndarray) -> np.ndarray:
  """`(1 - s) correct + s format` with s = `FORMAT_SHARE`."""
  return (1 - FORMAT_SHARE) * correct_BG + FORMAT_SHARE * format_BG


def _arrays(verdicts: Sequence[geneval.Verdict], B: int, G: int) -> tuple[np.ndarray, np.ndarray]:
  return (
    np.array([v.correct for v in verdicts], np.float32).reshape(B, G),
    np.array([v.parts for v in verdicts], np.float32).reshape(B, G),
  )


class Rules:
  """The rules of a task as a reward: images and edits by a detector, texts by their answer.

  Facts are 'correct', whether everything asked for holds, and of texts also 'format'.
  """

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.HOST

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    key = f'config.align.rewards.{task}.rules'
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
        source_BYXC = np.stack([example.source for example in samples.examples])
        correct, graded = edits(self._detector, source_BYXC, images_BGYXC, wanted)
      else:
        correct, graded = images(self._detector, images_BGYXC, wanted)
      facts = dict(correct=correct)
    value = graded if self._graded else correct
    return base.Scores(value, np.ones(samples.shape, bool), facts)
