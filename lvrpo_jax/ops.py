"""Masked reductions, token log-probabilities, and random draws with one key a row."""

from __future__ import annotations

from typing import Any

import jax
from jax import numpy as jnp

Array = jax.Array


def masked_sum(x: Array, mask: Array) -> tuple[Array, Array]:
  """Returns (sum, weight) of `x` where `mask` is non-zero; the caller divides once, at the end.

  A masked place adds exactly 0, even where `x` is not finite.
  """
  weight = mask.astype(jnp.float32)
  return jnp.sum(jnp.where(weight > 0, x, 0) * weight), jnp.sum(weight)


def divide(total: Array, weight: Array) -> Array:
  """Returns `total / weight`, and 0 where the weight is 0."""
  return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)


def masked_mean(x: Array, mask: Array) -> Array:
  """Returns the mean of `x` where `mask` is non-zero; 0 for an empty mask."""
  return divide(*masked_sum(x, mask))


def token_logp(logits_V: Array, ids: Array, temperature: float | Array = 1.0) -> Array:
  """Log-probability of `ids` under softmax(logits / temperature), float32, last axis V."""
  logits_V = logits_V.astype(jnp.float32) / temperature
  # The maximum is subtracted before anything is summed, so large logits keep their low digits.
  logits_V = logits_V - jax.lax.stop_gradient(jnp.max(logits_V, axis=-1, keepdims=True))
  picked = jnp.take_along_axis(logits_V, ids[..., None], axis=-1)[..., 0]
  return picked - jnp.log(jnp.sum(jnp.exp(logits_V), axis=-1))


def token_entropy(logits_V: Array, temperature: float | Array = 1.0) -> Array:
  """Entropy in nats of softmax(logits / temperature), last axis V."""
  logp_V = jax.nn.log_softmax(logits_V.astype(jnp.float32) / temperature, axis=-1)
  return -jnp.sum(jnp.exp(logp_V) * logp_V, axis=-1)


def normal_rows(key_B: Array, shape: tuple[int, ...]) -> Array:
  """Draws standard normal values with one independent key a row.

  The values of a row are the same on any number of devices.

  Args:
    key_B: typed PRNG keys of any leading shape.
    shape: shape of the draw for one key.
  """

  def draw(key: Array) -> Array:
    return jax.random.normal(key, shape)

  for _ in key_B.shape:
    draw = jax.vmap(draw)
  return draw(key_B)


def fold_rows(key: Array, shape: tuple[int, ...]) -> Array:
  """Makes keys of the given shape; key (i, j, ..) depends on `key` and its flat index alone."""
  count = 1
  for size in shape:
    count *= size
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count)).reshape(shape)


def fold_each(key_B: Array, data: int) -> Array:
  """Applies `jax.random.fold_in(key, data)` to every key of an array of keys."""

  def fold(key: Array) -> Array:
    return jax.random.fold_in(key, data)

  for _ in key_B.shape:
    fold = jax.vmap(fold)
  return fold(key_B)


def global_norm(tree: Any) -> Array:
  """L2 norm over all leaves of a tree, in float32."""
  leaves = jax.tree.leaves(tree)
  return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))
