"""BAGEL's checkpoints: safetensors, read and written.

One ordered table per module pairs tensor names with paths of our parameter tree and is read in both
directions. Layers are stacked on a leading axis on our side, one tensor each in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from absl import logging
from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np
import safetensors

from lvrpo_jax import types
from lvrpo_jax.models import layers
from lvrpo_jax.models import safetensors as safetensors_lib
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel

Config = bagel.ModelConfig | vae_lib.Autoencoder
_Path = str | os.PathLike

MAX_VOCABULARY_PADDING = 1024
"""Vocabularies are padded to round sizes; a larger difference is another vocabulary."""

_FLOATS = {'F32', 'BF16', 'F16'}
_VOCABULARY = ('embed_tokens', 'lm_head/kernel')
_NAMES_SHOWN = 3


class Rule(NamedTuple):
  """A tensor name, a parameter path, and the axes that turn the tensor into the parameter.

  `{field}` stands for text of the same field on both sides; `{layer}` is missing from the path,
  where it is the leading axis.
  """

  tensor: str
  path: str
  axes: tuple[int, ...] | None = None


_LINEAR, _CONV = (1, 0), (2, 3, 1, 0)
_FIELDS = {
  'layer': r'\d+',
  'attn': '[qkvo]',
  'qk': '[qk]',
  'ff': 'gate|up|down',
  'n': r'\d+',
  'flat': 'vae2llm|llm2vae',
  'table': 'latent_pos_embed|vit_pos_embed',
  'proj': 'q|k|v|out',
  'side': 'encoder|decoder',
  'way': 'down|up',
  'sampler': 'downsample|upsample',
  'middle': 'block_1|attn_1|block_2',
  'level': r'\d+',
  'norm': r'norm\d?|norm_out',
  'conv': r'conv\d|conv_in|conv_out|nin_shortcut|[qkv]|proj_out',
}
_TEXT, _VIT = 'language_model.model.', 'vit_model.vision_model.'


def _expert_rules(expert: str, suffix: str) -> list[Rule]:
  tensor, path = _TEXT + 'layers.{layer}.', f'trunk/layers/{expert}/'
  attention, mlp = f'{tensor}self_attn.', f'{tensor}mlp{suffix}.'
  return [
    Rule(attention + '{attn}_proj' + f'{suffix}.weight', path + '{attn}_proj/kernel', _LINEAR),
    Rule(attention + '{attn}_proj' + f'{suffix}.bias', path + '{attn}_proj/bias'),
    Rule(attention + '{qk}_norm' + f'{suffix}.weight', path + '{qk}_norm/scale'),
    Rule(mlp + '{ff}_proj.weight', path + '{ff}_proj/kernel', _LINEAR),
    Rule(f'{tensor}input_layernorm{suffix}.weight', path + 'input_norm/scale'),
    Rule(f'{tensor}post_attention_layernorm{suffix}.weight', path + 'post_norm/scale'),
    Rule(f'{_TEXT}norm{suffix}.weight', f'trunk/norm_{expert}/scale'),
  ]


def _norm_rules(tensor: str, path: str) -> list[Rule]:
  return [Rule(f'{tensor}.weight', f'{path}/scale'), Rule(f'{tensor}.bias', f'{path}/bias')]


def _linear_rules(tensor: str, path: str, axes: tuple[int, ...] = _LINEAR) -> list[Rule]:
  return [Rule(f'{tensor}.weight', f'{path}/kernel', axes), Rule(f'{tensor}.bias', f'{path}/bias')]


def _conv_rules(tensor: str, path: str) -> list[Rule]:
  return _linear_rules(tensor, path, _CONV)


_VIT_LAYER = _VIT + 'encoder.layers.{layer}.'
MODEL_RULES = (
  *_expert_rules('und', ''),
  *_expert_rules('gen', '_moe_gen'),
  Rule(_TEXT + 'embed_tokens.weight', 'embed_tokens'),
  Rule('language_model.lm_head.weight', 'lm_head/kernel', _LINEAR),
  Rule('{table}.pos_embed', '{table}'),
  *_linear_rules('time_embedder.mlp.{n}', 'time_embedder/mlp_{n}'),
  *_linear_rules('{flat}', '{flat}'),
  *_linear_rules('connector.fc{n}', 'connector_fc{n}'),
  *_linear_rules(_VIT + 'embeddings.patch_embedding', 'vit/patch_embedding'),
  Rule(_VIT + 'embeddings.position_embedding.weight', 'vit/position_embedding'),
  *_linear_rules(_VIT_LAYER + 'self_attn.{proj}_proj', 'vit/layers/{proj}_proj'),
  *_norm_rules(_VIT_LAYER + 'layer_norm{n}', 'vit/layers/layer_norm{n}'),
  *_linear_rules(_VIT_LAYER + 'mlp.fc{n}', 'vit/layers/fc{n}'),
  *_norm_rules(_VIT + 'post_layernorm', 'vit/post_layernorm'),
)

_BLOCKS = (
  ('{side}.', '{side}/'),
  ('{side}.mid.{middle}.', '{side}/mid_{middle}/'),
  ('{side}.{way}.{level}.block.{n}.', '{side}/{way}_{level}_block_{n}/'),
)
AUTOENCODER_RULES = (
  *(
    rule
    for tensor, path in _BLOCKS
    for rule in (
      *_norm_rules(tensor + '{norm}', path + '{norm}'),
      *_conv_rules(tensor + '{conv}', path + '{conv}'),
    )
  ),
  *_conv_rules('{side}.{way}.{level}.{sampler}.conv', '{side}/{way}_{level}_{sampler}/conv'),
)


def _match(template: str, text: str) -> dict[str, str] | None:
  """Fields of `text` if it has the form of `template`."""
  pattern = re.sub(r'\\\{(\w+)\\\}', lambda m: f'(?P<{m[1]}>{_FIELDS[m[1]]})', re.escape(template))
  found = re.fullmatch(pattern, text)
  return None if found is None else found.groupdict()


def parameter_path(tensor: str, rules: tuple[Rule, ...]) -> tuple[str, int | None]:
  """Path in our tree, and the layer on its leading axis, of a tensor.

  Raises:
    ValueError: no rule knows the name.
  """
  for rule in rules:
    fields = _match(rule.tensor, tensor)
    if fields is not None:
      layer = fields.pop('layer', None)
      return rule.path.format(**fields), None if layer is None else int(layer)
  raise ValueError(f'tensor {tensor} has no place in the model')


class Place(NamedTuple):
  """A tensor's name and shape in a file, and where it stands in our tree."""

  tensor: str
  shape: tuple[int, ...]
  path: str
  layer: int | None
  axes: tuple[int, ...] | None


