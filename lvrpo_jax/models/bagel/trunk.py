"""Mixture-of-Transformers trunk: two experts, one shared attention (arXiv 2411.04996).

Tokens lie in memory as `[understanding | generation]`; each expert runs on its own slice only.
Positions and masks carry the logical order.

A pass runs one stream of tokens, or several at once: contexts, and the tokens that follow them. The
tokens of all streams are multiplied with a weight in one product, so that a mesh gathers it once.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from flax import linen as nn
from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import attention as attention_lib
from lvrpo_jax.models import layers
from lvrpo_jax.parallel import activations

Array = types.Array


class Rope(NamedTuple):
  """RoPE tables of both slices: cosines and sines, (B, M, L, K) each."""

  und: tuple[Array, Array]
  gen: tuple[Array, Array]


Stream = tuple[Array, Array]
"""New tokens (B, M, L, D): the understanding and the generation slice; either may be empty."""
KeyValue = tuple[Array, Array]
"""Keys and values of the same tokens."""


class Shared(struct.PyTreeNode):
  """Inputs of a stream that are the same in every layer.

  Attributes:
    rope: RoPE tables of the new tokens.
    mask: mask among the new tokens.
    context_mask: mask of the context; None without a context.
    row_mask: mask over the decoded tokens; None outside decoding.
    row_index: index of the new token among the decoded ones; None outside decoding.
    source: index of the stream in the same pass that is the context; None if there is none.
  """

  rope: Rope
  mask: attention_lib.Mask
  context_mask: attention_lib.Mask | None = None
  row_mask: attention_lib.Mask | None = None
  row_index: Array | None = None
  source: int | None = struct.field(pytree_node=False, default=None)


class LayerCache(NamedTuple):
  """Cached keys and values of one layer or, with a leading axis E, of all layers.

  Attributes:
    context: (B, S, J, K), shared by the rows of a prompt.
    row: (B, M, T, J, K), the decoded tokens of each row.
  """

  context: KeyValue | None = None
  row: KeyValue | None = None


NO_CACHE = LayerCache()
"""Cache of a pass without a context from an earlier pass."""


class LayerOutputs(TypedDict):
  """Outputs of a layer or, with a leading axis E, of all layers; one list entry per stream.

  Attributes:
    kv: keys and values of the new tokens, after norm and RoPE.
    row: the updated decode cache; None outside decoding.
    hidden: the streams after the layer.
  """

  kv: list[KeyValue]
  row: KeyValue | None
  hidden: tuple[Stream, ...]


class Outputs(TypedDict):
  """`LayerOutputs` of all layers for a pass of one stream."""

  kv: KeyValue
  row: KeyValue | None
  hidden: Stream


class Expert(nn.Module):
  """Norms, projections and MLP of one expert in a layer (Qwen2 with query and key norms)."""

  heads: int
  kv_heads: int
  head_width: int
  ff_width: int
  eps: float
  dtype: jnp.dtype
  depth: int

  def setup(self) -> None:
    def linear(width: int, bias: bool, scale: float = 1.0) -> layers.Linear:
      kernel_init = nn.initializers.variance_scaling(scale, 'fan_in', 'normal')
      return layers.Linear(width, use_bias=bias, dtype=self.dtype, kernel_init=kernel_init)

    # Kernels that write to the residual stream start small (GPT-2's rule), so that token
    # embeddings remain distinguishable through the depth.
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
    """Returns queries (..., H, K), keys and values (..., J, K) of tokens (..., D), before RoPE."""
    y = self.input_norm(x)

    def split(z: Array) -> Array:
      return z.reshape(*z.shape[:-1], -1, self.head_width)

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


class ExpertSizes(TypedDict):
  """Fields of `Expert`."""

  heads: int
  kv_heads: int
  head_width: int
  ff_width: int
  eps: float
  dtype: jnp.dtype
  depth: int


class Layer(nn.Module):
  """Layer of the trunk; `freeze_und` and `attention` as in `Trunk`."""

  expert: ExpertSizes
  freeze_und: bool
  attention: str

  @nn.compact
  def __call__(
    self, streams: tuple[Stream, ...], cache: LayerCache, shared: tuple[Shared, ...]
  ) -> tuple[tuple[Stream, ...], LayerOutputs]:
    experts = Expert(**self.expert, name='und'), Expert(**self.expert, name='gen')

    def used(side: int) -> list[int]:
      """Returns indices of the streams whose slice of this side holds tokens."""
      return [n for n, x in enumerate(streams) if x[side].shape[2] or self.is_initializing()]

    parts: list[list[tuple[Array, Array, Array]]] = [[] for _ in streams]
    for side, expert in enumerate(experts):
      indices = used(side)
      found = (
        activations.together(expert.qkv, [streams[n][side] for n in indices]) if indices else []
      )
      for n, (q, k, v) in zip(indices, found, strict=True):
        rope = shared[n].rope[side]
        qkv = attention_lib.apply_rope(q, *rope), attention_lib.apply_rope(k, *rope), v
        parts[n].append(jax.lax.stop_gradient(qkv) if self.freeze_und and not side else qkv)
    new = [_join_slices(part) for part in parts]

    attended, row = [], None
    for (q, k, v), stream_shared in zip(new, shared, strict=True):
      context = cache.context
      if stream_shared.source is not None:
        _, source_k, source_v = new[stream_shared.source]
        context = source_k[:, 0], source_v[:, 0]
      blocks, row = _blocks(k, v, context, cache.row, stream_shared)
      out = attention_lib.attend(q, blocks, self.attention)
      attended.append(out.reshape(*out.shape[:3], -1))

    outputs = [list(x) for x in streams]
    for side, expert in enumerate(experts):
      indices = used(side)
      cuts = [streams[n][0].shape[2] for n in indices]
      reads = [
        attended[n][:, :, cut:] if side else attended[n][:, :, :cut]
        for n, cut in zip(indices, cuts, strict=True)
      ]
      found = (
        activations.together(expert.output, [streams[n][side] for n in indices], reads)
        if indices
        else []
      )
      for n, x in zip(indices, found, strict=True):
        outputs[n][side] = jax.lax.stop_gradient(x) if self.freeze_und and not side else x
    hidden = tuple(
      (activations.constrain(und, 'rows'), activations.constrain(gen, 'rows'))
      for und, gen in outputs
    )
    return hidden, {'kv': [(k, v) for _, k, v in new], 'row': row, 'hidden': hidden}


def _join_slices(parts: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
  """Concatenates queries, keys and values of the slices of a stream along the token axis."""
  q, k, v = (jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True))
  return q, k, v


def _blocks(
  k: Array, v: Array, context: KeyValue | None, row: KeyValue | None, shared: Shared
) -> tuple[list[attention_lib.Block], KeyValue | None]:
  """Returns the blocks that new tokens attend to, and the updated decode cache."""
  blocks = []
  if context is not None:
    assert shared.context_mask is not None
    blocks.append(attention_lib.Block(context[0], context[1], shared.context_mask))
  if row is None:
    blocks.append(attention_lib.Block(k, v, shared.mask))
    return blocks, None
  assert shared.row_mask is not None and shared.row_index is not None
  row_k, row_v = (
    jax.lax.dynamic_update_slice_in_dim(old, x, shared.row_index, axis=2)
    for old, x in zip(row, (k, v), strict=True)
  )
  blocks.append(attention_lib.Block(row_k, row_v, shared.row_mask))
  return blocks, (row_k, row_v)


class Trunk(nn.Module):
  """All layers, scanned, and the final norm of each expert.

  Attributes:
    unroll: layers unrolled per scan step; the full depth is fastest on CPU.
    remat: name of a policy in `jax.checkpoint_policies`, 'full', or 'none'.
    freeze_und: stops gradients at every output of the understanding expert.
    attention: implementation, see `attention.attend`.
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

  def setup(self) -> None:
    expert = ExpertSizes(
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_width=self.head_width,
      ff_width=self.ff_width,
      eps=self.eps,
      dtype=self.dtype,
      depth=self.depth,
    )
    stack = layers.scan(
      layers.remat(Layer, self.remat),
      self,
      in_axes=(0, nn.broadcast),
      length=self.depth,
      unroll=self.unroll,
    )
    self.layers = stack(expert, self.freeze_und, self.attention)
    self.norm_und = layers.RMSNorm(self.eps)
    self.norm_gen = layers.RMSNorm(self.eps)

  def rope(self, und_position: Array, gen_position: Array) -> Rope:
    """Computes tables for positions (B, M, L) of both slices."""

    def table(position: Array) -> tuple[Array, Array]:
      return attention_lib.rope_table(position, self.head_width, self.rope_theta)

    return Rope(table(und_position), table(gen_position))

  def __call__(
    self, x_und: Array, x_gen: Array, shared: Shared, cache: LayerCache = NO_CACHE
  ) -> tuple[Array, Array, Outputs]:
    """Runs one stream of new tokens (B, M, L, D); a slice may be empty.

    Returns:
      Normalised hidden states of both slices, and `Outputs` with a leading axis E for the layers.
      The compiler drops what the caller does not use.
    """
    (x,), out = self.layers(((x_und, x_gen),), cache, (shared,))
    outputs = Outputs(kv=out['kv'][0], row=out['row'], hidden=out['hidden'][0])
    return *self._norm(x), outputs

  def joint(self, streams: tuple[Stream, ...], shared: tuple[Shared, ...]) -> list[Stream]:
    """Runs several streams through the same layers and returns normalised hidden states of each.

    A stream with `Shared.source` follows the stream at that index; all of its M rows see the one
    row of their prompt there.
    """
    streams, _ = self.layers(streams, NO_CACHE, shared)
    return [self._norm(x) for x in streams]

  def _norm(self, x: Stream) -> Stream:
    """Applies the final norm of each expert."""
    out_und = self.norm_und(x[0])
    if self.freeze_und:
      out_und = jax.lax.stop_gradient(out_und)
    return out_und, self.norm_gen(x[1])
