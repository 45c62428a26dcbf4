"""Prints how the parameters of a config lie on its mesh."""

from __future__ import annotations

import pathlib

import jax
import ml_collections
import numpy as np

from lvrpo_jax.aot import compile as aot_compile
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights


def describe(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Prints every parameter with its shape, partition and bytes on a device."""
  job = (
    aot_compile.build(config, workdir) if config.topology else experiment_lib.build(config, workdir)
  )
  total = whole = 0.0
  rows = [('parameter', 'shape', 'partition', 'bytes a device')]
  for kind in (weights.BASE, weights.VAE, weights.JUDGE):
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights.template(job, kind)):
      size = aot_compile.bytes_of(leaf)
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
  print(f'mesh {dict(job.mesh.shape)}: {int(total):,} of {int(whole):,} bytes on every device')
