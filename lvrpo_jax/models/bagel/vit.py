"""Vision tower of the understanding expert: SigLIP's encoder on packed patches (NaViT)."""

from __future__ import annotations

import functools

from flax import linen as nn
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import attention as attention_lib
from lvrpo_jax.models import layers
from lvrpo_jax.parallel import activations

Array = types.Array


def gelu(x: Array) -> Array:
  """Applies the tanh approximation of GELU."""
  return nn.gelu(x, approximate=True)


class VitLayer(nn.Module):
  """Pre-norm transformer layer with biases everywhere."""

  heads: int
  ff_width: int
  eps: float
  dtype: jnp.dtype
  attention: str

  @nn.compact
  def __call__(self, x_BND: Array, mask_BNN: Array) -> tuple[Array, Array]:
    B, N, D = x_BND.shape
    linear = functools.partial(layers.Linear, dtype=self.dtype)

    def split(y: Array) -> Array:
      return y.reshape(B, 1, N, self.heads, D // self.heads)

    y = layers.LayerNorm(self.eps, name='layer_norm1')(x_BND)
    q, k, v = (split(linear(D, name=f'{n}_proj')(y)) for n in 'qkv')
    block = attention_lib.Block(k, v, attention_lib.Mask(mask_BNN[:, None]))
    out = attention_lib.attend(q, [block], self.attention)
    x_BND = x_BND + linear(D, name='out_proj')(out.reshape(B, N, D))
    y = layers.LayerNorm(self.eps, name='layer_norm2')(x_BND)
    y = linear(D, name='fc2')(gelu(linear(self.ff_width, name='fc1')(y)))
    x_BND = activations.constrain(x_BND + y, 'rows')
    return x_BND, x_BND


class Vit(nn.Module):
  """Encoder of patches; attention is bidirectional inside each image only.

  Attributes:
    side: patches along each side of the position table.
    unroll, remat, attention: as in `trunk.Trunk`.
  """

  width: int
  depth: int
  heads: int
  ff_width: int
  side: int
  eps: float = 1e-6
  dtype: jnp.dtype = jnp.float32
  unroll: int = 1
  remat: str = 'none'
  attention: str = 'xla'

  @nn.compact
  def __call__(
    self, patches_BNP: Array, position_BN: Array, image_BN: Array
  ) -> tuple[Array, Array]:
    """Encodes patches.

    Args:
      position_BN: rows of the position table.
      image_BN: index of the image that a patch belongs to; negative on padding.

    Returns:
      Features (B, N, D) after the post norm, and the outputs (E, B, N, D) of all layers.
    """
    x = layers.Linear(self.width, name='patch_embedding', dtype=self.dtype)(patches_BNP)
    table = self.param('position_embedding', layers.normal(0.02), (self.side**2, self.width))
    x = activations.constrain(x + table[position_BN].astype(self.dtype), 'rows')
    mask_BNN = (image_BN[:, :, None] == image_BN[:, None, :]) & (image_BN >= 0)[:, None, :]
    stack = layers.scan(
      layers.remat(VitLayer, self.remat),
      self,
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=self.unroll,
    )
    x, outputs = stack(
      self.heads, self.ff_width, self.eps, self.dtype, self.attention, name='layers'
    )(x, mask_BNN)
    return layers.LayerNorm(self.eps, name='post_layernorm')(x), outputs
