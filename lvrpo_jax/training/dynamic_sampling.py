"""Dynamic sampling (DAPO, arXiv 2503.14476, sec. 3.2): replaces prompts of constant groups.

A group whose rewards are all equal has no advantage. Fresh prompts are sampled in further rounds of
the same shape, and those whose groups vary replace those whose groups do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rollouts import think


class ScoredTrajectory(NamedTuple):
  """Samples of a task with their rewards; every array has a leading axis of prompts.

  Attributes:
    trajectory: what is kept of the rollout.
    rewards: value and validity (B, G) by name.
    facts: further values (B, G) for metrics.
    pixels: uint8 (B, G, Y, X, 3), or None for answers.
  """

  trajectory: types.SampledTexts | types.SampledImages | think.SampledPlans
  rewards: dict[str, types.Rewards]
  facts: dict[str, types.Array]
  pixels: types.Array | None


def informative(rewards: dict[str, types.Rewards], component: str = '') -> np.ndarray:
  """Tells which prompts (B,) have an advantage: a reward varies among their valid samples.

  Args:
    rewards: value and validity (B, G) by name.
    component: name of the reward that has to vary; where there is none of that name, any may.
  """
  if component in rewards:
    rewards = {component: rewards[component]}
  valid_BG: np.ndarray = np.all(
    [multihost.gather_rows(reward.valid_BG) for reward in rewards.values()], axis=0
  )

  def varies_B(reward: types.Rewards) -> np.ndarray:
    value_BG = multihost.gather_rows(reward.value_BG)
    constant_B1 = advantage_lib.constant(types.on_host(value_BG), types.on_host(valid_BG))
    return ~np.asarray(constant_B1)[:, 0]

  return np.any([varies_B(reward) for reward in rewards.values()], axis=0)


def replacement_rows(dead: np.ndarray, alive: np.ndarray) -> np.ndarray:
  """Chooses rows (B,) of the concatenation of two batches: fresh rows replace dead ones.

  Args:
    dead: prompts (B,) of the first batch that may be replaced.
    alive: prompts (B,) of the second batch that may replace them; those left over are dropped.
  """
  out = np.arange(len(dead))
  count = min(dead.sum(), alive.sum())
  out[np.flatnonzero(dead)[:count]] = len(dead) + np.flatnonzero(alive)[:count]
  return out


@jax.jit
def _take(old: types.Tree, new: types.Tree, rows_B: jax.Array) -> types.Tree:
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y])[rows_B], old, new)


def replace_constant_groups(
  found: dict[str, ScoredTrajectory],
  rounds: int,
  component: str,
  draw: Callable[[list[str]], dict[str, ScoredTrajectory]],
  place: Callable[[types.Tree], types.Tree],
) -> tuple[dict[str, ScoredTrajectory], dict[str, float]]:
  """Replaces prompts of constant groups, in at most `rounds` rounds.

  Args:
    found: samples of every task; changed in place.
    rounds: largest number of further rounds.
    component: see `informative`.
    draw: samples fresh prompts of the named tasks.
    place: puts rows on the devices of the run's mesh.

  Returns:
    `found`, and metrics of every task: the number of rounds, and the fraction of prompts whose
    groups are still constant.
  """
  dead = {task: ~informative(scored.rewards, component) for task, scored in found.items()}
  used = dict.fromkeys(found, 0)
  for _ in range(rounds):
    wanted = [task for task, rows in dead.items() if rows.any()]
    if not wanted:
      break
    for task, fresh in draw(wanted).items():
      used[task] += 1
      alive = informative(fresh.rewards, component)
      rows = replacement_rows(dead[task], alive)
      # Some arrays were made on one device. They can be combined with the others as long as they
      # are not moved.
      found[task] = place(_take(found[task], fresh, rows))
      dead[task] &= rows < len(rows)
  return found, {
    **{f'dynamic_sampling/{task}/rounds': float(count) for task, count in used.items()},
    **{f'dynamic_sampling/{task}/dead': float(rows.mean()) for task, rows in dead.items()},
  }
