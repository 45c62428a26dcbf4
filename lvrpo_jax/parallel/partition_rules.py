"""How parameters lie on a mesh: the table from their names to partitions."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')
"""Mesh axes that split rows of a batch."""

JUDGE = re.compile(r'(^|/)(vision|text)/')
"""Names of the judge's parameters. It is small beside the policy, and its sizes should not decide
on which meshes the policy may lie: parameters of at most `SMALL` values are whole, and those above
are split where that divides."""

SMALL = 2**18
"""Values of an array that may be whole on every device: 1 MB in float32."""

TABLE = (
  # The judge's kernels hold heads as an axis of their own.
  (r'attention/(q|k|v)_proj/kernel$', ('fsdp', None, None)),
  (r'attention/out_proj/kernel$', (None, None, 'fsdp')),
  (r'(^|/)text/(tokens/embedding|positions|head/kernel)$', (None, 'fsdp')),
  (r'(^|/)vision/positions$', (None, 'fsdp')),
  (r'(q|k|v|gate|up)_proj/kernel$', ('fsdp', 'tensor')),
  (r'(o|down|out)_proj/kernel$', ('tensor', 'fsdp')),
  (r'embed_tokens$', ('tensor', 'fsdp')),
  (r'lm_head/kernel$', ('fsdp', 'tensor')),
  (r'(connector_fc\d|fc1|mlp_\d)/kernel$', ('fsdp', None)),
  # The vision tower's inner width and patches divide by few sizes.
  (r'(fc2|patch_embedding)/kernel$', (None, 'fsdp')),
  (r'(latent_pos_embed|vit_pos_embed|position_embedding)$', (None, 'fsdp')),
  # The autoencoder, by output channel.
  (r'(conv[12]?|conv_in|nin_shortcut|mid_attn_1/(q|k|v|proj_out))/kernel$', (None, 'fsdp')),
)
"""Ordered: the first pattern found in a parameter's name gives the partition of its LAST axes
(scanned layers add a leading axis, which is never split). Adapters follow their kernel: `rule`."""

REPLICATED = (
  r'(^|/)(bias|scale)$',
  r'(^|/)(vae2llm|llm2vae|(encoder|decoder)/conv_out)/kernel$',  # A few channels on one side.
  r'(^|/)(encoder|decoder)/kernel$',  # The autoencoder of one linear layer each way.
)
"""Names of parameters that every device holds whole, of any size. Others for which `TABLE` has no
rule have at most `SMALL` values."""

ADAPTER = re.compile(r'/[ab]$')
"""Names of the factors of low-rank adapters: those of their kernel, and one of these."""

RESTING = re.compile(r'\.(mu|nu|old|reference)/')
"""Parts of a state that no pass over the layers needs at hand: Adam's moments, the old policy and
the reference. They are split over data as well, where that divides (ZeRO, arXiv 1910.02054)."""


def rule(name: str) -> tuple[str | None, ...] | None:
  """Mesh axes of the last axes of a parameter by `TABLE`, or None where no pattern is found.

  Of an adapter A (..., in, rank) and B (..., rank, out) the long axis has that of its kernel.
  """
  kernel = ADAPTER.sub('', name)
  axes = next((axes for pattern, axes in TABLE if re.search(pattern, kernel)), None)
  if axes is None or kernel == name:
    return axes
  return (axes[-2], None) if name.endswith('/a') else (None, axes[-1])


def _check_replicated(name: str, shape: tuple[int, ...], mesh: Mesh) -> None:
  """Refuses a large parameter that no rule knows, where there are several devices."""
  known = any(re.search(pattern, name) for pattern in REPLICATED)
  if math.prod(mesh.shape.values()) > 1 and math.prod(shape) > SMALL and not known:
    raise ValueError(
      f'{name} of shape {shape} has more than {SMALL} values, and no rule says how '
      f'it lies on parallel.mesh = {tuple(mesh.shape.values())}; add its name to '
      'layout.TABLE, or to layout.WHOLE if every device should hold all of it'
    )


@functools.cache
def _warn_replicated(name: str, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
  """Once for each, for sizes of the judge are no reason to refuse a mesh."""
  logging.warning(
    '%s of shape %s, of the judge, does not divide over parallel.mesh = %s: every '
    'device holds all of it',
    name,
    shape,
    sizes,
  )


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Partition of one parameter, or of a part of the state that is `RESTING`.

  Raises:
    ValueError: an axis does not divide by the mesh axes that should split it, or a large parameter
      has no rule.
  """
  axes = rule(name)
  if axes is None:
    _check_replicated(name, shape, mesh)
    axes = ()
  spec = [None] * (len(shape) - len(axes)) + list(axes)
  if JUDGE.search(name):
    fits = math.prod(shape) > SMALL and not any(
      axis and size % mesh.shape[axis] for size, axis in zip(shape, spec)
    )
    if math.prod(shape) > SMALL and not fits and any(spec):
      _warn_replicated(name, shape, tuple(mesh.shape.values()))
    return P(*spec) if fits else P()
  for size, axis in zip(shape, spec):
    if axis and size % mesh.shape[axis]:
      raise ValueError(
        f'{name} of shape {shape}: an axis of {size} does not divide by the '
        f'{mesh.shape[axis]} devices of mesh axis {axis!r}; allowed in '
        f'config.parallel.mesh: divisors of {size}'
      )
  if ADAPTER.search(name):
    return P(*(_both(size, axis, mesh) for size, axis in zip(shape, spec)))
  if 'fsdp' in spec and 'tensor' not in spec and mesh.shape['tensor'] > 1:
    # A mesh without fsdp, on which rollouts run, would hold it whole otherwise.
    place = spec.index('fsdp')
    spec[place] = _both(shape[place], 'fsdp', mesh)
    return P(*spec)
  rows = mesh.shape['data'] * mesh.shape['fsdp']
  if mesh.shape['data'] > 1 and 'fsdp' in spec and RESTING.search(name):
    place = spec.index('fsdp')
    spec[place] = 'fsdp' if shape[place] % rows else ROWS
  return P(*spec)


def _both(size: int, axis: str | None, mesh: Mesh) -> Any:
  """An axis that is the only one to be split, split by the other mesh axis too where it divides:
  alone, one of them would leave the array whole on a mesh of the other."""
  other = {'fsdp': 'tensor', 'tensor': 'fsdp'}.get(axis)
  if other is None or size % (mesh.shape['fsdp'] * mesh.shape['tensor']):
    return axis
  return axis, other
