"""Computes metrics of rewards and advantages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.parallel import multihost


def truncated(tokens_BGT: np.ndarray, eos: int) -> np.ndarray:
  """Returns 1 for every text (B, G) that reached the longest length without an end token, else 0."""
  return np.all(tokens_BGT != eos, axis=-1).astype(np.float32)


def truncated_texts(
  task: str, texts: Mapping[str, types.TextTrajectory], eos: int
) -> dict[str, np.ndarray]:
  """Tells which texts of a task, or plans, were truncated; by metric name, empty without texts."""
  name = tasks.PLAN if tasks.BY_NAME[task].plans else task
  if name not in texts:
    return {}
  return {f'truncated/{name}': truncated(multihost.local_rows(texts[name].tokens_BGT), eos)}


def reward_metrics(
  task: str,
  rewards: Mapping[str, types.Rewards],
  facts: Mapping[str, types.Array | np.ndarray],
  advantage: advantage_lib.Advantages,
) -> dict[str, types.Array | np.number | float]:
  """Computes metrics of every reward, and the means of facts.

  For a reward these are the mean, the deviation in the group, the share of the advantage, the
  fraction of invalid samples and the fraction of dead groups, in which it does not vary.

  Args:
    task: of the rewards.
    rewards: value and validity (B, G) by name.
    facts: values (B, G) whose mean is logged, as 'accuracy/<task>/<name>', or under the whole name
      where that has a slash.
    advantage: of these rewards.
  """
  out: dict[str, types.Array | np.number | float] = {
    name if '/' in name else f'accuracy/{task}/{name}': multihost.gather_rows(value).mean()
    for name, value in facts.items()
  }
  for name, reward in rewards.items():
    valid = multihost.gather_rows(reward.valid_BG)
    value = np.where(valid, multihost.gather_rows(reward.value_BG), np.nan)
    whole = valid.any(axis=1)
    out[f'reward/{task}/{name}'] = np.nanmean(value) if whole.any() else 0.0
    out[f'deviation/{task}/{name}'] = np.nanstd(value[whole], axis=1).mean() if whole.any() else 0.0
    out[f'invalid/{task}/{name}'] = 1.0 - valid.mean()
    out[f'share/{task}/{name}'] = advantage.share[name]
    out[f'dead/{task}/{name}'] = advantage.dead[name]
  return out
