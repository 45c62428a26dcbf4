"""Low-rank adapters (LoRA, arXiv 2106.09685): `W + scale * A B` on chosen kernels.

`scale` is `alpha / rank` of the config. Models receive merged parameters and know nothing of
adapters. The program that runs a model merges them (`AdaptedParams`, `merge_adapters`); between
programs only the factors A and B are stored. Without its adapters the policy is the reference: the
frozen base parameters.
"""

from __future__ import annotations

import re
from typing import cast

from flax import struct
from flax import traverse_util
import jax
from jax import numpy as jnp

from lvrpo_jax import types


def init(params: types.Params, rank: int, target: str, key: types.Array) -> types.Params:
  """Creates adapters in float32: A is normal with deviation 1 / sqrt(in), B is zero.

  The merged parameters therefore equal `params` until B is trained.

  Args:
    params: kernels (..., in, out); every index of the leading axes (scanned layers) has its own
      adapters.
    rank: inner width.
    target: regular expression that is searched in parameter names such as 'head/kernel'.

  Raises:
    ValueError: `target` matches no kernel, or `rank` is more than a kernel's smaller side.
  """
  flat = _flatten(params)
  kernels = [name for name in sorted(flat) if name.endswith('kernel')]
  chosen = [name for name in kernels if re.search(target, name)]
  if not chosen:
    raise ValueError(
      f'config.align.lora.target is {target!r}, which matches no kernel; names look '
      f'like {kernels[-1]}'
    )
  out = {}
  for index, name in enumerate(chosen):
    *lead, inputs, outputs = flat[name].shape
    if rank > min(inputs, outputs):
      raise ValueError(
        f'config.align.lora.rank is {rank}; allowed: at most '
        f'{min(inputs, outputs)}, the smaller side of {name}'
      )
    noise = jax.random.normal(jax.random.fold_in(key, index), (*lead, inputs, rank))
    out[f'{name}/a'] = noise * inputs**-0.5
    out[f'{name}/b'] = jnp.zeros((*lead, rank, outputs))
  return traverse_util.unflatten_dict(out, sep='/')


def merge(params: types.Params, adapters: types.Params, scale: float) -> types.Params:
  """Adds `scale * A B` to every adapted kernel."""
  flat, parts = _flatten(params), _flatten(adapters)
  for name in (path.removesuffix('/a') for path in parts if path.endswith('/a')):
    flat[name] = flat[name] + scale * (parts[f'{name}/a'] @ parts[f'{name}/b'])
  return traverse_util.unflatten_dict(flat, sep='/')


class AdaptedParams(struct.PyTreeNode):
  """Parameters of a policy before merging: frozen base, adapters, and the scale of `A B`."""

  base: types.Params
  adapters: types.Params
  scale: float = struct.field(pytree_node=False)


def merge_adapters(params: types.Params | AdaptedParams) -> types.Params:
  """Returns parameters as a model reads them: merged if they have adapters, else unchanged."""
  if isinstance(params, AdaptedParams):
    return merge(params.base, params.adapters, params.scale)
  return params


def _flatten(params: types.Params) -> dict[str, types.Array]:
  return cast(dict[str, types.Array], traverse_util.flatten_dict(params, sep='/'))
