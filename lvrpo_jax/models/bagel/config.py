"""Reader of BAGEL's configuration files (arXiv 2505.14683).

The released folder has one file for the language model and one for the vision tower. The released
scripts set the remaining values, and overrule both files in places. A folder may instead hold
everything in one `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
from typing import cast, TypeVar

from lvrpo_jax import types
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel

_Number = TypeVar('_Number', int, float)

SCRIPT: dict[str, types.Json] = {
  'latent_patch_size': 2,
  'max_latent_size': 64,
  'vit_max_num_patch_per_side': 70,
  'connector_act': 'gelu_pytorch_tanh',
  'interpolate_pos': False,
  'special_tokens': {
    'bos_token_id': 151644,
    'eos_token_id': 151645,
    'start_of_image': 151652,
    'end_of_image': 151653,
  },
  'vae_config': {
    'in_channels': 3,
    'out_ch': 3,
    'ch': 128,
    'ch_mult': [1, 2, 4, 4],
    'num_res_blocks': 2,
    'z_channels': 16,
    'downsample': 8,
    'scale_factor': 0.3611,
    'shift_factor': 0.1159,
  },
}
"""Values that the released scripts set, whatever the configuration files say."""

SCRIPT_LLM = {'layer_module': 'Qwen2MoTDecoderLayer', 'qk_norm': True, 'tie_word_embeddings': False}
"""Values of `llm_config` that the released scripts set."""

_REQUIRED = {
  '': {'interpolate_pos': False, 'connector_act': 'gelu_pytorch_tanh'},
  'llm_config': {**SCRIPT_LLM, 'hidden_act': 'silu'},
  'vit_config': {'rope': False, 'hidden_act': 'gelu_pytorch_tanh', 'num_channels': 3},
}
"""The only values that this implementation supports, by section; others are refused."""

LAYER_NORM_EPS = 1e-6
"""Epsilon of a vision tower whose file has none; it is SigLIP's."""


def read_config(folder: str | os.PathLike) -> dict[str, types.Json]:
  """Reads a folder as one dictionary: `llm_config`, `vit_config`, `vae_config`, and other sizes.

  A folder with an `llm_config.json` is taken for the released one. Keys of `SCRIPT` that its
  `config.json` lacks have the values of `SCRIPT`, and the last layer of the vision tower is not
  used. Without `llm_config.json`, the content of `config.json` is returned unchanged.

  Raises:
    ValueError: a file is missing or does not hold a JSON object.
  """
  folder = pathlib.Path(folder)

  def read(name: str) -> dict[str, types.Json]:
    try:
      found = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8.
      raise ValueError(f'cannot read {folder / name}: {error}') from error
    if not isinstance(found, dict):
      raise ValueError(f'cannot read {folder / name}: it holds no JSON object')
    return found

  if not (folder / 'llm_config.json').exists():
    return read('config.json')
  vit = read('vit_config.json')
  layers = _number({'vit_config': vit}, 'vit_config', 'num_hidden_layers', int)
  vit = {**vit, 'rope': False, 'num_hidden_layers': layers - 1}
  given = read('config.json') if (folder / 'config.json').exists() else {}
  own = {key: given[key] for key in SCRIPT if key in given}
  # A complete description of an autoencoder replaces the released one; a partial one is ignored.
  if not SCRIPT['vae_config'].keys() <= own.get('vae_config', {}).keys():
    own.pop('vae_config', None)
  return {
    **SCRIPT,
    **own,
    'llm_config': {**read('llm_config.json'), **SCRIPT_LLM},
    'vit_config': vit,
  }


def _name(section: str, key: str) -> str:
  return f'{section}.{key}' if section else key


def _number(
  config: Mapping[str, types.Json],
  section: str,
  key: str,
  kind: type[_Number],
  default: _Number | None = None,
) -> _Number:
  """Returns a number of the configuration; `section` is '' for the top level.

  Raises:
    ValueError: it is missing, or no number of this kind (integers are valid floats).
  """
  given = config.get(section) if section else config
  name = _name(section, key)
  if not isinstance(given, Mapping) or key not in given:
    if default is not None:
      return default
    raise ValueError(f'the configuration has no {name}')
  value = given[key]
  if isinstance(value, bool) or not isinstance(value, (int, kind)):
    raise ValueError(f'{name} is {value!r}; expected a number ({kind.__name__})')
  return cast(_Number, value)


