"""Checkpoints of SigLIP and SigLIP 2: Hugging Face safetensors, read and written.

One ordered table pairs tensor names with paths of our parameters and is read in both directions.
The fused projection of the pooling head holds three of our parameters.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
import pathlib
import re
from typing import cast, NamedTuple, TypeVar

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from lvrpo_jax import types
from lvrpo_jax.models import safetensors as safetensors_lib
from lvrpo_jax.models.siglip import model as siglip

_ArrayT = TypeVar('_ArrayT', jax.Array, np.ndarray)


class Row(NamedTuple):
  """Templates of a tensor name and of a parameter path with the same `{field}`s.

  Attributes:
    kind: 'plain', 'linear' (out, in), 'patch' (a linear layer, or a convolution whose stride is its
      kernel size), or 'fused' (several linear layers concatenated along the outputs).
    part: index of the layer in a fused tensor.
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
  """Returns the rows of a layer with a bias; 'plain' ones are layer norms."""
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
      tensor=f'{_HEAD}attention.in_proj_{theirs}',
      path=f'vision/head/attention/{proj}_proj/{ours}',
      kind='fused',
      part=part,
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
"""Regular expression of tensors that are not read: tables of indices in some files."""
_FLOATS = safetensors_lib.FLOATS | {'F64'}


def _row(path: str) -> tuple[Row, str]:
  """Returns the row of one of our paths, and the name of its tensor."""

  def group(field: re.Match[str]) -> str:
    return f'(?P<{field[1]}>{_FIELDS[field[1]]})'

  for row in ROWS:
    pattern = re.sub(r'\\\{(\w+)\\\}', group, re.escape(row.path))
    if found := re.fullmatch(pattern, path):
      return row, row.tensor.format(**found.groupdict())
  raise KeyError(f'no row of the table matches parameter {path}')


def _parameter_shapes(model: siglip.Siglip) -> dict[str, tuple[int, ...]]:
  """Returns shapes of our parameters by path."""
  size = model.vision_config.image_size
  args = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), *args)['params']
  return {path: leaf.shape for path, leaf in _flatten(tree).items()}


# Flax modules are hashable, but their type stubs lack `__hash__`.
_spec = cast(
  Callable[[siglip.Siglip], dict[str, tuple[int, ...]]], functools.cache(_parameter_shapes)
)


def _flatten(tree: types.Tree) -> dict[str, types.Tree]:
  """Returns the leaves of nested dicts by path."""
  return cast(dict[str, types.Tree], traverse_util.flatten_dict(tree, sep='/'))


def from_tensor(row: Row, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Converts a tensor to one of our parameters, of the given shape."""
  if row.kind == 'fused':
    value = np.split(value, 3)[row.part]
  if row.kind == 'patch' and value.ndim == 4:
    value = value.transpose(0, 2, 3, 1).reshape(len(value), -1)
  transposed = row.kind in ('linear', 'patch') or (row.kind == 'fused' and value.ndim == 2)
  return (value.T if transposed else value).reshape(shape)


def to_tensor(path: str, row: Row, value: _ArrayT, model: siglip.Siglip, conv: bool) -> _ArrayT:
  """Converts our parameter to a tensor, or to its part of a fused tensor."""
  if path.endswith('/bias') and value.ndim > 1:
    return value.reshape(-1)
  if path.endswith('/kernel'):
    # Attention kernels are (in, heads, head width); those of `out_proj` (heads, head width, out).
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
  """Returns the shapes that the tensor of one of our parameters may have."""
  ours, out = jax.ShapeDtypeStruct(shape, jnp.float32), []
  for conv in (True, False):
    convert = functools.partial(to_tensor, path, row, model=model, conv=conv)
    made = jax.eval_shape(convert, ours).shape
    out.append((3 * made[0], *made[1:]) if row.kind == 'fused' else made)
  if path.startswith('logit_'):
    out.append(())
  return list(dict.fromkeys(out))


def load(
  path: str | os.PathLike, model: siglip.Siglip, sharding: types.Params | None = None
) -> types.Params:
  """Reads parameters from `model.safetensors` or its index, tensor by tensor.

  Args:
    path: the file, an `.index.json`, or their folder.
    sharding: a tree of shardings like the parameters; None puts all on the default device.

  Raises:
    ValueError: a tensor is missing, unknown, misshapen or not of floats, or a file cannot be read.
  """
  stored = {
    name: tensor
    for name, tensor in safetensors_lib.open_tensors(_files(pathlib.Path(path))).items()
    if not re.fullmatch(IGNORED, name)
  }
  shapes = {}
  for ours, shape in _spec(model).items():
    row, name = _row(ours)
    shapes[name] = expected_shapes(ours, row, shape, model)
  safetensors_lib.check_names(stored, shapes, path)
  shardings, params = {} if sharding is None else _flatten(sharding), {}
  for ours, shape in _spec(model).items():
    row, name = _row(ours)
    safetensors_lib.check_tensor(stored[name], shapes[name], _FLOATS)
    value = from_tensor(row, stored[name].read(), shape)
    params[ours] = safetensors_lib.make_array(
      value.__getitem__, shape, None if sharding is None else shardings[ours]
    )
  return traverse_util.unflatten_dict(params, sep='/')


def save(
  params: types.Params, path: str | os.PathLike, model: siglip.Siglip, conv: bool = True
) -> None:
  """Writes float32 safetensors.

  Args:
    conv: the patch embedding is a convolution (SigLIP), not a linear layer (SigLIP 2 NaFlex).
  """
  parts: dict[str, dict[int, np.ndarray]] = {}
  for ours, value in _flatten(params).items():
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


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a checkpoint; in a folder a single file has precedence over an index."""
  if path.is_dir():
    single = path / 'model.safetensors'
    path = single if single.exists() else path / 'model.safetensors.index.json'
  return safetensors_lib.indexed(path) if path.name.endswith('.index.json') else [path]
