"""Guided sampling: three branches of a context, mixed at every step of the flow.

The recipe is that of BAGEL's released inference (arXiv 2505.14683): one velocity with the whole
context, one without the last text, one without the images; guidance is on in an interval of the
flow time only.
"""

from __future__ import annotations

from typing import NamedTuple

from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax.rollouts import image

Array = jax.Array


class Branches(NamedTuple):
  """Velocities of the same latents under three contexts; see `image.Velocity`."""
  main: image.Velocity
  without_text: image.Velocity
  without_images: image.Velocity


@struct.dataclass
class Guidance:
  """Strength of guidance.

  Attributes:
    text_scale, image_scale: 1 turns a branch off; see `flow.guide`.
    low, high: guidance is on for low < t <= high.
    renorm: 'global' (norm over one image), 'channel' or 'text_channel'.
    renorm_min: floor of the renormalisation; 1 turns it off.
  """
  text_scale: float
  image_scale: float
  low: float
  high: float
  renorm: str = struct.field(pytree_node=False)
  renorm_min: float = 0.


class Walk(NamedTuple):
  """Latents and guided velocities before every step, the scales in force, the final latents."""
  x_TBGNC: Array
  v_TBGNC: Array
  text_scale_T: Array
  image_scale_T: Array
  latents_BGNC: Array


def scales(guidance: Guidance, t: Array) -> tuple[Array, Array]:
  """Text and image scale in force at time t: 1 outside the interval."""
  inside = (t > guidance.low) & (t <= guidance.high)
  return (jnp.where(inside, guidance.text_scale, 1.), jnp.where(inside, guidance.image_scale, 1.))


def velocity(branches: Branches, guidance: Guidance, x_BGNC: Array, t: Array) -> Array:
  """Guided velocity (B, G, N, C) at the scalar time t; images are renormalised one by one."""
  time = jnp.broadcast_to(t, x_BGNC.shape[:2])
  text_scale, image_scale = scales(guidance, t)
  guide = lambda *v: flow.guide(
      *v, text_scale, image_scale, guidance.renorm, guidance.renorm_min)
  # A branch that stands for another one runs once.
  computed = {branch: branch(x_BGNC, time) for branch in branches}
  return jax.vmap(jax.vmap(guide))(*(computed[branch] for branch in branches))


def sample(branches: Branches, guidance: Guidance, x_BGNC: Array, grid: Array) -> Walk:
  """Walks the probability-flow ODE from `x_BGNC` at `grid[0]`, keeping the steps.

  Args:
    grid: T + 1 falling times, see `flow.time_grid`.
  """
  def step(x, times):
    t, t_next = times
    v = velocity(branches, guidance, x, t)
    return flow.ode_step(x, v, t, t_next), (x, v, *scales(guidance, t))

  x, steps = jax.lax.scan(step, x_BGNC, (grid[:-1], grid[1:]))
  return Walk(*steps, x)
