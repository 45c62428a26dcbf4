"""Meshes, the scope of a mesh, placement of trees and rows; where parameters lie is in `layout`."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import partition_rules


def constrain(tree: Any, mesh: Mesh) -> Any:
  """Lays out parameters, or trees like them, inside a compiled function."""
  if mesh.size == 1:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, tree_shardings(tree, mesh))


def parameter_name(path: Any) -> str:
  """'trunk/layers/und/q_proj/kernel' from a key path."""
  return '/'.join(str(k.key) if isinstance(k, jax.tree_util.DictKey) else str(k) for k in path)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """Shardings of parameters, or of any tree whose paths end like those of parameters."""

  def sharding(path, leaf):
    return NamedSharding(
      mesh, partition_rules.partition(parameter_name(path), tuple(leaf.shape), mesh)
    )

  return jax.tree_util.tree_map_with_path(sharding, tree)


def shard_state(tree: Any, mesh: Mesh) -> Any:
  """Places a state on the mesh; what is not there yet is the same in every process."""
  return put_tree(tree, tree_shardings(tree, mesh))


def put_tree(tree: Any, where: Any) -> Any:
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
  return NamedSharding(mesh, P(mesh_lib.ROWS))


def shard_rows(batch: Any, mesh: Mesh) -> Any:
  """Places a batch of which every process holds the rows of its `row_block`.

  Raises:
    ValueError: the rows do not divide by the devices that should split them, or see `row_block`.
  """
  where, count = rows_sharding(mesh), mesh.shape['data'] * mesh.shape['fsdp']
  blocks = multihost.row_block(mesh)[1]

  def place(x):
    total = x.shape[0] * blocks
    if total % count:
      raise ValueError(
        f'{total} rows do not divide over {count} devices (parallel.mesh is '
        f'{tuple(mesh.shape.values())}); choose numbers of prompts that do'
      )
    if jax.process_count() == 1:
      return jax.device_put(x, where)
    return jax.make_array_from_process_local_data(where, np.asarray(x))

  return jax.tree.map(place, batch)


def shard_copies(batch: Any, mesh: Mesh) -> Any:
  """Places a batch of which every process holds all rows."""
  return put_tree(batch, jax.tree.map(lambda _: rows_sharding(mesh), batch))


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
      raise ValueError(
        f'{parameter_name(path)}: {x.shape[0]} rows do not divide into {parts} parts, those '
        'of parallel.micro_batches or parallel.group_parts'
      )
    if x.shape[0] // parts % count:
      raise ValueError(
        f'{parameter_name(path)}: {x.shape[0]} rows in {parts} parts (parallel.micro_batches or '
        f'parallel.group_parts) do not divide over the {count} devices of mesh axes data and '
        f'fsdp (parallel.mesh is {tuple(mesh.shape.values())}); allowed: multiples of '
        f'{parts * count} rows'
      )


def split_micro_batches(batch: Any, parts: int) -> Any:
  """Adds a leading axis of micro-batches: part i holds rows i, i + parts, ...

  Every device then holds rows of every part, and none has to move.

  Raises:
    ValueError: the rows do not divide by the parts, or those of a part not over the devices.
  """
  check_rows(batch, parts)
  return jax.tree.map(
    lambda x: jax.numpy.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
  )


def split_over_devices(batch: Any, parts: int) -> Any:
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
