"""Values and arrays on which several processes have to agree.

All processes have to call a function that communicates at the same point; its docstring says so.
With one process nothing is sent. `row_block` defines which rows of a batch a process loads.
"""

from __future__ import annotations

from collections.abc import Sequence
import pathlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from lvrpo_jax import types


def broadcast_integers(values: Sequence[int]) -> list[int]:
  """Returns the integers that process 0 holds, in every process; all processes call it.

  What process 0 finds in a folder then counts for all.
  """
  if jax.process_count() == 1:
    return list(values)
  broadcast = multihost_utils.broadcast_one_to_all
  count = int(broadcast(np.int32(len(values))))
  # Other processes may hold more or fewer integers, but have to pass an array of the same size.
  return broadcast(np.resize(np.array([*values, 0], np.int32), count)).tolist()


def path_exists(path: pathlib.Path) -> bool:
  """Whether `path` exists on process 0; all processes call it, and so take the same branch."""
  return bool(broadcast_integers([path.exists()])[0])


def any_process(value: bool) -> bool:
  """Whether the value is true in any process; all processes call it."""
  return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def process_mean(values: dict[str, float]) -> dict[str, float]:
  """Returns means over all processes of values that each computed from its rows; all call it."""
  if jax.process_count() == 1:
    return values
  rows = multihost_utils.process_allgather(np.array(list(values.values()), np.float64))
  return dict(zip(values, rows.mean(axis=0).tolist(), strict=True))


def row_block(mesh: Mesh) -> tuple[int, int]:
  """Returns (index, count) of the block of rows that this process loads.

  All blocks have equally many rows. Processes that the mesh axis `tensor` spans hold the same rows,
  and therefore share a block.

  Raises:
    ValueError: the rows of two processes overlap without being the same, or some hold more.
  """
  if jax.process_count() == 1:
    return 0, 1
  held = _row_shards(mesh)
  blocks = sorted(set(held.values()))
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  if sum(map(len, blocks)) != rows or len({len(block) for block in blocks}) > 1:
    raise ValueError(
      f'parallel.mesh is {tuple(mesh.shape.values())} over {len(held)} processes, '
      f'which hold shards of rows {blocks}; allowed: meshes on which any two '
      'processes hold the same rows or none in common, and all as many'
    )
  return blocks.index(held[jax.process_index()]), len(blocks)


def _row_shards(mesh: Mesh) -> dict[int, tuple[int, ...]]:
  """Indices of the shards of rows that each process holds."""
  held: dict[int, list[int]] = {}
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  for index, devices in enumerate(mesh.devices.reshape(rows, -1)):
    for process in {device.process_index for device in devices}:
      held.setdefault(process, []).append(index)
  return {process: tuple(indices) for process, indices in held.items()}


def agree_on_rows(rows: types.Tree, mesh: Mesh) -> types.Tree:
  """Makes NumPy rows equal in all processes that share a block; all processes call it.

  Each process has computed its rows alone, and a remote judge may answer them differently. The rows
  of the first process of a block count.
  """
  if row_block(mesh)[1] == jax.process_count():
    return rows
  held = _row_shards(mesh)
  first = min(process for process, block in held.items() if block == held[jax.process_index()])
  return jax.tree.map(lambda x: np.asarray(x)[first], multihost_utils.process_allgather(rows))


def gather_rows(x: types.Array | np.ndarray) -> np.ndarray:
  """Returns all rows of an array, in every process; all processes call it."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def local_rows(x: types.Array | np.ndarray) -> np.ndarray:
  """Returns the rows of this process's block, in order, of an array from `placement.shard_rows`."""
  if not isinstance(x, jax.Array) or x.is_fully_addressable:
    return np.asarray(x)
  parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
