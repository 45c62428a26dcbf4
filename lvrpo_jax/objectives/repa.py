"""Representation alignment (REPA, arXiv 2410.06940), a supervised baseline for alignment.

During flow matching, the states of the noised latent tokens after one layer are projected, and the
projections are fitted to the features that a frozen vision encoder computes of the clean image. The
encoder is the vision tower of the dual encoder of semantic rewards. The projector is discarded
after training.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast, Protocol

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import contexts
from lvrpo_jax.models import family
from lvrpo_jax.models import layers
from lvrpo_jax.models.siglip import model as siglip

Array = types.Array

PROJECTOR = 'projector'
"""Key of the projector's parameters among those of the policy, whose modules do not read them."""


class Projector(nn.Module):
  """Projector of three linear maps with silu between them, as in REPA's code.

  Attributes:
    width: width of the policy, and of the hidden layers.
    features: width of the encoder's features.
  """

  width: int
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = nn.silu(layers.Linear(self.width, name='mlp_0')(x))
    x = nn.silu(layers.Linear(self.width, name='mlp_1')(x))
    return layers.Linear(self.features, name='mlp_2')(x)


def misalignment(projected: Array, target: Array) -> Array:
  """Computes the negative cosine of every token over the last axis (arXiv 2410.06940, eq. 8).

  A vector of length 0, which has no direction, gives 0.
  """

  def unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))

  return -jnp.sum(unit(projected) * unit(target), axis=-1)


class VisionEncoder(Protocol):
  """Holder of a vision encoder's network, such as `runtime.dual_encoder.DualEncoder`.

  Attributes:
    module: the network.
  """

  module: siglip.Siglip


@dataclasses.dataclass(frozen=True)
class Repa:
  """The alignment loss and its settings.

  Attributes:
    weight: weight of the loss beside flow matching; REPA uses 0.5.
    layer: count of layers after which states are aligned, from 1.
    encoder: the dual encoder whose vision tower is the target.
  """

  weight: float
  layer: int
  encoder: VisionEncoder

  def init(self, policy: family.Policy, key: Array) -> types.Params:
    """Initialises the parameters of the projector."""
    return self._projector(policy).init(key, jnp.zeros((1, policy.width)))['params']

  def _projector(self, policy: family.Policy) -> Projector:
    return Projector(policy.width, self.encoder.module.vision_config.hidden)

  def target(self, encoder_params: types.Params, image_BYXC: Array, tokens: int) -> Array:
    """Computes the features (B, N, D) of clean uint8 images.

    Args:
      encoder_params: parameters of the dual encoder.
      image_BYXC: the images.
      tokens: N, the count of latent tokens; features are resized to their square grid.
    """
    embedded = self.encoder.module.apply(
      {'params': encoder_params}, contexts.to_unit(image_BYXC), False, method='embed_image'
    )
    _, features = cast(tuple[Array, Array], embedded)
    B, P, D = features.shape
    side, wanted = math.isqrt(P), math.isqrt(tokens)
    if side != wanted:
      grid = jax.image.resize(features.reshape(B, side, side, D), (B, wanted, wanted, D), 'linear')
      features = grid.reshape(B, tokens, D)
    return jax.lax.stop_gradient(features)

  def loss(
    self, policy: family.Policy, params: types.Params, states_EBMND: Array, target_BND: Array
  ) -> tuple[Array, Array]:
    """Returns (sum, weight) of `misalignment` over the tokens, after the aligned layer.

    Args:
      policy: the model.
      params: its parameters, with those of the projector under `PROJECTOR`.
      states_EBMND: states of the latent tokens after every layer.
      target_BND: from `target`.
    """
    projected = self._projector(policy).apply(
      {'params': params[PROJECTOR]}, states_EBMND[self.layer - 1].astype(jnp.float32)
    )
    loss = misalignment(cast(Array, projected), target_BND[:, None])
    return jnp.sum(loss), jnp.float32(loss.size)
