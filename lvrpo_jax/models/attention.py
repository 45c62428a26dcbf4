"""Attention: the mask of a sequence layout, RoPE, and grouped-query softmax by several kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import splash

Array = types.Array


def join(*layouts: types.Layout) -> types.Layout:
  """Concatenates layouts along the token axis."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *layouts)


def keep_mask(query: types.Layout, key: types.Layout) -> Array:
  """Computes which keys each query may attend to: bool (B, L, S).

  A key is visible when all of these hold:
    * it belongs to the same sample;
    * it is not later than the query, or both are in one full or noise split;
    * it is not in a noise split other than the query's own.

  For text `t`, a clean image `c` and a noised target `n`:

        t t c c n n
      t 1 0 0 0 0 0
      t 1 1 0 0 0 0
      c 1 1 1 1 0 0
      c 1 1 1 1 0 0
      n 1 1 1 1 1 1
      n 1 1 1 1 1 1

  A token that follows `n` sees the first four columns only.
  """

  def at_query(x_BL: Array) -> Array:
    return x_BL[:, :, None]

  def at_key(x_BL: Array) -> Array:
    return x_BL[:, None, :]

  same_sample = (at_query(query.sample_BL) == at_key(key.sample_BL)) & at_key(
    key.sample_BL != types.PADDING
  )
  same_split = at_query(query.split_BL) == at_key(key.split_BL)
  not_later = at_key(key.order_BL) <= at_query(query.order_BL)
  inside = same_split & at_key(key.mode_BL != types.CAUSAL)
  hidden = at_key(key.mode_BL == types.NOISE) & ~same_split
  return same_sample & (not_later | inside) & ~hidden


