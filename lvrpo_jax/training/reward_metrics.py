"""Metrics of rewards and advantages."""

from __future__ import annotations

from typing import Any

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.parallel import multihost


def truncated(tokens_BGT: np.ndarray, eos: int) -> np.ndarray:
  """1 for every text (B, G) that was cut at the longest answer, before an end token; else 0."""
  return np.all(tokens_BGT != eos, axis=-1).astype(np.float32)


def reward_metrics(
  task: str, rewards: dict[str, types.Rewards], facts: dict[str, Any], advantage: Any
) -> dict[str, Any]:
  """Per component: mean, deviation in the group, share of the advantage, dead groups.

  Args:
    facts: values (B, G) whose mean is logged, as 'accuracy/<task>/<name>', or under the whole name
      where that has a slash.
  """
  out = {
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
