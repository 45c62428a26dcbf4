"""Keeps values of a remote judge by content, in memory and in a file."""

from __future__ import annotations

import collections
import fcntl
import json
import math
import pathlib
import threading

from absl import logging

MOST = 100_000
"""Values held in memory, about 20 MB; the file is not bounded."""


class Cache:
  """Holds the values used last, by key.

  The file, if there is one, holds one JSON object a line, {"key": "<hex>", "value": 0.7}, and is
  only appended to. A line that a crash cut short is skipped. The file is locked until `close` or
  the end of the process, so that no process repairs a line that another is still writing.
  """

  def __init__(self, path: str):
    """Reads the file, which is created with its folders if it is missing.

    Args:
      path: of the file; '' keeps values in memory alone.

    Raises:
      BlockingIOError: another cache on this host has it open.
      OSError: it cannot be read, written or locked.
    """
    self._values: collections.OrderedDict[str, float] = collections.OrderedDict()
    self._lock = threading.Lock()
    self._path, self._file = path, None
    if not path:
      return
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    # It stays open until `close`.
    self._file = open(path, 'ab', buffering=0)  # noqa: SIM115
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # It ends with the process.
    except OSError:
      self._close()
      raise
    line = b'\n'
    with open(path, 'rb') as lines:
      for line in lines:
        self._read(line)
    if not line.endswith(b'\n'):
      self._file.write(b'\n')  # Else the next value would be lost with the torn line.

  def get(self, key: str) -> float | None:
    """Returns the value of a key, or None."""
    with self._lock:
      if key in self._values:
        self._values.move_to_end(key)
      return self._values.get(key)

  def put(self, key: str, value: float) -> None:
    """Keeps a finite value; where the disk cannot be written to, in memory alone from then on."""
    with self._lock:
      self._keep(key, value)
      if self._file is None:
        return
      line = json.dumps({'key': key, 'value': value}).encode() + b'\n'
      try:
        if self._file.write(line) != len(line):
          raise OSError('the disk is full')
      except OSError as error:
        logging.warning(
          '%s cannot be written (%s); later values are kept in memory alone', self._path, error
        )
        self._close()

  def close(self) -> None:
    """Closes the file; values are kept in memory alone from then on."""
    with self._lock:
      self._close()

  def _close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None

  def _keep(self, key: str, value: float) -> None:
    self._values[key] = value
    self._values.move_to_end(key)
    if len(self._values) > MOST:
      self._values.popitem(last=False)

  def _read(self, line: bytes) -> None:
    """Takes the value of a line of the file; a line of another form is skipped."""
    try:
      entry = json.loads(line)
      key, value = entry['key'], entry['value']
    except (ValueError, TypeError, KeyError):
      return
    if isinstance(key, str) and isinstance(value, float) and math.isfinite(value):
      self._keep(key, value)