def _check_required(config: Mapping[str, types.Json]) -> None:
  """Raises ValueError if a value is one that this implementation does not support."""
  for section, required in _REQUIRED.items():
    given = config.get(section) if section else config
    if not isinstance(given, Mapping):
      raise ValueError(f'the configuration has no {section}')
    for key, value in required.items():
      if given.get(key, value) != value:
        raise ValueError(f'{_name(section, key)} is {given[key]!r}; supported: {value!r}')


def _check_divides(section: str, whole: str, size: int, by: str, count: int) -> None:
  """Raises ValueError unless `size` is a multiple of `count`."""
  if count < 1 or size % count:
    raise ValueError(f'{section}.{whole} {size} is no multiple of {section}.{by} {count}')


def model_config(config: Mapping[str, types.Json]) -> bagel.ModelConfig:
  """Builds the model's configuration from the dictionary of `read_config`.

  Raises:
    ValueError: a key is missing, or its value is one that this implementation does not support.
  """
  _check_required(config)

  def top(key: str) -> int:
    return _number(config, '', key, int)

  def llm(key: str) -> int:
    return _number(config, 'llm_config', key, int)

  vit = _vit_config(config, top('vit_max_num_patch_per_side'))
  width, heads, kv_heads = (
    llm('hidden_size'),
    llm('num_attention_heads'),
    llm('num_key_value_heads'),
  )
  _check_divides('llm_config', 'hidden_size', width, 'num_attention_heads', heads)
  _check_divides('llm_config', 'num_attention_heads', heads, 'num_key_value_heads', kv_heads)
  if width // heads % 2:
    raise ValueError(f'llm_config.hidden_size {width} gives {heads} heads of odd width')
  return bagel.ModelConfig(
    vocab=llm('vocab_size'),
    width=width,
    depth=llm('num_hidden_layers'),
    heads=heads,
    kv_heads=kv_heads,
    ff_width=llm('intermediate_size'),
    latent_channels=(
      top('latent_patch_size') ** 2 * _number(config, 'vae_config', 'z_channels', int)
    ),
    latent_side=top('max_latent_size'),
    vit=vit,
    start_of_image=_number(config, 'special_tokens', 'start_of_image', int),
    end_of_image=_number(config, 'special_tokens', 'end_of_image', int),
    eps=_number(config, 'llm_config', 'rms_norm_eps', float),
    rope_theta=_number(config, 'llm_config', 'rope_theta', float),
    freeze_und=config['llm_config'].get('freeze_und', False),
  )


def _vit_config(config: Mapping[str, types.Json], side: int) -> bagel.VitConfig:
  """Builds the vision tower's configuration; `side` is `vit_max_num_patch_per_side`."""

  def vit(key: str) -> int:
    return _number(config, 'vit_config', key, int)

  patches = vit('image_size') // vit('patch_size')
  if patches != side:
    raise ValueError(
      f'vit_max_num_patch_per_side is {side}, but the vision tower has {patches} patches a side'
    )
  width, heads = vit('hidden_size'), vit('num_attention_heads')
  _check_divides('vit_config', 'hidden_size', width, 'num_attention_heads', heads)
  return bagel.VitConfig(
    width=width,
    depth=vit('num_hidden_layers'),
    heads=heads,
    ff_width=vit('intermediate_size'),
    patch=vit('patch_size'),
    side=side,
    eps=_number(config, 'vit_config', 'layer_norm_eps', float, LAYER_NORM_EPS),
  )


def autoencoder(config: Mapping[str, types.Json]) -> vae_lib.Autoencoder:
  """Builds the autoencoder from the dictionary of `read_config`.

  Raises:
    ValueError: a key is missing, or `downsample` contradicts the levels.
  """
  given = config['vae_config']
  try:
    model = vae_lib.Autoencoder(
      ch=given['ch'],
      ch_mult=tuple(given['ch_mult']),
      num_res_blocks=given['num_res_blocks'],
      z_channels=given['z_channels'],
      in_channels=given['in_channels'],
      out_ch=given['out_ch'],
      scale_factor=given['scale_factor'],
      shift_factor=given['shift_factor'],
    )
    downsample = given['downsample']
  except KeyError as error:
    raise ValueError(f'vae_config has no {error}') from error
  if model.downsample != downsample:
    raise ValueError(f'vae_config.downsample is {downsample}; the levels give {model.downsample}')
  return model
