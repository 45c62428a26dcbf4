"""SIGTERM as a request to save and stop."""

from __future__ import annotations

import itertools
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """A stage was asked to stop; it saves on the way out."""


class StopSignal:
  """Inside its `with`, SIGTERM asks for a save instead of ending the process at once.

  Several processes agree through JAX's coordination service, which listens itself, also outside.
  It stops all of them at one number, the largest that any has reached as the signal comes and one
  more, so the numbers have to be those of the calls: steps of a stage begin anywhere.
  """

  _calls = itertools.count(1)  # Of this process.
  _agreed = False

  def __init__(self):
    self._asked = False
    self._before: Any = None

  def __enter__(self) -> StopSignal:
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      # It is None of a handler that is not Python's, such as that of JAX's coordination service.
      self._before = signal.signal(signal.SIGTERM, self._ask) or signal.SIG_DFL
    return self

  def __exit__(self, *exception_info: object):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _ask(self, number: int, frame: Any):
    del number, frame
    self._asked = True

  def asked(self) -> bool:
    """Whether to save and stop; every one of several processes calls it at the same places."""
    if jax.process_count() == 1:
      return self._asked
    if not StopSignal._agreed:  # The service says so once.
      StopSignal._agreed = multihost_utils.reached_preemption_sync_point(next(StopSignal._calls))
    return StopSignal._agreed

  def check(self):
    """Asks.

    Raises:
      Preempted: `asked`.
    """
    if self.asked():
      raise Preempted('asked to stop')
