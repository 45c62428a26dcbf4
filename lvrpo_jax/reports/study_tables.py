"""Tables and plots of a study; reads prediction records and verdicts, runs no detector.

    python -m lvrpo_jax.reports.study_tables runs/study/full/measured

Prints the tables of the runs in a folder and writes them, with plots, beside it.

A value is the mean over seeds and kinds; its 95 % interval is a bootstrap over the meanings of the
prompts within every seed and kind. Differences are paired on prompts and noise. Neither covers the
variation between seeds, which the table of single seeds shows.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
import gzip
import json
import math
import pathlib
from typing import Any, NamedTuple

from lvrpo_jax.data import tasks
from lvrpo_jax.data.shapes import world
from lvrpo_jax.evaluation import scores
from lvrpo_jax.evaluation import stats
from lvrpo_jax.reports import charts
from lvrpo_jax.reports import html

Done = dict[str, Any]
"""What `study.measured` returns for a run; `number` is its index within its seed."""
REFERENCE = 'default'
"""The variant that the others are compared with."""
INFORMATION = 'information'
"""Name of the score that bounds I(T;V) from below, in nats."""

HEADLINES = (
  ('generation', 'generation/overall'),
  ('unseen', 'generation/unseen'),
  ('understanding', 'understanding/accuracy'),
  ('reasoning', 'understanding/reasoning'),
  ('editing', 'editing/overall'),
  ('I(T;V) ≥, nats', INFORMATION),
)
CATEGORIES = tuple((kind.replace('_', ' '), f'generation/{kind}') for kind in world.GENERATE_KINDS)
SEED = 0
"""Seed of the bootstrap."""
FIELDS = ('task', 'split', 'kind', 'meaning', 'correct', 'greedy_correct', 'format')
"""Fields of a prediction record that `save` keeps."""


def save(path: pathlib.Path, done: Done) -> None:
  """Writes what the tables need from a run to a file that is small enough to be published."""
  short = [
    {field: record[field] for field in FIELDS if field in record} for record in done['records']
  ]
  text = json.dumps(
    {**done, 'records': short, 'information': [round(term, 5) for term in done['information']]}
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  # Without a time, the same run gives the same bytes.
  temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
  temporary.replace(path)


def load(path: pathlib.Path) -> Done:
  """Reads a file that `save` wrote."""
  return json.loads(gzip.decompress(path.read_bytes()))


class Scores:
  """Holds scores of all runs by variant, seed and name."""

  def __init__(self, done: Sequence[Done]):
    """Groups the values of all runs."""
    self._groups: dict[str, dict[int, dict[str, scores.Groups]]] = collections.defaultdict(dict)
    self._seconds: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for run in done:
      generated = [
        record
        for record in run['records']
        if record['task'] == tasks.GENERATE and record['split'] == 'eval'
      ]
      information: scores.Groups = {}
      for record, term in zip(generated, run['information'], strict=True):
        values, clusters = information.setdefault(record['kind'], ([], []))
        values.append(term)
        clusters.append(record['meaning'])
      self._groups[run['variant']][run['seed']] = {
        **scores.headlines(run['records']),
        INFORMATION: information,
      }
      self._seconds[run['variant']][run['seed']] = run['seconds']

  @property
  def variants(self) -> list[str]:
    """Variants in the order of the runs."""
    return list(self._groups)

  def seeds(self, variant: str) -> list[int]:
    """Returns the seeds of a variant that have been measured."""
    return sorted(self._groups[variant])

  def groups(self, variant: str, score: str) -> scores.Groups:
    """Returns the values of all seeds, a category for every seed and kind."""
    return {
      f'{seed}/{kind}': group
      for seed, found in self._groups[variant].items()
      for kind, group in found.get(score, {}).items()
    }

  def value(self, variant: str, score: str) -> tuple[float, float, float]:
    """Returns (mean, low, high) of a score."""
    return stats.macro_average(self.groups(variant, score), SEED)

  def by_seed(self, variant: str, score: str) -> list[float]:
    """Returns the means of the single seeds."""
    return [
      stats.macro_average(found[score], SEED)[0]
      for _, found in sorted(self._groups[variant].items())
    ]

  def difference(self, variant: str, score: str) -> dict[str, float]:
    """Tests a variant against the reference, paired, on the seeds that both have."""
    mine, theirs = self.groups(variant, score), self.groups(REFERENCE, score)
    return stats.macro_paired_test(
      {name: (theirs[name][0], mine[name][0], mine[name][1]) for name in mine if name in theirs}
    )

  def minutes(self, variant: str) -> float:
    """Returns the time of alignment, or of the continued pretraining in its place.

    It is the minimum over seeds, the one that other work on the machine slowed least.
    """
    return min(self._seconds[variant].values()) / 60


def markdown(found: Scores) -> str:
  """Writes the tables."""
  lines = _table(
    ('variant', 'seeds', *(title for title, _ in HEADLINES), 'minutes'),
    [
      (
        variant,
        str(len(found.seeds(variant))),
        *(_value(found, variant, score) for _, score in HEADLINES),
        f'{found.minutes(variant):.1f}',
      )
      for variant in found.variants
    ],
  )
  lines += ['', 'Generation by kind:', '']
  lines += _table(
    ('variant', *(title for title, _ in CATEGORIES)),
    [
      (variant, *(_value(found, variant, score) for _, score in CATEGORIES))
      for variant in found.variants
    ],
  )
  lines += ['', 'Seed by seed:', '']
  lines += _table(
    ('variant', *(title for title, _ in HEADLINES)),
    [
      (variant, *(_seed_values(found, variant, score) for _, score in HEADLINES))
      for variant in found.variants
    ],
  )
  if REFERENCE in found.variants:
    others = [
      variant
      for variant in found.variants
      if variant != REFERENCE and set(found.seeds(variant)) & set(found.seeds(REFERENCE))
    ]
    lines += ['', f'Differences from {REFERENCE}, paired, with 1.96 standard errors and p:', '']
    lines += _table(
      ('variant', *(title for title, _ in HEADLINES)),
      [
        (variant, *(_difference(found.difference(variant, score)) for _, score in HEADLINES))
        for variant in others
      ],
    )
  return '\n'.join(lines)


def _value(found: Scores, variant: str, score: str) -> str:
  mean, low, high = found.value(variant, score)
  return f'{mean:.3f} ({low:.3f} to {high:.3f})'


def _seed_values(found: Scores, variant: str, score: str) -> str:
  return ', '.join(f'{value:.3f}' for value in found.by_seed(variant, score))


def _difference(test: dict[str, float]) -> str:
  return f'{test["difference"]:+.3f} ± {1.96 * test["se"]:.3f} (p {test["p"]:.1g})'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  return [_row(head), '|---' * len(head) + '|', *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
  return f'| {" | ".join(cells)} |'


ROW, LEFT, WIDTH, GAP, RIGHT = 18, 130, 190, 34, 60
"""Drawing units of `plot`: height of a row, names, an axis, between axes, after the last."""


class _Axis(NamedTuple):
  """The horizontal axis of a score: its range, and where it begins in drawing units."""

  low: float
  high: float
  left: float

  def place(self, value: float) -> float:
    """Returns the drawing units of a value."""
    return self.left + WIDTH * (value - self.low) / (max(self.high, self.low + 1e-9) - self.low)


def plot(found: Scores) -> str:
  """Draws an axis a score with a dot and an interval a variant, as SVG; a line is the reference."""
  height = ROW * len(found.variants) + 58
  parts = [
    html.el('text', variant, x=LEFT - 8, y=ROW * i + 44, text_anchor='end')
    for i, variant in enumerate(found.variants)
  ]
  for column, (title, score) in enumerate(HEADLINES):
    values = {variant: found.value(variant, score) for variant in found.variants}
    parts += _column(title, values, LEFT + column * (WIDTH + GAP), height)
  width = LEFT + len(HEADLINES) * (WIDTH + GAP) + RIGHT
  return html.el(
    'svg',
    html.el('rect', width='100%', height='100%', fill='white'),
    *parts,
    xmlns='http://www.w3.org/2000/svg',
    viewBox=f'0 0 {width} {height}',
    font_family='sans-serif',
    font_size=12,
  )


def _column(
  title: str, values: dict[str, tuple[float, float, float]], left: int, height: int
) -> list[html.Html]:
  """Draws the (mean, low, high) of all variants on one axis."""
  axis = _Axis(
    low=min(low for _, low, _ in values.values()),
    high=max(high for _, _, high in values.values()),
    left=left,
  )
  parts = [html.el('text', title, x=left, y=18, font_weight='bold')]
  if REFERENCE in values:
    at = f'{axis.place(values[REFERENCE][0]):.1f}'
    parts.append(html.el('line', x1=at, x2=at, y1=28, y2=height - 24, stroke='#c9ccd1'))
  for i, (variant, (mean, low, high)) in enumerate(values.items()):
    y = ROW * i + 40
    color = '#2461c4' if variant == REFERENCE else '#5c6570'
    ends = {'x1': f'{axis.place(low):.1f}', 'x2': f'{axis.place(high):.1f}'}
    parts.append(html.el('line', **ends, y1=y, y2=y, stroke=color, stroke_width=2))
    parts.append(html.el('circle', cx=f'{axis.place(mean):.1f}', cy=y, r=4, fill=color))
  return parts + [
    html.el('text', f'{tick:.3g}', x=f'{axis.place(tick):.1f}', y=height - 8, text_anchor='middle')
    for tick in charts.ticks(axis.low, axis.high, 3)
    if math.isfinite(tick)
  ]


def write(folder: pathlib.Path, done: Sequence[Done]) -> str:
  """Writes `study.md`, `study.svg` and `study.html`; returns the text of the first."""
  found = Scores(done)
  text, drawing = markdown(found), plot(found)
  (folder / 'study.md').write_text(text + '\n')
  (folder / 'study.svg').write_text(drawing)
  page = html.join(
    html.Html('<!doctype html>'),
    html.el(
      'html',
      html.el('head', html.el('meta', charset='utf-8'), html.el('title', 'study')),
      html.el(
        'body',
        html.el('h1', 'Study'),
        drawing,
        html.el('pre', text),
        style='font-family:sans-serif;margin:2rem',
      ),
      lang='en',
    ),
  )
  (folder / 'study.html').write_text(page)
  return text


def _place(run: Done) -> tuple[int, int]:
  return run['seed'], run['number']


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; see the module's docstring."""
  parser = argparse.ArgumentParser(description='Tables and plots of a study.')
  parser.add_argument('folder', type=pathlib.Path, help="'measured' of a study")
  folder = parser.parse_args(argv).folder
  files = sorted(folder.glob('*.json.gz'))
  if not files:
    parser.error(f'{folder} holds no *.json.gz; expected the folder `measured` of a study')
  # Tables list the variants in the order in which a study runs them.
  done = sorted((load(file) for file in files), key=_place)
  print(write(folder.parent, done))


if __name__ == '__main__':
  main()
