"""Facts and arrays that several processes have to agree on."""

from __future__ import annotations

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np


def broadcast_integers(values: Sequence[int]) -> list[int]:
  """The integers that process 0 holds, in every process: what it sees of a folder goes for all."""
  if jax.process_count() == 1:
    return list(values)
  tell = multihost_utils.broadcast_one_to_all
  count = int(tell(np.int32(len(values))))
  # Others may see more or fewer, but have to bring as many.
  return tell(np.resize(np.array([*values, 0], np.int32), count)).tolist()


def path_exists(path: pathlib.Path) -> bool:
  """Whether process 0 sees it: work that is left out, or begun, is left out by all or by none."""
  return bool(broadcast_integers([path.exists()])[0])


def any_process(value: bool) -> bool:
  """Whether it is so in any process."""
  return bool(np.any(multihost_utils.process_allgather(np.array(value))))


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
    raise ValueError(
      f'parallel.mesh is {tuple(mesh.shape.values())} over {len(held)} processes, '
      f'which hold shards of rows {blocks}; allowed: meshes on which any two '
      'processes hold the same rows or none in common, and all as many'
    )
  return blocks.index(held[jax.process_index()]), len(blocks)


def agree_on_rows(rows: Any, mesh: Mesh) -> Any:
  """NumPy rows that each process has found for itself, made equal where several share a block: what
  a remote judge says need not be the same for each. All processes call this."""
  if row_block(mesh)[1] == jax.process_count():
    return rows
  held = _row_shards(mesh)
  first = min(p for p, block in held.items() if block == held[jax.process_index()])
  return jax.tree.map(lambda x: np.asarray(x)[first], multihost_utils.process_allgather(rows))


def gather_rows(x: Any) -> np.ndarray:
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
