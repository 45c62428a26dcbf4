"""A tiny random model in the released form, for tests of the programs: three configuration files,
safetensors in shards, a tokenizer."""

import json
import pathlib

import jax
from jax import numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.data.shapes import wording
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import params as bagel_params


def configuration(tokenizer: tokenizer_lib.Tokenizer) -> dict:
  """Everything in one dictionary, as `config.json` holds it."""
  t = tokenizer
  return {
    'latent_patch_size': 2,
    'max_latent_size': 6,
    'vit_max_num_patch_per_side': 6,
    'connector_act': 'gelu_pytorch_tanh',
    'interpolate_pos': False,
    'special_tokens': {
      'bos_token_id': t.bos,
      'eos_token_id': t.eos,
      'start_of_image': t.start_of_image,
      'end_of_image': t.end_of_image,
    },
    'llm_config': {
      'vocab_size': len(t) + 8,
      'hidden_size': 16,
      'num_hidden_layers': 2,
      'num_attention_heads': 2,
      'num_key_value_heads': 1,
      'intermediate_size': 24,
      'rms_norm_eps': 1e-6,
      'rope_theta': 1e4,
      'hidden_act': 'silu',
      'qk_norm': True,
      'tie_word_embeddings': False,
      'layer_module': 'Qwen2MoTDecoderLayer',
    },
    'vit_config': {
      'hidden_size': 12,
      'num_hidden_layers': 1,
      'num_attention_heads': 2,
      'intermediate_size': 16,
      'patch_size': 8,
      'image_size': 48,
      'layer_norm_eps': 1e-6,
      'hidden_act': 'gelu_pytorch_tanh',
      'rope': False,
      'num_channels': 3,
    },
    'vae_config': {
      'in_channels': 3,
      'out_ch': 3,
      'ch': 32,
      'ch_mult': [1, 1, 1],
      'num_res_blocks': 1,
      'z_channels': 4,
      'downsample': 4,
      'scale_factor': 0.4,
      'shift_factor': 0.1,
    },
  }


def vocabulary(folder: pathlib.Path) -> int:
  """Size of the vocabulary that the configuration of a folder names."""
  return json.loads((folder / 'llm_config.json').read_text())['vocab_size']


def rows(folder: pathlib.Path) -> int:
  """Rows of the embedding table in a folder."""
  for path in folder.glob('ema*.safetensors'):
    found = safetensors.load_file(path)
    if (name := 'language_model.model.embed_tokens.weight') in found:
      return len(found[name])
  raise AssertionError(f'{folder} holds no embedding table')


def write(folder: pathlib.Path, shards: int = 2) -> pathlib.Path:
  """Writes configuration, tokenizer and random weights."""
  folder.mkdir()
  tokenizer = tokenizer_lib.from_words(wording.vocabulary())
  tokenizer.save(folder / 'tokenizer.json')
  config = configuration(tokenizer)
  files = {
    'llm_config': config['llm_config'],
    # The released file counts a last layer that is not used.
    'vit_config': {
      **config['vit_config'],
      'num_hidden_layers': config['vit_config']['num_hidden_layers'] + 1,
    },
    'config': {k: v for k, v in config.items() if k not in ('llm_config', 'vit_config')},
  }
  for name, content in files.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  model, vae = bagel_config.model_config(config), bagel_config.autoencoder(config)
  rng = np.random.default_rng(0)

  def random(tree, fixed=()):
    return {
      name: value
      if name in fixed
      else jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), value)
      for name, value in tree.items()
    }

  params = bagel.init(model, jax.random.key(0))
  bagel_params.save(
    random(params, ('latent_pos_embed', 'vit_pos_embed')), folder / 'ema.safetensors', model, shards
  )
  image = jnp.zeros((1, vae.downsample, vae.downsample, 3))
  bagel_params.save(
    random(vae.init(jax.random.key(0), image)['params']), folder / 'ae.safetensors', vae
  )
  return folder
