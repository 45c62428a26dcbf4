"""Text rollouts: one `while_loop` over tokens for all rows, with cached keys and values."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.models import family

Array = types.Array
Decode = Callable[[types.Tree, Array, Array], tuple[Array, types.Tree]]
"""`decode(row, index, token_BG) -> (logits_BGV, row)`, where `row` is the decode cache."""
Carry = tuple[Array, types.Tree, Array, Array, Array, Array, Array]
"""Index of the token, decode cache, last tokens, ended rows; tokens, log-probabilities, mask."""


def sample(
  decode: Decode,
  row: types.Tree,
  key_BG: Array,
  bos: int,
  eos: int,
  length: int,
  temperature: float,
  top_p: float = 1.0,
) -> types.TextTrajectory:
  """Samples a text for every row, until all rows have ended.

  Args:
    decode: one step of the policy on its context.
    row: the empty decode cache.
    key_BG: one PRNG key a row; the text of a row does not depend on other rows.
    bos, eos: ids that start and end a text.
    length: most tokens of a text, the end token included. A text without an end token by then is
      cut; `mask_BGT` covers all its tokens.
    temperature: 0 takes the most likely token; log-probabilities are then those of the softmax at
      temperature 1.
    top_p: see `nucleus`; log-probabilities are those of the distribution that is left.

  Returns:
    The texts. Tokens after the end of a row are `eos`, with mask False and log-probability 0.
  """
  B, G = key_BG.shape
  scale = temperature if temperature > 0 else 1.0

  def step(carry: Carry) -> Carry:
    index, row, token, ended, tokens, logps, mask = carry
    logits, row = decode(row, index, token)
    if top_p < 1:
      logits = nucleus(logits, scale, top_p)
    if temperature > 0:
      noise = gumbel_noise(key_BG, index, logits.shape[-1:])
      token = jnp.argmax(logits.astype(jnp.float32) / scale + noise, axis=-1)
    else:
      token = jnp.argmax(logits, axis=-1)
    token = jnp.where(ended, eos, token).astype(jnp.int32)
    logp = jnp.where(ended, 0.0, ops.token_logp(logits, token, scale))

    def put(old: Array, new: Array) -> Array:
      return jax.lax.dynamic_update_index_in_dim(old, new, index, axis=2)

    return (
      index + 1,
      row,
      token,
      ended | (token == eos),
      put(tokens, token),
      put(logps, logp),
      put(mask, ~ended),
    )

  def unfinished(carry: Carry) -> Array:
    index, _, _, ended, *_ = carry
    return (index < length) & ~jnp.all(ended)

  start = (
    jnp.int32(0),
    row,
    jnp.full((B, G), bos, jnp.int32),
    jnp.zeros((B, G), bool),
    jnp.full((B, G, length), eos, jnp.int32),
    jnp.zeros((B, G, length)),
    jnp.zeros((B, G, length), bool),
  )
  _, _, _, _, tokens, logps, mask = jax.lax.while_loop(unfinished, step, start)
  return types.TextTrajectory(
    tokens_BGT=tokens,
    logp_BGT=logps,
    mask_BGT=mask,
    temperature=jnp.float32(scale),
    drift=jnp.float32(0.0),
  )


def sample_text(
  policy: family.Policy,
  params: types.Params,
  cache: types.Cache,
  key_BG: Array,
  length: int,
  temperature: float,
) -> types.TextTrajectory:
  """Samples texts of at most `length` tokens after contexts; see `sample`."""

  def decode(row: types.Tree, index: Array, token: Array) -> tuple[Array, types.Tree]:
    return policy.decode_token(params, cache, row, index, token)

  B, G = key_BG.shape
  row = policy.empty_row((B, G), length)
  return sample(decode, row, key_BG, policy.bos, policy.eos, length, temperature)


def gumbel_noise(key_BG: Array, index: Array, size: tuple[int, ...]) -> Array:
  """Draws standard Gumbel noise (B, G, *size) of the token at an index, from a key a row."""

  def fold(key: Array) -> Array:
    return jax.random.fold_in(key, index)

  def draw(key: Array) -> Array:
    return jax.random.gumbel(key, size)

  return jax.vmap(jax.vmap(draw))(jax.vmap(jax.vmap(fold))(key_BG))


def nucleus(logits_V: Array, temperature: float, top_p: float) -> Array:
  """Replaces logits by -inf outside the nucleus (arXiv 1904.09751).

  The nucleus is the smallest set of most likely tokens whose probabilities sum to `top_p`.
  """
  order_V = jnp.argsort(-logits_V, axis=-1)
  p_V = jax.nn.softmax(logits_V.astype(jnp.float32) / temperature, axis=-1)
  sorted_V = jnp.take_along_axis(p_V, order_V, axis=-1)
  # The most likely token always stays, as the mass before it is 0.
  keep_V = jnp.cumsum(sorted_V, axis=-1) - sorted_V < top_p
  keep_V = jnp.put_along_axis(jnp.zeros_like(keep_V), order_V, keep_V, axis=-1, inplace=False)
  return jnp.where(keep_V, logits_V, -jnp.inf)


def rescore(rollout: types.TextTrajectory, logits_BGTV: Array) -> types.TextTrajectory:
  """Replaces the log-probabilities of decoding by those of teacher forcing.

  Decoding sums in another order, and a float32 logit of 16 has steps of 1e-6. With the
  log-probabilities of decoding, the first ratio of an update would differ from 1. The pass that the
  update replays gives exactly 1. The largest difference between the two is stored in `drift`.
  """
  logp = ops.token_logp(logits_BGTV, rollout.tokens_BGT, rollout.temperature)
  logp = jnp.where(rollout.mask_BGT, logp, 0.0)
  return rollout.replace(logp_BGT=logp, drift=jnp.max(jnp.abs(logp - rollout.logp_BGT)))


def teacher_ids(tokens_BGT: Array, bos: int) -> Array:
  """Returns the inputs whose logits score `tokens_BGT`: `bos` first, the last token left out."""
  start = jnp.full_like(tokens_BGT[..., :1], bos)
  return jnp.concatenate([start, tokens_BGT[..., :-1]], axis=-1)
