"""Answers: one `while_loop` over tokens for all rows, with cached keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types

Array = jax.Array
Decode = Callable[[Any, Array, Array], tuple[Array, Any]]
"""`decode(row, index, token_BG) -> (logits_BGV, row)`."""


def sample(
  decode: Decode,
  row: Any,
  key_BG: Array,
  bos: int,
  eos: int,
  length: int,
  temperature: float,
  top_p: float = 1.0,
) -> types.TextTrajectory:
  """Samples an answer for every row; stops when all rows have ended.

  Args:
    decode: one step of the policy on its context.
    row: the empty decode cache.
    key_BG: one PRNG key a row; a row's answer does not depend on other rows.
    bos, eos: the token that starts the answer, and the one that ends it.
    length: most tokens of an answer, the end token included. An answer without an end token by
      then is cut there; `mask_BGT` covers all its tokens.
    temperature: 0 takes the most likely token; its log-probability is then that of the
      untempered softmax.
    top_p: see `nucleus`; the log-probabilities are those of the distribution that is left.

  Returns:
    Tokens after the end of a row are `eos`, with mask False and log-probability 0.
  """
  B, G = key_BG.shape
  scale = temperature if temperature > 0 else 1.0

  def step(carry):
    index, row, token, ended, tokens, logps, mask = carry
    logits, row = decode(row, index, token)
    if top_p < 1:
      logits = nucleus(logits, scale, top_p)
    if temperature > 0:
      keys = jax.vmap(jax.vmap(lambda k: jax.random.fold_in(k, index)))(key_BG)
      noise = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[-1:])))(keys)
      token = jnp.argmax(logits.astype(jnp.float32) / scale + noise, axis=-1)
    else:
      token = jnp.argmax(logits, axis=-1)
    token = jnp.where(ended, eos, token).astype(jnp.int32)
    logp = jnp.where(ended, 0.0, ops.token_logp(logits, token, scale))
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, new, index, axis=2)
    carry = (
      index + 1,
      row,
      token,
      ended | (token == eos),
      put(tokens, token),
      put(logps, logp),
      put(mask, ~ended),
    )
    return carry

  start = (
    jnp.int32(0),
    row,
    jnp.full((B, G), bos, jnp.int32),
    jnp.zeros((B, G), bool),
    jnp.full((B, G, length), eos, jnp.int32),
    jnp.zeros((B, G, length)),
    jnp.zeros((B, G, length), bool),
  )
  unfinished = lambda carry: (carry[0] < length) & ~jnp.all(carry[3])
  _, _, _, _, tokens, logps, mask = jax.lax.while_loop(unfinished, step, start)
  return types.TextTrajectory(tokens, logps, mask, jnp.float32(scale), jnp.float32(0.0))


def nucleus(logits_V: Array, temperature: float, top_p: float) -> Array:
  """Logits with -inf outside the fewest most likely tokens of mass `top_p` (arXiv 1904.09751)."""
  order_V = jnp.argsort(-logits_V, axis=-1)
  p_V = jax.nn.softmax(logits_V.astype(jnp.float32) / temperature, axis=-1)
  sorted_V = jnp.take_along_axis(p_V, order_V, axis=-1)
  # The most likely token always stays: nothing stands before it.
  keep_V = jnp.cumsum(sorted_V, axis=-1) - sorted_V < top_p
  keep_V = jnp.put_along_axis(jnp.zeros_like(keep_V), order_V, keep_V, axis=-1, inplace=False)
  return jnp.where(keep_V, logits_V, -jnp.inf)


def rescore(rollout: types.TextTrajectory, logits_BGTV: Array) -> types.TextTrajectory:
  """The rollout with log-probabilities of teacher forcing in place of those of decoding.

  Decoding adds up in another order, and a float32 logit of 16 has steps of 1e-6. Kept as they are,
  its log-probabilities would make the first ratio of an update differ from 1; scored by the pass
  that the update replays, they do not. What decoding was off by stays in `drift`.
  """
  logp = ops.token_logp(logits_BGTV, rollout.tokens_BGT, rollout.temperature)
  logp = jnp.where(rollout.mask_BGT, logp, 0.0)
  return rollout.replace(logp_BGT=logp, drift=jnp.max(jnp.abs(logp - rollout.logp_BGT)))


def teacher_ids(tokens_BGT: Array, bos: int) -> Array:
  """Inputs whose logits score `tokens_BGT`: `bos` first, the last token dropped."""
  start = jnp.full_like(tokens_BGT[..., :1], bos)
  return jnp.concatenate([start, tokens_BGT[..., :-1]], axis=-1)
