"""Semantic reward: similarity of images and texts in a dual encoder's joint space."""

from __future__ import annotations

import jax
from jax import numpy as jnp

Array = jax.Array


def similarity(image_BGD: Array, text_BGD: Array) -> Array:
  """Cosine (B, G) of unit vectors; the text may be one for a whole group (B, 1, D)."""
  return jnp.sum(image_BGD * text_BGD, axis=-1)


def dense(patch_BGND: Array, word_VD: Array, words_BV: Array, top: int = 1) -> Array:
  """Mean over the key words of a prompt of their best match among the image's patches, (B, G).

  Args:
    patch_BGND: unit vectors of patches.
    word_VD: unit vectors of all words.
    words_BV: how often each word counts in a prompt; 0 for words that carry no visual meaning.
    top: the match is the mean over this many best patches. 1 is LVRPO's maximum (arXiv
      2603.27693); with more, a single odd patch cannot satisfy it.
  """
  match_BGVN = jnp.einsum('BGND,VD->BGVN', patch_BGND, word_VD)
  best_BGV = jnp.mean(jax.lax.top_k(match_BGVN, top)[0], axis=-1)
  weight_B1V = words_BV[:, None].astype(jnp.float32)
  return (jnp.sum(best_BGV * weight_B1V, axis=-1)
          / jnp.maximum(jnp.sum(weight_B1V, axis=-1), 1.))
