"""Schedules of noisy and of replayed steps, as pure functions of the seed and the iteration.

All samples of a group have the same steps, on any number of devices and after a resume.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp
import numpy as np

Array = jax.Array

SCHEDULES = ('random', 'sliding')


def window_start(
  schedule: str, seed: int, iteration: int, permitted: int, size: int, every: int
) -> int:
  """Returns the first of `size` consecutive steps out of `permitted` ones, counted from 0.

  It is 0 if the window holds all permitted steps.

  Args:
    schedule: 'random' takes every start once, in a random order, before it repeats one, so that
      none is rare by chance (Flow-GRPO-Fast draws from the first steps, which are the permitted
      ones here); 'sliding' moves by one step every `every` iterations (MixGRPO,
      arXiv 2507.21802) and starts again after the last full window, so that no window is empty.
    seed: of the run.
    iteration: index of the iteration, from 1.
    permitted: count of steps that may be chosen.
    size: count of steps in the window.
    every: iterations between two moves of a sliding window.

  Raises:
    ValueError: the schedule is unknown.
  """
  starts = permitted - size + 1
  if schedule == 'random':
    turn, place = divmod(iteration - 1, starts)
    return int(np.random.default_rng((seed, 7, turn)).permutation(starts)[place])
  if schedule == 'sliding':
    return (iteration - 1) // every % starts
  raise ValueError(f'align.rollout.window_schedule is {schedule!r}; allowed: {SCHEDULES}')


def noise_levels(eta: float, steps: int, low: float, high: float, grid: Array) -> Array:
  """Returns noise levels (T,): `eta` on steps that start at a time in (low, high], else 0.

  The last step is always deterministic; with noise, the scored image would keep that noise.
  """
  inside = (grid[:-1] > low) & (grid[:-1] <= high) & (jnp.arange(steps) < steps - 1)
  return jnp.where(inside, eta, 0.0)
