"""Device meshes, and the scope in which activations follow one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import partition_rules

AXES, ROWS = partition_rules.AXES, partition_rules.ROWS


RULES = (('rows', ROWS), ('heads', 'tensor'), ('pixels', AXES))
"""What the logical axis names of activations in `models/` mean on a mesh."""


MAX_AXIS_SIZE = {'data': 1, 'fsdp': 32, 'tensor': 4}
"""What a size of 0 takes at most. With more fsdp devices a 7B model's rows of a weight do not fill
a TPU's tiles of 16, and XLA moves padding; its 4 key/value heads bound tensor."""


def axis_sizes(
  shape: tuple[int, ...], count: int, key: str, unit: str, slices: tuple[int, int, int] = (1, 1, 1)
) -> tuple[int, ...]:
  """Sizes of the axes whose product is `count`.

  One may be -1 and takes what the others leave. 0 takes as many as divide both `MOST` and `count`;
  with several slices, as many of each slice as keep the axis within `MOST`.

  Raises:
    ValueError: they do not multiply to `count`; the message names the config key.
  """
  inner = count // math.prod(slices)
  out = [
    outer * math.gcd(inner, max(MAX_AXIS_SIZE[axis] // outer, 1)) if size == 0 else size
    for axis, size, outer in zip(AXES, shape, slices)
  ]
  if out.count(-1) > 1:
    raise ValueError(f'{key} is {tuple(shape)}: at most one size may be -1')
  if -1 in out:
    rest = math.prod(size for size in out if size != -1)
    out[out.index(-1)] = max(count // rest, 1)
  if math.prod(out) != count:
    raise ValueError(
      f'{key} is {tuple(shape)}, which does not multiply to the {count} {unit} at hand'
    )
  return tuple(out)


def make_mesh(
  shape: tuple[int, int, int],
  devices: list[jax.Device] | None = None,
  slices: tuple[int, int, int] = (-1, 1, 1),
) -> Mesh:
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
    shape = axis_sizes(shape, len(devices), 'parallel.mesh', 'devices')
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    outer = axis_sizes(slices, count, 'parallel.slices', 'slices')
    shape = axis_sizes(shape, len(devices), 'parallel.mesh', 'devices', outer)
    if any(multihost.gather_rows % part for multihost.gather_rows, part in zip(shape, outer)):
      raise ValueError(f'parallel.slices is {outer}; allowed: divisors of parallel.mesh = {shape}')
    inner = tuple(
      multihost.gather_rows // part for multihost.gather_rows, part in zip(shape, outer)
    )
    grid = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, allow_split_physical_axes=True
    )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def reshape_mesh(mesh: Mesh, shape: tuple[int, int, int]) -> Mesh:
  """Another view of a mesh's devices, neighbours along the last axes staying neighbours."""
  shape = axis_sizes(shape, mesh.size, 'parallel.rollout_mesh', 'devices')
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