def rope_table(position: Array, head_width: int, theta: float) -> tuple[Array, Array]:
  """Computes cosines and sines of RoPE (arXiv 2104.09864), float32 (..., K).

  Angles are `position * theta^(-2j / K)`; the vector of K / 2 frequencies is repeated twice.
  """
  frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  angle = position.astype(jnp.float32)[..., None] * frequency
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates (..., heads, K) by tables (..., K); feature j is paired with feature j + K / 2."""
  cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
  low, high = jnp.split(x, 2, axis=-1)
  return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


class Mask(struct.PyTreeNode):
  """Visible keys of a block: a dense mask alone, or the conjunction of `keys` and `causal`.

  Attributes:
    dense: bool, broadcasts against (B, M, L, S); None if the other fields give the mask.
    keys: bool (B, S), False on padding, or None.
    causal: keys and queries are the same tokens, and no query sees a later key.
  """

  dense: Array | None = None
  keys: Array | None = None
  causal: bool = struct.field(pytree_node=False, default=False)

  def array(self, length: int, keys: int) -> Array:
    """Returns the mask as one array that broadcasts against (B, M, L, S)."""
    if self.dense is not None:
      return self.dense
    ones = jnp.ones((length if self.causal else 1, keys), bool)
    visible = (jnp.tril(ones) if self.causal else ones)[None, None]
    return visible if self.keys is None else visible & self.keys[:, None, None]


SHORT = 64
"""Query length below which the blocked kernels are slower than plain attention."""


class Block(NamedTuple):
  """Keys and values with the mask over them.

  Attributes:
    k, v: (B, S, J, K) when all M rows share them, else (B, M, S, J, K).
    mask: a `Mask`.
  """

  k: Array
  v: Array
  mask: Mask


def attend(q_BMLHK: Array, blocks: list[Block], implementation: str = 'xla') -> Array:
  """Computes softmax attention over the keys of all blocks together.

  Query head h reads key/value head `h // (H / J)`. Logits and softmax are float32. The output of a
  query without a visible key is finite but undefined; callers do not read it.

  Args:
    implementation: 'xla' (any mask and shape), 'splash' (Pallas, TPU), 'cudnn' (GPU, 16 bits), or
      'auto', the one for this backend. Queries shorter than `SHORT` and masks that differ between
      the rows of a prompt always take 'xla'.

  Returns:
    (B, M, L, H, K).
  """
  chosen = choose(implementation, q_BMLHK, blocks)
  return IMPLEMENTATIONS[chosen](q_BMLHK, blocks)


def choose(implementation: str, q_BMLHK: Array, blocks: list[Block]) -> str:
  """Selects the implementation that runs these shapes."""
  if implementation == 'auto':
    wanted = {'tpu': 'splash', 'gpu': 'cudnn'}.get(jax.default_backend(), 'xla')
    narrow = q_BMLHK.dtype in (jnp.bfloat16, jnp.float16)
    implementation = wanted if wanted != 'cudnn' or narrow else 'xla'
  short = q_BMLHK.shape[2] < SHORT
  masks_differ = any(b.mask.dense is not None and b.mask.dense.shape[1] > 1 for b in blocks)
  return 'xla' if short or masks_differ else implementation


def attend_xla(q_BMLHK: Array, blocks: list[Block]) -> Array:
  """Computes plain attention: all logits are in memory at once; any mask is allowed."""
  B, M, L, H, K = q_BMLHK.shape
  J = blocks[0].k.shape[-2]
  q = q_BMLHK.reshape(B, M, L, J, H // J, K) * (K**-0.5)
  logits = []
  for block in blocks:
    keys = 'BSJK' if block.k.ndim == 4 else 'BMSJK'
    logit = jnp.einsum(f'BMLJGK,{keys}->BMJGLS', q, block.k, preferred_element_type=jnp.float32)
    mask = block.mask.array(L, block.k.shape[-3])
    logits.append(jnp.where(mask[:, :, None, None], logit, -1e30))
  weight = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
  out: Array | float = 0.0
  start = 0
  for block in blocks:
    S = block.k.shape[-3]
    values = 'BSJK' if block.v.ndim == 4 else 'BMSJK'
    part = jax.lax.slice_in_dim(weight, start, start + S, axis=-1)
    out = out + jnp.einsum(f'BMJGLS,{values}->BMLJGK', part, block.v)
    start += S
  return jnp.reshape(out, (B, M, L, H, K))


def joined(blocks: list[Block], rows: tuple[int, int]) -> tuple[Array, Array]:
  """Concatenates keys and values of all blocks, (B, M, S, J, K) each; `rows` is (B, M)."""

  def expand(x: Array) -> Array:
    x = x[:, None] if x.ndim == 4 else x
    return jnp.broadcast_to(x, (*rows, *x.shape[2:]))

  return (
    jnp.concatenate([expand(block.k) for block in blocks], axis=2),
    jnp.concatenate([expand(block.v) for block in blocks], axis=2),
  )


def joined_mask(blocks: list[Block], rows: int, length: int) -> Array:
  """Concatenates the masks of all blocks, (B, L, S)."""
  return jnp.concatenate(
    [
      jnp.broadcast_to(b.mask.array(length, b.k.shape[-3])[:, 0], (rows, length, b.k.shape[-3]))
      for b in blocks
    ],
    axis=-1,
  )


def attend_cudnn(
  q_BMLHK: Array, blocks: list[Block], implementation: Literal['cudnn', 'xla'] = 'cudnn'
) -> Array:
  """Runs the fused attention of `jax.nn.dot_product_attention` with a mask array.

  cuDNN has no gradients under a mask of odd lengths, so queries and keys are padded to even ones.
  """
  B, M, L, H, K = q_BMLHK.shape

  def fold(x: Array) -> Array:
    return splash.pad(x.reshape(B * M, *x.shape[2:]), 1, multiple=2)

  mask = splash.pad(splash.pad(joined_mask(blocks, B, L), 1, multiple=2), 2, multiple=2)
  # A padded query sees the first key, which keeps its softmax from dividing by zero.
  mask = jnp.repeat(mask.at[:, L:, 0].set(True)[:, None], M, axis=0)
  k, v = joined(blocks, (B, M))
  out = jax.nn.dot_product_attention(
    fold(q_BMLHK), fold(k), fold(v), mask=mask, scale=K**-0.5, implementation=implementation
  )
  return out[:, :L].reshape(B, M, L, H, K)


def attend_splash(q_BMLHK: Array, blocks: list[Block], interpret: bool = False) -> Array:
  """Runs Pallas splash attention, which keeps no logits in memory.

  Under a mesh every device runs its own rows and heads.
  """
  B, M, L = q_BMLHK.shape[:3]
  k, v = joined(blocks, (B, M))
  dense, valid, causal_from = _splash_mask(blocks, B, L)
  return splash.attend(q_BMLHK, k, v, dense, valid, causal_from, interpret)


def _splash_mask(
  blocks: list[Block], rows: int, length: int
) -> tuple[Array | None, Array | None, int | None]:
  """Returns the mask arguments of `splash.attend`.

  They are a dense mask (B, L, S) alone, or valid keys (B, S) and the index of the first causal key.
  """
  if any(b.mask.dense is not None for b in blocks):
    dense = joined_mask(blocks, rows, length)
    # A query without a visible key would divide by zero; its NaN would reach other tokens when
    # multiplied by zero. Every query therefore sees its own key.
    start = dense.shape[-1] - length
    return dense | (jnp.arange(length)[:, None] + start == jnp.arange(dense.shape[-1])), None, None
  valid, causal, start = [], None, 0
  for block in blocks:
    S = block.k.shape[-3]
    keys = block.mask.keys
    valid.append(jnp.ones((rows, S), bool) if keys is None else keys)
    causal = start if block.mask.causal else causal
    start += S
  if all(b.mask.keys is None for b in blocks):
    return None, None, causal
  return None, jnp.concatenate(valid, axis=1), causal


IMPLEMENTATIONS: dict[str, Callable[[Array, list[Block]], Array]] = {
  'xla': attend_xla,
  'splash': attend_splash,
  'cudnn': attend_cudnn,
}
"""Attention functions by their name in the config."""