def places(config: Config) -> dict[str, Place]:
  """Every tensor of a checkpoint of this configuration, by name."""
  rules, spec = _rules(config), _spec(config)
  found = {}
  for path, leaf in spec.items():
    rule, fields = next(
      (rule, fields) for rule in rules if (fields := _match(rule.path, path)) is not None
    )
    stacked = '{layer}' in rule.tensor
    shape = leaf.shape[1:] if stacked else leaf.shape
    if rule.axes is not None:
      shape = tuple(shape[i] for i in np.argsort(rule.axes))
    for layer in range(leaf.shape[0]) if stacked else (None,):
      tensor = rule.tensor.format(**fields, layer=layer)
      found[tensor] = Place(tensor, shape, path, layer, rule.axes)
  return dict(sorted(found.items()))


def tensors(params: types.Params, config: Config) -> Iterator[tuple[str, np.ndarray]]:
  """Names and values of the tensors of a parameter tree, one at a time, sorted by name.

  Raises:
    ValueError: the tree is not that of `config`, or a parameter is not float32.
  """
  flat, spec = traverse_util.flatten_dict(params, sep='/'), _spec(config)
  if flat.keys() != spec.keys():
    raise ValueError(f'parameters and configuration differ in {_some(flat.keys() ^ spec.keys())}')
  for path, leaf in flat.items():
    if (leaf.shape, leaf.dtype) != (spec[path].shape, np.float32):
      raise ValueError(
        f'parameter {path} is {leaf.dtype}{list(leaf.shape)}; '
        f'expected float32{list(spec[path].shape)}'
      )
  for place in places(config).values():
    value = flat[place.path] if place.layer is None else flat[place.path][place.layer]
    value = np.asarray(value)
    if place.axes is not None:
      value = value.transpose(np.argsort(place.axes))
    yield place.tensor, np.ascontiguousarray(value)


