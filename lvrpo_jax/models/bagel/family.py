"""Builds policies of the BAGEL family: the released architecture, and the small one of a config."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from absl import logging

from lvrpo_jax import types
from lvrpo_jax.models import family
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.models.bagel import released


def find_architecture(config: types.Config) -> dict[str, Any]:
  """Sizes of a released model in its own format, from its folder or the config; {} for neither.

  Raises:
    ValueError: the folder holds another model than the config describes.
  """
  mine = config.architecture.to_dict()
  if not config.checkpoint:
    return mine
  theirs = bagel_config.read_config(config.checkpoint)
  if mine:
    here, there = _sizes(mine), _sizes(theirs)
    for key, value in here.items():
      if value != there[key]:
        raise ValueError(
          f'config.architecture gives {key} = {value!r}, but the model in '
          f'config.checkpoint = {config.checkpoint!r} has {there[key]!r}'
        )
  return theirs


def _sizes(architecture: dict[str, Any]) -> dict[str, Any]:
  """Everything in an architecture that shapes a parameter, by name."""
  autoencoder = bagel_config.autoencoder(architecture)
  return {
    **dataclasses.asdict(bagel_config.model_config(architecture)),
    **{
      f'vae_config.{key}': value
      for key, value in vars(autoencoder).items()
      if key in architecture['vae_config']
    },
  }


def released_policy(
  config: types.Config,
  tokenizer: family.Tokenizer,
  image_size: int,
  architecture: dict[str, Any],
) -> policy_lib.Policy:
  """A model of the released architecture.

  Where a tokenizer is given (`config.checkpoint`) its special tokens hold; one that lacked them
  has them behind its last word, and the embedding table grows if it must.

  Raises:
    ValueError: the data's images do not fit the model.
  """
  settings = config.model
  model = dataclasses.replace(
    bagel_config.model_config(architecture),
    dtype=settings.dtype,
    unroll=settings.unroll,
    remat=settings.remat,
    attention=settings.attention,
  )
  vae, patch = bagel_config.autoencoder(architecture), architecture['latent_patch_size']
  if config.checkpoint:
    mine = dict(
      bos_token_id=tokenizer.bos,
      eos_token_id=tokenizer.eos,
      start_of_image=tokenizer.start_of_image,
      end_of_image=tokenizer.end_of_image,
    )
    if not tokenizer.added and mine != architecture['special_tokens']:
      logging.warning(
        'special tokens of the tokenizer in %s are %s, its configuration says %s; '
        "the tokenizer's hold",
        config.checkpoint,
        mine,
        architecture['special_tokens'],
      )
    model = dataclasses.replace(
      model,
      vocab=max(model.vocab, len(tokenizer)),
      start_of_image=tokenizer.start_of_image,
      end_of_image=tokenizer.end_of_image,
    )
  if image_size % (vae.downsample * patch):
    raise ValueError(
      f'config.data.source {config.data.source!r} has images of {image_size} '
      f'pixels a side; allowed: multiples of {vae.downsample * patch}'
    )
  policy = policy_lib.Policy(
    model, vae, image_size, patch, bos=tokenizer.bos, eos=tokenizer.eos
  )
  if policy.latent_grid > model.latent_side:
    raise ValueError(
      f'config.data.source {config.data.source!r} has images of {image_size} '
      f'pixels a side; allowed: at most {model.latent_side * vae.downsample * patch}'
      ', the position table of the model'
    )
  return policy


def small_policy(
  config: types.Config, tokenizer: family.Tokenizer, image_size: int
) -> policy_lib.Policy:
  """The unified model of `config.model` with the small autoencoder.

  Raises:
    ValueError: a patch does not divide the data's images, or the position table is too small.
  """
  m = config.model
  patches = {'vae.patch': config.vae.patch, 'model.vit_patch': m.vit_patch}
  if not config.dual_encoder.path:
    patches['dual_encoder.patch'] = config.dual_encoder.patch
  for key, patch in patches.items():
    if image_size % patch:
      raise ValueError(
        f'config.{key} is {patch}; allowed: a divisor of the {image_size} '
        'pixels along a side of an image'
      )
  tokens_a_side = image_size // min(config.vae.patch, m.vit_patch)
  if m.position_side < tokens_a_side:
    raise ValueError(
      f'config.model.position_side is {m.position_side}; allowed: at least the '
      f'{tokens_a_side} tokens along a side of an image'
    )
  vae = vae_lib.PatchAutoencoder(patch=config.vae.patch, z_channels=config.vae.channels)
  vit = bagel.VitConfig(
    width=m.vit_width,
    depth=m.vit_depth,
    heads=m.vit_heads,
    ff_width=m.vit_ff_width,
    patch=m.vit_patch,
    side=m.position_side,
  )
  model = bagel.ModelConfig(
    vocab=len(tokenizer),
    width=m.width,
    depth=m.depth,
    heads=m.heads,
    kv_heads=m.kv_heads,
    ff_width=m.ff_width,
    latent_channels=config.vae.channels,
    latent_side=m.position_side,
    interpolate_pos=True,
    vit=vit,
    start_of_image=tokenizer.start_of_image,
    end_of_image=tokenizer.end_of_image,
    eps=m.eps,
    rope_theta=m.rope_theta,
    dtype=m.dtype,
    unroll=m.unroll,
    remat=m.remat,
    attention=m.attention,
  )
  return policy_lib.Policy(
    model, vae, image_size, latent_patch=1, bos=tokenizer.bos, eos=tokenizer.eos
  )


class Family:
  """BAGEL (arXiv 2505.14683): a Mixture-of-Transformers with a rectified flow over latents."""

  def build(
    self, config: types.Config, tokenizer: family.Tokenizer, image_size: int
  ) -> policy_lib.Policy:
    """The policy of a config.

    Args:
      config: the whole config, of which the sections `model`, `vae`, `architecture` and the key
        `checkpoint` are read.
      tokenizer: of the data.
      image_size: pixels a side of the data's images.
    """
    architecture = find_architecture(config)
    if architecture:
      return released_policy(config, tokenizer, image_size, architecture)
    return small_policy(config, tokenizer, image_size)

  def digest(self, policy: policy_lib.Policy, folder: str | os.PathLike, part: str) -> str:
    """Tells the weights of one part of a released folder apart from others."""
    return released.digest(policy, folder, part)

  def load(
    self,
    policy: policy_lib.Policy,
    folder: str | os.PathLike,
    part: str,
    shardings: types.Tree,
  ) -> types.Params:
    """Parameters of one part of a released folder, read straight into their shards."""
    return released.load(policy, folder, part, shardings)

  def save(
    self,
    policy: policy_lib.Policy,
    params: types.Params,
    vae_params: types.Params,
    source: str | os.PathLike,
    target: pathlib.Path,
    shards: int,
  ) -> None:
    """Writes a folder of the released form, configuration and tokenizer copied from `source`."""
    released.save(policy, params, vae_params, source, target, shards)


BAGEL = Family()
"""The family."""
