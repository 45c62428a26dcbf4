"""Which steps of a trajectory an update replays: pure functions of (seed, iteration).

The same for a whole group, on any number of devices, and after a resume.
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
  """First of `size` consecutive steps out of `permitted`; all of them where the numbers are equal.

  Args:
    iteration: from 1.
    schedule: 'random' takes every start once, in a random order, before any of them again, so that
      none is rare by chance (Flow-GRPO-Fast draws from the first steps, which are the permitted
      ones here); 'sliding' moves by one step every `every` iterations (MixGRPO,
      arXiv 2507.21802) and starts again after the last full window, so that none is ever empty.

  Raises:
    ValueError: unknown schedule.
  """
  starts = permitted - size + 1
  if schedule == 'random':
    turn, place = divmod(iteration - 1, starts)
    return int(np.random.default_rng((seed, 7, turn)).permutation(starts)[place])
  if schedule == 'sliding':
    return (iteration - 1) // every % starts
  raise ValueError(f'align.rollout.window_schedule is {schedule!r}; allowed: {SCHEDULES}')


def noise_levels(eta: float, steps: int, low: float, high: float, grid: Array) -> Array:
  """Noise scales: `eta` on steps whose start time is in (low, high], never on the last step.

  The last step stays deterministic, or the scored image would keep its noise.
  """
  inside = (grid[:-1] > low) & (grid[:-1] <= high) & (jnp.arange(steps) < steps - 1)
  return jnp.where(inside, eta, 0.0)
