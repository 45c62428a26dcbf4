"""Mixture-of-Transformers trunk: two experts, one shared attention (arXiv 2411.04996).

Tokens lie in memory as `[understanding | generation]`; each expert runs on its own slice only.
Positions and masks carry the logical order.

A pass runs one stream of tokens, or several at once: contexts, and what follows them. Together, the
tokens of all streams meet each weight in one product, so that a mesh gathers it once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flax import linen as nn
from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax.models import attention as attention_lib
from lvrpo_jax.models import layers
from lvrpo_jax.parallel import activations

Array = jax.Array


class Rope(NamedTuple):
  """RoPE tables of both slices, (B, M, L, K) each."""

  und: tuple[Array, Array]
  gen: tuple[Array, Array]


Stream = tuple[Array, Array]
"""New tokens (B, M, L, D) of both slices; a slice may be empty."""


@struct.dataclass
class Shared:
  """What every layer reads alike for a stream.

  Attributes:
    rope: tables of the new tokens.
    mask: among the new tokens.
    context_mask: of the context, or None without one.
    row_mask: over decoded tokens, or None outside decoding.
    row_index: place of the new token among the decoded ones, or None.
    source: number of the stream in the same pass that is the context, or None.
  """

  rope: Rope
  mask: attention_lib.Mask
  context_mask: attention_lib.Mask | None = None
  row_mask: attention_lib.Mask | None = None
  row_index: Array | None = None
  source: int | None = struct.field(pytree_node=False, default=None)


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
    linear = lambda width, bias, scale=1.0: layers.Linear(
      width, bias, self.dtype, nn.initializers.variance_scaling(scale, 'fan_in', 'normal')
    )
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

  def qkv(self, x: Array) -> tuple[Array, Array, Array]:
    """Queries (..., H, K), keys and values (..., J, K) of tokens (..., D), before RoPE."""
    y = self.input_norm(x)
    split = lambda z: z.reshape(*z.shape[:-1], -1, self.head_width)
    return (
      self.q_norm(split(self.q_proj(y))),
      self.k_norm(split(self.k_proj(y))),
      split(self.v_proj(y)),
    )

  def output(self, x: Array, attended: Array) -> Array:
    """Adds the attention output (..., H * K) and the MLP to the residual stream (..., D)."""
    x = x + self.o_proj(attended)
    y = self.post_norm(x)
    return x + self.down_proj(nn.silu(self.gate_proj(y)) * self.up_proj(y))


class Layer(nn.Module):
  """A layer of the trunk; see `Trunk`."""

  expert: dict[str, Any]
  freeze_und: bool
  attention: str

  @nn.compact
  def __call__(self, streams: tuple[Stream, ...], cache: LayerCache, shared: tuple[Shared, ...]):
    experts = Expert(**self.expert, name='und'), Expert(**self.expert, name='gen')
    used = lambda side: [
      n for n, x in enumerate(streams) if x[side].shape[2] or self.is_initializing()
    ]
    parts: list[list[Any]] = [[] for _ in streams]
    for side, expert in enumerate(experts):
      rows = used(side)
      found = activations.together(expert.qkv, [streams[n][side] for n in rows]) if rows else []
      for n, (q, k, v) in zip(rows, found):
        rope = shared[n].rope[side]
        qkv = attention_lib.apply_rope(q, *rope), attention_lib.apply_rope(k, *rope), v
        parts[n].append(jax.lax.stop_gradient(qkv) if self.freeze_und and not side else qkv)
    new = [tuple(jnp.concatenate(z, axis=2) for z in zip(*part)) for part in parts]

    attended, row = [], None
    for (q, k, v), s in zip(new, shared):
      blocks, context = [], cache.context
      if s.source is not None:
        context = tuple(x[:, 0] for x in new[s.source][1:])
      if context is not None:
        blocks.append(attention_lib.Block(*context, s.context_mask))
      if cache.row is not None:
        row = tuple(
          jax.lax.dynamic_update_slice_in_dim(old, x, s.row_index, axis=2)
          for old, x in zip(cache.row, (k, v))
        )
        blocks.append(attention_lib.Block(*row, s.row_mask))
      else:
        blocks.append(attention_lib.Block(k, v, s.mask))
      out = attention_lib.attend(q, blocks, self.attention)
      attended.append(out.reshape(*out.shape[:3], -1))

    out = [list(x) for x in streams]
    for side, expert in enumerate(experts):
      rows = used(side)
      cut = [streams[n][0].shape[2] for n in rows]
      reads = [attended[n][:, :, c:] if side else attended[n][:, :, :c] for n, c in zip(rows, cut)]
      found = (
        activations.together(expert.output, [streams[n][side] for n in rows], reads) if rows else []
      )
      for n, x in zip(rows, found):
        out[n][side] = jax.lax.stop_gradient(x) if self.freeze_und and not side else x
    streams = tuple(tuple(activations.constrain(y, 'rows') for y in x) for x in out)
    return streams, {'kv': [(k, v) for _, k, v in new], 'row': row, 'hidden': streams}


class Trunk(nn.Module):
  """All layers, scanned, and the final norm of each expert.

  Attributes:
    unroll: layers unrolled per scan step; the full depth is fastest on CPU.
    remat: name of a policy in `jax.checkpoint_policies`, 'full', or 'none'.
    freeze_und: stops gradients at every output of the understanding expert.
    attention: see `attention.attend`.
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
  attention: str = 'xla'

  def setup(self):
    expert = dict(
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_width=self.head_width,
      ff_width=self.ff_width,
      eps=self.eps,
      dtype=self.dtype,
      depth=self.depth,
    )
    self.layers = nn.scan(
      layers.remat(Layer, self.remat),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=self.depth,
      unroll=self.unroll,
      **layers.traced_once(self),
    )(expert, self.freeze_und, self.attention)
    self.norm_und = layers.RMSNorm(self.eps)
    self.norm_gen = layers.RMSNorm(self.eps)

  def rope(self, und_position: Array, gen_position: Array) -> Rope:
    """Tables for positions (B, M, L) of both slices."""
    table = lambda p: attention_lib.rope_table(p, self.head_width, self.rope_theta)
    return Rope(table(und_position), table(gen_position))

  def __call__(
    self, x_und: Array, x_gen: Array, shared: Shared, cache: LayerCache = LayerCache()
  ) -> tuple[Array, Array, dict[str, Any]]:
    """Runs one stream of new tokens (B, M, L, D); a slice may be empty.

    Returns:
      Normalised hidden states of both slices, and of every layer (leading axis E): 'kv' of the new
      tokens, 'row' (the updated decode cache) and 'hidden'. What the caller does not use is never
      computed.
    """
    (x,), out = self.layers(((x_und, x_gen),), cache, (shared,))
    return *self._norm(x), {'kv': out['kv'][0], 'row': out['row'], 'hidden': out['hidden'][0]}

  def joint(self, streams: tuple[Stream, ...], shared: tuple[Shared, ...]) -> list[Stream]:
    """Runs several streams through the same layers; normalised hidden states of each.

    A stream whose `Shared.source` is set follows the stream of that number: its M rows all see the
    one row of their prompt there.
    """
    streams, _ = self.layers(streams, LayerCache(), shared)
    return [self._norm(x) for x in streams]

  def _norm(self, x: Stream) -> Stream:
    out_und = self.norm_und(x[0])
    if self.freeze_und:
      out_und = jax.lax.stop_gradient(out_und)
    return out_und, self.norm_gen(x[1])
