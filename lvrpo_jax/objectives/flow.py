"""Flow objectives, per sample. Their mathematics of transitions is that of `lvrpo_jax.flow`."""

from __future__ import annotations

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax.objectives import text as text_objectives

Array = jax.Array


TOKENS = (-2, -1)
"""Axes of one sample: image tokens and channels."""


def sde(
  mean: Array, old_mean: Array, noise: Array, std: Array, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Flow-GRPO's clipped loss of one step (arXiv 2505.05470), per sample.

  Args:
    mean, old_mean, noise: (..., N, C); the sampled next latents are old_mean + std * noise.
    clip: bound on |ratio - 1|. The log-ratio is a mean over N * C values.

  Returns:
    (loss, log_ratio), both (...).
  """
  log_ratio = flow.log_ratio(noise, mean, old_mean, std, TOKENS)
  return text_objectives.clipped(log_ratio, advantage, clip, clip), log_ratio


def cps(
  mean: Array, old_mean: Array, noise: Array, std: Array, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Flow-CPS's clipped loss of one step (arXiv 2509.05952), per sample.

  Its log-probability is `-mean((x' - mean)^2)`, without the step's variance, so its clips are not
  those of `sde`. With `x' = old_mean + std * noise` the difference of two of them is
  `mean(2 std noise d - d^2)`, `d = mean - old_mean`.

  Args, returns: as `sde`.
  """
  moved = mean - old_mean
  log_ratio = jnp.mean((2 * std[..., None, None] * noise - moved) * moved, TOKENS)
  return text_objectives.clipped(log_ratio, advantage, clip, clip), log_ratio


def guard(
  mean: Array, old_mean: Array, noise: Array, dt: Array | None, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """GRPO-Guard's loss of one step (arXiv 2510.22319), per sample: ratios of all times alike.

  The log-ratio of `sde` is centred and scaled by the step's deviation, which cancels and leaves
  `mean(noise * (mean - old_mean))`; the loss is divided by the step's length `|dt|`, where one is
  given (codebases differ).

  Returns:
    (loss, log_ratio), both (...).
  """
  log_ratio = jnp.mean(noise * (mean - old_mean), TOKENS)
  loss = text_objectives.clipped(log_ratio, advantage, clip, clip)
  return loss if dt is None else loss / jnp.abs(dt), log_ratio


def awm(
  v: Array, v_old: Array, x0: Array, x_t: Array, t: Array, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Advantage-weighted matching (arXiv 2509.25050), per sample: PPO on a flow-matching likelihood.

  The log-likelihood is `-mean((v - (eps - x0))^2)`; `eps - x0 = (x_t - x0) / t`.

  Args:
    v, v_old, x0, x_t, t: as in `nft`.
    clip: bound on |ratio - 1|.

  Returns:
    (loss, log_ratio), both (...).
  """
  v_old = jax.lax.stop_gradient(v_old)
  target = (x_t - x0) / jnp.maximum(t, 1e-3)[..., None, None]
  # A difference of squares as a product: equal velocities give exactly 0.
  log_ratio = jnp.mean((v_old - v) * (v_old + v - 2 * target), TOKENS)
  return text_objectives.clipped(log_ratio, advantage, clip, clip), log_ratio


def nft(
  v: Array,
  v_old: Array,
  x0: Array,
  x_t: Array,
  t: Array,
  advantage: Array,
  beta: float,
  scale: float,
) -> Array:
  """DiffusionNFT's forward-process loss (arXiv 2509.16117), per sample.

  The policy `v` is mixed with the old one into an implicit positive and negative velocity; both
  regress the clean sample, weighted by the optimality probability `r` and `1 - r`. Each squared
  error is divided by its own mean absolute error, a constant for the gradient. The authors' code
  takes five times this and adds 1e-4 times `velocity_mse`; to Adam a common factor matters through
  `align.clip_norm` alone, and `align.velocity_penalty = 2e-5` gives their ratio.

  Args:
    v, v_old, x0, x_t: (..., N, C); `v_old` and `x0` carry no gradient.
    t: (...), flow time of `x_t`.
    beta: strength of the mixture.
    scale: advantage at which r saturates: `r = clip(1/2 + A / (2 scale), 0, 1)`.
  """
  v_old = jax.lax.stop_gradient(v_old)
  probability = jnp.clip(0.5 + advantage / (2 * scale), 0.0, 1.0)
  t = t[..., None, None]

  def error(mixed):
    off = x_t - t * mixed - x0
    weight = jax.lax.stop_gradient(jnp.maximum(jnp.mean(jnp.abs(off), TOKENS), 1e-5))
    return jnp.mean(jnp.square(off), TOKENS) / weight

  positive = error(beta * v + (1 - beta) * v_old)
  negative = error((1 + beta) * v_old - beta * v)
  return (probability * positive + (1 - probability) * negative) / beta


def velocity_mse(v: Array, reference_v: Array) -> Array:
  """Mean squared difference of velocities, per sample: the default penalty to the reference."""
  return jnp.mean(jnp.square(v - jax.lax.stop_gradient(reference_v)), TOKENS)


def gaussian_kl(mean: Array, reference_mean: Array, std: Array) -> Array:
  """Exact KL of two Gaussian transitions of one deviation, per sample and latent value.

  `mean((mu - mu_ref)^2) / (2 std^2)`, where `std` is that of the whole step: it holds the factor
  sqrt(|dt|) that common implementations leave out.
  """
  return jnp.mean(jnp.square(mean - reference_mean), TOKENS) / (2 * jnp.square(std))


def old_policy_decay(iteration: int, flat: int, rise: float, hold: float) -> float:
  """DiffusionNFT's schedule of the old policy: `old <- d old + (1 - d) policy`.

  d is 0 up to `flat`, then rises by `rise` an iteration up to `hold`.
  """
  return 0.0 if iteration < flat else min((iteration - flat) * rise, hold)


DECOUPLED = ('nft', 'awm')
"""Objectives on freshly noised final images."""


COUPLED = ('sde', 'cps', 'guard', 'guard_plain')
"""Objectives on steps of the rollout."""
