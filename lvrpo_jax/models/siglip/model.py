"""SigLIP dual encoder: maps images and texts to unit vectors whose inner product is a similarity.

Both released families are covered. SigLIP (Zhai et al. 2023, arXiv 2303.15343) takes square images
of one size. The variable-size models of SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786) take
padded patch sequences and resize the position table to the grid of every image.

Axes beyond the common legend: `U`, `V` rows and columns of the position table, `M` attention keys.
"""

from __future__ import annotations

import dataclasses
import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import layers as layers_lib
from lvrpo_jax.models import vae as vae_lib

Array = types.Array


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
  """Sizes of the image encoder; its width is also that of the joint space.

  Attributes:
    hidden: width.
    mlp: feed-forward width.
    layers: number of blocks.
    heads: attention heads; divides `hidden`.
    image_size: side in pixels of the images, or of the square that the position table covers. If
      it is no multiple of `patch`, the rest at the bottom and at the right is not seen.
    patch: patch side in pixels.
    eps: layer-norm epsilon.
  """

  hidden: int
  mlp: int
  layers: int
  heads: int
  image_size: int
  patch: int
  eps: float = 1e-6

  @property
  def side(self) -> int:
    """Rows, and also columns, of the position table: the whole patches along a side."""
    return self.image_size // self.patch


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
  """Sizes of the text encoder.

  Attributes:
    hidden: width.
    mlp: feed-forward width.
    layers: number of blocks.
    heads: attention heads; divides `hidden`.
    vocab: size of the vocabulary.
    max_positions: longest text in tokens.
    projection: width of the joint space, the `hidden` of the image encoder.
    eps: layer-norm epsilon.
  """

  hidden: int
  mlp: int
  layers: int
  heads: int
  vocab: int
  max_positions: int
  projection: int
  eps: float = 1e-6


SiglipTowerConfig = SiglipVisionConfig | SiglipTextConfig


def _layer_norm(config: SiglipTowerConfig, name: str | None = None) -> nn.LayerNorm:
  return nn.LayerNorm(epsilon=config.eps, use_fast_variance=False, name=name)


