"""What an update is made of: sizes of its gradients by expert, and how tasks agree."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import sharding
from lvrpo_jax import step
from lvrpo_jax import types
from lvrpo_jax.data import pipeline

Array = jax.Array

EXPERTS = {
    'understanding': r'layers/und/|norm_und|embed_tokens|lm_head|^vit/|connector',
    'generation': r'layers/gen/|norm_gen|vae2llm|llm2vae|time_embedder',
}
"""Parameters of either expert with its way in and out, by pattern."""

SHARED = r'layers/und/(q|k|v|o)_proj/'
"""Attention of the understanding expert, which both modalities read: images through their context."""


def chosen(tree: types.Params, pattern: str) -> list[Array]:
  """Leaves whose names hold a pattern."""
  return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
          if re.search(pattern, sharding.name(path))]


def cosine(one: list[Array], two: list[Array]) -> Array:
  """Cosine of two lists of arrays as vectors; 0 where one of them is 0."""
  product = sum(jnp.sum(a.astype(jnp.float32) * b) for a, b in zip(one, two, strict=True))
  return ops.divide(product, ops.global_norm(one) * ops.global_norm(two))


def gradients(loss: step.Loss, params: types.Params, state: types.TrainState, frozen: Any,
              batch: dict[str, Any]) -> dict[str, Array]:
  """Norms of the gradient by expert, and of the two modalities on the attention they share.

  LVRPO (arXiv 2603.27693) speaks of gradients that decouple; the cosine says whether they do. Both
  gradients are of the weighted losses, penalties included, so that their sum is the update's.
  """
  weights = loss.weights(batch)

  def terms(params):
    sums, _ = loss.sums(params, state, frozen, batch)
    scaled = {k: loss.coefficients[k] * ops.divide(v, weights[k]) for k, v in sums.items()}
    answers = pipeline.UNDERSTAND, f'{pipeline.UNDERSTAND}_penalty'
    return (sum((v for k, v in scaled.items() if k in answers), jnp.float32(0)),
            sum((v for k, v in scaled.items() if k not in answers), jnp.float32(0)))
  _, pull = jax.vjp(terms, params)
  one, none = jnp.float32(1), jnp.float32(0)
  answers, images = pull((one, none))[0], pull((none, one))[0]
  whole = jax.tree.map(jnp.add, answers, images)
  out = {f'gradient/{name}_expert': ops.global_norm(chosen(whole, pattern))
         for name, pattern in EXPERTS.items()}
  parts = chosen(answers, SHARED), chosen(images, SHARED)
  for name, part in zip(('answers', 'images'), parts):
    out[f'gradient/{name}_on_shared'] = ops.global_norm(part)
  return {**out, 'gradient/cosine': cosine(*parts)}
