"""BAGEL's checkpoints: safetensors files, read and written.

`tensor_names` pairs the tensors with our parameters; `models.safetensors` reads the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import functools
import json
import os
import pathlib
from typing import cast

from absl import logging
from flax import traverse_util
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.models import layers
from lvrpo_jax.models import safetensors as safetensors_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import tensor_names

Config = tensor_names.Config
_Path = str | os.PathLike

MAX_VOCABULARY_PADDING = 1024
"""Rows by which vocabularies of one model may differ, as they are padded to round sizes."""

_VOCABULARY = ('embed_tokens', 'lm_head/kernel')
_NAMES_SHOWN = 3


def tensors(params: types.Params, config: Config) -> Iterator[tuple[str, np.ndarray]]:
  """Yields names and values of the tensors of a parameter tree, one at a time, sorted by name.

  Raises:
    ValueError: the tree is not that of `config`, or a parameter is not float32.
  """
  flat = _flatten(params)
  spec = tensor_names.parameter_shapes(config)
  if flat.keys() != spec.keys():
    raise ValueError(f'parameters and configuration differ in {_some(flat.keys() ^ spec.keys())}')
  for path, leaf in flat.items():
    if (leaf.shape, leaf.dtype) != (spec[path].shape, np.float32):
      raise ValueError(
        f'parameter {path} is {leaf.dtype}{list(leaf.shape)}; '
        f'expected float32{list(spec[path].shape)}'
      )
  for place in tensor_names.places(config).values():
    value = flat[place.path] if place.layer is None else flat[place.path][place.layer]
    value = np.asarray(value)
    if place.axes is not None:
      value = value.transpose(np.argsort(place.axes))
    yield place.tensor, np.ascontiguousarray(value)


def _flatten(tree: types.Tree) -> dict[str, types.Tree]:
  """Returns the leaves of nested dicts by path."""
  return cast(dict[str, types.Tree], traverse_util.flatten_dict(tree, sep='/'))


def _some(names: set[str]) -> str:
  """Formats names for a message: the first ones, and how many more there are."""
  shown = sorted(names)
  rest = f' and {len(shown) - _NAMES_SHOWN} more' if len(shown) > _NAMES_SHOWN else ''
  return ', '.join(shown[:_NAMES_SHOWN]) + rest


def _files(path: pathlib.Path, config: Config) -> list[pathlib.Path]:
  """Returns the safetensors files of a checkpoint, from a file, an index file or a folder.

  Raises:
    ValueError: there are none, or both a single file and an index.
  """
  if path.is_dir():
    path = path / ('ema' if isinstance(config, bagel.ModelConfig) else 'ae')
    path = path.with_suffix('.safetensors')
  index = path.with_name(path.name + '.index.json')
  if path.name.endswith('.index.json'):
    index = path
  elif path.exists() and index.exists():
    raise ValueError(f'both {path} and {index} exist; remove the one that is out of date')
  elif path.exists():
    return [path]
  if not index.exists():
    raise ValueError(f'neither {path} nor {index} exists')
  return safetensors_lib.indexed(index)


def fingerprint(path: _Path, config: Config) -> str:
  """Computes a digest that tells checkpoints apart; see `safetensors.digest`."""
  return safetensors_lib.digest(_files(pathlib.Path(path), config))


def _check(stored: safetensors_lib.StoredTensor, place: tensor_names.Place, config: Config) -> None:
  """Raises ValueError unless a tensor's dtype and shape can become the parameter."""
  shapes = [place.shape]
  if _rows_may_differ(stored.shape, place, config):
    shapes.append(stored.shape)
  safetensors_lib.check_tensor(stored, shapes)


def _rows_may_differ(shape: tuple[int, ...], place: tensor_names.Place, config: Config) -> bool:
  """Returns whether a tensor of this shape is allowed because it differs in its rows only."""
  if len(shape) != len(place.shape) or shape[1:] != place.shape[1:]:
    return False
  if place.path in _VOCABULARY and isinstance(config, bagel.ModelConfig):
    return abs(shape[0] - config.vocab) <= MAX_VOCABULARY_PADDING
  return place.path == 'latent_pos_embed'


def _read(
  stored: safetensors_lib.StoredTensor, place: tensor_names.Place, index: safetensors_lib.Index
) -> np.ndarray:
  """Reads the part of one tensor at `index` of the parameter's axes as float32."""
  if place.axes is not None:
    index = tuple(index[i] for i in np.argsort(place.axes))
  rows = stored.shape[0]
  if place.path == 'latent_pos_embed' and rows != place.shape[0]:
    # The table is a formula, so a checkpoint of another latent size still loads.
    logging.warning(
      '%s in %s has %d rows; max_latent_size of the configuration asks for %d, which are computed',
      place.tensor,
      stored.file,
      rows,
      place.shape[0],
    )
    return layers.sincos_table(round(place.shape[0] ** 0.5), place.shape[1])[index]
  if rows < place.shape[0]:
    # Rows that the checkpoint lacks are padding. The mean row gives them ordinary logits.
    values = stored.read((slice(None),))
    mean = np.broadcast_to(values.mean(0), (place.shape[0] - rows, *place.shape[1:]))
    value = np.concatenate([values, mean])[index]
  else:
    value = stored.read(index)
  return value if place.axes is None else value.transpose(place.axes)


