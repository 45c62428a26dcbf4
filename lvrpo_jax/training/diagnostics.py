"""Measures the gradients of an update: their norms by expert, and how the modalities agree."""

from __future__ import annotations

from collections.abc import Iterable
import re
from typing import cast

import jax
from jax import numpy as jnp
import numpy as np
import optax

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.parallel import placement
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib

Array = jax.Array

EXPERTS = {
  'understanding': r'layers/und/|norm_und|embed_tokens|lm_head|^vit/|connector',
  'generation': r'layers/gen/|norm_gen|vae2llm|llm2vae|time_embedder',
}
"""Patterns of the parameters of either expert, its input and output layers included."""

SHARED = r'layers/und/(q|k|v|o)_proj/'
"""Pattern of the attention of the understanding expert.

Both modalities depend on it; image rollouts read it through their context.
"""


def _sum(values: Iterable[Array]) -> Array:
  return cast(Array, sum(values))


def chosen(tree: types.Params, pattern: str) -> list[Array]:
  """Returns the leaves whose names match a pattern."""
  return [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if re.search(pattern, placement.parameter_name(path))
  ]


def cosine(one: list[Array], two: list[Array]) -> Array:
  """Computes the cosine of two lists of arrays as vectors; 0 where one of them is 0."""
  product = _sum(jnp.sum(x.astype(jnp.float32) * y) for x, y in zip(one, two, strict=True))
  return ops.divide(product, ops.global_norm(one) * ops.global_norm(two))


def gradient(
  before: optax.OptState, after: optax.OptState, norm: Array, b1: float, clip_norm: float
) -> types.Params:
  """Recovers the gradient of an update from the momentum: `m' = decay m + (1 - decay) g`.

  Args:
    before, after: states of the optimizer.
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
  """Computes the fraction of the non-zero values of a tree whose magnitude is below a bound.

  Zeros do not count: a gradient of 0, such as that of a token that no text holds, changes no
  parameter at any eps. Without values that are not 0 the fraction is 0.
  """
  magnitudes = [jnp.abs(leaf) for leaf in jax.tree.leaves(tree)]
  below = _sum(jnp.sum((x > 0) & (x < bound)) for x in magnitudes)
  return ops.divide(below, _sum(jnp.sum(x > 0) for x in magnitudes))


def report(
  answers: types.Params, images: types.Params, clip_norm: Array | float, eps: Array | float
) -> dict[str, Array]:
  """Computes norms of the gradient by expert, and of each modality on the shared attention.

  'cosine' is that of the modalities on the shared attention; LVRPO (arXiv 2603.27693) describes
  gradients that decouple. 'below_eps' is the share of an expert's non-zero gradients, clipped as
  the optimizer clips them, that are smaller than the optimizer's eps. Adam hardly changes these
  parameters.

  Args:
    answers, images: gradients of the losses of either modality; their sum is the update's.
    clip_norm: norm to which the optimizer clips the update's gradient.
    eps: of the optimizer.
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
  step: step_lib.Step,
  state: types.TrainState,
  frozen: types.Tree,
  batch: types.Tree,
  settings: types.Config,
) -> dict[str, Array]:
  """Returns the `report` of an update, by the update's own program on copies of the state.

  The program runs twice, each time with the losses of one modality off, so nothing else is
  compiled.

  Args:
    step: the compiled update.
    state: before the update; it is copied.
    frozen: what the update reads, with 'factors' of `losses.FACTORS`.
    batch: of the update.
    settings: of the optimizer.
  """

  def gradient_without(**off: np.number) -> types.Params:
    factors = {**frozen['factors'], **off}
    after, metrics = step(jax.tree.map(jnp.copy, state), {**frozen, 'factors': factors}, batch)
    norm = metrics['grad_norm']
    return gradient(state.opt_state, after.opt_state, norm, settings.b1, settings.clip_norm)

  off = np.float32(0)
  answers, images = gradient_without(images=off), gradient_without(answers=off)
  return _report(answers, images, jnp.float32(settings.clip_norm), jnp.float32(settings.eps))


_report = jax.jit(report)
