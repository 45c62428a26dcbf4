"""Penalties to the reference by config name, and a controller of their weight."""

from __future__ import annotations

from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import policy_gradient
from lvrpo_jax.objectives import text as text_objectives

Array = types.Array

TEXT = ('k1', 'k2', 'k3', 'k3_ratio')
IMAGE = ('velocity', 'gaussian', 'gaussian_per_time')


def of_text(kind: str, logp: Array, reference_logp: Array, log_ratio: Array) -> Array:
  """Computes the penalty of every token.

  Args:
    kind: an estimator of `objectives.text`; 'k3_ratio' weights k3 by the policy's ratio to the
      policy that sampled, which makes it unbiased after the first update (as TRL does).
    logp: log-probabilities under the policy.
    reference_logp: log-probabilities under the reference.
    log_ratio: log-ratios of the policy to the policy that sampled.

  Raises:
    ValueError: the kind is unknown.
  """
  if kind == 'k3_ratio':
    return policy_gradient.ratio_of(log_ratio) * text_objectives.k3(logp, reference_logp)
  if kind not in text_objectives.KL:
    raise ValueError(f'align.text.kl is {kind!r}; allowed: {TEXT}')
  return text_objectives.KL[kind](logp, reference_logp)


def of_steps(kind: str, mean: Array, reference_mean: Array, std: Array, dt: Array) -> Array:
  """Computes the penalty of every replayed step, per sample and latent value.

  Args:
    kind: 'gaussian' is the exact KL; 'gaussian_per_time' leaves the step's length out of the
      variance, as Flow-GRPO's code does, and is |dt| times as large.
    mean, reference_mean: means of the transition under the policy and under the reference.
    std: deviation of the transition.
    dt: length of the step, negative.

  Raises:
    ValueError: the kind is unknown.
  """
  exact = flow_objectives.gaussian_kl(mean, reference_mean, std)
  if kind == 'gaussian':
    return exact
  if kind == 'gaussian_per_time':
    return exact * jnp.abs(dt)
  raise ValueError(f'align.image.kl is {kind!r}; allowed: {IMAGE}')


def adapted(factor: float, value: float, target: float, rate: float, bound: float = 100.0) -> float:
  """Returns the next factor of a coefficient that holds a penalty at `target`.

  The controller (arXiv 1909.08593, sec. 2.2) is
  `factor * (1 + rate * clip(value / target - 1, -0.2, 0.2))`, limited to [1 / bound, bound].
  """
  error = min(max(value / target - 1.0, -0.2), 0.2)
  return min(max(factor * (1.0 + rate * error), 1.0 / bound), bound)
