"""Semantic reward: similarity of images and texts in a dual encoder's joint space.

Axes beyond the common legend: `W` key words of the data, `K` key words of a prompt.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp

Array = jax.Array


def similarity(image_BGD: Array, text_BGD: Array) -> Array:
  """Cosine (B, G) of unit vectors; the text may be one for a whole group (B, 1, D)."""
  return jnp.sum(image_BGD * text_BGD, axis=-1)


def dense(
  patch_BGND: Array, words_WD: Array, row_BK: Array, count_BK: Array, top: int = 1
) -> Array:
  """Mean over the key words of a prompt of their match among the image's patches, (B, G).

  With `top = 1` the match of a word is its cosine with the best patch, LVRPO's form (arXiv
  2603.27693). With `top = k` it is the mean over the k best patches, and one hot patch cannot
  satisfy it: whatever that patch shows, its cosine is at most 1 and makes up 1/k of the mean, so k
  patches have to match. Only the words of a prompt meet its patches, so the largest array has
  shape (B, G, K, N).

  Args:
    patch_BGND: unit vectors of patches, at least `top` of them.
    words_WD: unit vectors of all key words.
    row_BK: the rows of `words_WD` that stand in a prompt.
    count_BK: how often each of them counts; 0 for padding.
    top: number of best patches.
  """
  match_BGKN = jnp.einsum('BGND,BKD->BGKN', patch_BGND, words_WD[row_BK])
  best_BGK = jnp.mean(jax.lax.top_k(match_BGKN, top)[0], axis=-1)
  weight_B1K = count_BK[:, None].astype(jnp.float32)
  return jnp.sum(best_BGK * weight_B1K, axis=-1) / jnp.maximum(jnp.sum(weight_B1K, axis=-1), 1.0)
