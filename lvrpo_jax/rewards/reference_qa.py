"""What the reference is asked about images."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

from flax import struct
import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array


@struct.dataclass
class ReferenceQuestions:
  """Up to Q questions about each of the images that were drawn for B prompts.

  Attributes:
    questions: the first, the second, ... of every prompt, without pictures.
    blind: the same with the place of the image masked, or None.
    answer_BQ: numbers of the right answers.
    asked_BQ: False where a prompt has fewer questions.
    number_B: questions that a prompt has.
  """

  questions: tuple[types.Prompts, ...]
  blind: tuple[types.Prompts, ...] | None
  answer_BQ: Array
  asked_BQ: Array
  number_B: Array


def prompt_questions(
  job: experiment_lib.Experiment,
  examples: Sequence[examples_lib.Example],
  iteration: int,
  blind: bool,
) -> ReferenceQuestions:
  """What prompts imply about their images: `align.questions` of each, see `Example.inquiry`."""
  most = job.config.align.questions
  asked = [e.inquiry(iteration, most) for e in examples]
  asked_BQ = np.array([[q < len(pairs) for q in range(most)] for pairs in asked])
  filled = [pairs + [('', '')] * (most - len(pairs)) for pairs in asked]
  source = np.zeros((job.policy.image_size,) * 2 + (3,), np.uint8)
  rows = [
    [
      examples_lib.Example(e.index, pairs[q][0], source=source, answer='')
      for e, pairs in zip(examples, filled)
    ]
    for q in range(most)
  ]
  answer_BQ = np.array(
    [[job.data.answers.index(answer) if answer else 0 for _, answer in pairs] for pairs in filled],
    np.int32,
  )
  # The blank pictures stay here: what is asked about takes their place.
  bare = lambda row: job.place(
    job.encoder(tasks.UNDERSTAND, row).prompts.replace(
      source_BYXC=np.zeros((len(row), 0, 0, 3), np.uint8)
    )
  )
  return ReferenceQuestions(
    tuple(map(bare, rows)),
    tuple(bare(_masked(row)) for row in rows) if blind else None,
    *job.place((answer_BQ, asked_BQ, np.array([len(e.questions) for e in examples], np.float32))),
  )


def mask_images(
  job: experiment_lib.Experiment, examples: Sequence[examples_lib.Example]
) -> types.Prompts:
  """Questions whose images are masked."""
  return job.place(job.encoder(tasks.UNDERSTAND, _masked(examples)).prompts)


def _masked(examples: Sequence[examples_lib.Example]) -> list[examples_lib.Example]:
  return [dataclasses.replace(e, drop_vit=True) for e in examples]
