"""Layout of activations by the logical names of their axes, and calls that keep rows local.

`mesh.RULES` maps the logical names to mesh axes. Outside of `mesh.scope` an axis has one part, and
nothing is split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flax.core import spmd as logical_axes
from flax.linen import spmd
import jax
from jax import numpy as jnp

from lvrpo_jax import types

Array = jax.Array
Output = TypeVar('Output')


def constrain(x: Array, *names: str | None) -> Array:
  """Lays out an activation by the logical names of its leading axes; the rest is not split.

  Raises:
    ValueError: an axis does not divide, see `parts_of`.
  """
  # There may be fewer names than axes.
  split = [
    name if name and parts_of(name, size) > 1 else None
    for name, size in zip(names, x.shape, strict=False)
  ]
  return spmd.with_logical_constraint(x, (*split, *[None] * (x.ndim - len(names))))


def resolve(name: str) -> str | tuple[str, ...] | None:
  """Returns the mesh axes of a logical name, or None."""
  return dict(logical_axes.get_logical_axis_rules()).get(name)


def shards(name: str) -> int:
  """Count of parts of an axis of this name on the mesh of the trace; 1 without a mesh."""
  mesh, axes = jax.sharding.get_abstract_mesh(), resolve(name)
  if mesh.empty or axes is None:
    return 1
  count = 1
  for axis in (axes,) if isinstance(axes, str) else axes:
    count *= mesh.shape[axis]
  return count


def parts_of(name: str, size: int) -> int:
  """Count of parts of an axis of this name and size on the mesh of the trace.

  An axis of size 1 is not split: every device computes a single row, such as one prompt on several
  devices.

  Raises:
    ValueError: the axis does not divide. XLA would silently pad it, or give all of it to every
      device.
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


def together(function: Callable[..., Output], *arrays: list[Array]) -> list[Output]:
  """Applies `function(x, ...)` to the features of every entry (B, ..., D) of the lists in one call.

  A weight is then gathered once and its gradient reduced once, whatever the length of the lists.
  Rows are folded so that no token leaves its device.

  Args:
    function: acts on the last axis; it returns an array or a tree of arrays.
    *arrays: lists of one length, one for each argument of `function`.

  Returns:
    The outputs, one for each entry of the lists.

  Raises:
    ValueError: the rows do not divide, see `parts_of`.
  """
  if len(arrays[0]) == 1:
    return [function(*(xs[0] for xs in arrays))]
  parts = parts_of('rows', arrays[0][0].shape[0])

  def fold(x: Array) -> Array:
    return constrain(x.reshape(parts, -1, x.shape[-1]), 'rows')

  folded = [[fold(x) for x in xs] for xs in arrays]
  bounds = [0]
  for x in folded[0]:
    bounds.append(bounds[-1] + x.shape[1])
  out = function(*(jnp.concatenate(xs, axis=1) for xs in folded))

  def cut(y: Array, index: int) -> Array:
    part = jax.lax.slice_in_dim(y, bounds[index], bounds[index + 1], axis=1)
    return constrain(part.reshape(*arrays[0][index].shape[:-1], *y.shape[2:]), 'rows')

  return [jax.tree.map(lambda y, i=i: cut(y, i), out) for i in range(len(bounds) - 1)]


def gathered(params: types.Params) -> types.Params:
  """Gathers parameters, so that every device holds all of them while a function uses them.

  Otherwise XLA splits the channels of a convolution by the parts of its kernel and gathers images
  instead of the small kernels. It gathers all images of the mesh, so the memory and traffic of a
  chip would grow with the number of chips.
  """
  return jax.tree.map(constrain, params)


def one_by_one(function: Callable[[Array], Array], x: Array) -> Array:
  """Applies `function` to rows (R, ...), on every device one row after the other, to save memory.

  Raises:
    ValueError: the rows do not divide over the devices.
  """
  parts = shards('pixels')
  if x.shape[0] % parts:
    raise ValueError(
      f'{x.shape[0]} images do not divide over {parts} devices; choose numbers of prompts that do'
    )

  def step(rows: Array) -> Array:
    return constrain(function(constrain(rows, 'pixels')), 'pixels')

  turns = constrain(x.reshape(parts, -1, *x.shape[1:]), 'pixels')
  out = jax.lax.map(step, jnp.moveaxis(turns, 1, 0))
  return jnp.moveaxis(out, 0, 1).reshape(x.shape[0], *out.shape[2:])
