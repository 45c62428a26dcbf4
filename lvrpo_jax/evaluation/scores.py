"""From prediction records to scores, intervals and paired tests. Reads files, draws nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lvrpo_jax.evaluation import stats

Records = list[dict[str, Any]]
Groups = dict[str, tuple[list[float], list[str]]]
REASONING = ('compare', 'reason')
"""Kinds of questions that take two steps."""


def groups(
  records: Records, task: str, split: str, key: str, kinds: Callable[[str], bool] = lambda _: True
) -> Groups:
  """Per kind: the mean of `key` for every prompt, and the prompt's meaning as its cluster."""
  out: Groups = {}
  for r in records:
    if r['task'] == task and r['split'] == split and kinds(r['kind']):
      values, clusters = out.setdefault(r['kind'], ([], []))
      values.append(float(np.mean(r[key])))
      clusters.append(r['meaning'])
  return out


def headlines(records: Records) -> dict[str, Groups]:
  """All scores by name, as groups by kind: 'generation/overall', 'generation/position', ..."""
  generate = groups(records, 'generate', 'eval', 'correct')
  edit = groups(records, 'edit', 'eval', 'correct')
  think = groups(records, 'think_generate', 'eval', 'correct')
  answers = groups(records, 'understand', 'eval', 'correct')
  out = {
    'generation/overall': generate,
    'generation/unseen': groups(records, 'generate', 'unseen', 'correct'),
    'understanding/accuracy': answers,
    'understanding/greedy': groups(records, 'understand', 'eval', 'greedy_correct'),
    'understanding/format': groups(records, 'understand', 'eval', 'format'),
    'understanding/reasoning': {k: v for k, v in answers.items() if k in REASONING},
    'editing/overall': edit,
    'thinking/overall': think,
  }
  for family, parts in (
    ('generation', generate),
    ('understanding', answers),
    ('editing', edit),
    ('thinking', think),
  ):
    out.update({f'{family}/{kind}': {kind: group} for kind, group in parts.items()})
  return {name: group for name, group in out.items() if group}


def table(records: Records, seed: int) -> dict[str, dict[str, Any]]:
  """{'generation': {'overall': {'value', 'ci95', 'n'}, ...}, ...}; `n` counts prompts."""
  out: dict[str, dict[str, Any]] = {}
  for name, group in headlines(records).items():
    family, key = name.split('/')
    out.setdefault(family, {})[key] = summary(group, seed)
  return out


def summary(group: Groups, seed: int) -> dict[str, Any]:
  """Mean over kinds with its bootstrap interval over meanings."""
  value, low, high = stats.macro_average(group, seed)
  return {'value': value, 'ci95': [low, high], 'n': sum(len(v) for v, _ in group.values())}


def paired(before: Records, after: Records) -> dict[str, dict[str, float]]:
  """Paired differences of every score over the same prompts."""
  old, new = headlines(before), headlines(after)
  return {
    name: stats.macro_paired_test(
      {kind: (values, new[name][kind][0], clusters) for kind, (values, clusters) in group.items()}
    )
    for name, group in old.items()
  }
