"""Text objectives: losses of token or text ratios, and estimators of the KL to the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from jax import numpy as jnp

from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.objectives import policy_gradient

Array = types.Array


class TextPoints(NamedTuple):
  """Tokens of sampled texts, as an objective reads them.

  Attributes:
    log_ratio_BGT: log-ratios of the policy to the policy that sampled, 0 outside the texts.
    logp_BGT: log-probabilities under the policy.
    mask_BGT: True on the tokens of the texts.
    advantage_BG: advantage of every sample.
  """

  log_ratio_BGT: Array
  logp_BGT: Array
  mask_BGT: Array
  advantage_BG: Array


class TextSettings(Protocol):
  """Keys of `config.align.text` that an objective reads.

  Attributes:
    clip_low, clip_high: ratios are clipped to [1 - clip_low, 1 + clip_high].
  """

  clip_low: float
  clip_high: float


def token_ratios(points: TextPoints, settings: TextSettings) -> tuple[Array, Array]:
  """Clips the ratio of every token; returns (loss, log-ratio that was clipped), per token."""
  loss_BGT = policy_gradient.clipped_surrogate(
    points.log_ratio_BGT,
    points.advantage_BG[..., None],
    settings.clip_low,
    settings.clip_high,
  )
  return loss_BGT, points.log_ratio_BGT


def sequence_ratios(points: TextPoints, settings: TextSettings) -> tuple[Array, Array]:
  """Clips one ratio a text, which all its tokens share (GSPO, arXiv 2507.18071)."""
  log_ratio_BG1 = policy_gradient.sequence_log_ratio(points.log_ratio_BGT, points.mask_BGT)
  log_ratio_BGT = jnp.broadcast_to(log_ratio_BG1, points.log_ratio_BGT.shape)
  return token_ratios(points._replace(log_ratio_BGT=log_ratio_BGT), settings)


def cut_weights(points: TextPoints, settings: TextSettings) -> tuple[Array, Array]:
  """Caps the ratios, which are weights here, at 1 + `clip_high` (CISPO, arXiv 2506.13585)."""
  loss_BGT = policy_gradient.cispo_surrogate(
    points.log_ratio_BGT, points.logp_BGT, points.advantage_BG[..., None], 1 + settings.clip_high
  )
  return loss_BGT, points.log_ratio_BGT


class TextObjective(NamedTuple):
  """A text objective: its loss, and the weights of tokens in it.

  Attributes:
    loss: `(points, settings) -> (loss, log-ratio that was clipped)`, per token.
    aggregation: see `token_weights`.
    clips_low: True if ratios below 1 - clip_low are clipped.
  """

  loss: Callable[[TextPoints, TextSettings], tuple[Array, Array]]
  aggregation: str
  clips_low: bool = True


OBJECTIVES = {
  'grpo': TextObjective(token_ratios, 'sequence'),  # arXiv 2402.03300
  # arXiv 2503.20783; with align.advantage.scope = 'none'
  'dr_grpo': TextObjective(token_ratios, 'constant'),
  'dapo': TextObjective(token_ratios, 'token'),  # arXiv 2503.14476
  'gspo': TextObjective(sequence_ratios, 'sequence'),
  'cispo': TextObjective(cut_weights, 'token', clips_low=False),
}
"""Text objectives by config name."""


def find(name: str) -> TextObjective:
  """Returns the objective that `config.align.text.objective` names, by name or import path.

  Raises:
    ValueError: there is no such objective; the message names the key.
  """
  return symbols.find(name, 'config.align.text.objective', OBJECTIVES)


def k1(logp: Array, reference_logp: Array) -> Array:
  """Computes `log p - log p_ref`, unbiased; it may be negative.

  Source of all three estimators: http://joschu.net/blog/kl-approx.html
  """
  return logp - reference_logp


def k2(logp: Array, reference_logp: Array) -> Array:
  """Computes `(log p - log p_ref)^2 / 2`."""
  return jnp.square(logp - reference_logp) / 2


def k3(logp: Array, reference_logp: Array, bound: float = policy_gradient.BOUND) -> Array:
  """Computes `e^d - d - 1` with `d = log p_ref - log p`, unbiased and never negative.

  `d` is bounded from above. A token that is likely under the reference and has almost no
  probability under the policy gives a large finite penalty without a gradient, not an overflow.
  """
  d = jnp.minimum(reference_logp - logp, bound)
  return jnp.exp(d) - d - 1


KL: dict[str, Callable[[Array, Array], Array]] = {'k1': k1, 'k2': k2, 'k3': k3}
"""Estimators of the KL by name."""


def token_weights(mask_BGT: Array, valid_BG: Array, aggregation: str) -> Array:
  """Returns the weight of every token in the loss; divide by `total_weight` of the whole batch.

  Args:
    mask_BGT: True on the tokens of the texts.
    valid_BG: True for samples that have an advantage.
    aggregation: 'token' gives all tokens the same weight (DAPO), 'sequence' gives all texts the
      same weight (GRPO: 1 / |o_i|), 'constant' divides by the longest possible text (Dr. GRPO:
      1 / T).

  Raises:
    ValueError: the aggregation is unknown.
  """
  mask = mask_BGT.astype(jnp.float32) * valid_BG.astype(jnp.float32)[..., None]
  if aggregation == 'token':
    return mask
  if aggregation == 'sequence':
    return mask / jnp.maximum(jnp.sum(mask_BGT, axis=-1, keepdims=True), 1)
  if aggregation == 'constant':
    return mask / mask_BGT.shape[-1]
  raise ValueError(f"text aggregation is {aggregation!r}; allowed: 'token', 'sequence', 'constant'")


def total_weight(mask_BGT: Array, valid_BG: Array, aggregation: str) -> Array:
  """Returns the divisor of a weighted loss: the count of valid tokens ('token') or texts."""
  if aggregation == 'constant':
    return jnp.sum(valid_BG.astype(jnp.float32))
  return jnp.sum(token_weights(mask_BGT, valid_BG, aggregation))
