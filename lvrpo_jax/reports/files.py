"""Reads the files of a workdir, and knows the former names of metrics and stages."""

from __future__ import annotations

import json
import pathlib
from typing import Any

Json = dict[str, Any]
"""An object that `json.loads` returns."""

RENAMED = {
  'gap/': 'mismatch/',
  'refill/': 'dynamic_sampling/',
  'held_out/gold': 'held_out/reward',
  'loss/judge': 'loss/dual_encoder',
}
"""Former name of a metric: present name. A name that ends in '/' stands for all that begin so."""

RENAMED_STAGES = {'judge': 'dual_encoder'}
"""Former name of a stage: present name."""


def present_name(name: str) -> str:
  """Returns the present name of a metric."""
  for former, present in RENAMED.items():
    if name == former or former.endswith('/') and name.startswith(former):
      return present + name.removeprefix(former)
  return name


def present_stage(name: str) -> str:
  """Returns the present name of a stage."""
  return RENAMED_STAGES.get(name, name)


def read_json(path: pathlib.Path) -> Json:
  """Returns the object in a file, empty if there is no file.

  Raises:
    ValueError: the file is not a JSON object.
  """
  return _parse(path, _read_text(path)) if path.exists() else {}


def read_lines(path: pathlib.Path, growing: bool = True) -> list[Json]:
  """Returns the objects of a JSON-lines file, [] if there is no file.

  Args:
    path: the file.
    growing: leaves out a last line without its newline, which is still being written.

  Raises:
    ValueError: a line is not a JSON object.
  """
  texts = _read_text(path).split('\n') if path.exists() else []
  if texts and (growing or not texts[-1]):
    texts.pop()
  return [_parse(path, text) for text in texts]


def read_metrics(path: pathlib.Path, growing: bool = True) -> list[Json]:
  """Returns the lines of a `metrics.jsonl`, see `read_lines`, with present names.

  Raises:
    ValueError: a line is not a JSON object, or has no stage.
  """
  out = []
  for index, line in enumerate(read_lines(path, growing), 1):
    if not isinstance(line.get('stage'), str):
      raise ValueError(f"{path}: line {index} has no 'stage'")
    line = {present_name(name): value for name, value in line.items()}
    out.append({**line, 'stage': present_stage(line['stage'])})
  return out


def find_score(scores: Json, side: str, key: str) -> Json:
  """Returns the score `task/part` of a side ('before', 'after', ...), empty if there is none."""
  task, _, part = key.partition('/')
  return scores.get(side, {}).get(task, {}).get(part, {})


def _read_text(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}: {error}') from error


def _parse(path: pathlib.Path, text: str) -> Json:
  try:
    value = json.loads(text)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path}: expected a JSON object, got {type(value).__name__}')
  return value
