"""Logical names of activation axes, and rows of several arrays in one product.

The names and what they mean on a mesh are in `mesh.RULES`; outside of a mesh nothing here does
anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn
from flax.linen import spmd
import jax
from jax import numpy as jnp

Array = jax.Array


def constrain(x: Array, *names: str | None) -> Array:
  """Lays out an activation by the logical names of its leading axes; the rest is not split.

  Raises:
    ValueError: an axis does not divide, see `parts_of`.
  """
  kept = [name if name and parts_of(name, size) > 1 else None for name, size in zip(names, x.shape)]
  return nn.with_logical_constraint(x, (*kept, *[None] * (x.ndim - len(names))))


def resolve(name: str) -> Any:
  """Mesh axes of a logical name, or None."""
  return dict(spmd.get_logical_axis_rules()).get(name)


def shards(name: str) -> int:
  """Parts that an axis of this name is split into on the mesh of this trace; 1 without a mesh."""
  mesh, axes = jax.sharding.get_abstract_mesh(), resolve(name)
  if mesh.empty or axes is None:
    return 1
  count = 1
  for axis in (axes,) if isinstance(axes, str) else axes:
    count *= mesh.shape[axis]
  return count


def parts_of(name: str, size: int) -> int:
  """Parts that an axis of this name and size is split into on the mesh of this trace.

  An axis of 1 is not split: a single row, such as one prompt on several devices, has no parts, and
  every device computes it.

  Raises:
    ValueError: the axis does not divide. XLA would pad it, or give all of it to every device, and
      say nothing.
  """
  parts = 1 if size == 1 else shards(name)
  if size % parts:
    axes = resolve(name)
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    raise ValueError(
      f'an axis of {size} {name} does not divide over the {parts} devices of mesh '
      f'axes {axes!r} (the mesh is {mesh}); allowed: 1, and multiples of {parts}'
    )
  return parts


def together(function: Callable[..., Any], *arrays: list[Array]) -> list[Any]:
  """`function(x, ...)` on the features of every entry (B, ..., D) of the lists, in one call.

  A weight is then gathered once and its gradient reduced once, however many entries there are. Rows
  are folded so that no token leaves its device.

  Raises:
    ValueError: the rows do not divide, see `parts_of`.
  """
  if len(arrays[0]) == 1:
    return [function(*(xs[0] for xs in arrays))]
  parts = parts_of('rows', arrays[0][0].shape[0])
  fold = lambda x: constrain(x.reshape(parts, -1, x.shape[-1]), 'rows')
  folded = [[fold(x) for x in xs] for xs in arrays]
  bounds = [0]
  for x in folded[0]:
    bounds.append(bounds[-1] + x.shape[1])
  out = function(*(jnp.concatenate(xs, axis=1) for xs in folded))

  def cut(y, number):
    part = jax.lax.slice_in_dim(y, bounds[number], bounds[number + 1], axis=1)
    return constrain(part.reshape(*arrays[0][number].shape[:-1], *y.shape[2:]), 'rows')

  return [jax.tree.map(lambda y, n=n: cut(y, n), out) for n in range(len(bounds) - 1)]


def gathered(params: Any) -> Any:
  """Parameters whole on every device, for as long as a function uses them.

  Of convolutions XLA else splits channels by the kernel's parts and gathers images in place of the
  small kernels: all of a mesh's, so that a chip's memory and traffic grow with the number of chips.
  """
  return jax.tree.map(constrain, params)


def one_by_one(function: Callable[[Array], Array], x: Array) -> Array:
  """`function` of rows (R, ...), on every device one row after the other, for what takes memory."""
  parts = shards('pixels')
  if x.shape[0] % parts:
    raise ValueError(
      f'{x.shape[0]} images do not divide over {parts} devices; choose numbers of prompts that do'
    )
  turns = constrain(x.reshape(parts, -1, *x.shape[1:]), 'pixels')
  out = jax.lax.map(
    lambda rows: constrain(function(constrain(rows, 'pixels')), 'pixels'), jnp.moveaxis(turns, 1, 0)
  )
  return jnp.moveaxis(out, 0, 1).reshape(x.shape[0], *out.shape[2:])
