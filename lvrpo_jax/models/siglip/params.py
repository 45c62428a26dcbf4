"""SigLIP and SigLIP-2 dual encoders: Hugging Face safetensors, read and written.

One ordered table pairs tensor names with paths of our parameters, in both directions. The pooling
head's fused projection holds three of our parameters.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from typing import Any, NamedTuple

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from lvrpo_jax import types
from lvrpo_jax.models import safetensors as safetensors_lib
from lvrpo_jax.models.siglip import model as siglip


class Row(NamedTuple):
  """A tensor name and a parameter path with the same fields.

  `kind`: 'plain', 'linear' (out, in), 'patch' (a linear layer, or a convolution of one stride), or
  'fused' (linear layers below each other, of which this is number `part`).
  """

  tensor: str
  path: str
  kind: str = 'plain'
  part: int = 0


_FIELDS = {
  'tower': 'vision|text',
  'layer': r'\d+',
  'norm': r'\d',
  'proj': r'\w+_proj',
  'fc': r'fc\d',
  'scalar': 'scale|bias',
}
_LAYER, _OURS = '{tower}_model.encoder.layers.{layer}.', '{tower}/layers_{layer}/'
_HEAD = 'vision_model.head.'


def _affine(tensor: str, path: str, kind: str = 'linear') -> list[Row]:
  weight = 'scale' if kind == 'plain' else 'kernel'
  return [Row(f'{tensor}.weight', f'{path}/{weight}', kind), Row(f'{tensor}.bias', f'{path}/bias')]


ROWS = (
  Row('logit_{scalar}', 'logit_{scalar}'),
  *_affine('vision_model.embeddings.patch_embedding', 'vision/patch_embedding', 'patch'),
  Row('{tower}_model.embeddings.position_embedding.weight', '{tower}/positions'),
  Row('text_model.embeddings.token_embedding.weight', 'text/tokens/embedding'),
  *_affine(_LAYER + 'layer_norm{norm}', _OURS + 'norm{norm}', 'plain'),
  *_affine(_LAYER + 'self_attn.{proj}', _OURS + 'attention/{proj}'),
  *_affine(_LAYER + 'mlp.{fc}', _OURS + 'mlp/{fc}'),
  *_affine('vision_model.post_layernorm', 'vision/post_norm', 'plain'),
  Row(_HEAD + 'probe', 'vision/head/probe'),
  *(
    Row(
      f'{_HEAD}attention.in_proj_{theirs}',
      f'vision/head/attention/{proj}_proj/{ours}',
      'fused',
      part,
    )
    for part, proj in enumerate('qkv')
    for theirs, ours in (('weight', 'kernel'), ('bias', 'bias'))
  ),
  *_affine(_HEAD + 'attention.out_proj', 'vision/head/attention/out_proj'),
  *_affine(_HEAD + 'layernorm', 'vision/head/norm', 'plain'),
  *_affine(_HEAD + 'mlp.{fc}', 'vision/head/mlp/{fc}'),
  *_affine('text_model.final_layer_norm', 'text/final_norm', 'plain'),
  *_affine('text_model.head', 'text/head'),
)
IGNORED = r'.*\.position_ids'
"""Tables of indices that some files hold."""


def _row(path: str) -> tuple[Row, str]:
  """The row of one of our paths, and the tensor's name."""
  for row in ROWS:
    pattern = re.sub(
      r'\\\{(\w+)\\\}', lambda m: f'(?P<{m[1]}>{_FIELDS[m[1]]})', re.escape(row.path)
    )
    if found := re.fullmatch(pattern, path):
      return row, row.tensor.format(**found.groupdict())
  raise KeyError(f'{path} stands in no row of the table')


@functools.cache
def _spec(model: siglip.Siglip) -> dict[str, tuple[int, ...]]:
  """Shapes of our parameters by path."""
  size = model.vision_config.image_size
  args = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), *args)['params']
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep='/').items()}


