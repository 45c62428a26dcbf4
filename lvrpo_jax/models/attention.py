"""Attention over blocks of keys: mask builder, RoPE, grouped-query softmax."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import types

Array = jax.Array


def join(*layouts: types.Layout) -> types.Layout:
  """Concatenates layouts along the token axis."""
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *layouts)


def keep_mask(query: types.Layout, key: types.Layout) -> Array:
  """Which keys a query may attend to: bool (B, L, S).

  Same sample, and (key not later, or both in one full or noise split), and the key is not in a
  noise split other than the query's own. For text `t`, a clean image `c` and a noised target `n`:

        t t c c n n
      t 1 0 0 0 0 0
      t 1 1 0 0 0 0
      c 1 1 1 1 0 0
      c 1 1 1 1 0 0
      n 1 1 1 1 1 1
      n 1 1 1 1 1 1

  Anything that follows `n` sees the first four columns only.
  """
  at_query = lambda x_BL: x_BL[:, :, None]
  at_key = lambda x_BL: x_BL[:, None, :]
  same_sample = ((at_query(query.sample_BL) == at_key(key.sample_BL))
                 & at_key(key.sample_BL != types.PADDING))
  same_split = at_query(query.split_BL) == at_key(key.split_BL)
  not_later = at_key(key.order_BL) <= at_query(query.order_BL)
  inside = same_split & at_key(key.mode_BL != types.CAUSAL)
  hidden = at_key(key.mode_BL == types.NOISE) & ~same_split
  return same_sample & (not_later | inside) & ~hidden


def rope_table(position: Array, head_width: int, theta: float) -> tuple[Array, Array]:
  """Cosines and sines of RoPE, (..., K), the frequency vector repeated twice (arXiv 2104.09864).

  Angles are float32: `position * theta^(-2j / K)`.
  """
  frequency = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
  angle = position.astype(jnp.float32)[..., None] * frequency
  angle = jnp.concatenate([angle, angle], axis=-1)
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
  """Rotates (..., heads, K) by tables (..., K): halves are paired, not neighbours."""
  cos, sin = cos[..., None, :].astype(x.dtype), sin[..., None, :].astype(x.dtype)
  low, high = jnp.split(x, 2, axis=-1)
  return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


class Block(NamedTuple):
  """Keys and values with the places that may be seen.

  `k` and `v` are (B, S, J, K) when all M rows share them, else (B, M, S, J, K); `mask`
  broadcasts against (B, M, L, S).
  """
  k: Array
  v: Array
  mask: Array


def attend(q_BMLHK: Array, blocks: list[Block]) -> Array:
  """Softmax attention over the keys of all blocks together.

  Query head h reads key/value head `h // (H / J)`. Logits and softmax are float32; a query with
  no visible key returns the mean of the values, which callers never read.

  Returns:
    (B, M, L, H, K).
  """
  B, M, L, H, K = q_BMLHK.shape
  J = blocks[0].k.shape[-2]
  q = q_BMLHK.reshape(B, M, L, J, H // J, K) * (K ** -0.5)
  logits = []
  for block in blocks:
    keys = 'BSJK' if block.k.ndim == 4 else 'BMSJK'
    logit = jnp.einsum(f'BMLJGK,{keys}->BMJGLS', q, block.k, preferred_element_type=jnp.float32)
    logits.append(jnp.where(block.mask[:, :, None, None], logit, -1e30))
  weight = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1).astype(q.dtype)
  out, start = 0., 0
  for block in blocks:
    S = block.k.shape[-3]
    values = 'BSJK' if block.v.ndim == 4 else 'BMSJK'
    part = jax.lax.slice_in_dim(weight, start, start + S, axis=-1)
    out = out + jnp.einsum(f'BMJGLS,{values}->BMLJGK', part, block.v)
    start += S
  return out.reshape(B, M, L, H, K)
