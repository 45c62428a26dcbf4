"""Dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2): prompts that teach nothing are replaced.

A group whose rewards are all alike has no advantage. Fresh prompts are sampled in further rounds of
the same shape, and those whose groups vary take the places of those that do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.parallel import multihost


class ScoredTrajectory(NamedTuple):
  """What a task has sampled and how it was scored; every array has a leading axis of prompts.

  Attributes:
    trajectory: what is kept of the rollout.
    rewards: components by name.
    facts: for the log.
    pixels: uint8 (B, G, Y, X, 3), or None for answers.
  """

  trajectory: Any
  rewards: dict[str, types.Rewards]
  facts: dict[str, Any]
  pixels: Any


def informative(rewards: dict[str, types.Rewards], component: str = '') -> np.ndarray:
  """Which prompts (B,) teach something: the component varies among their valid samples, or, where
  there is no such component, any of them does."""
  if component in rewards:
    rewards = {component: rewards[component]}
  valid = np.stack([multihost.gather_rows(r.valid_BG) for r in rewards.values()]).all(0)
  return np.any(
    [
      ~np.asarray(advantage_lib.constant(multihost.gather_rows(r.value_BG), valid))[:, 0]
      for r in rewards.values()
    ],
    axis=0,
  )


def replacement_rows(dead: np.ndarray, alive: np.ndarray) -> np.ndarray:
  """Rows (B,) of the first batch followed by a second one: fresh rows in the place of dead ones.

  Args:
    dead: prompts (B,) of the first batch that may go.
    alive: prompts (B,) of the second one that may come; those left over are dropped.
  """
  out = np.arange(len(dead))
  count = min(dead.sum(), alive.sum())
  out[np.flatnonzero(dead)[:count]] = len(dead) + np.flatnonzero(alive)[:count]
  return out


@jax.jit
def _take(old: Any, new: Any, rows_B: jax.Array) -> Any:
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows_B], old, new)


def replace_constant_groups(
  found: dict[str, ScoredTrajectory],
  rounds: int,
  component: str,
  draw: Callable[[list[str]], dict[str, ScoredTrajectory]],
  place: Callable[[Any], Any],
) -> tuple[dict[str, ScoredTrajectory], dict[str, float]]:
  """Replaces prompts of constant groups, for at most so many rounds.

  Args:
    component: see `informative`.
    draw: samples fresh prompts of the named tasks.
    place: puts rows on the devices of the run's mesh.

  Returns:
    What was sampled, and for every task how many rounds it took and the fraction of prompts that
    still teach nothing.
  """
  dead = {task: ~informative(s.rewards, component) for task, s in found.items()}
  used = dict.fromkeys(found, 0)
  for _ in range(rounds):
    wanted = [task for task, rows in dead.items() if rows.any()]
    if not wanted:
      break
    for task, fresh in draw(wanted).items():
      used[task] += 1
      alive = informative(fresh.rewards, component)
      rows = replacement_rows(dead[task], alive)
      # Some arrays were made on one device and follow the others as long as they are not moved.
      found[task] = place(_take(found[task], fresh, rows))
      dead[task] &= rows < len(rows)
  return found, {
    **{f'dynamic_sampling/{task}/rounds': float(n) for task, n in used.items()},
    **{f'dynamic_sampling/{task}/dead': float(rows.mean()) for task, rows in dead.items()},
  }
