"""Runs the program 'convert': imports a released model, or exports the aligned one."""

from __future__ import annotations

import pathlib

from lvrpo_jax import types
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights


def run(config: types.Config, workdir: pathlib.Path) -> None:
  """Imports a released model into the workdir, or exports the aligned one.

  Raises:
    ValueError: see `weights.import_released` and `weights.export`.
  """
  experiment = experiment_lib.build(config, workdir)
  if config.convert.direction == 'import':
    weights.import_released(experiment)
  else:
    weights.export(experiment, config.convert.target, config.convert.shards)
