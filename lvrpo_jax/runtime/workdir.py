"""Reads, compares and writes the config file of a workdir; writes JSON files."""

from __future__ import annotations

import json
import pathlib

from absl import logging
import jax
from jax.experimental import multihost_utils

from configs import base
from lvrpo_jax import types
from lvrpo_jax.runtime import renamed

CHANGEABLE_KEYS = (
  'parallel.',
  'study.workers',
  'log_every',
  'report',
  'compile.',
  'sample.',
  'convert.',
  'align.checks.mismatch',
)
"""Prefixes of keys that may differ between two starts of a run.

They say how the work is split over devices and processes, which only changes the rounding of sums;
what is shown of a run; what ends it; and what other programs read.
"""


def check_config(workdir: pathlib.Path, config: types.Config) -> None:
  """Compares the config with `config.json`, if there is one, and writes the file.

  The file then holds all keys of this start. Their values, defaults included, bind later versions
  of the code.

  Raises:
    ValueError: the workdir holds a run of another config; the message lists the differing keys.
  """
  path = workdir / 'config.json'
  if path.exists():
    compare_config(workdir, config)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(config.to_json()))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('check_config')


def compare_config(
  workdir: pathlib.Path, config: types.Config, parts: tuple[str, ...] = ()
) -> None:
  """Compares a config with the `config.json` of a workdir.

  Keys of `CHANGEABLE_KEYS` may differ. A key that the file lacks may have its default; this logs a
  warning.

  Args:
    workdir: folder of the run.
    config: of this start.
    parts: prefixes of the keys that are compared; () for all.

  Raises:
    ValueError: the message lists the differing keys.
  """
  mine, default = (flatten(json.loads(each.to_json())) for each in (config, base.get_config()))
  theirs = renamed.translate(flatten(json.loads((workdir / 'config.json').read_text())))
  keys = [
    key
    for key in sorted(mine.keys() | theirs.keys())
    if mine.get(key) != theirs.get(key)
    and not key.startswith(CHANGEABLE_KEYS)
    and (not parts or key.startswith(parts))
  ]
  added = [
    key for key in keys if key not in theirs and key in default and mine[key] == default[key]
  ]
  different = [
    f'{key}: {theirs.get(key, "absent")!r} there, {mine.get(key, "absent")!r} here'
    for key in keys
    if key not in added
  ]
  if different:
    raise ValueError(
      f'{workdir} holds a run of another config; use another --workdir, or the '
      'same values:\n  ' + '\n  '.join(different)
    )
  if added:
    logging.warning(
      '%s is older than some keys of the config; it goes on with the defaults %s',
      workdir,
      ', '.join(f'{key} = {mine[key]!r}' for key in added),
    )


def flatten(tree: dict[str, types.Json], prefix: str = '') -> dict[str, types.Json]:
  """Turns {'a': {'b': 1}} into {'a.b': 1}."""
  out: dict[str, types.Json] = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out.update(flatten(value, f'{prefix}{key}.'))
    else:
      out[f'{prefix}{key}'] = value
  return out


def write_json(path: pathlib.Path, value: types.Json) -> None:
  """Replaces a JSON file in one step, so that it is never incomplete; process 0 alone writes."""
  if jax.process_index():
    return
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(json.dumps(value, indent=1))
  temporary.replace(path)
