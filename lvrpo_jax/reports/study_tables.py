"""Tables and plots of a study; reads records, recomputes no score.

    python -m lvrpo_jax.reports.study_tables runs/study/full/measured

prints the tables of the runs in a folder and writes them, with plots, beside it.

A value is the mean over seeds and kinds; its 95 % interval is a bootstrap over the meanings of the
prompts within every seed and kind. Differences are paired on prompts and noise. Neither covers how
much another seed would have changed; that is what the numbers of the single seeds are for.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
import gzip
import json
import math
import pathlib
from typing import Any

from lvrpo_jax.data.shapes import world
from lvrpo_jax.evaluation import scores
from lvrpo_jax.evaluation import stats
from lvrpo_jax.reports import html

Done = dict[str, Any]
"""What `study.measured` returns of a run; `number` is its place in the study."""
REFERENCE = 'default'
"""The variant that the others are compared with."""
INFORMATION = 'information'

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
"""Of the bootstrap."""


FIELDS = ('task', 'split', 'kind', 'meaning', 'correct', 'greedy_correct', 'format')
"""What is kept of a record."""


def save(path: pathlib.Path, done: Done) -> None:
  """Keeps what the tables need of a run in a file that is small enough to be published."""
  short = [{k: r[k] for k in FIELDS if k in r} for r in done['records']]
  text = json.dumps(
    {**done, 'records': short, 'information': [round(term, 5) for term in done['information']]}
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix('.tmp')
  temporary.write_bytes(gzip.compress(text.encode(), mtime=0))  # The same run, the same bytes.
  temporary.replace(path)


def load(path: pathlib.Path) -> Done:
  """Reads what `save` wrote."""
  return json.loads(gzip.decompress(path.read_bytes()))


class Scores:
  """Scores of all runs by variant, seed and name."""

  def __init__(self, done: Sequence[Done]):
    self._groups: dict[str, dict[int, dict[str, scores.Groups]]] = collections.defaultdict(dict)
    self._seconds: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for run in done:
      drawn = [r for r in run['records'] if r['task'] == 'generate' and r['split'] == 'eval']
      information: scores.Groups = {}
      for record, term in zip(drawn, run['information'], strict=True):
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
    """In the order of the runs."""
    return list(self._groups)

  def seeds(self, variant: str) -> list[int]:
    """Seeds of a variant that have been measured."""
    return sorted(self._groups[variant])

  def groups(self, variant: str, score: str) -> scores.Groups:
    """Values of all seeds, a category for every seed and kind."""
    return {
      f'{seed}/{kind}': group
      for seed, found in self._groups[variant].items()
      for kind, group in found.get(score, {}).items()
    }

  def value(self, variant: str, score: str) -> tuple[float, float, float]:
    """(mean, low, high)."""
    return stats.macro_average(self.groups(variant, score), SEED)

  def by_seed(self, variant: str, score: str) -> list[float]:
    """Means of the single seeds."""
    return [
      stats.macro_average(found[score], SEED)[0]
      for _, found in sorted(self._groups[variant].items())
    ]

  def difference(self, variant: str, score: str) -> dict[str, float]:
    """Paired test of a variant against the reference, on the seeds that both have."""
    mine, theirs = self.groups(variant, score), self.groups(REFERENCE, score)
    return stats.macro_paired_test(
      {name: (theirs[name][0], mine[name][0], mine[name][1]) for name in mine if name in theirs}
    )

  def minutes(self, variant: str) -> float:
    """Time of alignment, or of what stands in its place: the least of the seeds, which other work on
    the machine has slowed the least."""
    return min(self._seconds[variant].values()) / 60


def markdown(found: Scores) -> str:
  """The tables."""
  cell = lambda v, s: '{:.3f} ({:.3f} to {:.3f})'.format(*found.value(v, s))
  lines = _table(
    ('variant', 'seeds', *(title for title, _ in HEADLINES), 'minutes'),
    [
      (v, str(len(found.seeds(v))), *(cell(v, s) for _, s in HEADLINES), f'{found.minutes(v):.1f}')
      for v in found.variants
    ],
  )
  lines += ['', 'Generation by kind:', '']
  lines += _table(
    ('variant', *(title for title, _ in CATEGORIES)),
    [(v, *(cell(v, s) for _, s in CATEGORIES)) for v in found.variants],
  )
  lines += ['', 'Seed by seed:', '']
  lines += _table(
    ('variant', *(title for title, _ in HEADLINES)),
    [
      (v, *(', '.join(f'{x:.3f}' for x in found.by_seed(v, s)) for _, s in HEADLINES))
      for v in found.variants
    ],
  )
  if REFERENCE in found.variants:
    others = [
      v
      for v in found.variants
      if v != REFERENCE and set(found.seeds(v)) & set(found.seeds(REFERENCE))
    ]
    lines += ['', f'Differences from {REFERENCE}, paired, with 1.96 standard errors and p:', '']
    lines += _table(
      ('variant', *(title for title, _ in HEADLINES)),
      [(v, *(_difference(found.difference(v, s)) for _, s in HEADLINES)) for v in others],
    )
  return '\n'.join(lines)


def _difference(test: dict[str, float]) -> str:
  return f'{test["difference"]:+.3f} ± {1.96 * test["se"]:.3f} (p {test["p"]:.1g})'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  line = lambda cells: f'| {" | ".join(cells)} |'
  return [line(head), '|---' * len(head) + '|', *map(line, rows)]


ROW, LEFT, WIDTH, GAP, RIGHT = 18, 130, 190, 34, 60
"""Drawing units of `plot`: height of a row, names, an axis, between axes, after the last."""


def plot(found: Scores) -> str:
  """An SVG drawing: an axis a score, a dot and an interval a variant; the line is the reference."""
  height = ROW * len(found.variants) + 58
  parts = [
    html.el('text', v, x=LEFT - 8, y=ROW * i + 44, text_anchor='end')
    for i, v in enumerate(found.variants)
  ]
  for number, (title, score) in enumerate(HEADLINES):
    values = {v: found.value(v, score) for v in found.variants}
    low, high = min(v[1] for v in values.values()), max(v[2] for v in values.values())
    left = LEFT + number * (WIDTH + GAP)
    x = lambda value, a=low, b=max(high, low + 1e-9), l=left: l + WIDTH * (value - a) / (b - a)
    parts.append(html.el('text', title, x=left, y=18, font_weight='bold'))
    if REFERENCE in values:
      at = f'{x(values[REFERENCE][0]):.1f}'
      parts.append(html.el('line', x1=at, x2=at, y1=28, y2=height - 24, stroke='#c9ccd1'))
    for i, v in enumerate(found.variants):
      y, (mean, least, most) = ROW * i + 40, values[v]
      colour = '#2461c4' if v == REFERENCE else '#5c6570'
      parts.append(
        html.el(
          'line',
          x1=f'{x(least):.1f}',
          x2=f'{x(most):.1f}',
          y1=y,
          y2=y,
          stroke=colour,
          stroke_width=2,
        )
      )
      parts.append(html.el('circle', cx=f'{x(mean):.1f}', cy=y, r=4, fill=colour))
    parts += [
      html.el('text', f'{tick:.3g}', x=f'{x(tick):.1f}', y=height - 8, text_anchor='middle')
      for tick in html.ticks(low, high, 3)
      if math.isfinite(tick)
    ]
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


def write(folder: pathlib.Path, done: Sequence[Done]) -> str:
  """Writes `study.md`, `study.svg` and `study.html`; returns the first."""
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


def main(argv: Sequence[str] | None = None) -> None:
  """Command line; see the module's docstring."""
  parser = argparse.ArgumentParser(description='Tables and plots of a study.')
  parser.add_argument('folder', type=pathlib.Path, help="'measured' of a study")
  folder = parser.parse_args(argv).folder
  files = sorted(folder.glob('*.json.gz'))
  if not files:
    parser.error(f'{folder} holds no *.json.gz; expected the folder `measured` of a study')
  # The order of the variants in the tables is that in which a study runs them.
  done = sorted(map(load, files), key=lambda run: (run['seed'], run['number']))
  print(write(folder.parent, done))


if __name__ == '__main__':
  main()
