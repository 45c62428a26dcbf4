"""Layers that all towers share: linear maps, RMS norm, sin-cos tables, time features."""

from __future__ import annotations

from collections.abc import Sequence

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

Array = jax.Array


def remat(layer: type[nn.Module], policy: str) -> type[nn.Module]:
  """A scanned layer that is computed again in the backward pass.

  Args:
    policy: 'none', 'full' (nothing is kept), or a name in `jax.checkpoint_policies`.
  """
  if policy == 'none':
    return layer
  kept = None if policy == 'full' else jax.checkpoint_policies.__dict__[policy]
  return nn.remat(layer, policy=kept, prevent_cse=False)


def traced_once(module: nn.Module) -> dict[str, bool]:
  """The option of `nn.scan` that spares a second trace of every layer.

  That trace only checks what is constant over layers. It also draws from the random streams, so
  parameters start as they do with it.
  """
  return {'check_constancy_invariants': module.is_initializing()}


def normal(stddev: float) -> nn.initializers.Initializer:
  """Normal numbers, the same bits whether initialisation is compiled or not.

  Without the barrier a compiler joins `stddev` with the constants of the distribution.
  """

  def init(key: Array, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
    return jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype)) * stddev

  return init


class Linear(nn.Module):
  """`x @ kernel + bias` on the last axis.

  All leading axes are folded into one before the product: XLA's CPU backend computes weight
  gradients about twice as fast that way, and other backends do it anyway.
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
  """Root-mean-square norm in float32, rounded to the input's dtype, then scaled."""

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
  """2-D sin-cos position table, (side * side, width) float32, made in float64.

  Row `r * side + c`: the first half of the features encodes the column, the second the row, each
  as [sin, cos] of `position * 10000^(-k / (width / 4))`.

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
  """Rows of a position table for an image at the top left: `r * side + c`, row-major."""
  return (np.arange(rows)[:, None] * side + np.arange(columns)[None]).reshape(-1).astype(np.int32)


def interpolated_positions(rows: int, columns: int, side: int) -> np.ndarray:
  """The alternative rule: row and column stretched over the whole table and rounded down."""
  boundaries = np.arange(1 / side, 1.0, 1 / side)
  bucket = lambda n: np.searchsorted(boundaries, np.arange(0, 1 - 1e-6, 1 / n), side='right')
  return (bucket(rows)[:, None] * side + bucket(columns)[None]).reshape(-1).astype(np.int32)


def spread_positions(rows: int, columns: int, side: int) -> np.ndarray:
  """Rows of a position table for an image that is stretched over all of it: `floor(i side / n)`.

  Distinct for at most `side` rows and columns, which the rounding of `interpolated_positions` does
  not grant (9 of 9 give 8).
  """
  place = lambda n: np.arange(n) * side // n
  return (place(rows)[:, None] * side + place(columns)[None]).reshape(-1).astype(np.int32)


def time_features(t: Array, width: int = 256) -> Array:
  """`[cos(t f_j), sin(t f_j)]`, `f_j = 10000^(-j / (width / 2))`; t in [0, 1] is not scaled."""
  half = width // 2
  frequency = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = t.astype(jnp.float32)[..., None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedder(nn.Module):
  """`Linear(silu(Linear(time_features(t))))`."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, t: Array) -> Array:
    hidden = nn.silu(Linear(self.width, name='mlp_0', dtype=self.dtype)(time_features(t)))
    return Linear(self.width, name='mlp_2', dtype=self.dtype)(hidden)
