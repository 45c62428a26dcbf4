"""State of one call to a remote judge, shared by the threads that work on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import threading
import time

from lvrpo_jax.rewards.remote import http as remote_http
from lvrpo_jax.rewards.remote import protocols as remote_protocols


class Call:
  """Collects the verdicts of one `Judge.submit`, by the content of samples.

  Attributes:
    start, deadline: values of `time.monotonic()`.
    over: set when all verdicts are there, or nobody waits for them any more.
    refused: whether the last failure was a status that no retry changes.
    retried: number of retries.
    last_error: of the last failure, for messages.
    last_reply: start of the last reply that lacked a value.
    broken: an unexpected error of this program.
    verdicts: values and causes.
  """

  def __init__(self, deadline_s: float):
    """Starts the clock; the deadline is in seconds from now."""
    self.start = time.monotonic()
    self.deadline = self.start + deadline_s
    self.over = threading.Event()
    self.refused = False
    self.retried = 0
    self.last_error = 'no complete reply within the deadline'
    self.last_reply = ''
    self.broken: Exception | None = None
    self.verdicts: dict[str, remote_protocols.Verdict] = {}
    self._lock = threading.Lock()
    self._waiting: set[str] = set()

  def expect(self, keys: Sequence[str]) -> None:
    """Names the verdicts that are missing; with none, the call is over."""
    self._waiting = set(keys)
    if not keys:
      self.over.set()

  def settle(self, verdicts: Mapping[str, remote_protocols.Verdict]) -> None:
    """Takes verdicts; those that come after the deadline are dropped."""
    with self._lock:
      if not self.over.is_set():
        self.verdicts.update(verdicts)
        self._waiting -= verdicts.keys()
        if not self._waiting:
          self.over.set()

  def note(self, failure: remote_http.Failure, again: bool = True) -> None:
    """Records a failed try; `again` if another one follows."""
    with self._lock:
      self.last_error, self.refused = str(failure), failure.refused
      self.retried += again

  def stop(self, error: Exception | None = None) -> None:
    """Ends the call, with an unexpected error or none."""
    with self._lock:
      self.broken = self.broken or error
      self.over.set()
