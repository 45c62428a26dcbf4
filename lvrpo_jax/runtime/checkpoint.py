"""Orbax checkpoints of everything that a step changes, one folder a stage.

A resume has five steps: (1) build the state from the config and the seed; (2) read the newest
complete checkpoint of the stage into it; (3) set the data iterators to their saved states; (4) drop
metric lines beyond the restored step; (5) go on. All randomness is a function of the seed and of
counters inside the state, so nothing else has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import copy
import math
import pathlib
from typing import Any

from absl import logging
from etils import epath
import jax
from jax.experimental import multihost_utils
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lvrpo_jax import types
from lvrpo_jax.parallel import multihost


class _Manager(ocp.CheckpointManager):
  """Leaves preemption to `StopSignal`, which counts its calls where Orbax would count steps."""

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def _score(metrics: Mapping[str, float]) -> float:
  return metrics['score']


class Checkpoints:
  """Saves and restores a stage asynchronously: a state (arrays) and a record (JSON)."""

  def __init__(self, folder: pathlib.Path, keep: int = 2, best: int = 0):
    """Opens a folder, of which the newest `keep` and the `best` of highest score are kept."""
    self._folder = folder.resolve()
    # Saves that were cut off with their process, listed here because the manager may delete them.
    self._cut_off = sorted(path.name for path in self._folder.glob('[0-9]*.orbax-checkpoint-tmp*'))
    policies: list[preservation_policy.PreservationPolicy] = [preservation_policy.LatestN(keep)]
    if best:
      policies.append(
        preservation_policy.BestN(
          get_metric_fn=_score,
          n=best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._manager = _Manager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        create=True,
        best_fn=_score if best else None,
        enable_async_checkpointing=True,
      ),
    )

  def latest(self) -> int | None:
    """Returns the step of the newest complete checkpoint."""
    return self._manager.latest_step()

  def save(
    self, step: int, state: types.Tree, record: dict[str, Any], score: float = math.nan
  ) -> None:
    """Starts to save a checkpoint.

    When this returns, the state may be donated and the record changed.

    Args:
      step: index of the checkpoint.
      state: arrays.
      record: what JSON can hold.
      score: by which the best checkpoints are kept; NaN for none.
    """
    record = copy.deepcopy(record)  # Orbax writes it later, in a thread.
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
      metrics={'score': float(score)} if math.isfinite(score) else None,
    )

  def record(self) -> dict[str, Any] | None:
    """Returns the newest record alone, None where there is none that can be read."""
    step = self.latest()
    try:
      return None if step is None else _read_record(self._folder / str(step))
    except (OSError, ValueError):
      return None

  def best(self) -> int | None:
    """Returns the step of the kept checkpoint of highest score; of equals, the newest."""
    self._manager.wait_until_finished()
    scores = [
      (metrics['score'], step)
      for step in self._manager.all_steps()
      if (metrics := self._manager.metrics(step))
    ]
    return max(scores)[1] if scores else None

  def restore(
    self, target: types.Tree, newest: int | None = None
  ) -> tuple[types.Tree, dict[str, Any]] | None:
    """Reads the newest complete checkpoint.

    A save that was cut off is skipped, with a warning. A checkpoint that cannot be read is renamed
    to `<step>.unreadable<n>`, with a warning, and the one before is used. The same step can then be
    saved again.

    Args:
      target: the state's shapes, dtypes and shardings.
      newest: largest step that is read; None for any.

    Returns:
      (state, record), the state laid out like `target`; None where nothing has been saved.

    Raises:
      ValueError: a checkpoint holds other arrays than `target`, or none can be read. No file is
        changed.
    """
    self._manager.wait_until_finished()
    steps = multihost.broadcast_integers(
      [
        step
        for step in sorted(self._manager.all_steps(), reverse=True)
        if newest is None or step <= newest
      ]
    )
    latest = max(self._manager.all_steps(), default=-1)
    cut_off = [name for name in self._cut_off if int(name.split('.')[0]) > latest]
    if cut_off and jax.process_index() == 0:
      logging.warning(
        'in %s a save was cut off and is skipped: %s', self._folder, ', '.join(cut_off)
      )
    unreadable = []
    for step in steps:
      out, error = self._read(step, target)
      if error is None:
        if unreadable:
          self._set_aside(unreadable)
        return out
      logging.warning('checkpoint of step %d cannot be read (%s)', step, error)
      unreadable.append(step)
    if steps:
      raise ValueError(
        f'none of the checkpoints in {self._folder} can be read; bring one back '
        'from a copy, or delete the folder to begin this stage anew'
      )
    return None

  def _read(
    self, step: int, target: types.Tree
  ) -> tuple[tuple[types.Tree, dict[str, Any]] | None, str | None]:
    """Returns (state, record) of a step, and the reason why some process cannot read it.

    Handlers are used because Orbax's manager ends a restore with a barrier, at which processes that
    can read would wait for one that cannot.
    """
    folder, out, error = self._folder / str(step), None, None
    try:
      state = ocp.StandardCheckpointHandler().restore(
        epath.Path(folder / 'state'), args=ocp.args.StandardRestore(target)
      )
      out = state, _read_record(folder)
    except Exception as failure:  # A bare Exception is Orbax's where data of an array is lost.
      bare = type(failure) is Exception
      if not bare and not isinstance(failure, (OSError, ValueError, KeyError)):
        raise
      error = str(failure).split('\n', 1)[0]
    if not multihost.any_process(error is not None):
      return out, None
    different = differences(folder / 'state', target)
    if multihost.any_process(bool(different)):
      shown = different[:10] + [f'and {len(different) - 10} more'] * (len(different) > 10)
      raise ValueError(
        f'{folder} holds other arrays than this program; use another --workdir, or '
        'the code and the config that wrote it:\n  ' + '\n  '.join(shown)
      )
    return None, error or 'another process cannot'

  def _set_aside(self, steps: Sequence[int]) -> None:
    """Renames checkpoints, because Orbax saves no step up to the newest that it finds.

    All are renamed at once, so that no process changes the folder while another lists it.
    """
    if jax.process_index() == 0:
      for step in steps:
        index = len(list(self._folder.glob(f'{step}.unreadable*')))
        (self._folder / str(step)).rename(self._folder / f'{step}.unreadable{index}')
    multihost_utils.sync_global_devices('set_aside')
    self._manager.reload()

  def close(self) -> None:
    """Waits until everything is written, and closes the folder."""
    self._manager.wait_until_finished()
    self._manager.close()


def _read_record(folder: pathlib.Path) -> types.Json:
  return ocp.JsonCheckpointHandler().restore(epath.Path(folder / 'record'))


def differences(folder: pathlib.Path, target: types.Tree) -> list[str]:
  """Lists arrays whose names or shapes in a folder differ from those in `target`.

  The list is empty where the folder's metadata cannot be read.
  """

  def shapes(tree: types.Tree) -> dict[str, tuple[int, ...]]:
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }

  try:
    there = shapes(ocp.StandardCheckpointHandler().metadata(epath.Path(folder)).tree)
  except (OSError, ValueError, KeyError):
    return []
  here = shapes(target)
  return [
    f'{name}: {there.get(name, "absent")} there, {here.get(name, "absent")} here'
    for name in sorted(there.keys() | here.keys())
    if there.get(name) != here.get(name)
  ]
