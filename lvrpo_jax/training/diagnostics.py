"""What an update is made of: sizes of its gradients by expert, and how tasks agree."""

from __future__ import annotations

from collections.abc import Callable
import re
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.parallel import placement

Array = jax.Array

EXPERTS = {
  'understanding': r'layers/und/|norm_und|embed_tokens|lm_head|^vit/|connector',
  'generation': r'layers/gen/|norm_gen|vae2llm|llm2vae|time_embedder',
}
"""Parameters of either expert with its way in and out, by pattern."""

SHARED = r'layers/und/(q|k|v|o)_proj/'
"""Attention of the understanding expert. Both modalities read it, images through their context."""


def chosen(tree: types.Params, pattern: str) -> list[Array]:
  """Leaves whose names hold a pattern."""
  return [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if re.search(pattern, placement.parameter_name(path))
  ]


def cosine(one: list[Array], two: list[Array]) -> Array:
  """Cosine of two lists of arrays as vectors; 0 where one of them is 0."""
  product = sum(jnp.sum(a.astype(jnp.float32) * b) for a, b in zip(one, two, strict=True))
  return ops.divide(product, ops.global_norm(one) * ops.global_norm(two))


def gradient(
  before: optax.OptState, after: optax.OptState, norm: Array, decay: float, clip_norm: float
) -> types.Params:
  """The gradient of an update of Adam, read from its momentum: `m' = decay m + (1 - decay) g`.

  Args:
    norm: global norm of the gradient, which was clipped to `clip_norm`.
  """
  momentum = lambda state: optax.tree_utils.tree_get(state, 'mu')
  scale = 1.0 / ((1.0 - decay) * jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30)))
  return jax.tree.map(
    lambda new, old: (new - decay * old) * scale, momentum(after), momentum(before)
  )


def report(answers: types.Params, images: types.Params) -> dict[str, Array]:
  """Norms of the gradient by expert, and of the two modalities on the attention they share.

  LVRPO (arXiv 2603.27693) speaks of gradients that decouple; the cosine says whether they do.

  Args:
    answers, images: gradients of the losses of either modality; their sum is the update's.
  """
  whole = jax.tree.map(jnp.add, answers, images)
  out = {
    f'gradient/{name}_expert': ops.global_norm(chosen(whole, pattern))
    for name, pattern in EXPERTS.items()
  }
  parts = chosen(answers, SHARED), chosen(images, SHARED)
  for name, leaves in zip(('answers', 'images'), parts):
    out[f'gradient/{name}_on_shared'] = ops.global_norm(leaves)
  return {**out, 'gradient/cosine': cosine(*parts)}


def probe(
  step: Callable[..., Any],
  state: types.TrainState,
  frozen: dict[str, Any],
  batch: Any,
  decay: float,
  clip_norm: float,
) -> dict[str, Array]:
  """`report` of an update, by the update's own program on copies of the state.

  It runs twice, with the losses of one modality off each time, so nothing else is compiled.
  """

  def one(**off):
    factors = {**frozen['factors'], **off}
    after, metrics = step(jax.tree.map(jnp.copy, state), {**frozen, 'factors': factors}, batch)
    return gradient(state.opt_state, after.opt_state, metrics['grad_norm'], decay, clip_norm)

  off = np.float32(0)
  return _report(one(images=off), one(answers=off))


_report = jax.jit(report)
