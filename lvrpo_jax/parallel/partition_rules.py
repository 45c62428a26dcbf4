"""Layout of parameters on a mesh: a table from their names to partitions."""

from __future__ import annotations

import functools
import math
import re

from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
"""Axes of every mesh."""

ROWS = ('data', 'fsdp')
"""Mesh axes that split rows of a batch."""

DUAL_ENCODER = re.compile(r'(^|/)(vision|text)/')
"""Names of the parameters of the dual encoder (SigLIP).

It is small beside the policy, and its sizes should not limit the meshes of the policy. Parameters
of at most `SMALL` values are whole on every device, and larger ones are split where they divide.
"""

SMALL = 2**18
"""Count of values up to which an array may be whole on every device: 1 MB in float32."""

TABLE = (
  # Kernels of the dual encoder hold heads as an axis of their own.
  (r'attention/(q|k|v)_proj/kernel$', ('fsdp', None, None)),
  (r'attention/out_proj/kernel$', (None, None, 'fsdp')),
  (r'(^|/)text/(tokens/embedding|positions|head/kernel)$', (None, 'fsdp')),
  (r'(^|/)vision/positions$', (None, 'fsdp')),
  (r'(q|k|v|gate|up)_proj/kernel$', ('fsdp', 'tensor')),
  (r'(o|down|out)_proj/kernel$', ('tensor', 'fsdp')),
  (r'embed_tokens$', ('tensor', 'fsdp')),
  (r'lm_head/kernel$', ('fsdp', 'tensor')),
  (r'(connector_fc\d|fc1|mlp_\d)/kernel$', ('fsdp', None)),
  # The inner width and the patches of the vision tower divide by few sizes.
  (r'(fc2|patch_embedding)/kernel$', (None, 'fsdp')),
  (r'(latent_pos_embed|vit_pos_embed|position_embedding)$', (None, 'fsdp')),
  # The autoencoder, by output channel.
  (r'(conv[12]?|conv_in|nin_shortcut|mid_attn_1/(q|k|v|proj_out))/kernel$', (None, 'fsdp')),
)
"""Patterns of names with the partition of the LAST axes.

The first pattern found in a parameter's name applies. Scanned layers add a leading axis, which is
never split. Adapters follow their kernel, see `rule`.
"""

REPLICATED = (
  r'(^|/)(bias|scale)$',
  r'(^|/)(vae2llm|llm2vae|(encoder|decoder)/conv_out)/kernel$',  # A few channels on one side.
  r'(^|/)(encoder|decoder)/kernel$',  # The autoencoder of one linear layer each way.
)
"""Patterns of parameters of any size that every device holds whole.

All others without a rule in `TABLE` have at most `SMALL` values.
"""

ADAPTER = re.compile(r'/[ab]$')
"""Suffixes that the factors of a low-rank adapter add to the name of their kernel."""

RESTING = re.compile(r'\.(mu|nu|old|reference)/')
"""Parts of a state that no pass over the layers reads.

These are Adam's moments, the old policy and the reference. They are split over the mesh axis data
as well, where that divides (ZeRO, arXiv 1910.02054).
"""

MeshAxes = str | tuple[str, ...] | None
"""Entry of a partition: the mesh axes that split an axis of an array."""


def rule(name: str) -> tuple[str | None, ...] | None:
  """Returns the mesh axes of the last axes of a parameter by `TABLE`; None without a pattern.

  The long axes of adapter factors A (..., in, rank) and B (..., rank, out) have the mesh axes of
  their kernel.
  """
  kernel = ADAPTER.sub('', name)
  axes = next((axes for pattern, axes in TABLE if re.search(pattern, kernel)), None)
  if axes is None or kernel == name:
    return axes
  return (axes[-2], None) if name.endswith('/a') else (None, axes[-1])


def _check_replicated(name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
  """Refuses a large parameter without a rule, where there are several devices.

  Raises:
    ValueError: the parameter has more than `SMALL` values and no rule.
  """
  known = any(re.search(pattern, name) for pattern in REPLICATED)
  if math.prod(mesh.shape.values()) > 1 and math.prod(shape) > SMALL and not known:
    raise ValueError(
      f'{name} of shape {shape} has more than {SMALL} values, and no rule says how '
      f'it lies on parallel.mesh = {tuple(mesh.shape.values())}; add its name to '
      'partition_rules.TABLE, or to partition_rules.REPLICATED if every device should hold all '
      'of it'
    )


@functools.cache
def _warn_replicated(name: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
  """Warns once for each parameter of the dual encoder, whose sizes do not decide on meshes."""
  logging.warning(
    '%s of shape %s, of the dual encoder, does not divide over parallel.mesh = %s: '
    'every device holds all of it',
    name,
    shape,
    sizes,
  )


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Returns the partition of one parameter, or of a part of the state that is `RESTING`.

  Raises:
    ValueError: an axis does not divide by the mesh axes that should split it, or a large parameter
      has no rule.
  """
  axes = rule(name)
  if axes is None:
    _check_replicated(name, shape, mesh)
    axes = ()
  by_rule = [*[None] * (len(shape) - len(axes)), *axes]
  if DUAL_ENCODER.search(name):
    fits = math.prod(shape) > SMALL and not any(
      axis and size % mesh.shape[axis] for size, axis in zip(shape, by_rule, strict=False)
    )
    if math.prod(shape) > SMALL and not fits and any(by_rule):
      _warn_replicated(name, shape, tuple(mesh.shape.values()))
    return P(*by_rule) if fits else P()
  for size, axis in zip(shape, by_rule, strict=False):
    if axis and size % mesh.shape[axis]:
      raise ValueError(
        f'{name} of shape {shape}: an axis of {size} does not divide by the '
        f'{mesh.shape[axis]} devices of mesh axis {axis!r}; allowed in '
        f'config.parallel.mesh: divisors of {size}'
      )
  if ADAPTER.search(name):
    return P(*(_both(size, axis, mesh) for size, axis in zip(shape, by_rule, strict=False)))
  if 'fsdp' not in by_rule:
    return P(*by_rule)
  place = by_rule.index('fsdp')
  spec: list[MeshAxes] = [*by_rule]
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  if 'tensor' not in by_rule and mesh.shape['tensor'] > 1:
    # Otherwise a mesh without fsdp, which rollouts may use, would hold it whole.
    spec[place] = _both(shape[place], 'fsdp', mesh)
  elif mesh.shape['data'] > 1 and RESTING.search(name):
    spec[place] = 'fsdp' if shape[place] % rows else ROWS
  return P(*spec)


def _both(size: int, axis: str | None, mesh: Mesh) -> MeshAxes:
  """Splits the only axis that is split by both mesh axes, fsdp and tensor, where it divides.

  One of them alone would leave the array whole on a mesh that has only the other.
  """
  if axis is None or size % (mesh.shape['fsdp'] * mesh.shape['tensor']):
    return axis
  return axis, {'fsdp': 'tensor', 'tensor': 'fsdp'}[axis]
