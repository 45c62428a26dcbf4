"""Where the rows of training come from: endless batches of examples and encoded prompts by task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools

import grain

from lvrpo_jax import types
from lvrpo_jax.data import examples
from lvrpo_jax.data import loader
from lvrpo_jax.data import tasks
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rollouts import engine
from lvrpo_jax.runtime import experiment as experiment_lib

Collate = Callable[[str], Callable[[Sequence[examples.Example]], types.Tree]]
"""Gives, for a task, the function that makes a batch of examples."""


def task_batches(
  experiment: experiment_lib.Experiment,
  split: str,
  sizes: Mapping[str, int],
  collate: Collate,
  offset: int = 0,
) -> dict[str, grain.DatasetIterator]:
  """Makes an endless iterator for every task, over this process's share of the rows.

  Args:
    experiment: what the run is made of.
    split: of the data source.
    sizes: rows of a batch by task, of all processes; tasks of 0 rows are left out.
    collate: makes batches.
    offset: index of the first row; behind the last row of the source the first one follows.

  Raises:
    ValueError: the rows of a task do not divide over the processes that hold different ones.
  """
  index, count = multihost.row_block(experiment.mesh)
  for task, size in sizes.items():
    if size % count:
      raise ValueError(
        f'{size} rows of task {task!r} a batch do not divide over {count} processes '
        f'with rows of their own; allowed: multiples of {count}'
      )
  return {
    task: loader.batches(
      loader.IndexedSource(
        functools.partial(_example, experiment.data, task, split, offset),
        experiment.data.size(task, split),
      ),
      size // count,
      collate(task),
      (index, count),
      experiment.config.data.prefetch,
    )
    for task, size in sizes.items()
    if size
  }


def _example(
  data: examples.DataSource, task: str, split: str, offset: int, index: int
) -> examples.Example:
  return data.example(task, split, (index + offset) % data.size(task, split))


def prompt_batches(experiment: experiment_lib.Experiment) -> dict[str, grain.DatasetIterator]:
  """Returns endless iterators over (examples, prompts) of every task of the alignment."""

  def encode(
    task: str, rows: Sequence[examples.Example]
  ) -> tuple[Sequence[examples.Example], types.Prompts]:
    return rows, experiment.encoder(task, rows).prompts

  return task_batches(
    experiment,
    examples.ALIGN,
    tasks.active(experiment.config.align.prompts),
    lambda task: functools.partial(encode, task),
  )


def next_prompts(
  experiment: experiment_lib.Experiment,
  data: Mapping[str, grain.DatasetIterator],
  names: Iterable[str],
) -> engine.PromptBatch:
  """Returns the next prompts of the named tasks."""
  drawn = {task: next(data[task]) for task in names}
  return engine.PromptBatch(
    examples={task: list(rows) for task, (rows, _) in drawn.items()},
    prompts={task: experiment.place(encoded) for task, (_, encoded) in drawn.items()},
  )