def from_tensor(row: Row, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """One of our parameters from a tensor."""
  if row.kind == 'fused':
    value = np.split(value, 3)[row.part]
  if row.kind == 'patch' and value.ndim == 4:
    value = value.transpose(0, 2, 3, 1).reshape(len(value), -1)
  transposed = row.kind in ('linear', 'patch') or (row.kind == 'fused' and value.ndim == 2)
  return (value.T if transposed else value).reshape(shape)


def to_tensor(
  path: str, row: Row, value: np.ndarray, model: siglip.Siglip, conv: bool
) -> np.ndarray:
  """A tensor, or one part of a fused one, from our parameter."""
  if path.endswith('/bias') and value.ndim > 1:
    return value.reshape(-1)
  if path.endswith('/kernel'):
    # Attention kernels are (in, heads, head width), and (heads, head width, out) behind it.
    inputs = -1 if path.endswith('out_proj/kernel') else value.shape[0]
    value = value.reshape(inputs, value.shape[-1] if inputs == -1 else -1).T
    if row.kind == 'patch' and conv:
      patch = model.vision_config.patch
      value = value.reshape(len(value), patch, patch, 3).transpose(0, 3, 1, 2)
    return value
  if path.endswith('/positions'):
    return value.reshape(-1, value.shape[-1])
  return value.reshape(1) if path.startswith('logit_') else value


def expected_shapes(
  path: str, row: Row, shape: tuple[int, ...], model: siglip.Siglip
) -> list[tuple[int, ...]]:
  """Shapes that the tensor of one of our parameters may have."""
  ours, out = jax.ShapeDtypeStruct(shape, jnp.float32), []
  for conv in (True, False):
    made = jax.eval_shape(lambda x, c=conv: to_tensor(path, row, x, model, c), ours).shape
    out.append((3 * made[0], *made[1:]) if row.kind == 'fused' else made)
  if path.startswith('logit_'):
    out.append(())
  return list(dict.fromkeys(out))


def load(
  path: str | os.PathLike, model: siglip.Siglip, sharding: types.Params | None = None
) -> types.Params:
  """Parameters from `model.safetensors` or its index, tensor by tensor.

  Args:
    path: the file, an `.index.json`, or their folder.
    sharding: a tree of shardings like the parameters; None puts all on the default device.

  Raises:
    ValueError: a tensor is missing, unknown or misshapen, or a file cannot be read.
  """
  handles, left = _open(pathlib.Path(path)), {}
  for handle in handles:
    left.update((name, handle) for name in handle.keys() if not re.fullmatch(IGNORED, name))
  known, flat = dict(left), {}
  where = None if sharding is None else traverse_util.flatten_dict(sharding, sep='/')
  for ours, shape in _spec(model).items():
    row, name = _row(ours)
    if name not in known:
      raise ValueError(f'tensor {name} is missing from {path}')
    left.pop(name, None)
    value = known[name].get_tensor(name)
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise ValueError(f'tensor {name} in {path} has dtype {value.dtype}; expected floats')
    expected = expected_shapes(ours, row, shape, model)
    if value.shape not in expected:
      raise ValueError(
        f'tensor {name} in {path} has shape {list(value.shape)}; expected '
        f'{" or ".join(str(list(s)) for s in expected)} for {ours}'
      )
    value = from_tensor(row, value.astype(np.float32), shape)
    flat[ours] = (
      jnp.asarray(value)
      if where is None
      else jax.make_array_from_callback(shape, where[ours], lambda i, v=value: v[i])
    )
  if left:
    raise ValueError(f'tensor {min(left)} in {path} is not of this model')
  return traverse_util.unflatten_dict(flat, sep='/')


def save(
  params: types.Params, path: str | os.PathLike, model: siglip.Siglip, conv: bool = True
) -> None:
  """Writes float32 safetensors.

  Args:
    conv: the patch embedding is a convolution (SigLIP), not a linear layer (SigLIP-2 NaFlex).
  """
  parts: dict[str, dict[int, np.ndarray]] = {}
  for ours, value in traverse_util.flatten_dict(params, sep='/').items():
    row, name = _row(ours)
    parts.setdefault(name, {})[row.part] = to_tensor(ours, row, np.asarray(value), model, conv)
  tensors = {
    name: np.ascontiguousarray(
      np.concatenate([part[i] for i in sorted(part)]) if len(part) > 1 else part[0]
    )
    for name, part in parts.items()
  }
  partial = pathlib.Path(f'{os.fspath(path)}.partial')
  safetensors_numpy.save_file(tensors, partial)
  os.replace(partial, path)


def _open(path: pathlib.Path) -> list[Any]:
  """Handles of the files of a checkpoint, nothing read yet."""
  if path.is_dir():
    single = path / 'model.safetensors'
    path = single if single.exists() else path / 'model.safetensors.index.json'
  try:
    parts = safetensors_lib.indexed(path) if path.name.endswith('.index.json') else [path]
    return [safetensors.safe_open(file, 'np') for file in parts]
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from error
