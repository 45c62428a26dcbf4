"""Turns prediction records into scores, intervals and paired tests; runs no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import stats

Records = list[dict[str, Any]]
"""Lines of `predictions.jsonl`."""
Groups = dict[str, tuple[list[float], list[str]]]
"""Kind of prompt: (a value for every prompt, the prompts' meanings as clusters)."""
REASONING = ('compare', 'reason')
"""Kinds of questions that take two steps."""


def groups(
  records: Records,
  task: str,
  split: str,
  key: str,
  kinds: Callable[[str], bool] | None = None,
) -> Groups:
  """Groups the means of a field by kind of prompt.

  Args:
    records: prediction records.
    task, split: of the records that count.
    key: the field, a value or a list of values for every prompt.
    kinds: whether a kind counts; None takes all.
  """
  out: Groups = {}
  for record in records:
    if record['task'] != task or record['split'] != split:
      continue
    if kinds is None or kinds(record['kind']):
      values, clusters = out.setdefault(record['kind'], ([], []))
      values.append(float(np.mean(record[key])))
      clusters.append(record['meaning'])
  return out


def headlines(records: Records) -> dict[str, Groups]:
  """Returns all scores by name, as groups by kind.

  Names are such as 'generation/overall' and 'generation/position'. A score without prompts is left
  out.
  """
  generate = groups(records, tasks.GENERATE, 'eval', 'correct')
  edit = groups(records, tasks.EDIT, 'eval', 'correct')
  think = groups(records, tasks.THINK_GENERATE, 'eval', 'correct')
  answers = groups(records, tasks.UNDERSTAND, 'eval', 'correct')
  out = {
    'generation/overall': generate,
    'generation/unseen': groups(records, tasks.GENERATE, 'unseen', 'correct'),
    'understanding/accuracy': answers,
    'understanding/greedy': groups(records, tasks.UNDERSTAND, 'eval', 'greedy_correct'),
    'understanding/format': groups(records, tasks.UNDERSTAND, 'eval', 'format'),
    'understanding/reasoning': {
      kind: group for kind, group in answers.items() if kind in REASONING
    },
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
  """Returns {'generation': {'overall': {'value', 'ci95', 'n'}, ...}, ...}.

  Args:
    records: prediction records.
    seed: of the bootstrap.
  """
  out: dict[str, dict[str, Any]] = {}
  for name, group in headlines(records).items():
    family, key = name.split('/')
    out.setdefault(family, {})[key] = summary(group, seed)
  return out


def summary(group: Groups, seed: int) -> dict[str, Any]:
  """Returns the mean over kinds with its bootstrap interval over meanings; 'n' counts prompts."""
  value, low, high = stats.macro_average(group, seed)
  count = sum(len(values) for values, _ in group.values())
  return {'value': value, 'ci95': [low, high], 'n': count}


def paired(before: Records, after: Records) -> dict[str, dict[str, float]]:
  """Tests the paired differences of every score over the same prompts."""
  old, new = headlines(before), headlines(after)
  return {
    name: stats.macro_paired_test(
      {kind: (values, new[name][kind][0], clusters) for kind, (values, clusters) in group.items()}
    )
    for name, group in old.items()
  }
