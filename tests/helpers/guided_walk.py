"""The released guidance over a whole grid of times, with all its steps, for comparison with goldens."""

from typing import NamedTuple

import jax

from lvrpo_jax import flow
from lvrpo_jax.rollouts import guidance as guidance_lib


class Walk(NamedTuple):
  """Latents and guided velocities before every step, the scales in force, the final latents."""

  x_TBGNC: jax.Array
  v_TBGNC: jax.Array
  text_scale_T: jax.Array
  image_scale_T: jax.Array
  latents_BGNC: jax.Array


def sample_guided(
  branches: guidance_lib.Branches,
  guidance: guidance_lib.Guidance,
  x_BGNC: jax.Array,
  grid: jax.Array,
) -> Walk:
  """Walks the probability-flow ODE from `x_BGNC` at `grid[0]`, keeping the steps.

  Args:
    grid: T + 1 falling times, see `flow.time_grid`.
  """

  def step(x, times):
    t, t_next = times
    v = guidance_lib.mix_branches(branches, guidance, x, t)
    return flow.ode_step(x, v, t, t_next), (x, v, *guidance_lib.scales_at(guidance, t))

  x, steps = jax.lax.scan(step, x_BGNC, (grid[:-1], grid[1:]))
  return Walk(*steps, x)
