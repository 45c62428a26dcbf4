"""Prints several finished runs in one table, and writes before/after images of the first.

    python -m lvrpo_jax.reports.summary runs/seed0 runs/seed1 runs/seed2 --picture before_after.png

Prints Markdown: for every score its value before and after in each run, the mean of the paired
differences over runs, and their largest p. Then prints the guided baseline on its own prompts, and
how often a relation holds where the two objects are right; a policy that ignores the relation gets
a sixth of them right. A control run (`configs/base_control.py`) can be given like any other.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
import pathlib
import sys

import numpy as np
from PIL import Image

from lvrpo_jax.data import tasks
from lvrpo_jax.data.shapes import detect_rendering
from lvrpo_jax.data.shapes import world
from lvrpo_jax.reports import files
from lvrpo_jax.rewards import geneval

ROWS = (
  ('generation, overall', 'generation/overall'),
  ('… unseen compositions', 'generation/unseen'),
  *((f'… {kind.replace("_", " ")}', f'generation/{kind}') for kind in world.GENERATE_KINDS),
  ('understanding, sampled', 'understanding/accuracy'),
  ('… greedy', 'understanding/greedy'),
  *((f'… {kind}, sampled', f'understanding/{kind}') for kind in world.QUESTION_KINDS),
  ('editing', 'editing/overall'),
)
SCALE = 3
"""Screen pixels for a pixel of an image."""


def load(workdir: pathlib.Path) -> files.Json:
  """Reads the scores of a finished run.

  Raises:
    ValueError: the folder has none, or the run has not been measured after alignment.
  """
  path = workdir / 'scores.json'
  if not path.is_file():
    raise ValueError(f'{path} is missing; expected the workdir of a finished run')
  scores = files.read_json(path)
  if 'paired' not in scores:
    raise ValueError(f'{path} has no scores after alignment; the run is not finished')
  return scores


def table(names: Sequence[str], runs: Sequence[files.Json]) -> str:
  """Writes a Markdown table of several runs."""
  lines = [
    f'| held-out score | {" | ".join(names)} | mean difference | largest p |',
    '|---' * (len(runs) + 3) + '|',
  ]
  for name, key in ROWS:
    family, part = key.split('/')
    if any(key not in run['paired'] for run in runs):
      continue
    cells = [
      f'{run["before"][family][part]["value"]:.3f} → {run["after"][family][part]["value"]:.3f}'
      for run in runs
    ]
    differences = [run['paired'][key]['difference'] for run in runs]
    largest = max(run['paired'][key]['p'] for run in runs)
    lines.append(f'| {name} | {" | ".join(cells)} | {np.mean(differences):+.3f} | {largest:.1g} |')
  guided = [
    f'{run["before_guided"]["generation"]["overall"]["value"]:.3f} (scale '
    f'{run["before_guided"]["scale"]:g}), unguided {run["guidance"]["1"]["value"]:.3f}'
    for run in runs
    if run.get('before_guided')
  ]
  alarms = [', '.join(run['panel'].get('alarms', [])) or 'none' for run in runs]
  minutes = [f'{sum(run["seconds"].values()) / 60:.1f}' for run in runs]
  lines += [
    '',
    f'guided before alignment: {"; ".join(guided) or "not measured"}',
    f'minutes: {"; ".join(minutes)}',
    f'alarms: {"; ".join(alarms)}',
  ]
  return '\n'.join(lines)


def records(workdir: pathlib.Path, moment: str, **wanted: str) -> list[files.Json]:
  """Reads the prediction records of a moment whose fields have the wanted values.

  Raises:
    FileNotFoundError: there are none of this moment.
  """
  path = workdir / 'eval' / moment / 'predictions.jsonl'
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing; expected the workdir of a finished run')
  return [
    record
    for record in files.read_lines(path)
    if all(record.get(key) == value for key, value in wanted.items())
  ]


def on_guided_prompts(workdir: pathlib.Path, moment: str) -> float:
  """Returns the unguided generation score on the prompts of the guided baseline."""
  evaluate = files.read_json(workdir / 'config.json')['evaluate']
  # Workdirs that were written before have the second name.
  count = evaluate['guided_prompts'] if 'guided_prompts' in evaluate else evaluate['guided']
  kinds = collections.defaultdict(list)
  for record in records(workdir, moment, task=tasks.GENERATE, split='eval'):
    if int(record['id'].rpartition('/')[2]) < count:
      kinds[record['kind']].append(np.mean(record['correct']))
  return float(np.mean([np.mean(values) for values in kinds.values()]))


def relations_held(workdir: pathlib.Path, moment: str) -> tuple[int, int]:
  """Counts images of 'position': (whose relation holds, with just the two objects asked for)."""
  folder = workdir / 'eval' / moment
  held = total = 0
  for record in records(workdir, moment, task=tasks.GENERATE, split='eval', kind='position'):
    images = np.stack([np.asarray(Image.open(folder / name)) for name in record['images']])
    spec = record['spec']
    objects = {
      **spec,
      'include': [
        {name: value for name, value in entry.items() if name != 'position'}
        for entry in spec['include']
      ],
    }
    size = images.shape[2], images.shape[1]
    detections = detect_rendering.detect_by_rendering(images)
    for found, correct in zip(detections, record['correct'], strict=True):
      has_objects = geneval.evaluate(found, objects, strict=True, size=size).correct
      if has_objects and not geneval.surplus(found, spec):
        total += 1
        held += correct
  return held, total


def picture(workdir: pathlib.Path, columns: int = 2) -> np.ndarray:
  """Lays out images of the first held-out prompts of every kind, before above after, same noise.

  Args:
    columns: prompts of every kind.

  Returns:
    uint8 (Y, X, 3).
  """

  def row(moment: str) -> np.ndarray:
    folder = workdir / 'eval' / moment / tasks.GENERATE / 'eval'
    cells = []
    for kind in world.GENERATE_KINDS:
      for index in range(columns):
        image = np.asarray(Image.open(folder / kind / f'{index:03d}_0.png').convert('RGB'))
        cells.append(np.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=255))
    return np.concatenate(cells, axis=1)

  both = np.concatenate([row('before'), row('after')], axis=0)
  return both.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the table; returns 2 where a folder is no finished run."""
  parser = argparse.ArgumentParser(
    prog='python -m lvrpo_jax.reports.summary',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('workdirs', nargs='+', type=pathlib.Path)
  parser.add_argument('--picture', type=pathlib.Path, help='PNG file to write, of the first run')
  args = parser.parse_args(argv)
  try:
    runs = [load(workdir) for workdir in args.workdirs]
  except ValueError as error:
    parser.exit(2, f'{error}\n')
  print(table([workdir.name for workdir in args.workdirs], runs))
  for workdir, run in zip(args.workdirs, runs, strict=True):
    parts = [
      f'{held} of {total} {moment}'
      for moment in ('before', 'after')
      for held, total in [relations_held(workdir, moment)]
    ]
    print(f'{workdir.name}: relation holds, given just the two objects: {", ".join(parts)}')
    if run.get('before_guided'):
      print(
        f'{workdir.name}: unguided after alignment, on the prompts of the guided baseline: '
        f'{on_guided_prompts(workdir, "after"):.3f}'
      )
  if args.picture:
    Image.fromarray(picture(args.workdirs[0])).save(args.picture)
  return 0


if __name__ == '__main__':
  sys.exit(main())
