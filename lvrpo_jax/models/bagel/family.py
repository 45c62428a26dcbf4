"""Builds policies of the BAGEL family, of the released architecture or of a small config."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from absl import logging

from lvrpo_jax import types
from lvrpo_jax.models import family
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.models.bagel import released

Architecture = dict[str, types.Json]
"""Sizes of a released model, in the format of its own configuration."""


def find_architecture(config: types.Config) -> Architecture:
  """Reads the architecture of a released model from its folder or the config; {} for neither.

  Raises:
    ValueError: the model in the folder differs from the one that the config describes.
  """
  configured = config.architecture.to_dict()
  if not config.checkpoint:
    return configured
  released_sizes = bagel_config.read_config(config.checkpoint)
  if configured:
    expected, found = _sizes(configured), _sizes(released_sizes)
    for key, value in expected.items():
      if value != found[key]:
        raise ValueError(
          f'config.architecture gives {key} = {value!r}, but the model in '
          f'config.checkpoint = {config.checkpoint!r} has {found[key]!r}'
        )
  return released_sizes


def _sizes(architecture: Architecture) -> dict[str, types.Json]:
  """Returns all settings of an architecture that determine the shape of a parameter, by name."""
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
  architecture: Architecture,
) -> policy_lib.Policy:
  """Builds a policy of the released architecture.

  With `config.checkpoint`, the special tokens are those of the folder's tokenizer. A tokenizer that
  lacked them has them after its last word, and the embedding table grows if that is necessary.

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
    special_tokens = dict(
      bos_token_id=tokenizer.bos,
      eos_token_id=tokenizer.eos,
      start_of_image=tokenizer.start_of_image,
      end_of_image=tokenizer.end_of_image,
    )
    if not tokenizer.added and special_tokens != architecture['special_tokens']:
      logging.warning(
        'special tokens of the tokenizer in %s are %s, its configuration says %s; '
        'those of the tokenizer are used',
        config.checkpoint,
        special_tokens,
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
    config=model,
    vae=vae,
    image_size=image_size,
    latent_patch=patch,
    bos=tokenizer.bos,
    eos=tokenizer.eos,
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
  """Builds the policy of `config.model` with the small autoencoder.

  Raises:
    ValueError: a patch does not divide the data's images, or the position table is too small.
  """
  sizes = config.model
  patches = {'vae.patch': config.vae.patch, 'model.vit_patch': sizes.vit_patch}
  if not config.dual_encoder.path:
    patches['dual_encoder.patch'] = config.dual_encoder.patch
  for key, patch in patches.items():
    if image_size % patch:
      raise ValueError(
        f'config.{key} is {patch}; allowed: a divisor of the {image_size} '
        'pixels along a side of an image'
      )
  tokens_a_side = image_size // min(config.vae.patch, sizes.vit_patch)
  if sizes.position_side < tokens_a_side:
    raise ValueError(
      f'config.model.position_side is {sizes.position_side}; allowed: at least the '
      f'{tokens_a_side} tokens along a side of an image'
    )
  vae = vae_lib.PatchAutoencoder(patch=config.vae.patch, z_channels=config.vae.channels)
  vit = bagel.VitConfig(
    width=sizes.vit_width,
    depth=sizes.vit_depth,
    heads=sizes.vit_heads,
    ff_width=sizes.vit_ff_width,
    patch=sizes.vit_patch,
    side=sizes.position_side,
  )
  model = bagel.ModelConfig(
    vocab=len(tokenizer),
    width=sizes.width,
    depth=sizes.depth,
    heads=sizes.heads,
    kv_heads=sizes.kv_heads,
    ff_width=sizes.ff_width,
    latent_channels=config.vae.channels,
    latent_side=sizes.position_side,
    interpolate_pos=True,
    vit=vit,
    start_of_image=tokenizer.start_of_image,
    end_of_image=tokenizer.end_of_image,
    eps=sizes.eps,
    rope_theta=sizes.rope_theta,
    dtype=sizes.dtype,
    unroll=sizes.unroll,
    remat=sizes.remat,
    attention=sizes.attention,
  )
  return policy_lib.Policy(
    config=model,
    vae=vae,
    image_size=image_size,
    latent_patch=1,
    bos=tokenizer.bos,
    eos=tokenizer.eos,
  )


class Family:
  """Family of BAGEL (arXiv 2505.14683): a Mixture-of-Transformers with a flow over latents."""

  def build(
    self, config: types.Config, tokenizer: family.Tokenizer, image_size: int
  ) -> policy_lib.Policy:
    """Builds the policy of a config.

    Args:
      config: the whole config; the sections `model`, `vae`, `dual_encoder`, `architecture` and
        `data`, and the key `checkpoint`, are read.
      tokenizer: of the data.
      image_size: pixels a side of the data's images.
    """
    architecture = find_architecture(config)
    if architecture:
      return released_policy(config, tokenizer, image_size, architecture)
    return small_policy(config, tokenizer, image_size)

  def digest(self, policy: policy_lib.Policy, folder: str | os.PathLike, part: str) -> str:
    """Returns a fingerprint of the weights of one part of a released folder."""
    return released.digest(policy, folder, part)

  def load(
    self,
    policy: policy_lib.Policy,
    folder: str | os.PathLike,
    part: str,
    shardings: types.Tree,
  ) -> types.Params:
    """Reads the parameters of one part of a released folder, each straight into its shards."""
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
    """Writes a folder in the released form; copies configuration and tokenizer from `source`."""
    released.save(policy, params, vae_params, source, target, shards)


BAGEL: family.ModelFamily[policy_lib.Policy] = Family()
"""The family, as `models.family.FAMILIES` names it."""
