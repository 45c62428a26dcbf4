"""Representation alignment, the rival of reinforcement (REPA, arXiv 2410.06940).

While the policy learns to denoise an image, the states of its noised latent tokens after one layer
are projected onto the features that a frozen vision encoder has of the clean image. Here the
encoder is the vision tower of the semantic judge. The projector is thrown away after training.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import contexts
from lvrpo_jax.models import family
from lvrpo_jax.models import layers
from lvrpo_jax.models.siglip import model as siglip

Array = jax.Array

PROJECTOR = 'projector'
"""Where the projector's parameters stand among the policy's, whose modules do not read them."""


class Projector(nn.Module):
  """Three linear maps with silu between them, as in REPA's code."""

  width: int
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.silu(layers.Linear(self.width, name='mlp_0')(x))
    x = nn.silu(layers.Linear(self.width, name='mlp_1')(x))
    return layers.Linear(self.features, name='mlp_2')(x)


def misalignment(projected: Array, target: Array) -> Array:
  """Negative cosine of every token, the last axis gone (arXiv 2410.06940, eq. 8).

  A vector of length 0, which has no direction, gives 0.
  """
  unit = lambda x: x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))
  return -jnp.sum(unit(projected) * unit(target), axis=-1)


class VisionEncoder(Protocol):
  """What holds the encoder's network, such as `runtime.dual_encoder.DualEncoder`."""

  module: siglip.Siglip


@dataclasses.dataclass(frozen=True)
class Repa:
  """What the loss needs besides the policy.

  Attributes:
    weight: of the loss beside flow matching; REPA's is 0.5.
    layer: number of layers after which states are aligned, from 1.
    encoder: the dual encoder whose vision tower is the target.
  """

  weight: float
  layer: int
  encoder: VisionEncoder

  def init(self, policy: family.Policy, key: Array) -> types.Params:
    """Fresh parameters of the projector."""
    return self._projector(policy).init(key, jnp.zeros((1, policy.width)))['params']

  def _projector(self, policy: family.Policy) -> Projector:
    return Projector(policy.width, self.encoder.module.vision_config.hidden)

  def target(self, encoder_params: types.Params, image_BYXC: Array, tokens: int) -> Array:
    """Features (B, N, D) of clean uint8 images, as many as the square grid of latent tokens has."""
    _, found = self.encoder.module.apply(
      {'params': encoder_params}, contexts.to_unit(image_BYXC), False, method='embed_image'
    )
    B, P, D = found.shape
    side, wanted = math.isqrt(P), math.isqrt(tokens)
    if side != wanted:
      grid = jax.image.resize(found.reshape(B, side, side, D), (B, wanted, wanted, D), 'linear')
      found = grid.reshape(B, tokens, D)
    return jax.lax.stop_gradient(found)

  def loss(
    self, policy: family.Policy, params: types.Params, states_EBMND: Array, target_BND: Array
  ) -> tuple[Array, Array]:
    """(sum, weight) over tokens of `misalignment` after the layer."""
    projected = self._projector(policy).apply(
      {'params': params[PROJECTOR]}, states_EBMND[self.layer - 1].astype(jnp.float32)
    )
    loss = misalignment(projected, target_BND[:, None])
    return jnp.sum(loss), jnp.float32(loss.size)
