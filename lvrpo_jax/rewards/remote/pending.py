"""Awaits the scores of remote rewards, and interrupts a wait where a run should stop."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from concurrent import futures
import time

import jax

from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards.remote import client as remote_client

POLL_S = 1.0
"""Seconds between two calls of `check` while scores are awaited."""


LOOK_S = 0.02
"""Seconds between two calls of `check` while devices compute."""


def until_ready(x: jax.Array, check: Callable[[], None]) -> None:
  """Waits until devices have computed an array, and calls `check`, which may raise, meanwhile.

  With several processes, no process may poll alone: all must stop at the same point.
  """
  # The stubs of JAX lack `is_ready`.
  while jax.process_count() == 1 and not x.is_ready():  # pyright: ignore[reportAttributeAccessIssue]
    check()
    time.sleep(LOOK_S)


class PendingRewards:
  """Holds futures of scores by task and name of the reward."""

  def __init__(
    self,
    scores: Mapping[tuple[str, str], futures.Future[remote_client.Scored]],
    check: Callable[[], None],
  ):
    """Keeps the futures.

    Args:
      scores: futures by (task, name).
      check: called now and then during a wait, by all processes; may raise.
    """
    self._scores, self._check = scores, check

  def result(self, task: str, name: str) -> remote_client.Scored:
    """Waits for the scores of a reward; all processes call this in the same order of rewards.

    Raises:
      client.JudgeUnavailable: the server of this or of another process is unavailable. All
        processes stop after the same iteration.
      RuntimeError: anything else has failed, here (it is the cause) or in another process.
      Exception: what `check` raises.
    """
    future = self._scores[task, name]
    while multihost.any_process(bool(futures.wait([future], POLL_S).not_done)):
      self._check()
    error = future.exception()
    unavailable = isinstance(error, remote_client.JudgeUnavailable)
    # An unavailable server ends a run with its state saved, which all processes do together. Any
    # other error is known to the process that has it alone, so no process saves.
    if multihost.any_process(error is not None and not unavailable):
      raise RuntimeError(
        f'the answers of the remote judge for {task!r} could not be used; the log '
        'of the process that has failed says why'
      ) from error
    if multihost.any_process(unavailable):
      raise error or remote_client.JudgeUnavailable(
        f'the remote judge of another process failed for {task!r}; its log says why. Run the '
        'same command: the run resumes from its checkpoint.'
      )
    return future.result()

  def until_ready(self, x: jax.Array) -> None:
    """Waits until devices have computed an array, see the function `until_ready`."""
    until_ready(x, self._check)

  def metrics(self) -> dict[str, float]:
    """Returns the counts of all calls, see `client.Scored`; call it after `result`.

    They are named 'judge/<task>/<count>', with the reward's name in between where a task has more
    than one remote reward.
    """
    rewards = collections.Counter(task for task, _ in self._scores)
    return {
      f'judge/{task if rewards[task] == 1 else f"{task}/{reward}"}/{name}': value
      for (task, reward), future in self._scores.items()
      for name, value in future.result().stats.items()
    }
