"""Device meshes, and the scope in which activations are laid out on one.

A mesh has the axes `AXES`. The config gives the count of devices along each axis; `axis_sizes`
resolves counts of -1 and 0. Inside `scope`, the logical axis names of `parallel.activations` refer
to mesh axes by `RULES`.
"""

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

from lvrpo_jax.parallel import partition_rules

AXES, ROWS = partition_rules.AXES, partition_rules.ROWS

RULES = (('rows', ROWS), ('heads', 'tensor'), ('pixels', AXES))
"""Mesh axes of the logical axis names that activations in `models/` use."""

MAX_AXIS_SIZE = {'data': 1, 'fsdp': 32, 'tensor': 4}
"""Largest size that a configured size of 0 resolves to.

With more fsdp devices, the rows of a weight of a 7B model do not fill a TPU's tiles of 16, and XLA
moves padding. The 4 key/value heads of that model bound tensor.
"""


def axis_sizes(
  shape: tuple[int, ...], count: int, key: str, unit: str, slices: tuple[int, ...] = (1, 1, 1)
) -> tuple[int, int, int]:
  """Resolves the configured sizes of the axes to sizes whose product is `count`.

  One size may be -1 and takes what the others leave. A size of 0 takes as many as divide both
  `MAX_AXIS_SIZE` and `count`. With several slices it takes as many of each slice as divide the
  slice and keep the axis within `MAX_AXIS_SIZE`.

  Args:
    shape: configured sizes along `AXES`.
    count: devices or slices to distribute.
    key: config key, for messages.
    unit: what is counted, for messages.
    slices: slices along each axis.

  Raises:
    ValueError: the sizes do not multiply to `count`; the message names the config key.
  """
  inner = count // math.prod(slices)
  out = [
    outer * math.gcd(inner, max(MAX_AXIS_SIZE[axis] // outer, 1)) if size == 0 else size
    for axis, size, outer in zip(AXES, shape, slices, strict=True)
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
  data, fsdp, tensor = out
  return data, fsdp, tensor


def make_mesh(
  shape: tuple[int, int, int],
  # JAX declares `Device` as a variable, which is no type to pyright.
  devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
  slices: tuple[int, int, int] = (-1, 1, 1),
) -> Mesh:
  """Makes a mesh over `AXES`; `axis_sizes` resolves sizes of -1 and 0.

  Args:
    shape: devices along each axis.
    devices: default all.
    slices: slices along each axis, where there are several. A slice is one of TPUs, or a host of
      GPUs that counts as one. Slices communicate over the data center's network, so they belong
      along an axis that moves little data.

  Raises:
    ValueError: the sizes do not multiply to the count of devices or slices, or the slices of an
      axis do not divide its devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len({getattr(device, 'slice_index', 0) for device in devices})
  if count == 1 or devices[0].platform == 'cpu':
    sizes = axis_sizes(shape, len(devices), 'parallel.mesh', 'devices')
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  else:
    outer = axis_sizes(slices, count, 'parallel.slices', 'slices')
    sizes = axis_sizes(shape, len(devices), 'parallel.mesh', 'devices', outer)
    if any(size % part for size, part in zip(sizes, outer, strict=True)):
      raise ValueError(f'parallel.slices is {outer}; allowed: divisors of parallel.mesh = {sizes}')
    inner = tuple(size // part for size, part in zip(sizes, outer, strict=True))
    grid = mesh_utils.create_hybrid_device_mesh(
      inner, outer, devices, allow_split_physical_axes=True
    )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def reshape_mesh(mesh: Mesh, shape: tuple[int, int, int]) -> Mesh:
  """Makes another mesh of the same devices; neighbours along the last axes stay neighbours.

  Raises:
    ValueError: the sizes do not multiply to the count of devices.
  """
  sizes = axis_sizes(shape, mesh.size, 'parallel.rollout_mesh', 'devices')
  return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


@contextlib.contextmanager
def scope(mesh: Mesh) -> Iterator[None]:
  """Lays out the activations of functions traced inside by `RULES`; on one device does nothing."""
  if mesh.size == 1:
    yield
    return
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


def scoped(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
  """Wraps a compiled function so that it is traced and called in the scope of a mesh."""

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    with scope(mesh):
      return function(*args, **kwargs)

  return function if mesh.size == 1 else call


def traceable(function: Callable[..., Any]) -> Any:
  """Returns the compiled function inside a `scoped` one, for `trace` and `lower` in the scope."""
  return function if hasattr(function, 'lower') else function.__wrapped__
