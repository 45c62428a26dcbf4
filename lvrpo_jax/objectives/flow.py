"""Flow objectives, per sample. Their mathematics of transitions is that of `lvrpo_jax.flow`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.objectives import policy_gradient

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
  return policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip), log_ratio


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
  return policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip), log_ratio


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
  loss = policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip)
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
  return policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip), log_ratio


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
  `align.optimizer.clip_norm` alone, and `align.image.kl_weight = 2e-5` gives their ratio.

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


class StepPoints(NamedTuple):
  """Steps of trajectories under the policy and under the one that sampled, for coupled objectives.

  Attributes:
    mean, old_mean, noise: (..., N, C); the sampled next latents are old_mean + std * noise.
    std: (...), deviation of the step.
    dt: (...), length of the step, negative.
    advantage: (...).
  """

  mean: Array
  old_mean: Array
  noise: Array
  std: Array
  dt: Array
  advantage: Array


class NoisedPoints(NamedTuple):
  """Freshly noised final latents, for decoupled objectives.

  Attributes:
    v, v_old: (..., N, C), velocities of the policy and of the old policy at `x_t`.
    x0, x_t: (..., N, C), clean and noised latents.
    t: (...), flow time of `x_t`.
    advantage: (...).
  """

  v: Array
  v_old: Array
  x0: Array
  x_t: Array
  t: Array
  advantage: Array


Loss = tuple[Array, dict[str, Array]]
"""A loss of every point, and metrics of every point by name."""


def _clip_metrics(log_ratio: Array, settings: types.Config) -> dict[str, Array]:
  return {'clip_fraction': jnp.abs(jnp.expm1(log_ratio)) > settings.clip}


def _diffusion_nft(points: NoisedPoints, settings: types.Config) -> Loss:
  loss = nft(*points, beta=settings.nft_beta, scale=settings.nft_advantage_scale)
  return loss, {'old_mse': velocity_mse(points.v, points.v_old)}


def _awm(points: NoisedPoints, settings: types.Config) -> Loss:
  loss, log_ratio = awm(*points, clip=settings.clip)
  return loss, _clip_metrics(log_ratio, settings)


def _flow_grpo(points: StepPoints, settings: types.Config) -> Loss:
  loss, log_ratio = sde(
    points.mean, points.old_mean, points.noise, points.std, points.advantage, settings.clip
  )
  return loss, _clip_metrics(log_ratio, settings)


def _flow_cps(points: StepPoints, settings: types.Config) -> Loss:
  loss, log_ratio = cps(
    points.mean, points.old_mean, points.noise, points.std, points.advantage, settings.clip
  )
  return loss, _clip_metrics(log_ratio, settings)


def _grpo_guard(points: StepPoints, settings: types.Config) -> Loss:
  loss, log_ratio = guard(
    points.mean, points.old_mean, points.noise, points.dt, points.advantage, settings.clip
  )
  return loss, _clip_metrics(log_ratio, settings)


def _grpo_guard_plain(points: StepPoints, settings: types.Config) -> Loss:
  loss, log_ratio = guard(
    points.mean, points.old_mean, points.noise, None, points.advantage, settings.clip
  )
  return loss, _clip_metrics(log_ratio, settings)


def _plain_copy(settings: types.Config, iteration: int) -> float:
  """Importance ratios are to the policy that sampled: the old policy is a plain copy."""
  del settings, iteration
  return 0.0


def _slow_copy(settings: types.Config, iteration: int) -> float:
  """DiffusionNFT's schedule, see `old_policy_decay`."""
  return old_policy_decay(
    iteration,
    settings.old_policy_flat,
    settings.old_policy_rise,
    settings.old_policy_max_decay,
  )


class FlowObjective(NamedTuple):
  """How an image loss is made.

  Attributes:
    loss: `(points, settings) -> (loss, metrics)` of `StepPoints` or `NoisedPoints`; `settings` is
      `config.align.image`.
    coupled: whether it trains on steps of the trajectory, instead of on re-noised final latents.
    sampler_policy: 'current' or 'old': the policy that samples the images. DiffusionNFT (arXiv
      2509.16117, alg. 1) samples with the old policy, around which its positive and negative
      velocities lie.
    old_decay: `(settings, iteration) -> d` of `old <- d old + (1 - d) policy` after the updates of
      an iteration, counted from 1; read where the objective is decoupled.
  """

  loss: Callable[..., Loss]
  coupled: bool
  sampler_policy: str = 'current'
  old_decay: Callable[[types.Config, int], float] = _plain_copy


OBJECTIVES = {
  'diffusion_nft': FlowObjective(
    _diffusion_nft, coupled=False, sampler_policy='old', old_decay=_slow_copy
  ),
  'awm': FlowObjective(_awm, coupled=False),
  'flow_grpo': FlowObjective(_flow_grpo, coupled=True),
  'flow_cps': FlowObjective(_flow_cps, coupled=True),
  'grpo_guard': FlowObjective(_grpo_guard, coupled=True),
  'grpo_guard_plain': FlowObjective(_grpo_guard_plain, coupled=True),
}
"""Image objectives by config name."""


def find(name: str) -> FlowObjective:
  """The objective that `config.align.image.objective` names, by name or import path.

  Raises:
    ValueError: there is none; the message names the key.
  """
  return symbols.find(name, 'config.align.image.objective', OBJECTIVES)