def _read_parameter(
  parts: Mapping[int | None, tuple[safetensors_lib.StoredTensor, tensor_names.Place]],
  shape: tuple[int, ...],
  index: safetensors_lib.Index,
) -> np.ndarray:
  """Reads the part of a parameter at `index` from its tensors, which are keyed by layer."""
  index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape, strict=True))
  if None in parts:
    return _read(*parts[None], index)
  # The array is filled layer by layer, because a list of layers would hold the stack twice.
  out = np.empty([part.stop - part.start for part in index], np.float32)
  for layer in range(index[0].start, index[0].stop):
    out[layer - index[0].start] = _read(*parts[layer], index[1:])
  return out


def load(path: _Path, config: Config, sharding: types.Params | None = None) -> types.Params:
  """Reads parameters from safetensors, tensor by tensor, and slice by slice where sharded.

  A vocabulary that differs by padding is cut, or filled with the mean row. A latent position table
  of another size is computed. Half-precision tensors become float32.

  Args:
    path: a safetensors file, its `.index.json`, or a folder with `ema.safetensors` (for a model)
      or `ae.safetensors` (for an autoencoder), in one file or in several with an index.
    config: of the model or the autoencoder.
    sharding: a tree of shardings like the parameters; None puts all on the default device.

  Raises:
    ValueError: tensors are missing, unknown, misshapen, of a wrong dtype, or a file is truncated;
      the message names the tensor, the file and the expected shape.
  """
  path, expected, rules = (
    pathlib.Path(path),
    tensor_names.places(config),
    tensor_names.rules(config),
  )
  stored = safetensors_lib.open_tensors(_files(path, config))
  safetensors_lib.check_names(stored, {name: [p.shape] for name, p in expected.items()}, path)
  by_path = {}
  for name, tensor in stored.items():
    parameter, layer = tensor_names.parameter_path(name, rules)
    _check(tensor, expected[name], config)
    by_path.setdefault(parameter, {})[layer] = tensor, expected[name]

  shardings = {} if sharding is None else _flatten(sharding)
  params = {}
  for parameter, leaf in tensor_names.parameter_shapes(config).items():
    params[parameter] = safetensors_lib.make_array(
      functools.partial(_read_parameter, by_path[parameter], leaf.shape),
      leaf.shape,
      None if sharding is None else shardings[parameter],
    )
  return traverse_util.unflatten_dict(params, sep='/')


def save(params: types.Params, path: _Path, config: Config, shards: int = 1) -> None:
  """Writes float32 safetensors that `load` and the released code read.

  Files get their names only when all are complete, the index last.

  Args:
    path: of the single file; several shards are `stem-00001-of-0000n.safetensors` and
      `path.index.json` in the same folder.

  Raises:
    ValueError: the tree is not that of `config`, or the other form of this checkpoint exists.
  """
  path, places = pathlib.Path(path), list(tensor_names.places(config).values())
  index = path.with_name(path.name + '.index.json')
  other = index if shards == 1 else path
  if other.exists():
    raise ValueError(f'{other} exists and would contradict the new checkpoint')
  sizes = np.cumsum([4 * int(np.prod(place.shape)) for place in places])
  # A tensor belongs to the shard in which its middle byte falls.
  middle = sizes - np.diff(sizes, prepend=0) / 2
  shard_of = np.minimum(middle * shards // sizes[-1], shards - 1).astype(int)
  names = (
    [path.name]
    if shards == 1
    else [f'{path.stem}-{i + 1:05}-of-{shards:05}{path.suffix}' for i in range(shards)]
  )
  parts = [path.with_name(f'{name}.partial') for name in names]
  index_part = index.with_name(f'{index.name}.partial')
  values = tensors(params, config)
  try:
    for i, part in enumerate(parts):
      owned = [p for p, owner in zip(places, shard_of, strict=True) if owner == i]
      safetensors_lib.write_float32(part, {p.tensor: p.shape for p in owned}, values)
    if shards > 1:
      weight_map = {p.tensor: names[owner] for p, owner in zip(places, shard_of, strict=True)}
      index_part.write_text(
        json.dumps({'metadata': {'total_size': int(sizes[-1])}, 'weight_map': weight_map}, indent=2)
      )
      # Without an index, shards of two checkpoints cannot be read as one.
      index.unlink(missing_ok=True)
    for part in parts:
      os.replace(part, part.with_suffix(''))
    if shards > 1:
      os.replace(index_part, index)
  finally:
    for part in (*parts, index_part):
      part.unlink(missing_ok=True)
