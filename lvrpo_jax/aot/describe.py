"""Prints how the parameters of a config lie on its mesh."""

from __future__ import annotations

import pathlib

import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.aot import compile as aot_compile
from lvrpo_jax.aot import programs
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights


def describe(config: types.Config, workdir: pathlib.Path) -> None:
  """Prints every parameter with its shape, partition and bytes on a device."""
  experiment = (
    aot_compile.build(config, workdir)
    if config.compile.topology
    else experiment_lib.build(config, workdir)
  )
  total = whole = 0.0
  rows = [('parameter', 'shape', 'partition', 'bytes a device')]
  for kind in (weights.BASE, weights.VAE, weights.DUAL_ENCODER):
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights.template(experiment, kind)):
      size = programs.bytes_of(leaf)
      total, whole = total + size, whole + np.prod(leaf.shape) * leaf.dtype.itemsize
      spec = ', '.join('-' if axis is None else str(axis) for axis in leaf.sharding.spec)
      rows.append(
        (
          f'{kind}/{placement.parameter_name(path)}',
          str(tuple(leaf.shape)),
          f'({spec})',
          f'{int(size):,}',
        )
      )
  widths = [max(map(len, column)) for column in zip(*rows)]
  for row in rows:
    print('  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
  print(
    f'mesh {dict(experiment.mesh.shape)}: {int(total):,} of {int(whole):,} bytes on every device'
  )
