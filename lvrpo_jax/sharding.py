"""Meshes, the table from parameter names to partitions, and placement of batches."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

AXES = ('data', 'fsdp', 'tensor')

TABLE = (
    (r'(q|k|v|gate|up)_proj/kernel$', ('fsdp', 'tensor')),
    (r'(o|down)_proj/kernel$', ('tensor', 'fsdp')),
    (r'embed_tokens$', ('tensor', 'fsdp')),
    (r'lm_head/kernel$', ('fsdp', 'tensor')),
    (r'(connector_fc\d|fc\d|out_proj|mlp_\d)/kernel$', ('fsdp', None)),
)
"""Ordered: the first pattern found in a parameter's name gives the partition of its LAST axes
(scanned layers add a leading axis, which is never split). No match: replicated."""


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh over `AXES`; one size may be -1 and takes what the others leave.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = list(shape)
  if sizes.count(-1) > 1:
    raise ValueError(f'parallel.mesh is {tuple(shape)}: at most one size may be -1')
  if -1 in sizes:
    rest = int(np.prod([s for s in sizes if s != -1]))
    sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
  if int(np.prod(sizes)) != len(devices):
    raise ValueError(f'parallel.mesh is {tuple(shape)}, which does not multiply to the '
                     f'{len(devices)} devices at hand')
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Partition of one parameter.

  Raises:
    ValueError: an axis does not divide by the mesh axes that should split it.
  """
  axes = next((axes for pattern, axes in TABLE if re.search(pattern, name)), ())
  spec = [None] * (len(shape) - len(axes)) + list(axes)
  for size, axis in zip(shape, spec):
    if axis and size % mesh.shape[axis]:
      raise ValueError(f'{name} of shape {shape}: an axis of {size} does not divide by the '
                       f'{mesh.shape[axis]} devices of mesh axis {axis!r}')
  return P(*spec)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """Shardings of parameters, or of any tree whose paths end like those of parameters."""
  def sharding(path, leaf):
    name = '/'.join(str(k.key) if isinstance(k, jax.tree_util.DictKey) else str(k) for k in path)
    return NamedSharding(mesh, partition(name, tuple(leaf.shape), mesh))
  return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_state(tree: Any, mesh: Mesh) -> Any:
  """Places a state on the mesh."""
  return jax.device_put(tree, tree_shardings(tree, mesh))


def shard_rows(batch: Any, mesh: Mesh) -> Any:
  """Places a batch: its leading axis is split over 'data' and 'fsdp'."""
  return jax.device_put(batch, NamedSharding(mesh, P(('data', 'fsdp'))))


def split_rows(batch: Any, parts: int) -> Any:
  """Adds a leading axis of parts: devices under `pmap`, or micro-batches.

  Raises:
    ValueError: the rows do not divide by the parts.
  """
  def split(x):
    if x.shape[0] % parts:
      raise ValueError(f'{x.shape[0]} rows do not divide into {parts} parts (devices under pmap, '
                       'or parallel.micro_batches)')
    # Not -1: some arrays have no values.
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
  return jax.tree.map(split, batch)