def _rules(config: Config) -> tuple[Rule, ...]:
  return MODEL_RULES if isinstance(config, bagel.ModelConfig) else AUTOENCODER_RULES


@functools.cache
def _spec(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of our parameters by path, without computing any."""
  if isinstance(config, bagel.ModelConfig):
    tree = jax.eval_shape(lambda: bagel.init(config, jax.random.key(0)))
  else:
    image = jnp.zeros((1, config.downsample, config.downsample, config.in_channels))
    tree = jax.eval_shape(lambda: config.init(jax.random.key(0), image))['params']
  return traverse_util.flatten_dict(tree, sep='/')


def _some(names) -> str:
  names = sorted(names)
  rest = f' and {len(names) - _NAMES_SHOWN} more' if len(names) > _NAMES_SHOWN else ''
  return ', '.join(names[:_NAMES_SHOWN]) + rest


class _Source(NamedTuple):
  """A tensor in an open file; `values` reads slices of it."""

  file: pathlib.Path
  values: Any


def _files(path: pathlib.Path, config: Config) -> list[pathlib.Path]:
  """The safetensors files of a checkpoint, from a file, an index file or a folder."""
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
  """A digest that tells checkpoints apart; see `safetensors.digest`."""
  return safetensors_lib.digest(_files(pathlib.Path(path), config))


def _open(path: pathlib.Path, config: Config) -> dict[str, _Source]:
  """All tensors of a checkpoint, none of them read yet."""
  sources = {}
  for file in _files(path, config):
    try:
      # Kept open by the slices, closed with them.
      handle = safetensors.safe_open(file, 'np')
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(f'{file} cannot be read (is it truncated?): {error}') from error
    for name in handle.keys():
      if name in sources:
        raise ValueError(f'tensor {name} is in {sources[name].file} and in {file}')
      sources[name] = _Source(file, handle.get_slice(name))
  return sources


def _check(source: _Source, place: Place, config: Config) -> None:
  """Raises ValueError unless a tensor's dtype and shape can become the parameter."""
  shape, dtype = tuple(source.values.get_shape()), source.values.get_dtype()
  where = f'tensor {place.tensor} in {source.file}'
  if dtype not in _FLOATS:
    raise ValueError(
      f'{where} has dtype {dtype}; expected one of {sorted(_FLOATS)}, shape {list(place.shape)}'
    )
  same_tail = len(shape) == len(place.shape) and shape[1:] == place.shape[1:]
  if same_tail and place.path == 'latent_pos_embed':
    return
  if same_tail and isinstance(config, bagel.ModelConfig) and place.path in _VOCABULARY:
    if abs(shape[0] - config.vocab) <= MAX_VOCABULARY_PADDING:
      return
  if shape != place.shape:
    raise ValueError(f'{where} has shape {list(shape)}; expected {list(place.shape)}')


def _read(source: _Source, place: Place, index: tuple[slice, ...]) -> np.ndarray:
  """A part, in our axes, of one tensor as float32."""
  if place.axes is not None:
    index = tuple(index[i] for i in np.argsort(place.axes))
  have = source.values.get_shape()[0]
  if place.path == 'latent_pos_embed' and have != place.shape[0]:
    # The table is a formula, so a checkpoint made for other sizes still loads.
    logging.warning(
      '%s in %s has %d rows; max_latent_size of the configuration asks for %d, which are computed',
      place.tensor,
      source.file,
      have,
      place.shape[0],
    )
    return layers.sincos_table(round(place.shape[0] ** 0.5), place.shape[1])[index]
  if have < place.shape[0]:
    # Rows that the checkpoint lacks are padding: the mean row keeps their logits unremarkable.
    values = source.values[:].astype(np.float32)
    mean = np.broadcast_to(values.mean(0), (place.shape[0] - have, *place.shape[1:]))
    value = np.concatenate([values, mean])[index]
  else:
    value = source.values[index].astype(np.float32)
  return value if place.axes is None else value.transpose(place.axes)


def load(path: _Path, config: Config, sharding: types.Params | None = None) -> types.Params:
  """Parameters from safetensors, read tensor by tensor, and slice by slice where sharded.

  A vocabulary that differs by padding is cut, or filled with the mean row; a latent position table
  of another side is computed. Half-precision files become float32.

  Args:
    path: a safetensors file, its `.index.json`, or a folder with `ema.safetensors` (for a model)
      or `ae.safetensors` (for an autoencoder), in one file or in several with an index.
    config: of the model or the autoencoder.
    sharding: a tree of shardings like the parameters; None puts all on the default device.

  Raises:
    ValueError: tensors are missing, unknown, misshapen, of a wrong dtype, or a file is truncated;
      the message names the tensor, the file and the expected shape.
  """
  path, expected, rules = pathlib.Path(path), places(config), _rules(config)
  sources, by_path = _open(path, config), {}
  if extra := sources.keys() - expected.keys():
    name = min(extra)
    raise ValueError(f'tensor {name} in {sources[name].file} is not of this configuration')
  if missing := expected.keys() - sources.keys():
    name = min(missing)
    raise ValueError(f'tensor {name} of shape {list(expected[name].shape)} is missing from {path}')
  for name, source in sources.items():
    parameter, layer = parameter_path(name, rules)
    _check(source, expected[name], config)
    by_path.setdefault(parameter, {})[layer] = source, expected[name]

  def reader(parts, shape) -> Callable[[tuple[slice, ...]], np.ndarray]:
    def read(index):
      index = tuple(slice(*part.indices(size)) for part, size in zip(index, shape))
      if None in parts:
        return _read(*parts[None], index)
      # Filled layer by layer: a list of layers would hold the whole stack twice.
      out = np.empty([part.stop - part.start for part in index], np.float32)
      for layer in range(index[0].start, index[0].stop):
        out[layer - index[0].start] = _read(*parts[layer], index[1:])
      return out

    return read

  flat_sharding = None if sharding is None else traverse_util.flatten_dict(sharding, sep='/')
  params = {}
  for parameter, leaf in _spec(config).items():
    read = reader(by_path[parameter], leaf.shape)
    if flat_sharding is None:
      params[parameter] = jnp.asarray(read((slice(None),) * len(leaf.shape)))
    else:
      params[parameter] = jax.make_array_from_callback(leaf.shape, flat_sharding[parameter], read)
  return traverse_util.unflatten_dict(params, sep='/')


def save(params: types.Params, path: _Path, config: Config, shards: int = 1) -> None:
  """Writes float32 safetensors that `load` and the released code read.

  Files get their names only when all are complete, the index last.

  Args:
    path: of the single file; with several shards, `stem-00001-of-0000n.safetensors` and
      `path.index.json` stand beside it.

  Raises:
    ValueError: the tree is not that of `config`, or the other form of this checkpoint exists.
  """
  path, every = pathlib.Path(path), list(places(config).values())
  index = path.with_name(path.name + '.index.json')
  other = index if shards == 1 else path
  if other.exists():
    raise ValueError(f'{other} exists and would contradict the new checkpoint')
  sizes = np.cumsum([4 * int(np.prod(place.shape)) for place in every])
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
      _write(part, [p for p, owner in zip(every, shard_of, strict=True) if owner == i], values)
    if shards > 1:
      weight_map = {place.tensor: names[owner] for place, owner in zip(every, shard_of)}
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


def _write(
  path: pathlib.Path, wanted: list[Place], values: Iterator[tuple[str, np.ndarray]]
) -> None:
  """Writes one file, taking its tensors from `values` as they come."""
  header, start = {}, 0
  for place in wanted:
    end = start + 4 * int(np.prod(place.shape))
    header[place.tensor] = {
      'dtype': 'F32',
      'shape': list(place.shape),
      'data_offsets': [start, end],
    }
    start = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for _ in wanted:
      file.write(next(values)[1].astype('<f4', copy=False).tobytes())
    file.flush()
    os.fsync(file.fileno())
