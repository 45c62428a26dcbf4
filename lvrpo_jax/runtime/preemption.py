"""Turns SIGTERM into a request to save and stop."""

from __future__ import annotations

from collections.abc import Callable
import itertools
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """Raised where a stage was asked to stop; the stage saves as it ends."""


class StopSignal:
  """Records SIGTERM inside its `with`, where the signal does not end the process at once.

  With several processes, JAX's coordination service receives the signal, also outside the `with`.
  It stops all processes at the same count: one more than the largest that any has reached when the
  signal comes. The counts are therefore those of calls in a process; the steps of a stage would
  not do, because a stage may begin at any step.
  """

  _calls = itertools.count(1)
  """Calls of this process, over all stages."""
  _agreed = False
  """Whether the coordination service has told this process to stop."""

  def __init__(self):
    """Prepares the signal; `with` sets the handler."""
    self._asked = False
    self._before: Callable[[int, FrameType | None], object] | int | None = None

  def __enter__(self) -> StopSignal:
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      # `signal` returns None for a handler outside Python, such as JAX's coordination service's.
      self._before = signal.signal(signal.SIGTERM, self._ask) or signal.SIG_DFL
    return self

  def __exit__(self, *exception_info: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, signal_number: int, frame: FrameType | None) -> None:
    del signal_number, frame
    self._asked = True

  def asked(self) -> bool:
    """Returns whether to save and stop; all processes must call it at the same points."""
    if jax.process_count() == 1:
      return self._asked
    if not StopSignal._agreed:  # The service returns True once only.
      StopSignal._agreed = multihost_utils.reached_preemption_sync_point(next(StopSignal._calls))
    return StopSignal._agreed

  def check(self) -> None:
    """Calls `asked`.

    Raises:
      Preempted: it returned True.
    """
    if self.asked():
      raise Preempted('asked to stop')
