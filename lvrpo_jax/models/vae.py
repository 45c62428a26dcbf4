"""Autoencoders between images and latents, and the patch layout of all image tokens.

`Autoencoder` is the convolutional autoencoder of FLUX with released weights. `PatchAutoencoder` is
linear, for small models, and is fitted in closed form. Both have `moments`, `encode`,
`encode_mean`, `decode` and `downsample`, so callers need not know which one runs.

Images are `image_BYXC` in [-1, 1], latents `latent_BYXC`, both float32 with channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lvrpo_jax import types

Array = types.Array
_ArrayT = TypeVar('_ArrayT', jax.Array, np.ndarray)

_VARIANCE_FLOOR = 1e-8
"""Share of the largest variance below which a variance cannot be told from rounding."""


def patchify(image_BYXC: _ArrayT, patch: int) -> _ArrayT:
  """Cuts images or latents into square patches.

  Args:
    image_BYXC: shape (B, Y, X, C), sides multiples of `patch`.
    patch: side of a patch in pixels of the input.

  Returns:
    Shape (B, Y/patch * X/patch, patch * patch * C). Tokens are row-major; the values of a token are
    in the order (row in patch, column in patch, channel).

  Raises:
    ValueError: a side is no multiple of `patch`.
  """
  b, y, x, c = image_BYXC.shape
  if y % patch or x % patch:
    raise ValueError(f'{y} x {x} pixels cannot be cut into patches of {patch} x {patch}')
  blocks = image_BYXC.reshape(b, y // patch, patch, x // patch, patch, c).swapaxes(2, 3)
  return blocks.reshape(b, (y // patch) * (x // patch), patch * patch * c)


def unpatchify(tokens_BND: _ArrayT, grid_yx: tuple[int, int], patch: int) -> _ArrayT:
  """Joins tokens into images or latents; the inverse of `patchify`.

  Args:
    tokens_BND: shape (B, rows * columns, patch * patch * C).
    grid_yx: token rows and token columns.
    patch: side of a patch in pixels of the result.

  Returns:
    Shape (B, rows * patch, columns * patch, C).

  Raises:
    ValueError: the tokens do not fill the grid, or their width is no multiple of patch * patch.
  """
  b, n, d = tokens_BND.shape
  rows, columns = grid_yx
  if n != rows * columns:
    raise ValueError(f'{n} tokens do not fill a grid of {rows} x {columns}')
  if d % (patch * patch):
    raise ValueError(f'token width {d} is no multiple of {patch} x {patch} pixels')
  blocks = tokens_BND.reshape(b, rows, columns, patch, patch, d // patch**2).swapaxes(2, 3)
  return blocks.reshape(b, rows * patch, columns * patch, d // patch**2)


def _check_sides(image_BYXC: Array, downsample: int) -> None:
  """Raises ValueError unless both sides are multiples of `downsample`."""
  y, x = image_BYXC.shape[1:3]
  if y % downsample or x % downsample:
    raise ValueError(f'image sides {y} x {x} must be multiples of {downsample}')


def _group_norm(name: str) -> nn.GroupNorm:
  return nn.GroupNorm(num_groups=32, epsilon=1e-6, use_fast_variance=False, name=name)


def _conv(features: int, name: str, size: int = 3) -> nn.Conv:
  return nn.Conv(features, (size, size), padding=(size - 1) // 2, name=name)


class ResBlock(nn.Module):
  """Residual block `x + conv(silu(norm(conv(silu(norm(x))))))`; a 1x1 conv adapts the width of x."""

  features: int

  @nn.compact
  def __call__(self, x_BYXC: Array) -> Array:
    h_BYXC = _conv(self.features, 'conv1')(nn.silu(_group_norm('norm1')(x_BYXC)))
    h_BYXC = _conv(self.features, 'conv2')(nn.silu(_group_norm('norm2')(h_BYXC)))
    if x_BYXC.shape[-1] != self.features:
      x_BYXC = _conv(self.features, 'nin_shortcut', size=1)(x_BYXC)
    return x_BYXC + h_BYXC


class PixelAttention(nn.Module):
  """Residual single-head attention over all pixels; an image has (Y * X)^2 scores."""

  @nn.compact
  def __call__(self, x_BYXC: Array) -> Array:
    b, y, x, c = x_BYXC.shape
    h_BYXC = _group_norm('norm')(x_BYXC)
    q_BNC, k_BNC, v_BNC = (
      _conv(c, name, size=1)(h_BYXC).reshape(b, y * x, c) for name in ('q', 'k', 'v')
    )
    scores_BNM = jnp.einsum('BNC,BMC->BNM', q_BNC, k_BNC) * c**-0.5
    out_BNC = jnp.einsum('BNM,BMC->BNC', jax.nn.softmax(scores_BNM), v_BNC)
    return x_BYXC + _conv(c, 'proj_out', size=1)(out_BNC.reshape(x_BYXC.shape))


class Downsample(nn.Module):
  """Strided convolution that halves the sides; zero padding at the bottom and the right only."""

  @nn.compact
  def __call__(self, x_BYXC: Array) -> Array:
    padding = ((0, 1), (0, 1))
    return nn.Conv(x_BYXC.shape[-1], (3, 3), strides=2, padding=padding, name='conv')(x_BYXC)


class Upsample(nn.Module):
  """Doubles the sides by repeating pixels, then a 3x3 conv."""

  @nn.compact
  def __call__(self, x_BYXC: Array) -> Array:
    return _conv(x_BYXC.shape[-1], 'conv')(x_BYXC.repeat(2, axis=1).repeat(2, axis=2))


def _middle(x_BYXC: Array) -> Array:
  """Applies the blocks at the lowest resolution; their owner is the compact method that calls it."""
  features = x_BYXC.shape[-1]
  x_BYXC = ResBlock(features, name='mid_block_1')(x_BYXC)
  x_BYXC = PixelAttention(name='mid_attn_1')(x_BYXC)
  return ResBlock(features, name='mid_block_2')(x_BYXC)


class Encoder(nn.Module):
  """Maps images to the mean and log-variance of the latent, stacked along the channels."""

  ch: int
  ch_mult: Sequence[int]
  num_res_blocks: int
  z_channels: int

  @nn.compact
  def __call__(self, image_BYXC: Array) -> Array:
    h_BYXC = _conv(self.ch, 'conv_in')(image_BYXC)
    for level, mult in enumerate(self.ch_mult):
      for block in range(self.num_res_blocks):
        h_BYXC = ResBlock(self.ch * mult, name=f'down_{level}_block_{block}')(h_BYXC)
      if level < len(self.ch_mult) - 1:
        h_BYXC = Downsample(name=f'down_{level}_downsample')(h_BYXC)
    h_BYXC = nn.silu(_group_norm('norm_out')(_middle(h_BYXC)))
    return _conv(2 * self.z_channels, 'conv_out')(h_BYXC)


class Decoder(nn.Module):
  """Maps unscaled latents to images; level 0 is the full resolution and comes last."""

  ch: int
  ch_mult: Sequence[int]
  num_res_blocks: int
  out_ch: int

  @nn.compact
  def __call__(self, latent_BYXC: Array) -> Array:
    h_BYXC = _middle(_conv(self.ch * self.ch_mult[-1], 'conv_in')(latent_BYXC))
    for level in reversed(range(len(self.ch_mult))):
      for block in range(self.num_res_blocks + 1):
        features = self.ch * self.ch_mult[level]
        h_BYXC = ResBlock(features, name=f'up_{level}_block_{block}')(h_BYXC)
      if level > 0:
        h_BYXC = Upsample(name=f'up_{level}_upsample')(h_BYXC)
    return _conv(self.out_ch, 'conv_out')(nn.silu(_group_norm('norm_out')(h_BYXC)))


class Autoencoder(nn.Module):
  """FLUX autoencoder, whose architecture is that of VQGAN (Esser et al. 2021, arXiv 2012.09841).

  Attributes:
    ch: channels at full resolution, a multiple of 32.
    ch_mult: factor on `ch` at every level; each level but the last halves the sides.
    num_res_blocks: residual blocks in each level of the encoder; the decoder has one more.
    z_channels: latent channels.
    in_channels: channels of the images that `moments` takes.
    out_ch: channels of the images that `decode` returns.
    scale_factor: factor that scales latents to about unit deviation.
    shift_factor: offset removed from latents before scaling.
  """

  ch: int = 128
  ch_mult: Sequence[int] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  z_channels: int = 16
  in_channels: int = 3
  out_ch: int = 3
  scale_factor: float = 0.3611
  shift_factor: float = 0.1159

  @property
  def downsample(self) -> int:
    """Image pixels per latent pixel along each side."""
    return 2 ** (len(self.ch_mult) - 1)

  def setup(self) -> None:
    self.encoder = Encoder(self.ch, self.ch_mult, self.num_res_blocks, self.z_channels)
    self.decoder = Decoder(self.ch, self.ch_mult, self.num_res_blocks, self.out_ch)

  def __call__(self, image_BYXC: Array) -> Array:
    """Reconstructs images from the means of their latents; reads every parameter."""
    return self.decode(self.encode_mean(image_BYXC))

  def moments(self, image_BYXC: Array) -> tuple[Array, Array]:
    """Returns mean and log-variance of the unscaled latent, (B, Y/downsample, X/downsample, C) each.

    Raises:
      ValueError: a side is no multiple of `downsample`, or the channels are not `in_channels`.
    """
    _check_sides(image_BYXC, self.downsample)
    if image_BYXC.shape[-1] != self.in_channels:
      raise ValueError(f'image has {image_BYXC.shape[-1]} channels, not {self.in_channels}')
    mean_BYXC, logvar_BYXC = jnp.split(self.encoder(image_BYXC), 2, axis=-1)
    return mean_BYXC, logvar_BYXC

  def encode(self, image_BYXC: Array, eps_BYXC: Array) -> Array:
    """Samples scaled latents from standard normal noise `eps_BYXC` of their shape."""
    mean_BYXC, logvar_BYXC = self.moments(image_BYXC)
    sample_BYXC = mean_BYXC + jnp.exp(logvar_BYXC / 2) * eps_BYXC
    return self.scale_factor * (sample_BYXC - self.shift_factor)

  def encode_mean(self, image_BYXC: Array) -> Array:
    """Returns the scaled mean latents."""
    return self.scale_factor * (self.moments(image_BYXC)[0] - self.shift_factor)

  def decode(self, latent_BYXC: Array) -> Array:
    """Decodes scaled latents to unclipped images (B, Y * downsample, X * downsample, out_ch)."""
    return self.decoder(latent_BYXC / self.scale_factor + self.shift_factor)


class PatchAutoencoder(nn.Module):
  """Linear variational autoencoder of non-overlapping patches; each patch is one latent pixel.

  The log-variance has one value per channel. `fit_patch_autoencoder` sets all linear parameters.

  Attributes:
    patch: side of a patch in pixels.
    z_channels: latent channels.
    hidden: width of a two-layer MLP that is added to the decoder's linear output; 0 omits it. Its
      last kernel starts at zero, so the decoder starts linear.
    in_channels: image channels.
  """

  patch: int = 16
  z_channels: int = 32
  hidden: int = 0
  in_channels: int = 3

  @property
  def downsample(self) -> int:
    """Image pixels per latent pixel along each side."""
    return self.patch

  def setup(self) -> None:
    width = self.patch**2 * self.in_channels
    self.encoder = nn.Dense(self.z_channels)
    self.decoder = nn.Dense(width)
    if self.hidden:
      self.decoder_in = nn.Dense(self.hidden)
      self.decoder_out = nn.Dense(width, kernel_init=nn.initializers.zeros)
    self.logvar = self.param('logvar', nn.initializers.zeros, (self.z_channels,))
    self.scale = self.param('scale', nn.initializers.ones, (self.z_channels,))
    self.shift = self.param('shift', nn.initializers.zeros, (self.z_channels,))

  def __call__(self, image_BYXC: Array) -> Array:
    """Reconstructs images from the means of their latents; reads every parameter."""
    return self.decode(self.encode_mean(image_BYXC))

  def moments(self, image_BYXC: Array) -> tuple[Array, Array]:
    """Returns mean and log-variance of the unscaled latent, (B, Y/patch, X/patch, C) each.

    Raises:
      ValueError: a side is no multiple of `patch`.
    """
    _check_sides(image_BYXC, self.patch)
    b, y, x = image_BYXC.shape[:3]
    mean_BND = self.encoder(patchify(image_BYXC, self.patch))
    mean_BYXC = mean_BND.reshape(b, y // self.patch, x // self.patch, self.z_channels)
    return mean_BYXC, jnp.broadcast_to(self.logvar[None, None, None], mean_BYXC.shape)

  def encode(self, image_BYXC: Array, eps_BYXC: Array) -> Array:
    """Samples scaled latents from standard normal noise `eps_BYXC` of their shape."""
    mean_BYXC, logvar_BYXC = self.moments(image_BYXC)
    return self._normalise(mean_BYXC + jnp.exp(logvar_BYXC / 2) * eps_BYXC)

  def encode_mean(self, image_BYXC: Array) -> Array:
    """Returns the scaled mean latents."""
    return self._normalise(self.moments(image_BYXC)[0])

  def decode(self, latent_BYXC: Array) -> Array:
    """Decodes scaled latents to unclipped images (B, Y * patch, X * patch, in_channels)."""
    b, y, x, c = latent_BYXC.shape
    latent_BND = latent_BYXC.reshape(b, y * x, c)
    latent_BND = latent_BND / self.scale[None, None] + self.shift[None, None]
    pixels_BND = self.decoder(latent_BND)
    if self.hidden:
      pixels_BND += self.decoder_out(nn.gelu(self.decoder_in(latent_BND)))
    return unpatchify(pixels_BND, (y, x), self.patch)

  def _normalise(self, latent_BYXC: Array) -> Array:
    return self.scale[None, None, None] * (latent_BYXC - self.shift[None, None, None])


def fit_patch_autoencoder(
  model: PatchAutoencoder, image_BYXC: np.ndarray, seed: int = 0
) -> types.Params:
  """Computes parameters of `model` that are optimal for the given images, in closed form.

  A linear variational autoencoder has its optimum at probabilistic PCA (Lucas et al. 2019, arXiv
  1911.02469). Let l_1 >= l_2 >= ... be the eigenvalues of the patch covariance, u_k the
  eigenvectors, and s the mean of the discarded eigenvalues. The posterior of channel k has mean
  sqrt(l_k - s) / l_k * u_k . (x - mean) and variance s / l_k (Tipping and Bishop 1999, sections 3.2
  and 3.3). The decoder is the least-squares reconstruction from posterior means. Hence
  `decode(encode_mean(x))` is the PCA projection; its mean squared error per patch, summed over
  pixels and channels, is the sum of the discarded eigenvalues.

  `scale` gives `encode_mean` zero mean and unit deviation in every channel; a sampled latent has
  the slightly larger variance l_k / (l_k - s). Channels are ordered by falling variance, and the
  largest entry of each u_k is made positive. A hidden layer gets fresh weights from `seed`; its
  output is zero until it is trained.

  Args:
    model: its patch side, latent channels and hidden width are used.
    image_BYXC: images in [-1, 1], sides multiples of the patch side.
    seed: seeds the hidden layer.

  Returns:
    A parameter tree, float32.

  Raises:
    ValueError: the patches vary in fewer directions than there are latent channels.
  """
  patches_ND = np.asarray(image_BYXC, np.float64)
  patches_ND = patchify(patches_ND, model.patch).reshape(-1, model.patch**2 * model.in_channels)
  mean_D = patches_ND.mean(axis=0)
  centred_ND = patches_ND - mean_D
  variance_D, basis_DD = np.linalg.eigh(centred_ND.T @ centred_ND / len(patches_ND))
  variance_D, basis_DD = variance_D[::-1].clip(min=0), basis_DD[:, ::-1]

  z = model.z_channels
  floor = _VARIANCE_FLOOR * variance_D[0]
  kept_C = variance_D[:z]
  noise = max(variance_D[z:].sum() / max(len(variance_D) - z, 1), floor)
  if len(kept_C) < z or np.any(kept_C - noise <= floor):
    found = int(np.sum(kept_C - noise > floor))
    raise ValueError(f'patches vary in {found} directions, too few for {z} latent channels')

  basis_DC = basis_DD[:, :z]
  largest_C = np.take_along_axis(basis_DC, np.abs(basis_DC).argmax(axis=0)[None], axis=0)[0]
  basis_DC = basis_DC * np.sign(largest_C)
  signal_C = np.sqrt(kept_C - noise)
  encoder_DC = basis_DC * signal_C / kept_C
  fitted = {
    'encoder': {'kernel': encoder_DC, 'bias': -mean_D @ encoder_DC},
    'decoder': {'kernel': (basis_DC * kept_C / signal_C).T, 'bias': mean_D},
    'logvar': np.log(noise / kept_C),
    'scale': np.sqrt(kept_C) / signal_C,
    'shift': np.zeros(z),
  }
  fitted = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), fitted)
  if not model.hidden:
    return fitted
  blank_BYXC = jnp.zeros((1, model.patch, model.patch, model.in_channels))
  return {**jax.jit(model.init)(jax.random.key(seed), blank_BYXC)['params'], **fitted}
