"""Files of a checkpoint in safetensors: which they are, and whether they are the same."""

from __future__ import annotations

from collections.abc import Iterable
import hashlib
import json
import os
import pathlib

END_BYTES = 1 << 20
"""Bytes of either end of a file that its digest reads."""


def indexed(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index (`*.index.json`) names.

  Raises:
    ValueError: it is no index.
    OSError: it cannot be read.
  """
  try:
    names = json.loads(index.read_text())['weight_map'].values()
    return [index.with_name(name) for name in sorted(set(names))]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{index} is no index of safetensors: expected JSON with 'weight_map'"
    ) from error


def digest(files: Iterable[pathlib.Path]) -> str:
  """Tells checkpoints apart by names, sizes, and both ends of every file.

  Raises:
    ValueError: a file cannot be read.
  """
  out = hashlib.sha256()
  for file in files:
    try:
      with open(file, 'rb') as handle:
        size = handle.seek(0, os.SEEK_END)
        for start in (0, max(size - END_BYTES, 0)):
          handle.seek(start)
          out.update(handle.read(END_BYTES))
    except OSError as error:
      raise ValueError(f'{file} cannot be read: {error}') from error
    out.update(f'{file.name} {size}'.encode())
  return out.hexdigest()
