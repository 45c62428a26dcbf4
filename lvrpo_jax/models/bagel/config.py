"""BAGEL's configuration files (arXiv 2505.14683) as our configurations.

The released folder has one file for the language model and one for the vision tower; the remaining
values stand in the released scripts, which overrule both files in places. A folder may instead
hold everything in one `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any

from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel

SCRIPT = {
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
"""What the released scripts set, whatever the configuration files say."""

SCRIPT_LLM = {'layer_module': 'Qwen2MoTDecoderLayer', 'qk_norm': True, 'tie_word_embeddings': False}

_REQUIRED = {
  '': {'interpolate_pos': False, 'connector_act': 'gelu_pytorch_tanh'},
  'llm_config': {**SCRIPT_LLM, 'hidden_act': 'silu'},
  'vit_config': {'rope': False, 'hidden_act': 'gelu_pytorch_tanh', 'num_channels': 3},
}
"""The values that this implementation has; another one must not pass silently."""


LAYER_NORM_EPS = 1e-6
"""Of a vision tower whose file does not say: SigLIP's."""


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """One dictionary with `llm_config`, `vit_config`, `vae_config` and the sizes of the rest.

  With an `llm_config.json` the folder is taken for the released one: what its `config.json` does
  not say of the keys of `SCRIPT` is as there, and the last layer of the vision tower is not used.
  Otherwise `config.json` holds all, as it is.

  Raises:
    ValueError: a file is missing or is no JSON.
  """
  folder = pathlib.Path(folder)

  def read(name: str) -> dict[str, Any]:
    try:
      found = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:  # No JSON, or no text.
      raise ValueError(f'cannot read {folder / name}: {error}') from error
    if not isinstance(found, dict):
      raise ValueError(f'cannot read {folder / name}: it holds no JSON object')
    return found

  if not (folder / 'llm_config.json').exists():
    return read('config.json')
  vit = read('vit_config.json')
  layers = _number({'vit_config': vit}, 'vit_config', 'num_hidden_layers')
  vit = {**vit, 'rope': False, 'num_hidden_layers': layers - 1}
  said = read('config.json') if (folder / 'config.json').exists() else {}
  own = {key: said[key] for key in SCRIPT if key in said}
  # A full description of an autoencoder replaces the released one; two of its numbers do not.
  if not SCRIPT['vae_config'].keys() <= own.get('vae_config', {}).keys():
    own.pop('vae_config', None)
  return {
    **SCRIPT,
    **own,
    'llm_config': {**read('llm_config.json'), **SCRIPT_LLM},
    'vit_config': vit,
  }


def _number(
  config: Mapping[str, Any], part: str, key: str, kind: type = int, default: float | None = None
) -> Any:
  """A number of the configuration; `part` is '' for the top.

  Raises:
    ValueError: it is missing or no number of this kind.
  """
  given = config.get(part) if part else config
  name = f'{part}{"." * bool(part)}{key}'
  if not isinstance(given, Mapping) or key not in given:
    if default is not None:
      return default
    raise ValueError(f'the configuration has no {name}')
  value = given[key]
  if isinstance(value, bool) or not isinstance(value, (int, kind)):
    raise ValueError(f'{name} is {value!r}; expected a number ({kind.__name__})')
  return value


def _check_required(config: Mapping[str, Any]) -> None:
  for part, required in _REQUIRED.items():
    given = config.get(part) if part else config
    if not isinstance(given, Mapping):
      raise ValueError(f'the configuration has no {part}')
    for key, value in required.items():
      if given.get(key, value) != value:
        raise ValueError(f'{part}{"." * bool(part)}{key} is {given[key]!r}; supported: {value!r}')


def _check_divides(part: str, whole: str, size: int, by: str, count: int) -> None:
  if count < 1 or size % count:
    raise ValueError(f'{part}.{whole} {size} is no multiple of {part}.{by} {count}')


def model_config(config: Mapping[str, Any]) -> bagel.ModelConfig:
  """Sizes of the model from the dictionary of `read_config`.

  Raises:
    ValueError: a key is missing, or its value is one that this implementation does not have.
  """
  _check_required(config)
  top = lambda key: _number(config, '', key)
  llm = lambda key, *kind: _number(config, 'llm_config', key, *kind)
  vit = lambda key, *kind: _number(config, 'vit_config', key, *kind)
  special = lambda key: _number(config, 'special_tokens', key)
  side, patches = top('vit_max_num_patch_per_side'), vit('image_size') // vit('patch_size')
  if patches != side:
    raise ValueError(
      f'vit_max_num_patch_per_side is {side}, but the vision tower has {patches} patches a side'
    )
  width, heads = llm('hidden_size'), llm('num_attention_heads')
  _check_divides('llm_config', 'hidden_size', width, 'num_attention_heads', heads)
  _check_divides(
    'llm_config', 'num_attention_heads', heads, 'num_key_value_heads', llm('num_key_value_heads')
  )
  _check_divides(
    'vit_config',
    'hidden_size',
    vit('hidden_size'),
    'num_attention_heads',
    vit('num_attention_heads'),
  )
  if width // heads % 2:
    raise ValueError(f'llm_config.hidden_size {width} gives {heads} heads of odd width')
  return bagel.ModelConfig(
    vocab=llm('vocab_size'),
    width=width,
    depth=llm('num_hidden_layers'),
    heads=heads,
    kv_heads=llm('num_key_value_heads'),
    ff_width=llm('intermediate_size'),
    latent_channels=top('latent_patch_size') ** 2 * _number(config, 'vae_config', 'z_channels'),
    latent_side=top('max_latent_size'),
    vit=bagel.VitConfig(
      width=vit('hidden_size'),
      depth=vit('num_hidden_layers'),
      heads=vit('num_attention_heads'),
      ff_width=vit('intermediate_size'),
      patch=vit('patch_size'),
      side=side,
      eps=vit('layer_norm_eps', float, LAYER_NORM_EPS),
    ),
    start_of_image=special('start_of_image'),
    end_of_image=special('end_of_image'),
    eps=llm('rms_norm_eps', float),
    rope_theta=llm('rope_theta', float),
    freeze_und=config['llm_config'].get('freeze_und', False),
  )


def autoencoder(config: Mapping[str, Any]) -> vae_lib.Autoencoder:
  """The autoencoder from the dictionary of `read_config`.

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
  except KeyError as error:
    raise ValueError(f'vae_config has no {error}') from error
  if model.downsample != given['downsample']:
    raise ValueError(
      f'vae_config.downsample is {given["downsample"]}; the levels give {model.downsample}'
    )
  return model
