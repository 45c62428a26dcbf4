"""Optimizers from a config: schedule, clipping, learning rates by parameter name."""

from __future__ import annotations

from collections.abc import Sequence
import re

import jax
from jax import numpy as jnp
import optax
from optax import contrib

from lvrpo_jax import types

FROZEN = (r'^(latent|vit)_pos_embed$',)
"""Parameters that no run trains: checkpoints hold them, but they are fixed tables."""

MUON_DECAY = 0.95
"""Decay of the momentum of kernels under 'muon'."""


def parameter_name(path) -> str:
  """'trunk/layers/und/q_proj/kernel' from a key path."""
  return '/'.join(key.key for key in path)


def schedule(kind: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
  """Learning rate by step, after a linear warm-up.

  Args:
    kind: 'constant'; 'linear': flat, then linear to 0 from half time; 'cosine' to 0.

  Raises:
    ValueError: unknown kind.
  """
  if kind == 'constant':
    rate = optax.join_schedules([optax.constant_schedule(peak)], [])
  elif kind == 'linear':
    half = steps // 2
    falling = optax.linear_schedule(peak, 0.0, max(steps - half, 1))
    rate = optax.join_schedules([optax.constant_schedule(peak), falling], [half])
  elif kind == 'cosine':
    rate = optax.cosine_decay_schedule(peak, max(steps, 1))
  else:
    raise ValueError(f"optimizer schedule is {kind!r}; allowed: 'constant', 'linear', 'cosine'")

  def warmed_up(step):
    return rate(step) * jnp.minimum(1.0, (step + 1) / max(warmup, 1))

  return warmed_up


def rates(params: types.Params, rules: Sequence[tuple[str, float]]) -> types.Params:
  """Multiplier of the learning rate for every parameter: the first rule that matches, else 1."""
  rules = [(pattern, 0.0) for pattern in FROZEN] + list(rules)

  def rate(path, _):
    return next(
      (value for pattern, value in rules if re.search(pattern, parameter_name(path))), 1.0
    )

  return jax.tree_util.tree_map_with_path(rate, params)


def from_config(
  settings: types.Config,
  steps: int,
  factor: float = 1.0,
  rules: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
  """The optimizer that a section such as `config.align.optimizer` describes.

  Args:
    steps: optimizer steps of the whole stage.
    factor: of both learning rates.
    rules: see `build`.
  """

  def rate(peak):
    return schedule(settings.schedule, peak * factor, steps, settings.warmup)

  return build(
    settings.kind,
    rate(settings.learning_rate),
    settings.b1,
    settings.b2,
    settings.eps,
    settings.weight_decay,
    settings.clip_norm,
    rate(settings.muon_rate),
    rules,
  )


def build(
  kind: str,
  learning_rate: optax.Schedule,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  clip_norm: float,
  muon_rate: optax.Schedule | None = None,
  rules: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
  """The optimizer after clipping by global norm; weight decay on kernels only.

  Args:
    kind: 'adamw', or 'muon' (https://kellerjordan.github.io/posts/muon): the kernels of the
      trunk's layers take orthogonalised momentum steps, everything else AdamW.
    muon_rate: learning rate of those kernels.
    rules: (regular expression, multiplier of the learning rate) over parameter names.

  Raises:
    ValueError: unknown kind.
  """

  def is_kernel(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: parameter_name(path).endswith('kernel'), params
    )

  if kind == 'adamw':
    inner = optax.chain(
      optax.scale_by_adam(b1, b2, eps),
      optax.add_decayed_weights(weight_decay, mask=is_kernel),
      optax.scale_by_learning_rate(learning_rate),
    )
  elif kind == 'muon':

    def matrices(params):
      # Scanned layers add a leading axis.
      return jax.tree_util.tree_map_with_path(
        lambda path, _: (
          contrib.MuonDimensionNumbers((1,), (2,))
          if re.search(r'trunk/layers/.*kernel$', parameter_name(path))
          else None
        ),
        params,
      )

    inner = contrib.muon(
      muon_rate,
      beta=MUON_DECAY,
      adam_learning_rate=learning_rate,
      adam_b1=b1,
      adam_b2=b2,
      eps=eps,
      adam_weight_decay=weight_decay,
      muon_weight_dimension_numbers=matrices,
    )
  else:
    raise ValueError(f"optimizer.kind is {kind!r}; allowed: 'adamw', 'muon'")

  def scale(updates, state, params):
    return jax.tree.map(lambda u, r: u * r, updates, rates(params, rules)), state

  return optax.chain(
    optax.clip_by_global_norm(clip_norm),
    inner,
    optax.GradientTransformation(lambda _: optax.EmptyState(), scale),
  )


def momenta(state: optax.OptState, b1: float) -> tuple[types.Params, types.Params]:
  """Momentum of every parameter and its decay, of the state of a `build`.

  Args:
    b1: decay of Adam's momentum.
  """
  found = optax.tree_utils.tree_get_all_with_path(state, 'mu')
  # Kernels under 'muon' have a state of their own; either one has masks in the place of the others.
  decays = [MUON_DECAY if 'MuonState' in str(path[-1]) else b1 for path, _ in found]

  def is_masked(x):
    return isinstance(x, optax.MaskedNode)

  def merged(*trees):
    return jax.tree.map(
      lambda *parts: next(x for x in parts if not is_masked(x)), *trees, is_leaf=is_masked
    )

  trees = [tree for _, tree in found]
  constants = [jax.tree.map(lambda _, d=d: d, tree) for d, tree in zip(decays, trees)]
  return merged(*trees), merged(*constants)
