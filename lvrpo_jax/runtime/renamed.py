"""Former names of config keys, config values and import paths, with their present names.

A config that uses a former name is refused, and the message gives the present name. `config.json`
files in workdirs of former versions are translated as they are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import difflib
import re

from lvrpo_jax import types
from lvrpo_jax.data import tasks

TASKS = tasks.TASKS

Values = dict[str, types.Json]
"""Values of a flat config by dotted key."""


PLAIN_KEYS = {
  'align.steps': 'align.iterations',
  'align.updates': 'align.updates_per_rollout',
  'align.group': 'align.rollout.group_size',
  'align.steps_per_image': 'align.rollout.steps',
  'align.sampler': 'align.rollout.sampler',
  'align.eta': 'align.rollout.noise_level',
  'align.noise_low': 'align.rollout.noise_low',
  'align.noise_high': 'align.rollout.noise_high',
  'align.noise_outside': 'align.rollout.noise_outside_window',
  'align.window': 'align.rollout.window',
  'align.window_schedule': 'align.rollout.window_schedule',
  'align.window_every': 'align.rollout.window_every',
  'align.guidance': 'align.rollout.guidance',
  'align.temperature': 'align.rollout.temperature',
  'align.refill': 'align.dynamic_sampling.rounds',
  'align.refill_by': 'align.dynamic_sampling.reward',
  'align.remote': 'align.remote_judge',
  'align.detector': 'align.rewards.<task>.rules.detector',
  'align.graded': 'align.rewards.<task>.rules.graded',
  'align.dense_top': 'align.rewards.<task>.dense.top',
  'align.questions': 'align.rewards.<task>.knowledge.questions and .mutual.questions',
  'align.custom': 'align.rewards.<task>.custom',
  'study': 'study.name',
  'align.advantage': 'align.advantage.method',
  'align.floor': 'align.advantage.floor',
  'align.floor_form': 'align.advantage.floor_form',
  'align.scope': 'align.advantage.scope',
  'align.ddof': 'align.advantage.ddof',
  'align.text_objective': 'align.text.objective',
  'align.text_low': 'align.text.clip_low',
  'align.text_high': 'align.text.clip_high',
  'align.text_penalty': 'align.text.kl_weight',
  'align.text_kl': 'align.text.kl',
  'align.text_target': 'align.text.kl_target',
  'align.objective': 'align.image.objective',
  'align.image_clip': 'align.image.clip',
  'align.draws': 'align.image.draws',
  'align.nft_beta': 'align.image.nft_beta',
  'align.nft_scale': 'align.image.nft_advantage_scale',
  'align.old_flat': 'align.image.old_policy_flat',
  'align.old_rise': 'align.image.old_policy_rise',
  'align.old_hold': 'align.image.old_policy_max_decay',
  'align.velocity_penalty': 'align.image.kl_weight',
  'align.image_kl': 'align.image.kl',
  'align.image_target': 'align.image.kl_target',
  'align.adapt': 'align.text.kl_adaptation and align.image.kl_adaptation',
  'align.learning_rate': 'align.optimizer.learning_rate',
  'align.understand_rate': 'align.optimizer.understanding_rate',
  'align.clip_norm': 'align.optimizer.clip_norm',
  'align.gap_limit.texts': 'align.checks.mismatch.text_max',
  'align.gap_limit.texts_mean': 'align.checks.mismatch.text_mean',
  'align.gap_limit.decode': 'align.checks.mismatch.decode_max',
  'align.gap_limit.images': 'align.checks.mismatch.image_max',
  'align.diagnose_every': 'align.checks.gradients_every',
  'align.stop_on_alarm': 'align.checks.stop_on_alarm',
  'align.gold_every': 'align.evaluate.every',
  'align.gold': 'align.evaluate.prompts',
  'align.save_every': 'align.checkpoints.every',
  'align.keep_best': 'align.checkpoints.keep_best',
  'align.score': 'align.checkpoints.metric',
  'align.finish': 'align.checkpoints.finish',
  'align.weights': 'align.task_weights',
  'pretrain.weights': 'pretrain.task_weights',
  'optimizer': 'pretrain.optimizer',
  'sampling.steps': 'evaluate.steps',
  'sampling.shift': 'evaluate.shift and align.rollout.shift',
  'sampling.guidance': 'evaluate.guided_scales',
  'evaluate.unseen': 'evaluate.prompts.unseen',
  'evaluate.images': 'evaluate.samples',
  'evaluate.guided': 'evaluate.guided_prompts',
  'sample.points': 'sample.steps (one fewer)',
  'judge': 'dual_encoder',
  'data.prompt_words': 'data.prompt_tokens',
  'data.answer_words': 'data.answer_tokens',
  'topology': 'compile.topology',
  'studies': 'study.plans',
  'variants': 'study.variants',
  'critic': 'study.critic',
  'workers': 'study.workers',
}
"""Present key by former key, where neither depends on a task or an option."""


def _keys() -> Iterator[tuple[str, str]]:
  """Yields (former key, present key or keys)."""
  yield from PLAIN_KEYS.items()
  for name in ('wrong', 'chatty', 'plan', 'describe', 'drop', 'generate_kinds', 'question_kinds'):
    yield f'data.{name}', f'data.options.{name}'
  for task in TASKS:
    yield f'align.{task}', f'align.prompts.{task}'
    yield f'pretrain.{task}', f'pretrain.rows.{task}'
    yield f'evaluate.{task}', f'evaluate.prompts.{task}'
    yield f'align.custom.{task}', f'align.rewards.{task}.custom.kind'
    yield f'align.custom.{task}_weight', f'align.rewards.{task}.custom.weight'
    dense = () if task == tasks.UNDERSTAND else ('dense',)
    for name in ('rules', 'semantic', *dense, 'knowledge', 'mutual', 'remote'):
      yield f'align.rewards.{task}.{name}', f'align.rewards.{task}.{name}.weight'


KEYS = dict(_keys())
"""Present key by former key; a value may name several keys in words."""

SECTIONS = {
  former for former in KEYS if any(present.startswith(f'{former}.') for present in KEYS.values())
}
"""Former keys of single values whose names are sections now."""

VALUES = {
  'program': {'run': 'train'},
  'align.advantage.method': {'gdpo': 'normalize_then_sum', 'sum': 'sum_then_normalize'},
  'align.image.objective': {
    'nft': 'diffusion_nft',
    'sde': 'flow_grpo',
    'cps': 'flow_cps',
    'guard': 'grpo_guard',
    'guard_plain': 'grpo_guard_plain',
  },
}
"""Present values by present key and former value."""

PATHS = {
  'lvrpo_jax.data.mixture:ShapesData': 'shapes',
  'lvrpo_jax.data.detect:detect_components': 'components',
  'lvrpo_jax.data.detect:detect_by_rendering': 'rendering',
}
"""Present names by former import path."""

CHANGES = re.compile(r'(critic\.changes|studies\.[^.]+\.changes|variants\.[^.]+)\.(.+)')
"""Matches former keys of a study that hold changes of other keys."""


def present_name(key: str) -> str:
  """Returns the present name of a former key of a value or section; '' for any other key."""
  parts = key.split('.')
  for end in range(len(parts), 0, -1):
    former, rest = '.'.join(parts[:end]), parts[end:]
    if former in KEYS and not (rest and former in SECTIONS):
      return '.'.join([KEYS[former], *rest])
  return ''


def explain(key: str, known: Iterable[str]) -> str:
  """Returns the message for a key without a value: its present name, or the nearest key.

  Args:
    key: the key.
    known: all keys of the config.
  """
  known = list(known)
  present = present_name(key)
  if present:
    return f'config.{key} was renamed; the present name is config.{present}'
  inside = [other for other in known if other.startswith(f'{key}.')]
  if inside:
    return f'config.{key} is a section of the config; it has keys such as config.{inside[0]}'
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
  nearest = f'; the nearest key is config.{near[0]}' if near else ''
  return f'config.{key} is no key of the config{nearest}'


def refuse_former_keys(keys: Iterable[str]) -> None:
  """Refuses former keys. A config file may assign them, but nothing reads them.

  Raises:
    ValueError: names the key and the present one.
  """
  for key in keys:
    if present_name(key):
      raise ValueError(explain(key, ()))


def refuse_former_values(config: types.Config) -> None:
  """Refuses former names of values.

  Raises:
    ValueError: names the key, the value and the present name.
  """
  for key, values in VALUES.items():
    value = config
    for part in key.split('.'):
      value = value[part]
    # The names of the papers stay as aliases of the advantage methods.
    if key != 'align.advantage.method' and value in values:
      raise ValueError(
        f'config.{key} is {value!r}, which was renamed; the present name is {values[value]!r}'
      )


def translate(config: Values) -> Values:
  """Returns a flat config ({'align.steps': 70}) of a former version under present names."""
  if 'align.steps' not in config:
    return config
  out: Values = {}
  for key, value in config.items():
    changes = CHANGES.fullmatch(key)
    if changes:
      ((section, _),) = _translate(changes[1], value)
      found = [(f'{section}.{name}', changed) for name, changed in _translate(changes[2], value)]
    else:
      found = _translate(key, value)
    out.update(found)
  for task in TASKS:  # The weight was 1 by default, also where no function was named.
    if not config.get(f'align.custom.{task}'):
      out[f'align.rewards.{task}.custom.weight'] = 0.0
  return out


def _translate(key: str, value: types.Json) -> Iterator[tuple[str, types.Json]]:
  """Yields present keys and values of one former key."""
  for present, changed in _present_keys(key, value):
    if isinstance(changed, str):
      changed = VALUES.get(present, {}).get(changed, changed)
      changed = PATHS.get(changed, changed)
    yield present, changed


def _present_keys(key: str, value: types.Json) -> Iterator[tuple[str, types.Json]]:
  """Yields present keys of one former key, each with the value in its present form."""
  parts = key.split('.')
  if key == 'align.questions':
    for task in TASKS:
      yield f'align.rewards.{task}.knowledge.questions', value
      yield f'align.rewards.{task}.mutual.questions', value
  elif key in ('align.graded', 'align.detector'):
    for task in TASKS:
      yield f'align.rewards.{task}.rules.{parts[-1]}', value
  elif key == 'align.dense_top':
    for task in TASKS:
      if task != tasks.UNDERSTAND:
        yield f'align.rewards.{task}.dense.top', value
  elif key == 'align.adapt':
    yield 'align.text.kl_adaptation', value
    yield 'align.image.kl_adaptation', value
  elif key == 'sampling.shift':
    yield 'evaluate.shift', value
    yield 'align.rollout.shift', value
  elif key == 'sample.points':
    yield 'sample.steps', value - 1
  else:
    yield present_name(key) or key, value
