"""Meshes, the scope of a mesh, placement of trees and rows; where parameters lie is in `layout`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import numpy as np

from lvrpo_jax import layout

AXES, ROWS = layout.AXES, layout.ROWS

RULES = (('rows', ROWS), ('heads', 'tensor'), ('pixels', AXES))
"""What the logical axis names of activations in `models/` mean on a mesh."""

MOST = {'data': 1, 'fsdp': 32, 'tensor': 4}
"""What a size of 0 takes at most. With more fsdp devices a 7B model's rows of a weight do not fill
a TPU's tiles of 16, and XLA moves padding; its 4 key/value heads bound tensor."""


def sizes(shape: tuple[int, ...], count: int, key: str, unit: str,
          slices: tuple[int, int, int] = (1, 1, 1)) -> tuple[int, ...]:
  """Sizes of the axes whose product is `count`.

  One may be -1 and takes what the others leave. 0 takes as many as divide both `MOST` and `count`;
  with several slices, as many of each slice as keep the axis within `MOST`.

  Raises:
    ValueError: they do not multiply to `count`; the message names the config key.
  """
  inner = count // math.prod(slices)
  out = [outer * math.gcd(inner, max(MOST[axis] // outer, 1)) if size == 0 else size
         for axis, size, outer in zip(AXES, shape, slices)]
  if out.count(-1) > 1:
    raise ValueError(f'{key} is {tuple(shape)}: at most one size may be -1')
  if -1 in out:
    rest = math.prod(size for size in out if size != -1)
    out[out.index(-1)] = max(count // rest, 1)
  if math.prod(out) != count:
    raise ValueError(f'{key} is {tuple(shape)}, which does not multiply to the {count} {unit} at '
                     'hand')
  return tuple(out)


def make_mesh(shape: tuple[int, int, int], devices: list[jax.Device] | None = None,
              slices: tuple[int, int, int] = (-1, 1, 1)) -> Mesh:
  """A mesh over `AXES`; sizes of -1 and 0 are those of `sizes`.

  Args:
    shape: devices along each axis.
    devices: default all.
    slices: slices of TPUs, or hosts of GPUs that count as such, along each axis, where there are
      several: they talk over the data center's network, so an axis that moves little belongs there.

  Raises:
    ValueError: the sizes do not multiply to the number of devices or slices, or the slices of an
      axis do not divide its devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len({getattr(d, 'slice_index', 0) for d in devices})
  if count == 1 or devices[0].platform == 'cpu':
    shape = sizes(shape, len(devices), 'parallel.mesh', 'devices')
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    outer = sizes(slices, count, 'parallel.slices', 'slices')
    shape = sizes(shape, len(devices), 'parallel.mesh', 'devices', outer)
    if any(whole % part for whole, part in zip(shape, outer)):
      raise ValueError(f'parallel.slices is {outer}; allowed: divisors of parallel.mesh = {shape}')
    inner = tuple(whole // part for whole, part in zip(shape, outer))
    grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices,
                                                allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def reshaped(mesh: Mesh, shape: tuple[int, int, int]) -> Mesh:
  """Another view of a mesh's devices, neighbours along the last axes staying neighbours."""
  shape = sizes(shape, mesh.size, 'parallel.rollout_mesh', 'devices')
  return Mesh(mesh.devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
  """What is traced inside lays its activations out by `RULES`; on one device nothing changes."""
  if mesh.size == 1:
    yield
    return
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def scoped(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """A compiled function that is traced and called in the scope of a mesh."""
  @functools.wraps(function)
  def call(*args, **kwargs):
    with scope(mesh):
      return function(*args, **kwargs)
  return function if mesh.size == 1 else call


def traceable(function: Callable[..., Any]) -> Any:
  """What has `trace` and `lower` behind a compiled function, to be used in the mesh's scope."""
  return function if hasattr(function, 'lower') else function.__wrapped__


def constrain(tree: Any, mesh: Mesh) -> Any:
  """Lays out parameters, or trees like them, inside a compiled function."""
  if mesh.size == 1:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, tree_shardings(tree, mesh))


def name(path: Any) -> str:
  """'trunk/layers/und/q_proj/kernel' from a key path."""
  return '/'.join(str(k.key) if isinstance(k, jax.tree_util.DictKey) else str(k) for k in path)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """Shardings of parameters, or of any tree whose paths end like those of parameters."""
  def sharding(path, leaf):
    return NamedSharding(mesh, layout.partition(name(path), tuple(leaf.shape), mesh))
  return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_state(tree: Any, mesh: Mesh) -> Any:
  """Places a state on the mesh; what is not there yet is the same in every process."""
  return put(tree, tree_shardings(tree, mesh))


def put(tree: Any, where: Any) -> Any:
  """`jax.device_put`, also where several processes hold equal copies of what is placed."""
  if jax.process_count() == 1:
    return jax.device_put(tree, where)

  def place(x, s):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, s)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.device_put(x, s)
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, s, lambda index: value[index])
  return jax.tree.map(place, tree, where)


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Of a batch: its leading axis is split over `ROWS`."""
  return NamedSharding(mesh, P(ROWS))


def _row_shards(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """Numbers of the shards of rows that each process holds."""
  held = {}
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  for number, devices in enumerate(mesh.devices.reshape(rows, -1)):
    for process in {d.process_index for d in devices}:
      held.setdefault(process, []).append(number)
  return {process: tuple(numbers) for process, numbers in held.items()}


def row_block(mesh: Mesh) -> tuple[int, int]:
  """(index, count) of the block of rows that this process loads; all blocks have as many rows.

  Processes that the mesh axis `tensor` spans hold the same rows, and so share a block.

  Raises:
    ValueError: the rows of two processes are neither the same nor apart, or some hold more.
  """
  if jax.process_count() == 1:
    return 0, 1
  held = _row_shards(mesh)
  blocks = sorted(set(held.values()))
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  if sum(map(len, blocks)) != rows or len({len(block) for block in blocks}) > 1:
    raise ValueError(f'parallel.mesh is {tuple(mesh.shape.values())} over {len(held)} processes, '
                     f'which hold shards of rows {blocks}; allowed: meshes on which any two '
                     'processes hold the same rows or none in common, and all as many')
  return blocks.index(held[jax.process_index()]), len(blocks)


def agreed(rows: Any, mesh: Mesh) -> Any:
  """NumPy rows that each process has found for itself, made equal where several share a block: what
  a remote judge says need not be the same for each. All processes call this."""
  if row_block(mesh)[1] == jax.process_count():
    return rows
  held = _row_shards(mesh)
  first = min(p for p, block in held.items() if block == held[jax.process_index()])
  return jax.tree.map(lambda x: np.asarray(x)[first], multihost_utils.process_allgather(rows))


def shard_rows(batch: Any, mesh: Mesh) -> Any:
  """Places a batch of which every process holds the rows of its `row_block`.

  Raises:
    ValueError: the rows do not divide by the devices that should split them, or see `row_block`.
  """
  where, count = rows_sharding(mesh), mesh.shape['data'] * mesh.shape['fsdp']
  blocks = row_block(mesh)[1]

  def place(x):
    total = x.shape[0] * blocks
    if total % count:
      raise ValueError(f'{total} rows do not divide over {count} devices (parallel.mesh is '
                       f'{tuple(mesh.shape.values())}); choose numbers of prompts that do')
    if jax.process_count() == 1:
      return jax.device_put(x, where)
    return jax.make_array_from_process_local_data(where, np.asarray(x))
  return jax.tree.map(place, batch)


def shard_copies(batch: Any, mesh: Mesh) -> Any:
  """Places a batch of which every process holds all rows."""
  return put(batch, jax.tree.map(lambda _: rows_sharding(mesh), batch))


def whole(x: Any) -> np.ndarray:
  """All rows of an array, in every process; each of them calls this."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def process_mean(values: dict[str, float]) -> dict[str, float]:
  """Means over all processes of numbers that each has of its own rows; each of them calls this."""
  if jax.process_count() == 1:
    return values
  rows = multihost_utils.process_allgather(np.array(list(values.values()), np.float64))
  return dict(zip(values, rows.mean(axis=0).tolist()))


def local_rows(x: Any) -> np.ndarray:
  """The rows of this process's block of an array that came from `shard_rows`, in their order."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.asarray(x)
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def check_rows(batch: Any, parts: int = 1) -> None:
  """Refuses a batch of which not every device gets as many rows, on the mesh of this trace.

  XLA would pad the rows or give all of them to every device, and say nothing.

  Args:
    parts: micro-batches, each of which has to divide.

  Raises:
    ValueError: rows do not divide; the message names them by their path in the batch.
  """
  mesh = jax.sharding.get_abstract_mesh()
  count = mesh.shape.get('data', 1) * mesh.shape.get('fsdp', 1)
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    if not x.ndim:
      continue
    if x.shape[0] % parts:
      raise ValueError(f'{name(path)}: {x.shape[0]} rows do not divide into {parts} parts, those '
                       'of parallel.micro_batches or parallel.group_parts')
    if x.shape[0] // parts % count:
      raise ValueError(
          f'{name(path)}: {x.shape[0]} rows in {parts} parts (parallel.micro_batches or '
          f'parallel.group_parts) do not divide over the {count} devices of mesh axes data and '
          f'fsdp (parallel.mesh is {tuple(mesh.shape.values())}); allowed: multiples of '
          f'{parts * count} rows')


def interleaved(batch: Any, parts: int) -> Any:
  """Adds a leading axis of micro-batches: part i holds rows i, i + parts, ...

  Every device then holds rows of every part, and none has to move.

  Raises:
    ValueError: the rows do not divide by the parts, or those of a part not over the devices.
  """
  check_rows(batch, parts)
  return jax.tree.map(lambda x: jax.numpy.moveaxis(
      x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch)


def split_rows(batch: Any, parts: int) -> Any:
  """Adds a leading axis of the devices of `pmap`.

  Raises:
    ValueError: the rows do not divide by the parts.
  """
  def split(x):
    if x.shape[0] % parts:
      raise ValueError(f'{x.shape[0]} rows do not divide into {parts} parts, the devices of pmap')
    # Not -1: some arrays have no values.
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
  return jax.tree.map(split, batch)
