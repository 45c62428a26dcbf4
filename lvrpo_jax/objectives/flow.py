"""Image objectives of flow models, per sample; `lvrpo_jax.flow` computes the transitions."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.objectives import policy_gradient

Array = types.Array

TOKENS = (-2, -1)
"""Axes of one sample: image tokens and channels."""


def sde(
  mean: Array, old_mean: Array, noise: Array, std: Array, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Computes Flow-GRPO's clipped loss of one step (arXiv 2505.05470), per sample.

  Args:
    mean, old_mean, noise: (..., N, C); the sampled next latents are old_mean + std * noise.
    std: (...), deviation of the step.
    advantage: (...).
    clip: bound on |ratio - 1|. The log-ratio is a mean over N * C values.

  Returns:
    (loss, log_ratio), both (...).
  """
  log_ratio = flow.log_ratio(noise, mean, old_mean, std, TOKENS)
  return policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip), log_ratio


def cps(
  mean: Array, old_mean: Array, noise: Array, std: Array, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Computes Flow-CPS's clipped loss of one step (arXiv 2509.05952), per sample.

  Its log-probability is `-mean((x' - mean)^2)`, without the step's variance, so its clip range
  differs from that of `sde`. With `x' = old_mean + std * noise` the difference of two of them is
  `mean(2 std noise d - d^2)`, `d = mean - old_mean`.

  Arguments and results are those of `sde`.
  """
  moved = mean - old_mean
  log_ratio = jnp.mean((2 * std[..., None, None] * noise - moved) * moved, TOKENS)
  return policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip), log_ratio


def guard(
  mean: Array, old_mean: Array, noise: Array, dt: Array | None, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Computes GRPO-Guard's loss of one step (arXiv 2510.22319), per sample.

  The log-ratio of `sde` is centred and scaled by the step's deviation, which cancels and leaves
  `mean(noise * (mean - old_mean))`: ratios of all times then have one distribution.

  Args:
    mean, old_mean, noise: (..., N, C), as in `sde`.
    dt: (...), length of the step, by whose absolute value the loss is divided; None for no
      division (published code differs).
    advantage: (...).
    clip: bound on |ratio - 1|.

  Returns:
    (loss, log_ratio), both (...).
  """
  log_ratio = jnp.mean(noise * (mean - old_mean), TOKENS)
  loss = policy_gradient.clipped_surrogate(log_ratio, advantage, clip, clip)
  return loss if dt is None else loss / jnp.abs(dt), log_ratio


def awm(
  v: Array, v_old: Array, x0: Array, x_t: Array, t: Array, advantage: Array, clip: float
) -> tuple[Array, Array]:
  """Computes the loss of advantage-weighted matching (arXiv 2509.25050), per sample.

  It is PPO's loss on a flow-matching likelihood. The log-likelihood is `-mean((v - (eps - x0))^2)`,
  with `eps - x0 = (x_t - x0) / t`.

  Args:
    v, v_old, x0, x_t, t, advantage: as in `nft`.
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
  """Computes DiffusionNFT's forward-process loss (arXiv 2509.16117), per sample.

  The policy `v` is mixed with the old policy into an implicit positive and an implicit negative
  velocity. Both regress the clean sample, weighted by the optimality probability `r` and `1 - r`.
  Each squared error is divided by its own mean absolute error, which has no gradient. The authors'
  code takes five times this loss and adds 1e-4 times `velocity_mse`. With Adam, a common factor
  acts through `align.optimizer.clip_norm` alone; `align.image.kl_weight = 2e-5` gives their ratio.

  Args:
    v, v_old, x0, x_t: (..., N, C); `v_old` and `x0` carry no gradient.
    t: (...), flow time of `x_t`.
    advantage: (...).
    beta: strength of the mixture.
    scale: advantage at which r saturates: `r = clip(1/2 + A / (2 scale), 0, 1)`.
  """
  v_old = jax.lax.stop_gradient(v_old)
  probability = jnp.clip(0.5 + advantage / (2 * scale), 0.0, 1.0)
  t = t[..., None, None]

  def error(mixed: Array) -> Array:
    off = x_t - t * mixed - x0
    weight = jax.lax.stop_gradient(jnp.maximum(jnp.mean(jnp.abs(off), TOKENS), 1e-5))
    return jnp.mean(jnp.square(off), TOKENS) / weight

  positive = error(beta * v + (1 - beta) * v_old)
  negative = error((1 + beta) * v_old - beta * v)
  return (probability * positive + (1 - probability) * negative) / beta


def velocity_mse(v: Array, reference_v: Array) -> Array:
  """Computes the mean squared difference of velocities, per sample: the default penalty."""
  return jnp.mean(jnp.square(v - jax.lax.stop_gradient(reference_v)), TOKENS)


def gaussian_kl(mean: Array, reference_mean: Array, std: Array) -> Array:
  """Computes the exact KL of two Gaussian transitions of one deviation, per latent value.

  It is `mean((mu - mu_ref)^2) / (2 std^2)`, where `std` is the deviation of the whole step and
  includes the factor sqrt(|dt|), which common implementations leave out.
  """
  return jnp.mean(jnp.square(mean - reference_mean), TOKENS) / (2 * jnp.square(std))


def old_policy_decay(iteration: int, flat: int, rise: float, hold: float) -> float:
  """Returns the decay d of DiffusionNFT's old policy: `old <- d old + (1 - d) policy`.

  It is 0 before iteration `flat`, and then rises by `rise` an iteration up to `hold`.
  """
  return 0.0 if iteration < flat else min((iteration - flat) * rise, hold)


class StepPoints(NamedTuple):
  """Steps of trajectories under the policy and the policy that sampled, for coupled objectives.

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
    x0, x_t: (..., N, C), clean latents and noised latents.
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
"""The loss of every point, and metrics of every point by name."""


def _clip_metrics(log_ratio: Array, settings: types.Config) -> dict[str, Array]:
  """Returns whether the ratio of every point is clipped."""
  return {'clip_fraction': jnp.abs(jnp.expm1(log_ratio)) > settings.clip}


def _diffusion_nft(points: NoisedPoints, settings: types.Config) -> Loss:
  """Computes the loss of `nft`."""
  loss = nft(
    v=points.v,
    v_old=points.v_old,
    x0=points.x0,
    x_t=points.x_t,
    t=points.t,
    advantage=points.advantage,
    beta=settings.nft_beta,
    scale=settings.nft_advantage_scale,
  )
  return loss, {'old_mse': velocity_mse(points.v, points.v_old)}


def _awm(points: NoisedPoints, settings: types.Config) -> Loss:
  """Computes the loss of `awm`."""
  loss, log_ratio = awm(
    v=points.v,
    v_old=points.v_old,
    x0=points.x0,
    x_t=points.x_t,
    t=points.t,
    advantage=points.advantage,
    clip=settings.clip,
  )
  return loss, _clip_metrics(log_ratio, settings)


def _by_deviation(objective: Callable[..., tuple[Array, Array]]) -> Callable[..., Loss]:
  """Returns the loss of `sde` or `cps`, whose ratios need the deviation of a step."""

  def loss(points: StepPoints, settings: types.Config) -> Loss:
    loss, log_ratio = objective(
      points.mean, points.old_mean, points.noise, points.std, points.advantage, settings.clip
    )
    return loss, _clip_metrics(log_ratio, settings)

  return loss


def _grpo_guard(points: StepPoints, settings: types.Config, divide: bool) -> Loss:
  """Computes the loss of `guard`, divided by the step's length or not."""
  dt = points.dt if divide else None
  loss, log_ratio = guard(
    points.mean, points.old_mean, points.noise, dt, points.advantage, settings.clip
  )
  return loss, _clip_metrics(log_ratio, settings)


def _plain_copy(settings: types.Config, iteration: int) -> float:
  """Returns 0: importance ratios are to the policy that sampled, so the old policy is a copy."""
  del settings, iteration
  return 0.0


def _slow_copy(settings: types.Config, iteration: int) -> float:
  """Returns the decay of DiffusionNFT's schedule, see `old_policy_decay`."""
  return old_policy_decay(
    iteration,
    settings.old_policy_flat,
    settings.old_policy_rise,
    settings.old_policy_max_decay,
  )


class FlowObjective(NamedTuple):
  """An image objective: its loss, and the samples and policies that it needs.

  Attributes:
    loss: `(points, settings) -> (loss, metrics)` of `StepPoints` or `NoisedPoints`; `settings` is
      `config.align.image`.
    coupled: True for training on steps of the trajectory, False on re-noised final latents.
    sampler_policy: 'current' or 'old': the policy that samples the images. DiffusionNFT (arXiv
      2509.16117, alg. 1) samples with the old policy, around which its positive and negative
      velocities lie.
    old_decay: `(settings, iteration) -> d` of `old <- d old + (1 - d) policy` after the updates of
      an iteration, counted from 1; read by decoupled objectives only.
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
  'flow_grpo': FlowObjective(_by_deviation(sde), coupled=True),
  'flow_cps': FlowObjective(_by_deviation(cps), coupled=True),
  'grpo_guard': FlowObjective(functools.partial(_grpo_guard, divide=True), coupled=True),
  'grpo_guard_plain': FlowObjective(functools.partial(_grpo_guard, divide=False), coupled=True),
}
"""Image objectives by config name."""


def find(name: str) -> FlowObjective:
  """Returns the objective that `config.align.image.objective` names, by name or import path.

  Raises:
    ValueError: there is no such objective; the message names the key.
  """
  return symbols.find(name, 'config.align.image.objective', OBJECTIVES)
