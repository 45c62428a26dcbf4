"""What a remote judge was asked in an iteration, and waits that end where a run should stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent import futures
import time

import jax

from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards.remote import client as remote_client

POLL_S = 1.0
"""Seconds between two looks at whether to stop."""


LOOK_S = 0.02
"""Seconds between two looks at what devices compute."""


def until_ready(x: jax.Array, check: Callable[[], None]) -> None:
  """Waits for what devices compute, and asks meanwhile whether to stop; `check` may raise.

  Of several processes none may look by itself, for all have to stop at one place.
  """
  while jax.process_count() == 1 and not x.is_ready():
    check()
    time.sleep(LOOK_S)


class PendingRewards:
  """Scores to come, by task."""

  def __init__(self, scores: Mapping[str, futures.Future], check: Callable[[], None]):
    """Args:
    scores: futures of `client.Scored`.
    check: called now and then during a wait, by all processes; may raise.
    """
    self._scores, self._check = scores, check

  def __contains__(self, task: str) -> bool:
    return task in self._scores

  def result(self, task: str) -> remote_client.Scored:
    """Waits for the scores of a task. All processes call this, for the same tasks in turn.

    Raises:
      remote.JudgeUnavailable: the judge of this process is away, or that of another one: all of
        them stop after the same iteration.
      RuntimeError: anything else has failed, here (it is the cause) or in another process.
      Exception: what `check` raises.
    """
    future = self._scores[task]
    while multihost.any_process(bool(futures.wait([future], POLL_S).not_done)):
      self._check()
    error = future.exception()
    away = isinstance(error, remote_client.JudgeUnavailable)
    # A judge that is away ends a run with its state saved, which all processes do together. Of any
    # other error only the process that has it can say what it means, so nobody saves.
    if multihost.any_process(error is not None and not away):
      raise RuntimeError(
        f'the answers of the remote judge for {task!r} could not be used; the log '
        'of the process that has failed says why'
      ) from error
    if multihost.any_process(away):
      raise error or remote_client.JudgeUnavailable(
        f'the remote judge of another process failed for {task!r}; its log says why. Run the '
        'same command: the run resumes from its checkpoint.'
      )
    return future.result()

  def until_ready(self, x: jax.Array) -> None:
    """Waits for samples, see above."""
    until_ready(x, self._check)

  def metrics(self) -> dict[str, float]:
    """Counts of all calls, see `client.Scored`; after `result`."""
    return {
      f'judge/{task}/{name}': value
      for task, future in self._scores.items()
      for name, value in future.result().stats.items()
    }
