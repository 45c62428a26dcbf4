"""Placement of trees and batches on a mesh, and the split of batches into parts.

Parameters and states are laid out by `parallel.partition_rules`. Batches are split along their
leading axis over the mesh axes `partition_rules.ROWS`.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import partition_rules


def parameter_name(path: jax.tree_util.KeyPath) -> str:
  """Formats a key path as a name: 'trunk/layers/und/q_proj/kernel'."""
  return '/'.join(
    str(key.key) if isinstance(key, jax.tree_util.DictKey) else str(key) for key in path
  )


def tree_shardings(tree: types.Tree, mesh: Mesh) -> types.Tree:
  """Returns shardings of parameters, or of any tree whose paths end like those of parameters."""

  def sharding(path: jax.tree_util.KeyPath, leaf: types.Array) -> NamedSharding:
    spec = partition_rules.partition(parameter_name(path), tuple(leaf.shape), mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain(tree: types.Tree, mesh: Mesh) -> types.Tree:
  """Lays out parameters, or trees like them, inside a compiled function."""
  if mesh.size == 1:
    return tree
  return jax.tree.map(jax.lax.with_sharding_constraint, tree, tree_shardings(tree, mesh))


def put_tree(tree: types.Tree, where: types.Tree) -> types.Tree:
  """Places a tree as `jax.device_put` does, also with several processes.

  All processes hold equal copies of the leaves that are not placed yet.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, where)

  def place(x: types.Array | np.ndarray, sharding: NamedSharding) -> types.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return jax.device_put(x, sharding)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.device_put(x, sharding)
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  return jax.tree.map(place, tree, where)


def shard_state(tree: types.Tree, mesh: Mesh) -> types.Tree:
  """Places a state on the mesh; leaves that are not on it yet are equal in every process."""
  return put_tree(tree, tree_shardings(tree, mesh))


def rows_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch, whose leading axis is split over `partition_rules.ROWS`."""
  return NamedSharding(mesh, P(partition_rules.ROWS))


def shard_rows(batch: types.Tree, mesh: Mesh) -> types.Tree:
  """Places a batch of which every process holds the rows of its `multihost.row_block`.

  Raises:
    ValueError: the rows do not divide over the devices that split them, or see
      `multihost.row_block`.
  """
  where, count = rows_sharding(mesh), mesh.shape['data'] * mesh.shape['fsdp']
  blocks = multihost.row_block(mesh)[1]

  def place(x: np.ndarray) -> types.Array:
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


def shard_copies(batch: types.Tree, mesh: Mesh) -> types.Tree:
  """Places a batch of which every process holds all rows."""
  return put_tree(batch, jax.tree.map(lambda _: rows_sharding(mesh), batch))


def check_rows(batch: types.Tree, parts: int = 1) -> None:
  """Refuses a batch whose rows do not divide evenly over the devices of the mesh of the trace.

  XLA would silently pad the rows, or give all of them to every device.

  Args:
    batch: a tree whose leaves have rows as their leading axis.
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


def split_micro_batches(batch: types.Tree, parts: int) -> types.Tree:
  """Adds a leading axis of micro-batches: part i holds rows i, i + parts, ...

  Every device then holds rows of every part, and no row moves between devices.

  Raises:
    ValueError: the rows do not divide by the parts, or those of a part not over the devices.
  """
  check_rows(batch, parts)

  def split(x: types.Array) -> types.Array:
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

  return jax.tree.map(split, batch)


def split_over_devices(batch: types.Tree, parts: int) -> types.Tree:
  """Adds a leading axis of the devices of `pmap`.

  Raises:
    ValueError: the rows do not divide by the parts.
  """

  def split(x: types.Array) -> types.Array:
    if x.shape[0] % parts:
      raise ValueError(f'{x.shape[0]} rows do not divide into {parts} parts, the devices of pmap')
    # The size is given instead of -1, because some arrays have size 0.
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

  return jax.tree.map(split, batch)
