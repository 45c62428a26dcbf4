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
from lvrpo_jax.training import optimizer as optimizer_lib

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
  before: optax.OptState, after: optax.OptState, norm: Array, b1: float, clip_norm: float
) -> types.Params:
  """The gradient of an update, read from the momentum: `m' = decay m + (1 - decay) g`.

  Args:
    norm: global norm of the gradient, which was clipped to `clip_norm`.
    b1: decay of Adam's momentum.
  """
  clipped = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30))
  (new, decays), (old, _) = (optimizer_lib.momenta(state, b1) for state in (after, before))
  return jax.tree.map(
    lambda new, old, decay: (new - decay * old) * (1.0 / ((1.0 - decay) * clipped)),
    new,
    old,
    decays,
  )


def share_below(tree: types.Params, bound: Array | float) -> Array:
  """Fraction of the values of a tree whose magnitude is below a bound."""
  leaves = jax.tree.leaves(tree)
  below = sum(jnp.sum(jnp.abs(leaf) < bound) for leaf in leaves)
  return below / sum(leaf.size for leaf in leaves)


def report(
  answers: types.Params, images: types.Params, clip_norm: Array | float, eps: Array | float
) -> dict[str, Array]:
  """Norms of the gradient by expert, and of the two modalities on the attention they share.

  LVRPO (arXiv 2603.27693) speaks of gradients that decouple; the cosine says whether they do.
  'below_eps' is the share of an expert's gradients, clipped as the optimizer clips them, that are
  smaller than the optimizer's eps: parameters that Adam hardly moves.

  Args:
    answers, images: gradients of the losses of either modality; their sum is the update's.
    clip_norm: norm to which the optimizer clips the update's gradient.
  """
  whole = jax.tree.map(jnp.add, answers, images)
  out, smallest = {}, eps * jnp.maximum(1.0, ops.global_norm(whole) / clip_norm)
  for name, pattern in EXPERTS.items():
    leaves = chosen(whole, pattern)
    out[f'gradient/{name}_expert'] = ops.global_norm(leaves)
    out[f'gradient/below_eps/{name}_expert'] = share_below(leaves, smallest)
  parts = chosen(answers, SHARED), chosen(images, SHARED)
  for name, leaves in zip(('answers', 'images'), parts):
    out[f'gradient/{name}_on_shared'] = ops.global_norm(leaves)
  return {**out, 'gradient/cosine': cosine(*parts)}


def probe(
  step: Callable[..., Any],
  state: types.TrainState,
  frozen: dict[str, Any],
  batch: Any,
  settings: types.Config,
) -> dict[str, Array]:
  """`report` of an update, by the update's own program on copies of the state.

  It runs twice, with the losses of one modality off each time, so nothing else is compiled.

  Args:
    settings: of the optimizer.
  """

  def one(**off):
    factors = {**frozen['factors'], **off}
    after, metrics = step(jax.tree.map(jnp.copy, state), {**frozen, 'factors': factors}, batch)
    norm = metrics['grad_norm']
    return gradient(state.opt_state, after.opt_state, norm, settings.b1, settings.clip_norm)

  off = np.float32(0)
  answers, images = one(images=off), one(answers=off)
  return _report(answers, images, jnp.float32(settings.clip_norm), jnp.float32(settings.eps))


_report = jax.jit(report)
