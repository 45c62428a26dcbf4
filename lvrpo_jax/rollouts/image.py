"""Image rollouts: one scan over denoising steps for all rows."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types

Array = types.Array
Velocity = Callable[[Array, Array], Array]
"""`velocity(x_BGNC, time_BG) -> v_BGNC` of the policy that samples, guidance included."""


def initial_noise(key_BG: Array, shape: tuple[int, int]) -> Array:
  """Draws the latents (B, G, N, C) at t = 1; a row depends on its own key alone."""
  return ops.normal_rows(ops.fold_each(key_BG, 0), shape)


def transition(
  velocity: Velocity, sampler: str, x: Array, t: Array, t_next: Array, first_t: Array, eta: Array
) -> flow.Transition:
  """Computes the Gaussian transition of one step of a rollout."""
  v = velocity(x, jnp.broadcast_to(t, x.shape[:2]))
  return flow.STEPS[sampler](x, v, t, t_next, first_t, eta)


def sample_sde(
  velocity: Velocity, key_BG: Array, shape: tuple[int, int], grid: Array, eta_T: Array, sampler: str
) -> types.ImageTrajectory:
  """Samples a trajectory for every row.

  Args:
    velocity: the policy on its contexts.
    key_BG: one PRNG key a row; a row does not depend on other rows.
    shape: (image tokens, channels).
    grid: T + 1 falling times, see `flow.time_grid`.
    eta_T: noise level of every step; 0 makes a step deterministic.
    sampler: a key of `flow.STEPS`.
  """

  def step(x: Array, inputs: types.Tree) -> tuple[Array, tuple[Array, ...]]:
    index, t, t_next, eta = inputs
    mean, std = transition(velocity, sampler, x, t, t_next, grid[1], eta)
    noise = ops.normal_rows(ops.fold_each(key_BG, index + 1), shape)
    return mean + std * noise, (x, noise, mean, std)

  times, next_times = grid[:-1], grid[1:]
  x, (xs, noises, means, stds) = jax.lax.scan(
    step, initial_noise(key_BG, shape), (jnp.arange(len(times)), times, next_times, eta_T)
  )
  return types.ImageTrajectory(
    x_TBGNC=xs,
    noise_TBGNC=noises,
    mean_TBGNC=means,
    time_T=times,
    next_time_T=next_times,
    std_T=stds,
    latents_BGNC=x,
    guidance=jnp.float32(1.0),
  )


def slice_prompts(rollout: types.ImageTrajectory, start: int, stop: int) -> types.ImageTrajectory:
  """Returns the rollout of the prompts start, ..., stop - 1."""
  return rollout.replace(
    x_TBGNC=rollout.x_TBGNC[:, start:stop],
    noise_TBGNC=rollout.noise_TBGNC[:, start:stop],
    mean_TBGNC=rollout.mean_TBGNC[:, start:stop],
    latents_BGNC=rollout.latents_BGNC[start:stop],
  )


def sample_ode(velocity: Velocity, key_BG: Array, shape: tuple[int, int], grid: Array) -> Array:
  """Samples final latents by the probability-flow ODE; no trajectory is kept."""

  def step(x: Array, times: tuple[Array, Array]) -> tuple[Array, None]:
    t, t_next = times
    v = velocity(x, jnp.broadcast_to(t, x.shape[:2]))
    return flow.ode_step(x, v, t, t_next), None

  return jax.lax.scan(step, initial_noise(key_BG, shape), (grid[:-1], grid[1:]))[0]
