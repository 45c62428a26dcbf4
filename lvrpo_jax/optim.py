"""Optimizers from a config: schedule, clipping, learning rates by parameter name."""

from __future__ import annotations

from collections.abc import Sequence
import re

import jax
from jax import numpy as jnp
import optax

from lvrpo_jax import types

FROZEN = (r'^(latent|vit)_pos_embed$',)
"""Parameters that no run trains: checkpoints hold them, but they are fixed tables."""


def name(path) -> str:
  """'trunk/layers/und/q_proj/kernel' from a key path."""
  return '/'.join(key.key for key in path)


def schedule(kind: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then 'constant', or flat and 'linear' to 0 from half.

  Raises:
    ValueError: unknown kind.
  """
  if kind == 'constant':
    parts, bounds = [optax.constant_schedule(peak)], []
  elif kind == 'linear':
    half = steps // 2
    parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, 0., max(steps - half, 1))]
    bounds = [half]
  else:
    raise ValueError(f"optimizer schedule is {kind!r}; allowed: 'constant', 'linear'")
  rate = optax.join_schedules(parts, bounds)
  return lambda step: rate(step) * jnp.minimum(1., (step + 1) / max(warmup, 1))


def rates(params: types.Params, rules: Sequence[tuple[str, float]]) -> types.Params:
  """Multiplier of the learning rate for every parameter: the first rule that matches, else 1."""
  rules = [(pattern, 0.) for pattern in FROZEN] + list(rules)
  def rate(path, _):
    return next((value for pattern, value in rules if re.search(pattern, name(path))), 1.)
  return jax.tree_util.tree_map_with_path(rate, params)


def build(learning_rate: optax.Schedule, b1: float, b2: float, eps: float, weight_decay: float,
          clip_norm: float, rules: Sequence[tuple[str, float]] = ()) -> optax.GradientTransformation:
  """AdamW after clipping by global norm; decay on kernels only.

  Args:
    rules: (regular expression, multiplier of the learning rate) over parameter names.
  """
  def scale(updates, state, params):
    return jax.tree.map(lambda u, r: u * r, updates, rates(params, rules)), state
  is_kernel = lambda params: jax.tree_util.tree_map_with_path(
      lambda path, _: name(path).endswith('kernel'), params)
  return optax.chain(
      optax.clip_by_global_norm(clip_norm),
      optax.scale_by_adam(b1, b2, eps),
      optax.add_decayed_weights(weight_decay, mask=is_kernel),
      optax.GradientTransformation(lambda _: optax.EmptyState(), scale),
      optax.scale_by_learning_rate(learning_rate))
