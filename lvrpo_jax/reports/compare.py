"""Compares the scores and metrics of two runs, leaf by leaf.

    python -m lvrpo_jax.reports.compare runs/a runs/b
    python -m lvrpo_jax.reports.compare runs/a/scores.json runs/b/scores.json
    python -m lvrpo_jax.reports.compare runs/a runs/b --first=5 --tolerance=1e-6

Of two workdirs it compares `scores.json` and `metrics.jsonl`; of two files, those. Line n of a
stage in one `metrics.jsonl` is compared with line n of that stage in the other. Times and the
number of compiled programs are left out. Former names of metrics and stages are taken for the
present ones, see `files.RENAMED`.

Prints how many leaves are equal and different, the largest absolute difference, and the first ten
different leaves with both values. The exit status is 0 when all leaves are equal, 1 when some
differ, and 2 when a file is missing or invalid.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterator, Sequence
import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from lvrpo_jax.reports import files

SCORES, METRICS = 'scores.json', 'metrics.jsonl'
SHOWN = 10
"""Different leaves that are printed."""
LEFT_OUT = ('seconds', 'compiled')
"""Last parts of names that are not compared."""
LEFT_OUT_SUFFIXES = ('_s', '_per_s')
"""Ends of metric names that are not compared: seconds and rates."""
ABSENT = object()
"""Stands for a leaf that only the other run has."""

Leaves = dict[str, Any]
"""Name of a leaf: a number, text, truth value, None or an empty container."""


@dataclasses.dataclass
class Comparison:
  """Counts equal leaves and collects different ones.

  Attributes:
    tolerance: largest absolute difference of numbers that count as equal.
    equal: number of equal leaves.
    different: (name, value in the first run, value in the second run).
    largest: largest absolute difference of two finite numbers; those that count as equal included.
    largest_name: its leaf.
  """

  tolerance: float = 0.0
  equal: int = 0
  different: list[tuple[str, Any, Any]] = dataclasses.field(default_factory=list)
  largest: float = 0.0
  largest_name: str = ''

  def add(self, first: Leaves, second: Leaves) -> None:
    """Compares the leaves of two files, in the order of the first."""
    for name in [*first, *(name for name in second if name not in first)]:
      one, two = first.get(name, ABSENT), second.get(name, ABSENT)
      if self._same(name, one, two):
        self.equal += 1
      else:
        self.different.append((name, one, two))

  def _same(self, name: str, one: Any, two: Any) -> bool:
    if not (_is_number(one) and _is_number(two)):
      return type(one) is type(two) and one == two
    if one == two or math.isnan(one) and math.isnan(two):
      return True
    size = abs(one - two)
    if math.isfinite(size) and size > self.largest:
      self.largest, self.largest_name = size, name
    return size <= self.tolerance

  def report(self) -> str:
    """Writes the result as text."""
    lines = [f'leaves: {self.equal} equal, {len(self.different)} different']
    lines.append(
      f'largest absolute difference: {self.largest!r}'
      + (f' ({self.largest_name})' if self.largest_name else '')
    )
    if self.different:
      lines.append(f'first {min(SHOWN, len(self.different))} different leaves:')
    for name, one, two in self.different[:SHOWN]:
      lines.append(f'  {name}: {_text(one)} | {_text(two)}')
    return '\n'.join(lines)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
  return 'absent' if value is ABSENT else json.dumps(value)


def score_leaves(path: pathlib.Path) -> Leaves:
  """Returns the leaves of a `scores.json`, without times.

  Raises:
    ValueError: the file is missing, not JSON or empty.
  """
  _check_exists(path)
  leaves = _leaves('', files.read_json(path))
  return _filled(path, {f'{SCORES} {files.present_name(name)}': leaf for name, leaf in leaves})


def metric_leaves(path: pathlib.Path, first: int | None = None) -> Leaves:
  """Returns the leaves of a `metrics.jsonl`, stage by stage.

  Args:
    path: the file.
    first: lines of each stage that are read; None reads all.

  Raises:
    ValueError: the file is missing, not JSON or empty, or a line has no stage.
  """
  _check_exists(path)
  stages: dict[str, list[files.Json]] = collections.defaultdict(list)
  for line in files.read_metrics(path, growing=False):
    stages[line['stage']].append(line)
  out: Leaves = {}
  for stage, lines in stages.items():
    for index, line in enumerate(lines[:first], 1):
      for name, leaf in _leaves('', line):
        if not name.endswith(LEFT_OUT_SUFFIXES):
          out[f'{METRICS} {stage} line {index} {name}'] = leaf
  return _filled(path, out)


def _leaves(name: str, value: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
  """Yields (name, value) of all leaves; parts of a name are joined by '/'."""
  items = enumerate(value) if isinstance(value, list) else value.items()
  for key, inner in items:
    part = f'{name}/{key}' if name else str(key)
    if part.rpartition('/')[2] in LEFT_OUT:
      continue
    if isinstance(inner, (dict, list)) and inner:
      yield from _leaves(part, inner)
    else:
      yield part, inner


def _check_exists(path: pathlib.Path) -> None:
  if not path.is_file():
    raise ValueError(f'{path} is missing')


def _filled(path: pathlib.Path, leaves: Leaves) -> Leaves:
  if not leaves:
    raise ValueError(f'{path} holds nothing to compare')
  return leaves


def compare(
  first: pathlib.Path, second: pathlib.Path, lines: int | None = None, tolerance: float = 0.0
) -> Comparison:
  """Compares two workdirs, two `scores.json` or two `metrics.jsonl`.

  Args:
    first, second: the workdirs or files.
    lines: lines of each stage of the metrics that are compared; None compares all.
    tolerance: largest absolute difference of numbers that count as equal.

  Raises:
    ValueError: a file is missing or invalid, or the paths are of different kinds.
  """
  out = Comparison(tolerance)
  for path in (first, second):
    if not path.exists():
      raise ValueError(f'{path} is missing')
  if first.is_dir() != second.is_dir() or first.suffix != second.suffix and first.is_file():
    raise ValueError(f'{first} and {second} are of different kinds')
  if first.is_dir():
    out.add(score_leaves(first / SCORES), score_leaves(second / SCORES))
    first, second = first / METRICS, second / METRICS
  if first.suffix == '.jsonl':
    out.add(metric_leaves(first, lines), metric_leaves(second, lines))
  else:
    out.add(score_leaves(first), score_leaves(second))
  return out


def _line_count(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'{text!r}; allowed: an integer of at least 1')
  return int(text)


def _tolerance(text: str) -> float:
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f'{text!r}; allowed: a number of at least 0')
  return value


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status, see the module's docstring."""
  parser = argparse.ArgumentParser(
    prog='python -m lvrpo_jax.reports.compare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('first', type=pathlib.Path, help='workdir, scores.json or metrics.jsonl')
  parser.add_argument('second', type=pathlib.Path, help='the other one')
  parser.add_argument(
    '--first',
    dest='lines',
    type=_line_count,
    metavar='N',
    help='compares the first N lines of each stage; default: all',
  )
  parser.add_argument(
    '--tolerance',
    type=_tolerance,
    default=0.0,
    metavar='T',
    help='largest absolute difference of numbers that count as equal; default: 0',
  )
  args = parser.parse_args(argv)
  try:
    found = compare(args.first, args.second, args.lines, args.tolerance)
  except (OSError, ValueError) as error:
    print(error, file=sys.stderr)
    return 2
  print(found.report())
  return 1 if found.different else 0


if __name__ == '__main__':
  sys.exit(main())
