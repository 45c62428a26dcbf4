"""Files of a workdir that hold its config."""

from __future__ import annotations

import json
import pathlib
from typing import Any

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
"""Keys of the config, by how they begin, that may differ between two starts of a run: how the work
is split over devices and processes, which changes the rounding of sums and no more; what is shown
of it, and what ends it; and what other programs read."""


def check_config(workdir: pathlib.Path, config: types.Config) -> None:
  """Writes `config.json`; one that is there is compared first.

  It then holds what this start goes on with: a default that a key had when the run began to have it
  binds later versions of the code, too.

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


def compare_config(workdir: pathlib.Path, config: types.Config, parts: tuple[str, ...] = ()):
  """Compares with the `config.json` of a workdir; with `parts`, only keys that start with one.

  Keys of `CHANGEABLE_KEYS` may differ. One that the file does not have yet may be at its default,
  with a warning.

  Raises:
    ValueError: the message lists the differing keys.
  """
  mine, default = (flatten(json.loads(c.to_json())) for c in (config, base.get_config()))
  theirs = renamed.translate(flatten(json.loads((workdir / 'config.json').read_text())))
  keys = [
    key
    for key in sorted(mine.keys() | theirs.keys())
    if mine.get(key) != theirs.get(key)
    and not key.startswith(CHANGEABLE_KEYS)
    and (not parts or key.startswith(parts))
  ]
  young = [
    key for key in keys if key not in theirs and key in default and mine[key] == default[key]
  ]
  different = [
    f'{key}: {theirs.get(key, "absent")!r} there, {mine.get(key, "absent")!r} here'
    for key in keys
    if key not in young
  ]
  if different:
    raise ValueError(
      f'{workdir} holds a run of another config; use another --workdir, or the '
      'same values:\n  ' + '\n  '.join(different)
    )
  if young:
    logging.warning(
      '%s is older than some keys of the config; it goes on with the defaults %s',
      workdir,
      ', '.join(f'{key} = {mine[key]!r}' for key in young),
    )


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': 1}} to {'a.b': 1}."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out.update(flatten(value, f'{prefix}{key}.'))
    else:
      out[f'{prefix}{key}'] = value
  return out


def write_json(path: pathlib.Path, value: Any):
  """Writes JSON so that the file is either the old or the new one, never half.

  Of several processes the first one writes.
  """
  if jax.process_index():
    return
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(json.dumps(value, indent=1))
  temporary.replace(path)
