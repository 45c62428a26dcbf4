"""Mixture-of-Transformers trunk: two experts, one shared attention (arXiv 2411.04996).

Tokens lie in memory as `[understanding | generation]`; each expert runs on its own slice only.
Positions and masks carry the logical order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax.models import attention
from lvrpo_jax.models import layers

Array = jax.Array


class Rope(NamedTuple):
  """RoPE tables of both slices, (B, M, L, K) each."""
  und: tuple[Array, Array]
  gen: tuple[Array, Array]


class Shared(NamedTuple):
  """What every layer of a pass reads alike.

  Attributes:
    rope: tables of the new tokens.
    mask: (B, M or 1, L, L) among the new tokens.
    context_mask: (B, 1, 1, S), or None without a context.
    row_mask: (1, 1, 1, T) over decoded tokens, or None outside decoding.
    row_index: place of the new token among the decoded ones, or None.
  """
  rope: Rope
  mask: Array
  context_mask: Array | None = None
  row_mask: Array | None = None
  row_index: Array | None = None


class LayerCache(NamedTuple):
  """Keys and values of one layer, or, with a leading axis E, of all.

  `context` is shared by the rows of a prompt (B, S, J, K); `row` belongs to each (B, M, T, J, K).
  """
  context: tuple[Array, Array] | None = None
  row: tuple[Array, Array] | None = None


class Expert(nn.Module):
  """One expert's norms, projections and MLP of a layer (Qwen2 with query and key norms)."""
  heads: int
  kv_heads: int
  head_width: int
  ff_width: int
  eps: float
  dtype: jnp.dtype
  depth: int

  def setup(self):
    linear = lambda width, bias, scale=1.: layers.Linear(
        width, bias, self.dtype, nn.initializers.variance_scaling(scale, 'fan_in', 'normal'))
    # What is added to the residual stream starts small, so that tokens keep their identity
    # through the depth (GPT-2's rule).
    residual = 1 / (2 * self.depth)
    self.input_norm = layers.RMSNorm(self.eps)
    self.q_proj = linear(self.heads * self.head_width, True)
    self.k_proj = linear(self.kv_heads * self.head_width, True)
    self.v_proj = linear(self.kv_heads * self.head_width, True)
    self.q_norm = layers.RMSNorm(self.eps)
    self.k_norm = layers.RMSNorm(self.eps)
    self.o_proj = linear(self.heads * self.head_width, False, residual)
    self.post_norm = layers.RMSNorm(self.eps)
    self.gate_proj = linear(self.ff_width, False)
    self.up_proj = linear(self.ff_width, False)
    self.down_proj = linear(self.heads * self.head_width, False, residual)

  def qkv(self, x_BMLD: Array, rope: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Queries (B, M, L, H, K), keys and values (B, M, L, J, K); norm comes before RoPE."""
    y = self.input_norm(x_BMLD)
    split = lambda z: z.reshape(*z.shape[:-1], -1, self.head_width)
    q = attention.apply_rope(self.q_norm(split(self.q_proj(y))), *rope)
    k = attention.apply_rope(self.k_norm(split(self.k_proj(y))), *rope)
    return q, k, split(self.v_proj(y))

  def output(self, x_BMLD: Array, attended_BMLHK: Array) -> Array:
    """Adds the attention output and the MLP to the residual stream."""
    x = x_BMLD + self.o_proj(attended_BMLHK.reshape(x_BMLD.shape))
    y = self.post_norm(x)
    return x + self.down_proj(nn.silu(self.gate_proj(y)) * self.up_proj(y))


class Layer(nn.Module):
  """A layer of the trunk; see `Trunk`."""
  expert: dict[str, Any]
  freeze_und: bool

  @nn.compact
  def __call__(self, x: tuple[Array, Array], cache: LayerCache, shared: Shared):
    x_und, x_gen = x
    und, gen = Expert(**self.expert, name='und'), Expert(**self.expert, name='gen')
    sizes = x_und.shape[2], x_gen.shape[2]
    parts = []
    if sizes[0] or self.is_initializing():
      qkv = und.qkv(x_und, shared.rope.und)
      parts.append(jax.lax.stop_gradient(qkv) if self.freeze_und else qkv)
    if sizes[1] or self.is_initializing():
      parts.append(gen.qkv(x_gen, shared.rope.gen))
    q, k, v = (jnp.concatenate(z, axis=2) for z in zip(*parts))

    blocks, row = [], None
    if cache.context is not None:
      blocks.append(attention.Block(*cache.context, shared.context_mask))
    if cache.row is not None:
      row = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, shared.row_index, axis=2)
                  for old, new in zip(cache.row, (k, v)))
      blocks.append(attention.Block(*row, shared.row_mask))
    else:
      blocks.append(attention.Block(k, v, shared.mask))
    out = attention.attend(q, blocks)
    if sizes[0] or self.is_initializing():
      x_und = und.output(x_und, out[:, :, :sizes[0]])
      x_und = jax.lax.stop_gradient(x_und) if self.freeze_und else x_und
    if sizes[1] or self.is_initializing():
      x_gen = gen.output(x_gen, out[:, :, sizes[0]:])
    return (x_und, x_gen), {'kv': (k, v), 'row': row, 'hidden': (x_und, x_gen)}


class Trunk(nn.Module):
  """All layers, scanned, and the final norm of each expert.

  Attributes:
    unroll: layers unrolled per scan step; the full depth is fastest on CPU.
    remat: name of a policy in `jax.checkpoint_policies`, 'full', or 'none'.
    freeze_und: stops gradients at every output of the understanding expert.
  """
  depth: int
  heads: int
  kv_heads: int
  head_width: int
  ff_width: int
  eps: float
  rope_theta: float
  dtype: jnp.dtype
  unroll: int = 1
  remat: str = 'none'
  freeze_und: bool = False

  def setup(self):
    layer = Layer
    if self.remat != 'none':
      policy = (None if self.remat == 'full' else
                jax.checkpoint_policies.__dict__[self.remat])
      layer = nn.remat(Layer, policy=policy, prevent_cse=False)
    expert = dict(heads=self.heads, kv_heads=self.kv_heads, head_width=self.head_width,
                  ff_width=self.ff_width, eps=self.eps, dtype=self.dtype, depth=self.depth)
    self.layers = nn.scan(
        layer, variable_axes={'params': 0}, split_rngs={'params': True},
        in_axes=(0, nn.broadcast), length=self.depth, unroll=self.unroll)(expert, self.freeze_und)
    self.norm_und = layers.RMSNorm(self.eps)
    self.norm_gen = layers.RMSNorm(self.eps)

  def rope(self, und_position: Array, gen_position: Array) -> Rope:
    """Tables for positions (B, M, L) of both slices."""
    table = lambda p: attention.rope_table(p, self.head_width, self.rope_theta)
    return Rope(table(und_position), table(gen_position))

  def __call__(self, x_und: Array, x_gen: Array, shared: Shared,
               cache: LayerCache = LayerCache()) -> tuple[Array, Array, dict[str, Any]]:
    """Runs new tokens (B, M, L, D) of both slices; a slice may be empty.

    Returns:
      Normalised hidden states of both slices, and of every layer (leading axis E): 'kv' of the new
      tokens, 'row' (the updated decode cache) and 'hidden'. What the caller does not use is never
      computed.
    """
    (x_und, x_gen), out = self.layers((x_und, x_gen), cache, shared)
    out_und = self.norm_und(x_und)
    if self.freeze_und:
      out_und = jax.lax.stop_gradient(out_und)
    return out_und, self.norm_gen(x_gen), out
