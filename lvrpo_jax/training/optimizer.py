"""Builds optimizers from a config: schedule, clipping, learning rates by parameter name."""

from __future__ import annotations

from collections.abc import Sequence
import operator
import re

import jax
from jax import numpy as jnp
from jax import typing as jax_typing
import optax
from optax import contrib

from lvrpo_jax import types
from lvrpo_jax.parallel import placement

FROZEN = (r'^(latent|vit)_pos_embed$',)
"""Patterns of parameters that no run trains: fixed tables that checkpoints hold."""

MUON_DECAY = 0.95
"""Decay of the momentum of kernels under 'muon'."""

parameter_name = placement.parameter_name


def schedule(kind: str, peak: float, steps: int, warmup: int) -> optax.Schedule:
  """Returns the learning rate by step, with a linear warm-up.

  Args:
    kind: 'constant'; 'linear': flat, then linear to 0 from half time; 'cosine' to 0.
    peak: largest learning rate.
    steps: optimizer steps of the whole stage.
    warmup: optimizer steps of the warm-up.

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

  def warmed_up(step: jax_typing.ArrayLike) -> jax_typing.ArrayLike:
    return rate(step) * jnp.minimum(1.0, (step + 1) / max(warmup, 1))

  return warmed_up


def rates(params: types.Params, rules: Sequence[tuple[str, float]]) -> types.Params:
  """Returns the multiplier of every parameter's learning rate: of the first rule that matches.

  It is 1 where no rule matches, and 0 for `FROZEN`.
  """
  rules = [(pattern, 0.0) for pattern in FROZEN] + list(rules)

  def rate(path: jax.tree_util.KeyPath, _: jax.Array) -> float:
    name = parameter_name(path)
    return next((value for pattern, value in rules if re.search(pattern, name)), 1.0)

  return jax.tree_util.tree_map_with_path(rate, params)


def from_config(
  settings: types.Config,
  steps: int,
  factor: float = 1.0,
  rules: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
  """Builds the optimizer that a section such as `config.align.optimizer` describes.

  Args:
    settings: the section.
    steps: optimizer steps of the whole stage.
    factor: of both learning rates.
    rules: see `build`.
  """

  def rate(peak: float) -> optax.Schedule:
    return schedule(settings.schedule, peak * factor, steps, settings.warmup)

  return build(
    settings.kind,
    rate(settings.learning_rate),
    b1=settings.b1,
    b2=settings.b2,
    eps=settings.eps,
    weight_decay=settings.weight_decay,
    clip_norm=settings.clip_norm,
    muon_rate=rate(settings.muon_rate),
    rules=rules,
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
  """Builds an optimizer that clips by global norm first and decays kernels only.

  Args:
    kind: 'adamw', or 'muon' (https://kellerjordan.github.io/posts/muon): the kernels of the
      trunk's layers take orthogonalised momentum steps, everything else AdamW.
    learning_rate: of AdamW.
    b1, b2, eps: of AdamW.
    weight_decay: of kernels.
    clip_norm: largest global norm of a gradient.
    muon_rate: learning rate of the kernels under 'muon'.
    rules: (regular expression, multiplier of the learning rate) over parameter names.

  Raises:
    ValueError: unknown kind, or 'muon' without `muon_rate`.
  """

  def is_kernel(params: types.Params) -> types.Tree:
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
    if muon_rate is None:
      raise ValueError("muon_rate is None; allowed: a schedule where optimizer.kind is 'muon'")

    def axes(path: jax.tree_util.KeyPath, _: jax.Array) -> contrib.MuonDimensionNumbers | None:
      if not re.search(r'trunk/layers/.*kernel$', parameter_name(path)):
        return None
      return contrib.MuonDimensionNumbers((1,), (2,))  # Scanned layers add a leading axis.

    def matrices(params: types.Params) -> types.Tree:
      return jax.tree_util.tree_map_with_path(axes, params)

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

  def scale(updates: types.Params, params: types.Params | None) -> types.Params:
    return jax.tree.map(operator.mul, updates, rates(params, rules))

  return optax.chain(optax.clip_by_global_norm(clip_norm), inner, optax.stateless(scale))


def _filled(tree: types.Tree, value: float) -> types.Tree:
  return jax.tree.map(lambda _: value, tree)


def momenta(state: optax.OptState, b1: float) -> tuple[types.Params, types.Params]:
  """Returns the momentum of every parameter, and its decay.

  Args:
    state: of an optimizer from `build`.
    b1: decay of Adam's momentum.
  """
  found = optax.tree_utils.tree_get_all_with_path(state, 'mu')
  # Kernels under 'muon' have their own state; each state has masks for the other's parameters.
  decays = [MUON_DECAY if 'MuonState' in str(path[-1]) else b1 for path, _ in found]

  def is_masked(x: types.Tree) -> bool:
    return isinstance(x, optax.MaskedNode)

  def unmasked(*parts: types.Tree) -> types.Tree:
    return next(x for x in parts if not is_masked(x))

  def merge(trees: Sequence[types.Tree]) -> types.Params:
    return jax.tree.map(unmasked, *trees, is_leaf=is_masked)

  trees = [tree for _, tree in found]
  constants = [_filled(tree, decay) for decay, tree in zip(decays, trees)]
  return merge(trees), merge(constants)
