"""Layers shared by all towers: linear maps, norms, position tables, time features."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types

Array = types.Array


def remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
  """Wraps a scanned layer so that the backward pass recomputes it.

  Args:
    policy: 'none' (every activation is saved), 'full' (none is), or a name in
      `jax.checkpoint_policies`.
  """
  if policy == 'none':
    return layer
  saved = None if policy == 'full' else jax.checkpoint_policies.__dict__[policy]
  return nn.remat(layer, policy=saved, prevent_cse=False)


def scan(
  layer: type[nn.Module], parent: nn.Module, *, in_axes: types.Tree, length: int, unroll: int
) -> type[nn.Module]:
  """Turns a layer into `length` layers of `parent` that run as one `jax.lax.scan`.

  Parameters and outputs have a leading layer axis. Only initialisation checks what is constant over
  layers, because the check traces every layer a second time; that second trace also draws from the
  random streams, and initial parameters depend on those draws.

  Args:
    in_axes: for every argument but the carry, 0 (split over layers) or `nn.broadcast`.
    unroll: layers unrolled per scan step.
  """
  return nn.scan(
    layer,
    variable_axes={'params': 0},
    split_rngs={'params': True},
    in_axes=in_axes,
    length=length,
    unroll=unroll,
    check_constancy_invariants=parent.is_initializing(),
  )


def normal(stddev: float) -> nn.initializers.Initializer:
  """Builds an initialiser of normal numbers whose bits do not depend on compilation.

  Without the barrier, XLA folds `stddev` into the constants of the distribution.
  """

  def init(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
    return jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype)) * stddev

  return init


class Linear(nn.Module):
  """Linear map `x @ kernel + bias` on the last axis.

  All leading axes are folded into one before the product: XLA's CPU backend computes weight
  gradients about twice as fast that way. Other backends fold them themselves.
  """

  features: int
  use_bias: bool = True
  dtype: jnp.dtype = jnp.float32
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
    rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    out = rows @ kernel.astype(self.dtype)
    if self.use_bias:
      out = out + self.param('bias', nn.initializers.zeros_init(), (self.features,)).astype(
        self.dtype
      )
    return out.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
  """Root-mean-square norm, computed in float32, rounded to the input's dtype, then scaled."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
  """Layer norm with scale and bias, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones_init(), (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    return (x32 * scale + bias).astype(x.dtype)


def sincos_table(side: int, width: int) -> np.ndarray:
  """Computes a 2-D sin-cos position table in float64 and returns it as float32.

  Returns:
    (side * side, width). In row `r * side + c` the first half of the features encodes the column c,
    the second half the row r, each as [sin, cos] of `position * 10000^(-k / (width / 4))`.

  Raises:
    ValueError: width is no multiple of 4.
  """
  if width % 4:
    raise ValueError(f'width of a 2-D sin-cos table is {width}; it must be a multiple of 4')
  frequency = 10000.0 ** (-np.arange(width // 4, dtype=np.float64) / (width // 4))
  angle = np.arange(side, dtype=np.float64)[:, None] * frequency
  one = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
  column = np.tile(one, (side, 1))
  row = np.repeat(one, side, axis=0)
  return np.concatenate([column, row], axis=1).astype(np.float32)


def grid_positions(rows: int, columns: int, side: int) -> np.ndarray:
  """Returns position-table rows of an image at the top left of the table.

  The token in row r and column c has table row `r * side + c`; tokens are row-major.
  """
  return (np.arange(rows)[:, None] * side + np.arange(columns)[None]).reshape(-1).astype(np.int32)


def spread_positions(rows: int, columns: int, side: int) -> np.ndarray:
  """Returns position-table rows of an image that is stretched over the whole table.

  Token i of n along an axis has table index `floor(i * side / n)`. Integer arithmetic keeps these
  distinct for n <= side; BAGEL's `interpolate` rule compares floats and merges some (9 tokens on a
  side of 9 share 8 indices).
  """
  row, column = np.arange(rows) * side // rows, np.arange(columns) * side // columns
  return (row[:, None] * side + column[None]).reshape(-1).astype(np.int32)


def time_features(t: Array, width: int = 256) -> Array:
  """Computes `[cos(t f_j), sin(t f_j)]` with `f_j = 10000^(-j / (width / 2))`, float32 (..., width).

  The flow time t in [0, 1] is not scaled.
  """
  half = width // 2
  frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = t.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedder(nn.Module):
  """Two-layer embedding of the flow time: `Linear(silu(Linear(time_features(t))))`."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, t: Array) -> Array:
    hidden = nn.silu(Linear(self.width, name='mlp_0', dtype=self.dtype)(time_features(t)))
    return Linear(self.width, name='mlp_2', dtype=self.dtype)(hidden)