class Attention(nn.Module):
  """Multi-head attention with biases; scores are scaled by head_width ** -0.5."""

  heads: int
  hidden: int

  def setup(self) -> None:
    if self.hidden % self.heads:
      raise ValueError(f'{self.heads} heads do not divide the width {self.hidden}')
    split = (self.heads, self.hidden // self.heads)
    self.q_proj = nn.DenseGeneral(split)
    self.k_proj = nn.DenseGeneral(split)
    self.v_proj = nn.DenseGeneral(split)
    self.out_proj = nn.DenseGeneral(self.hidden, axis=(-2, -1))

  def __call__(self, query_BLD: Array, memory_BMD: Array, mask_BM: Array | None) -> Array:
    q_BLHK, k_BMHK = self.q_proj(query_BLD), self.k_proj(memory_BMD)
    scores_BHLM = jnp.einsum('BLHK,BMHK->BHLM', q_BLHK, k_BMHK) * q_BLHK.shape[-1] ** -0.5
    if mask_BM is not None:
      lowest = jnp.finfo(scores_BHLM.dtype).min
      scores_BHLM = jnp.where(mask_BM[:, None, None, :], scores_BHLM, lowest)
    weights_BHLM = jax.nn.softmax(scores_BHLM)
    return self.out_proj(jnp.einsum('BHLM,BMHK->BLHK', weights_BHLM, self.v_proj(memory_BMD)))

  def values(self, memory_BMD: Array) -> Array:
    """Returns the output at every position of a query that attends to this position alone."""
    return self.out_proj(self.v_proj(memory_BMD))


class Mlp(nn.Module):
  """Two linear layers with the tanh approximation of GELU between them."""

  mlp: int
  hidden: int

  @nn.compact
  def __call__(self, x_BLD: Array) -> Array:
    hidden_BLF = nn.gelu(nn.Dense(self.mlp, name='fc1')(x_BLD), approximate=True)
    return nn.Dense(self.hidden, name='fc2')(hidden_BLF)


class Block(nn.Module):
  """Pre-norm transformer block with bidirectional attention."""

  config: SiglipTowerConfig

  @nn.compact
  def __call__(self, x_BLD: Array, mask_BL: Array | None) -> Array:
    config = self.config
    n_BLD = _layer_norm(config, 'norm1')(x_BLD)
    x_BLD += Attention(config.heads, config.hidden, name='attention')(n_BLD, n_BLD, mask_BL)
    n_BLD = _layer_norm(config, 'norm2')(x_BLD)
    return x_BLD + Mlp(config.mlp, config.hidden, name='mlp')(n_BLD)


class PoolingHead(nn.Module):
  """Attention pooling: a learned query attends to all patches; a residual MLP follows."""

  config: SiglipVisionConfig

  def setup(self) -> None:
    config = self.config
    init = nn.initializers.xavier_uniform()
    self.probe = self.param('probe', init, (1, 1, config.hidden))
    self.attention = Attention(config.heads, config.hidden)
    self.norm = _layer_norm(config)
    self.mlp = Mlp(config.mlp, config.hidden)

  def __call__(self, hidden_BND: Array, mask_BN: Array | None) -> Array:
    probe_B1D = jnp.broadcast_to(self.probe, (len(hidden_BND), 1, self.config.hidden))
    return self._finish(self.attention(probe_B1D, hidden_BND, mask_BN))[:, 0]

  def each(self, hidden_BND: Array) -> Array:
    """Pools every patch on its own, as if it were the whole image: (B, N, D)."""
    return self._finish(self.attention.values(hidden_BND))

  def _finish(self, x_BLD: Array) -> Array:
    return x_BLD + self.mlp(self.norm(x_BLD))


def _interpolation(position_BN: Array, size_B: Array, source: int) -> Array:
  """Computes weights (B, N, source) of an antialiased linear resize of `source` samples to `size_B`.

  Row n is a triangle around the centre of target sample `position_BN`, normalised over the source
  samples. It is as wide as a target sample when shrinking, as a source sample when growing.
  """
  scale_B1 = (source / size_B)[:, None]
  centre_BN1 = ((position_BN + 0.5) * scale_B1)[..., None]
  distance_BNU = jnp.abs((jnp.arange(source) + 0.5)[None, None] - centre_BN1)
  weight_BNU = jnp.maximum(0.0, 1.0 - distance_BNU / jnp.maximum(scale_B1, 1.0)[..., None])
  return weight_BNU / weight_BNU.sum(axis=-1, keepdims=True)


def resize_positions(table_UVD: Array, grid_B2: Array, patches: int) -> Array:
  """Resizes a square position table to the grid of every image.

  Args:
    table_UVD: learned positions, rows and columns first.
    grid_B2: patch rows and patch columns of every image; may be traced.
    patches: length N of the padded patch sequences.

  Returns:
    Shape (B, N, D), row-major; entries past rows * columns repeat the first.
  """
  rows_B, columns_B = grid_B2[:, 0], grid_B2[:, 1]
  index_BN = jnp.broadcast_to(jnp.arange(patches)[None], (len(grid_B2), patches))
  index_BN = jnp.where(index_BN < (rows_B * columns_B)[:, None], index_BN, 0)
  row_BNU = _interpolation(index_BN // columns_B[:, None], rows_B, table_UVD.shape[0])
  column_BNV = _interpolation(index_BN % columns_B[:, None], columns_B, table_UVD.shape[1])
  return jnp.einsum('BNU,BNV,UVD->BND', row_BNU, column_BNV, table_UVD)


class VisionTower(nn.Module):
  """Image encoder, whose patch embedding is linear over (row, column, channel) of a patch."""

  config: SiglipVisionConfig

  def setup(self) -> None:
    config = self.config
    init = layers_lib.normal(config.hidden**-0.5)
    self.patch_embedding = nn.Dense(config.hidden)
    self.positions = self.param('positions', init, (config.side**2, config.hidden))
    self.layers = [Block(config) for _ in range(config.layers)]
    self.post_norm = _layer_norm(config)
    self.head = PoolingHead(config)

  def __call__(self, image_BYXC: Array) -> tuple[Array, Array]:
    """Encodes square images.

    As in a strided convolution without padding, pixels beyond the last whole patch are not seen.

    Returns:
      (hidden_BND, pooled_BD): patch states after the last norm, and the pooled state.

    Raises:
      ValueError: the images are not `image_size` pixels wide and high.
    """
    size = self.config.image_size
    if image_BYXC.shape[1:3] != (size, size):
      raise ValueError(f'images are {image_BYXC.shape[1:3]} pixels, not {size} x {size}')
    extent = self.config.side * self.config.patch
    if extent < size:
      image_BYXC = image_BYXC[:, :extent, :extent]
    patches_BND = vae_lib.patchify(image_BYXC, self.config.patch)
    return self._encode(self.patch_embedding(patches_BND) + self.positions[None], None)

  def embed_patches(
    self, patches_BND: Array, mask_BN: Array, grid_B2: Array
  ) -> tuple[Array, Array]:
    """Encodes padded patch sequences; arguments as in `Siglip.embed_patches`."""
    side = self.config.side
    table_UVD = self.positions.reshape(side, side, self.config.hidden)
    positions_BND = resize_positions(table_UVD, grid_B2, patches_BND.shape[1])
    return self._encode(self.patch_embedding(patches_BND) + positions_BND, mask_BN)

  def _encode(self, x_BND: Array, mask_BN: Array | None) -> tuple[Array, Array]:
    for layer in self.layers:
      x_BND = layer(x_BND, mask_BN)
    hidden_BND = self.post_norm(x_BND)
    return hidden_BND, self.head(hidden_BND, mask_BN)


class TextTower(nn.Module):
  """Text encoder with bidirectional attention; the state at the last position is the pooled one."""

  config: SiglipTextConfig

  @nn.compact
  def __call__(self, ids_BL: Array, mask_BL: Array | None = None) -> tuple[Array, Array]:
    """Encodes texts.

    Returns:
      (hidden_BLD, projected_BLD): token states after the last norm, and the head applied to each.

    Raises:
      ValueError: the texts are longer than `max_positions`.
    """
    config = self.config
    length = ids_BL.shape[1]
    if length > config.max_positions:
      raise ValueError(f'texts have {length} tokens, at most {config.max_positions} fit')
    init = layers_lib.normal(config.hidden**-0.5)
    positions = self.param('positions', init, (config.max_positions, config.hidden))
    embed = nn.Embed(config.vocab, config.hidden, embedding_init=init, name='tokens')
    x_BLD = embed(ids_BL) + positions[None, :length]
    for layer in range(config.layers):
      x_BLD = Block(config, name=f'layers_{layer}')(x_BLD, mask_BL)
    hidden_BLD = _layer_norm(config, 'final_norm')(x_BLD)
    return hidden_BLD, nn.Dense(config.projection, name='head')(hidden_BLD)


def _unit(x: Array) -> Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Siglip(nn.Module):
  """Dual encoder: both towers, and the scale and bias of their inner product.

  All vectors in the joint space have norm 1. The parameter `logit_scale` is the logarithm of the
  scale.
  """

  vision_config: SiglipVisionConfig
  text_config: SiglipTextConfig

  def setup(self) -> None:
    self.vision = VisionTower(self.vision_config)
    self.text = TextTower(self.text_config)
    # Initial values of arXiv 2303.15343, for batches in which nearly all pairs are negatives.
    self.logit_scale = self.param('logit_scale', nn.initializers.constant(math.log(10.0)), ())
    self.logit_bias = self.param('logit_bias', nn.initializers.constant(-10.0), ())

  def __call__(self, image_BYXC: Array, ids_BL: Array) -> tuple[Array, Array, Array, Array]:
    """Returns the arguments of `siglip_loss`: (image_BD, text_BD, scale, bias)."""
    image_BD, text_BD = self.embed_image(image_BYXC)[0], self.embed_text(ids_BL)[0]
    return image_BD, text_BD, *self.scale_and_bias()

  def scale_and_bias(self) -> tuple[Array, Array]:
    """Returns scale (not its logarithm) and bias of the logits, scalars."""
    return jnp.exp(self.logit_scale), self.logit_bias

  def embed_image(self, image_BYXC: Array, projected: bool = True) -> tuple[Array, Array]:
    """Embeds square images in [-1, 1], shape (B, image_size, image_size, channels).

    Args:
      image_BYXC: the images.
      projected: True applies the pooling head to every patch on its own, as if it were the whole
        image, so that patches are in the joint space; False returns the tower's states.

    Returns:
      (pooled_BD, patches_BND): unit vectors, except that unprojected patches keep their length.
    """
    return self._image_features(*self.vision(image_BYXC), projected)

  def embed_patches(
    self,
    patches_BND: Array,
    mask_BN: Array,
    grid_B2: Array,
    projected: bool = True,
  ) -> tuple[Array, Array]:
    """Embeds images of different sizes, given as padded patch sequences.

    Args:
      patches_BND: patches in the order of `patchify`, padded at the end of each sequence.
      mask_BN: boolean, True for real patches; every image has at least one.
      grid_B2: integer patch rows and patch columns of every image, rows * columns <= N.
      projected: see `embed_image`.

    Returns:
      (pooled_BD, patches_BND) as in `embed_image`; patches outside the mask are undefined.
    """
    hidden_BND, pooled_BD = self.vision.embed_patches(patches_BND, mask_BN, grid_B2)
    return self._image_features(hidden_BND, pooled_BD, projected)

  def embed_text(self, ids_BL: Array, mask_BL: Array | None = None) -> tuple[Array, Array]:
    """Embeds texts.

    Args:
      ids_BL: token ids. The released models were trained on texts padded to `max_positions`; the
        last position, padding or not, is the pooled one.
      mask_BL: boolean, True on tokens that attention may see; None lets it see padding too, as in
        the released models.

    Returns:
      (pooled_BD, tokens_BLD): unit vectors in the joint space; the head is applied to each token.
    """
    tokens_BLD = _unit(self.text(ids_BL, mask_BL)[1])
    return tokens_BLD[:, -1], tokens_BLD

  def _image_features(
    self, hidden_BND: Array, pooled_BD: Array, projected: bool
  ) -> tuple[Array, Array]:
    patches_BND = _unit(self.vision.head.each(hidden_BND)) if projected else hidden_BND
    return _unit(pooled_BD), patches_BND


def siglip_loss(image_BD: Array, text_BD: Array, scale: Array, bias: Array) -> Array:
  """Computes the sigmoid loss of all pairs, divided by B (Zhai et al. 2023, arXiv 2303.15343).

  -1/B sum_ij log sigmoid(z_ij (scale * x_i . y_j + bias)), z_ij = 1 for i = j and -1 otherwise.

  Args:
    image_BD: unit vectors of images.
    text_BD: unit vectors of texts; row i belongs to image i, all other pairs are negatives.
    scale: positive scalar, the exponential of `logit_scale`.
    bias: scalar.

  Returns:
    Scalar.
  """
  logits_BB = scale * jnp.einsum('ID,TD->IT', image_BD, text_BD) + bias
  sign_BB = 2 * jnp.eye(len(image_BD)) - 1
  return -jax.nn.log_sigmoid(sign_BB * logits_BB).sum() / len(image_BD)
