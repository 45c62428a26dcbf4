"""The vision tower that reads images: SigLIP's encoder on packed patches (NaViT)."""

from __future__ import annotations

import functools

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax.models import attention as attention_lib
from lvrpo_jax.models import layers
from lvrpo_jax.parallel import activations

Array = jax.Array
gelu = functools.partial(nn.gelu, approximate=True)


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
    split = lambda y: y.reshape(B, 1, N, self.heads, D // self.heads)
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
  """Patches to features; attention is bidirectional inside each image only.

  `side` is the number of patches along a side of the position table.
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
    """Returns (features_BND after the post norm, outputs of all layers (E, B, N, D)).

    Patches of one image share its number in `image_BN`; negative numbers are padding.
    """
    x = layers.Linear(self.width, name='patch_embedding', dtype=self.dtype)(patches_BNP)
    table = self.param('position_embedding', layers.normal(0.02), (self.side**2, self.width))
    x = activations.constrain(x + table[position_BN].astype(self.dtype), 'rows')
    mask_BNN = (image_BN[:, :, None] == image_BN[:, None, :]) & (image_BN >= 0)[:, None, :]
    stack = nn.scan(
      layers.remat(VitLayer, self.remat),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=self.unroll,
      **layers.traced_once(self),
    )
    x, outputs = stack(
      self.heads, self.ff_width, self.eps, self.dtype, self.attention, name='layers'
    )(x, mask_BNN)
    return layers.LayerNorm(self.eps, name='post_layernorm')(x), outputs
