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


def part(loss: step.Loss, params: types.Params, state: types.TrainState, frozen: Any,
         batch: dict[str, Any], answers: Array, images: Array) -> types.Params:
  """Gradient of the weighted losses of both modalities, penalties included, times 0 or 1 each.

  A factor that is an argument costs one program, where two gradients at once cost two.
  """
  weights = loss.weights(batch)

  def total(params):
    sums, _ = loss.sums(params, state, frozen, batch)
    out = jnp.float32(0)
    for name, value in sums.items():
      factor = answers if name.startswith(pipeline.UNDERSTAND) else images
      out += factor * loss.coefficients[name] * ops.divide(value, weights[name])
    return out
  return jax.grad(total)(params)


def report(answers: types.Params, images: types.Params) -> dict[str, Array]:
  """Norms of the gradient by expert, and of the two modalities on the attention they share.

  LVRPO (arXiv 2603.27693) speaks of gradients that decouple; the cosine says whether they do.

  Args:
    answers, images: gradients of `part`; their sum is the update's.
  """
  whole = jax.tree.map(jnp.add, answers, images)
  out = {f'gradient/{name}_expert': ops.global_norm(chosen(whole, pattern))
         for name, pattern in EXPERTS.items()}
  parts = chosen(answers, SHARED), chosen(images, SHARED)
  for name, leaves in zip(('answers', 'images'), parts):
    out[f'gradient/{name}_on_shared'] = ops.global_norm(leaves)
  return {**out, 'gradient/cosine': cosine(*parts)}
