"""Group-relative advantages from reward components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import cast, NamedTuple

from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types

Array = types.Array

CONSTANT = 1e-6
"""Deviation, in units of max(|mean|, 1), below which a group counts as constant.

The mean of equal float32 numbers has an error of this size.
"""


class Advantages(NamedTuple):
  """Advantages of one task.

  Attributes:
    value_BG: the advantage; 0 where any reward is invalid.
    valid_BG: True where all rewards are valid.
    share: share of the advantage's variance, by reward.
    dead: fraction of groups in which a reward does not vary, by reward.
  """

  value_BG: Array
  valid_BG: Array
  share: dict[str, Array]
  dead: dict[str, Array]


def group_statistics(x_BG: Array, valid_BG: Array, ddof: int = 0) -> tuple[Array, Array]:
  """Returns mean and standard deviation (B, 1) over the valid samples of every group."""
  weight = valid_BG.astype(jnp.float32)
  count = jnp.sum(weight, axis=1, keepdims=True)
  x = jnp.where(valid_BG, x_BG, 0.0)
  mean = ops.divide(jnp.sum(x, axis=1, keepdims=True), count)
  square = jnp.sum(weight * jnp.square(x - mean), axis=1, keepdims=True)
  return mean, jnp.sqrt(ops.divide(square, count - ddof))


def centred(x_BG: Array, valid_BG: Array) -> Array:
  """Subtracts the group's mean; exactly 0 for invalid samples and in constant groups."""
  mean, _ = group_statistics(x_BG, valid_BG)
  return jnp.where(valid_BG & ~constant(x_BG, valid_BG), x_BG - mean, 0.0)


def constant(x_BG: Array, valid_BG: Array) -> Array:
  """Whether a group (B, 1) does not vary; see `CONSTANT`."""
  mean, deviation = group_statistics(x_BG, valid_BG)
  return deviation < CONSTANT * jnp.maximum(jnp.abs(mean), 1.0)


FORMS = ('max', 'add', 'root')
"""Forms of the divisor: `max(std, floor)`, `std + floor`, `sqrt(var + floor)`."""


def divisor(
  x_BG: Array, valid_BG: Array, floor: float, ddof: int = 0, scope: str = 'group', form: str = 'max'
) -> Array:
  """Computes the divisor of a centred reward, (B, 1) or (1, 1).

  Args:
    x_BG: the reward, not centred.
    valid_BG: samples that count.
    floor: bounds the amplification of noise where the deviation is small; see `FORMS`.
    ddof: 0 for the population's deviation, 1 for Bessel's correction. Published code uses either;
      at 8 samples they differ by 7 %.
    scope: 'group', 'batch' (one deviation of all samples, as Flow-GRPO's default), or 'none'
      (1: Dr. GRPO, arXiv 2503.20783).
    form: one of `FORMS`. 'max' does not change groups above the floor; code of GRPO uses 'add'.

  Raises:
    ValueError: the scope or the form is unknown.
  """
  if scope == 'none':
    return jnp.ones((1, 1))
  if scope == 'batch':
    x_BG, valid_BG = x_BG.reshape(1, -1), valid_BG.reshape(1, -1)
  elif scope != 'group':
    raise ValueError(f"advantage scope is {scope!r}; allowed: 'group', 'batch', 'none'")
  deviation = group_statistics(x_BG, valid_BG, ddof)[1]
  if form == 'max':
    return jnp.maximum(deviation, floor)
  if form == 'add':
    return deviation + floor
  if form == 'root':
    return jnp.sqrt(jnp.square(deviation) + floor)
  raise ValueError(f'advantage form is {form!r}; allowed: {FORMS}')


def normalise(
  x_BG: Array, valid_BG: Array, floor: float, ddof: int = 0, scope: str = 'group', form: str = 'max'
) -> Array:
  """Computes `(x - group mean) / std` (GRPO, arXiv 2402.03300, eq. 3); see `divisor`.

  It is 0 for invalid samples and in constant groups.
  """
  return centred(x_BG, valid_BG) / divisor(x_BG, valid_BG, floor, ddof, scope, form)


METHODS = {
  'normalize_then_sum': 'normalize_then_sum',
  'sum_then_normalize': 'sum_then_normalize',
  'gdpo': 'normalize_then_sum',
  'sum': 'sum_then_normalize',
}
"""Methods by config name; 'gdpo' and 'sum' are the names of the papers."""


def combine(
  rewards: Mapping[str, types.Rewards],
  weights: Mapping[str, float],
  method: str,
  floor: float,
  ddof: int = 0,
  scope: str = 'group',
  form: str = 'max',
  clip: float = 5.0,
) -> Advantages:
  """Computes the advantages of one task.

  Args:
    rewards: by name.
    weights: weight of every reward, by name.
    method: 'sum_then_normalize', or 'sum', adds the weighted rewards and normalises the sum in its
      group (LVRPO); 'normalize_then_sum', or 'gdpo', normalises every reward in its group, adds
      them with the weights, and whitens over the batch (GDPO, as in arXiv 2601.05242).
    floor, ddof, scope, form: see `divisor`; scope 'none' turns the whitening off as well.
    clip: bound on the absolute advantage.

  Raises:
    ValueError: the method is unknown.
  """
  if method not in METHODS:
    raise ValueError(f'advantage method is {method!r}; allowed: {", ".join(METHODS)}')
  sums_first = METHODS[method] == 'sum_then_normalize'
  valid = jnp.stack([r.valid_BG for r in rewards.values()]).all(0)
  parts = {}
  for name, reward in rewards.items():
    if sums_first:
      part = centred(reward.value_BG, valid)
    else:
      part = normalise(reward.value_BG, valid, floor, ddof, scope, form)
    parts[name] = weights[name] * part
  total = _add(parts.values())
  if sums_first:
    raw = _add(weights[name] * jnp.where(valid, r.value_BG, 0.0) for name, r in rewards.items())
    divide = divisor(raw, valid, floor, ddof, scope, form)
  else:
    divide = divisor(total, valid, floor, ddof, 'none' if scope == 'none' else 'batch', form)
  value = jnp.where(valid, total / divide, 0.0)
  variance = ops.masked_mean(jnp.square(value), valid)
  share = {
    name: ops.divide(ops.masked_mean(value * part / divide, valid), variance)
    for name, part in parts.items()
  }
  dead = {name: jnp.mean(constant(r.value_BG, valid)) for name, r in rewards.items()}
  return Advantages(value_BG=jnp.clip(value, -clip, clip), valid_BG=valid, share=share, dead=dead)


def _add(terms: Iterable[Array]) -> Array:
  """Adds at least one array, in order."""
  return cast(Array, sum(terms))
