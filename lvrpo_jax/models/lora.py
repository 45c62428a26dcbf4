"""Low-rank adapters (arXiv 2106.09685): `W + (alpha / rank) A B` on chosen kernels.

The policy sees merged parameters, so no model knows of adapters. They are merged inside the
programs that read them (`Adapted`, `whole`); between these only the factors are held. With the
adapters off the policy is the reference: the frozen weights themselves.
"""

from __future__ import annotations

import re

from flax import struct
from flax import traverse_util
import jax
from jax import numpy as jnp

from lvrpo_jax import types


def init(params: types.Params, rank: int, target: str, key: jax.Array) -> types.Params:
  """Fresh adapters, float32: A normal with deviation 1 / sqrt(in), B zero, so nothing changes yet.

  Args:
    params: kernels (..., in, out); leading axes (scanned layers) have adapters of their own.
    rank: inner width.
    target: regular expression over parameter names, searched.

  Raises:
    ValueError: `target` matches no kernel, or `rank` is more than a kernel's smaller side.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  kernels = [name for name in sorted(flat) if name.endswith('kernel')]
  chosen = [name for name in kernels if re.search(target, name)]
  if not chosen:
    raise ValueError(
      f'config.align.lora.target is {target!r}, which matches no kernel; names look '
      f'like {kernels[-1]}'
    )
  out = {}
  for number, name in enumerate(chosen):
    *lead, inputs, outputs = flat[name].shape
    if rank > min(inputs, outputs):
      raise ValueError(
        f'config.align.lora.rank is {rank}; allowed: at most '
        f'{min(inputs, outputs)}, the smaller side of {name}'
      )
    draw = jax.random.normal(jax.random.fold_in(key, number), (*lead, inputs, rank))
    out[f'{name}/a'] = draw * inputs**-0.5
    out[f'{name}/b'] = jnp.zeros((*lead, rank, outputs))
  return traverse_util.unflatten_dict(out, sep='/')


def merge(params: types.Params, adapters: types.Params, scale: float) -> types.Params:
  """Parameters with `scale * A B` added to every adapted kernel."""
  flat = dict(traverse_util.flatten_dict(params, sep='/'))
  parts = traverse_util.flatten_dict(adapters, sep='/')
  for name in (path.removesuffix('/a') for path in parts if path.endswith('/a')):
    flat[name] = flat[name] + scale * (parts[f'{name}/a'] @ parts[f'{name}/b'])
  return traverse_util.unflatten_dict(flat, sep='/')


@struct.dataclass
class AdaptedParams:
  """A policy as frozen parameters and adapters, merged with `scale` by the program that reads it."""

  base: types.Params
  adapters: types.Params
  scale: float = struct.field(pytree_node=False)


def merge_adapters(params: types.Params | AdaptedParams) -> types.Params:
  """Parameters as a model reads them."""
  if isinstance(params, AdaptedParams):
    return merge(params.base, params.adapters, params.scale)
  return params
