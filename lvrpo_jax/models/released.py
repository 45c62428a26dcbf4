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

from lvrpo_jax.models import unified
from lvrpo_jax.models import vae

SCRIPT = {
    'latent_patch_size': 2,
    'max_latent_size': 64,
    'vit_max_num_patch_per_side': 70,
    'connector_act': 'gelu_pytorch_tanh',
    'interpolate_pos': False,
    'special_tokens': {'bos_token_id': 151644, 'eos_token_id': 151645,
                       'start_of_image': 151652, 'end_of_image': 151653},
    'vae_config': {'in_channels': 3, 'out_ch': 3, 'ch': 128, 'ch_mult': [1, 2, 4, 4],
                   'num_res_blocks': 2, 'z_channels': 16, 'downsample': 8,
                   'scale_factor': 0.3611, 'shift_factor': 0.1159},
}
"""What the released scripts set, whatever the configuration files say."""

SCRIPT_LLM = {'layer_module': 'Qwen2MoTDecoderLayer', 'qk_norm': True,
              'tie_word_embeddings': False}

_REQUIRED = {
    '': {'interpolate_pos': False, 'connector_act': 'gelu_pytorch_tanh'},
    'llm_config': {**SCRIPT_LLM, 'hidden_act': 'silu'},
    'vit_config': {'rope': False, 'hidden_act': 'gelu_pytorch_tanh', 'num_channels': 3},
}
"""The values that this implementation has; another one must not pass silently."""


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """One dictionary with `llm_config`, `vit_config`, `vae_config` and the sizes of the rest.

  With an `llm_config.json` the folder is taken for the released one: what its `config.json` does not
  say of the keys of `SCRIPT` is as there, and the last layer of the vision tower is not used.
  Otherwise `config.json` holds all, as it is.

  Raises:
    ValueError: a file is missing or is no JSON.
  """
  folder = pathlib.Path(folder)

  def read(name: str) -> dict[str, Any]:
    try:
      return json.loads((folder / name).read_text())
    except (OSError, json.JSONDecodeError) as error:
      raise ValueError(f'cannot read {folder / name}: {error}') from error

  if not (folder / 'llm_config.json').exists():
    return read('config.json')
  vit = read('vit_config.json')
  vit = {**vit, 'rope': False, 'num_hidden_layers': vit['num_hidden_layers'] - 1}
  said = read('config.json') if (folder / 'config.json').exists() else {}
  own = {key: said[key] for key in SCRIPT if key in said}
  # A full description of an autoencoder replaces the released one; two of its numbers do not.
  if not SCRIPT['vae_config'].keys() <= own.get('vae_config', {}).keys():
    own.pop('vae_config', None)
  return {**SCRIPT, **own, 'llm_config': {**read('llm_config.json'), **SCRIPT_LLM},
          'vit_config': vit}


def model_config(config: Mapping[str, Any]) -> unified.ModelConfig:
  """Sizes of the model from the dictionary of `read_config`.

  Raises:
    ValueError: a key is missing, or its value is one that this implementation does not have.
  """
  try:
    return _model_config(config)
  except KeyError as error:
    raise ValueError(f'the configuration has no {error}') from error


def _model_config(config: Mapping[str, Any]) -> unified.ModelConfig:
  for part, required in _REQUIRED.items():
    given = config[part] if part else config
    for key, value in required.items():
      if given.get(key, value) != value:
        raise ValueError(f'{part}{"." * bool(part)}{key} is {given[key]!r}; supported: {value!r}')
  llm, vit, special = config['llm_config'], config['vit_config'], config['special_tokens']
  side = config['vit_max_num_patch_per_side']
  if vit['image_size'] // vit['patch_size'] != side:
    raise ValueError(f'vit_max_num_patch_per_side is {side}, but the vision tower has '
                     f"{vit['image_size'] // vit['patch_size']} patches a side")
  if llm['hidden_size'] % llm['num_attention_heads']:
    raise ValueError(f"hidden_size {llm['hidden_size']} is no multiple of the "
                     f"{llm['num_attention_heads']} heads")
  return unified.ModelConfig(
      vocab=llm['vocab_size'], width=llm['hidden_size'], depth=llm['num_hidden_layers'],
      heads=llm['num_attention_heads'], kv_heads=llm['num_key_value_heads'],
      ff_width=llm['intermediate_size'],
      latent_channels=config['latent_patch_size'] ** 2 * config['vae_config']['z_channels'],
      latent_side=config['max_latent_size'],
      vit=unified.VitConfig(
          width=vit['hidden_size'], depth=vit['num_hidden_layers'],
          heads=vit['num_attention_heads'], ff_width=vit['intermediate_size'],
          patch=vit['patch_size'], side=side, eps=vit['layer_norm_eps']),
      start_of_image=special['start_of_image'], end_of_image=special['end_of_image'],
      eps=llm['rms_norm_eps'], rope_theta=llm['rope_theta'],
      freeze_und=llm.get('freeze_und', False))


def autoencoder(config: Mapping[str, Any]) -> vae.Autoencoder:
  """The autoencoder from the dictionary of `read_config`.

  Raises:
    ValueError: a key is missing, or `downsample` contradicts the levels.
  """
  given = config['vae_config']
  try:
    model = vae.Autoencoder(
        ch=given['ch'], ch_mult=tuple(given['ch_mult']), num_res_blocks=given['num_res_blocks'],
        z_channels=given['z_channels'], in_channels=given['in_channels'], out_ch=given['out_ch'],
        scale_factor=given['scale_factor'], shift_factor=given['shift_factor'])
  except KeyError as error:
    raise ValueError(f'vae_config has no {error}') from error
  if model.downsample != given['downsample']:
    raise ValueError(f"vae_config.downsample is {given['downsample']}; the levels give "
                     f'{model.downsample}')
  return model
