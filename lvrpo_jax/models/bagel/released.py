"""Folders in the released form: weights in safetensors files, with configuration and tokenizer."""

from __future__ import annotations

import json
import os
import pathlib
import shutil

from lvrpo_jax import types
from lvrpo_jax.models import family
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import params as bagel_params
from lvrpo_jax.models.bagel import policy as policy_lib

COPIED = (
  'config.json',
  'llm_config.json',
  'vit_config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'vocab.json',
  'merges.txt',
  'special_tokens_map.json',
  'added_tokens.json',
)
"""Files of a released folder that alignment does not change."""


def _autoencoder(policy: policy_lib.Policy) -> vae_lib.Autoencoder:
  """Returns the released autoencoder of a policy.

  Raises:
    ValueError: the policy has the small one.
  """
  if not isinstance(policy.vae, vae_lib.Autoencoder):
    raise ValueError('a released folder has no weights of the small autoencoder')
  return policy.vae


def _config_of(policy: policy_lib.Policy, part: str) -> bagel_params.Config:
  """Returns the configuration of a part of a released folder."""
  return _autoencoder(policy) if part == family.AUTOENCODER else policy.config


def digest(policy: policy_lib.Policy, folder: str | os.PathLike, part: str) -> str:
  """Returns a fingerprint of the weights of one part of a folder."""
  return bagel_params.fingerprint(pathlib.Path(folder), _config_of(policy, part))


def load(
  policy: policy_lib.Policy, folder: str | os.PathLike, part: str, shardings: types.Tree
) -> types.Params:
  """Reads the parameters of one part of a folder, each straight into its shards."""
  return bagel_params.load(folder, _config_of(policy, part), shardings)


def save(
  policy: policy_lib.Policy,
  params: types.Params,
  vae_params: types.Params,
  source: str | os.PathLike,
  target: pathlib.Path,
  shards: int,
) -> None:
  """Writes a folder in the released form, which appears under its name once it is complete.

  Args:
    policy: the model.
    params, vae_params: weights of the model and of the autoencoder.
    source: folder whose configuration and tokenizer are copied.
    target: the new folder.
    shards: count of files of the model.

  Raises:
    OSError: the folder cannot be written.
  """
  partial = target.with_name(target.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  try:
    partial.mkdir(parents=True)
    bagel_params.save(params, partial / 'ema.safetensors', policy.config, shards)
    bagel_params.save(vae_params, partial / 'ae.safetensors', _autoencoder(policy))
    for name in COPIED:
      if (pathlib.Path(source) / name).is_file():
        shutil.copy(pathlib.Path(source) / name, partial / name)
    _set_vocabulary(partial, policy.config.vocab)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def _set_vocabulary(folder: pathlib.Path, size: int) -> None:
  """Writes the row count of the exported embedding table into the configuration.

  The count differs from that of the source where special tokens were appended.
  """
  for name, part in (('llm_config.json', ''), ('config.json', 'llm_config')):
    path = folder / name
    found = json.loads(path.read_text()) if path.is_file() else {}
    config = found.get(part, {}) if part else found
    if config.get('vocab_size', size) != size:
      config['vocab_size'] = size
      path.write_text(json.dumps(found, indent=1))
