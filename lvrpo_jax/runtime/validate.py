"""Checks a config before any stage runs; a failure names the key, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import NamedTuple

import jax
import ml_collections

from lvrpo_jax import types
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.runtime import renamed

PROGRAMS = (
  'train', 'pretrain', 'control', 'study', 'sample', 'convert', 'describe', 'compile'
)  # fmt: skip


class Check(NamedTuple):
  """A condition on one value.

  Attributes:
    holds: tells whether a value is allowed.
    allowed: the allowed values in words, for the message.
  """

  holds: Callable[[types.Json], bool]
  allowed: str


def at_least(low: float, allowed: str) -> Check:
  """Returns the check that a number has a lower bound."""
  return Check(lambda value: value >= low, allowed)


POSITIVE = Check(lambda value: value > 0, 'a number above 0')
COUNT = at_least(1, 'an integer of at least 1')
NATURAL = at_least(0, 'at least 0')
FRACTION = Check(lambda value: 0 <= value <= 1, 'between 0 and 1')
DECAY = Check(lambda value: 0 <= value < 1, 'at least 0 and below 1')
SEED = Check(lambda value: 0 <= value < 2**31, 'an integer from 0 to 2147483647')
SCALE = at_least(1, 'at least 1, which is none')


def one_of(*values: str | int) -> Check:
  """Returns the check that a value is one of some values."""
  return Check(values.__contains__, 'one of ' + ', '.join(map(repr, values)))


OPTIMIZER = {
  'kind': one_of('adamw', 'muon'),
  'schedule': one_of('linear', 'cosine', 'constant'),
  'warmup': NATURAL,
  'b1': DECAY,
  'b2': DECAY,
  'weight_decay': NATURAL,
  **dict.fromkeys(('learning_rate', 'muon_rate', 'eps', 'clip_norm'), POSITIVE),
}

CHECKS: dict[str, Check] = {
  'program': one_of(*PROGRAMS),
  'seed': SEED,
  'log_every': POSITIVE,
  **{f'data.{k}': COUNT for k in ('prompt_tokens', 'answer_tokens', 'prefetch')},
  **{
    f'model.{k}': COUNT
    for k in (
      'width', 'depth', 'heads', 'kv_heads', 'ff_width', 'unroll', 'vit_width', 'vit_depth',
      'vit_heads', 'vit_ff_width', 'vit_patch', 'position_side',
    )
  },
  **{f'model.{k}': POSITIVE for k in ('rope_theta', 'eps')},
  'model.dtype': one_of('float32', 'bfloat16'),
  'model.remat': Check(
    lambda v: v in ('none', 'full') or v in dir(jax.checkpoint_policies),
    "'none', 'full', or a name in jax.checkpoint_policies",
  ),
  'model.attention': one_of('auto', 'xla', 'splash', 'cudnn'),
  **{f'vae.{k}': COUNT for k in ('patch', 'channels', 'images')},
  'vae.whiten': FRACTION,
  **{
    f'dual_encoder.{k}': COUNT for k in ('width', 'depth', 'heads', 'ff_width', 'patch', 'steps')
  },
  'dual_encoder.batch': at_least(2, 'an integer of at least 2'),
  'dual_encoder.learning_rate': POSITIVE,
  **{f'pretrain.{k}': COUNT for k in ('steps', 'draws', 'save_every')},
  'pretrain.shift': POSITIVE,
  'pretrain.ema': DECAY,
  **{f'pretrain.optimizer.{k}': check for k, check in OPTIMIZER.items()},
  'control.steps': COUNT,
  'control.rate': POSITIVE,
  'control.repa': NATURAL,
  'control.repa_layer': COUNT,
  **{f'align.{k}': COUNT for k in ('iterations', 'updates_per_rollout')},
  'align.rollout.group_size': at_least(
    2, 'an integer of at least 2: one sample has no siblings'
  ),
  'align.rollout.steps': at_least(2, 'an integer of at least 2'),
  'align.rollout.sampler': one_of('sde', 'cps', 'dance'),
  **{f'align.rollout.{k}': POSITIVE for k in ('temperature', 'shift', 'noise_level')},
  **{f'align.rollout.{k}': FRACTION for k in ('noise_low', 'noise_high')},
  'align.rollout.guidance': SCALE,
  'align.rollout.window': NATURAL,
  'align.rollout.window_schedule': one_of('random', 'sliding'),
  'align.rollout.window_every': COUNT,
  'align.dynamic_sampling.rounds': NATURAL,
  'align.advantage.method': one_of('normalize_then_sum', 'sum_then_normalize', 'gdpo', 'sum'),
  'align.advantage.floor': POSITIVE,
  'align.advantage.floor_form': one_of('max', 'add', 'root'),
  'align.advantage.scope': one_of('group', 'batch', 'none'),
  'align.advantage.ddof': one_of(0, 1),
  'align.advantage.clip': POSITIVE,
  'align.text.clip_low': FRACTION,
  'align.text.clip_high': NATURAL,
  'align.text.kl': one_of('k1', 'k2', 'k3', 'k3_ratio'),
  'align.image.kl': one_of('velocity', 'gaussian', 'gaussian_per_time'),
  'align.image.draws': COUNT,
  **{f'align.image.{k}': POSITIVE for k in ('clip', 'nft_beta', 'nft_advantage_scale')},
  **{f'align.image.{k}': NATURAL for k in ('old_policy_flat', 'old_policy_rise')},
  'align.image.old_policy_max_decay': FRACTION,
  **{
    f'align.{part}.{k}': NATURAL
    for part in ('text', 'image')
    for k in ('kl_weight', 'kl_target', 'kl_adaptation')
  },
  **{f'align.optimizer.{k}': check for k, check in OPTIMIZER.items()},
  'align.optimizer.understanding_rate': NATURAL,
  'align.lora.rank': NATURAL,
  'align.lora.alpha': POSITIVE,
  **{
    f'align.checks.mismatch.{k}': Check(
      lambda v: v >= 0 or v == -1, 'at least 0, or -1 for that of the dtype'
    )
    for k in ('text_max', 'text_mean', 'decode_max', 'image_max')
  },
  'align.checks.gradients_every': NATURAL,
  'align.evaluate.every': NATURAL,
  'align.evaluate.prompts': COUNT,
  'align.checkpoints.every': COUNT,
  'align.checkpoints.keep_best': NATURAL,
  'align.checkpoints.finish': one_of('last', 'best'),
  'evaluate.prompts.unseen': COUNT,
  **{
    f'evaluate.prompts.{task.name}': NATURAL if task.plans else COUNT
    for task in tasks_lib.BY_NAME.values()
  },
  **{f'evaluate.{k}': COUNT for k in ('samples', 'batch', 'steps')},
  'evaluate.shift': POSITIVE,
  'evaluate.guidance': SCALE,
  'evaluate.guided_prompts': NATURAL,
  'evaluate.guided_scales': Check(
    lambda v: all(isinstance(x, (int, float)) and x > 0 for x in v), 'numbers above 0'
  ),
  'sample.task': one_of(*(task.name for task in tasks_lib.BY_NAME.values() if not task.plans)),
  **{f'sample.{k}': COUNT for k in ('steps', 'max_tokens')},
  'sample.shift': POSITIVE,
  'sample.temperature': NATURAL,
  'sample.size': Check(
    lambda v: len(v) == 2 and all(isinstance(x, int) and x >= 0 for x in v),
    "(width, height) in pixels, 0 for the model's own",
  ),
  'sample.top_p': Check(lambda v: 0 < v <= 1, 'above 0 and at most 1'),
  **{
    f'sample.guidance.{task}.renorm': one_of('global', 'channel', 'text_channel')
    for task in (tasks_lib.GENERATE, tasks_lib.EDIT)
  },
  'convert.direction': one_of('import', 'export'),
  'convert.shards': COUNT,
  'study.workers': COUNT,
  'compile.image_size': NATURAL,
  'compile.programs': Check(
    lambda v: v and set(v) <= {'text', 'image', 'step'}, "some of 'text', 'image', 'step'"
  ),
  'parallel.rollout_mesh': Check(lambda v: len(v) in (0, 3), '() or three sizes'),
  'parallel.runner': one_of('jit', 'pmap'),
  'parallel.micro_batches': COUNT,
  'parallel.group_parts': NATURAL,
}  # fmt: skip
"""Checks of single values by key."""

REWARD_COUNTS = {'dense': 'top', 'knowledge': 'questions', 'mutual': 'questions'}
"""Names of the settings of rewards that are at least 1, by kind."""


def get(config: types.Config, key: str) -> types.Json:
  """Returns the value at a dotted key."""
  for part in key.split('.'):
    config = config[part]
  return config


def leaves(config: types.Config, prefix: str = '') -> list[tuple[str, types.Json]]:
  """Returns (dotted key, value) of every leaf of a config."""
  out: list[tuple[str, types.Json]] = []
  for key, value in config.items():
    nested = isinstance(value, (ml_collections.ConfigDict, ml_collections.FrozenConfigDict))
    out += leaves(value, f'{prefix}{key}.') if nested else [(f'{prefix}{key}', value)]
  return out


def validate(config: types.Config) -> None:
  """Checks every value and how they fit together.

  Raises:
    ValueError: names the key, its value and what is allowed.
  """
  values = leaves(config)
  renamed.refuse_former_keys(key for key, _ in values)
  renamed.refuse_former_values(config)
  for key, value in values:
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'config.{key} is {value!r}; allowed: finite numbers')
  for key, check in CHECKS.items():
    value = get(config, key)
    if not check.holds(value):
      raise ValueError(f'config.{key} is {value!r}; allowed: {check.allowed}')
  _check_shapes(config)
  _check_tasks(config, 'pretrain', 'rows')
  _check_tasks(config, 'align', 'prompts')
  _check_rewards(config)
  _check_answer_shown(config)
  _check_combinations(config)


def _check_tasks(config: types.Config, part: str, counts: str) -> None:
  """Requires at least one task, no negative count, and a loss weight for each task."""
  sizes = get(config, f'{part}.{counts}')
  for task, size in sizes.items():
    weight = get(config, f'{part}.task_weights.{task}')
    if size < 0:
      raise ValueError(f'config.{part}.{counts}.{task} is {size}; allowed: at least 0 rows')
    if size and not weight > 0:
      raise ValueError(
        f'config.{part}.task_weights.{task} is {weight}; allowed: above 0 where '
        f'config.{part}.{counts}.{task} is not 0'
      )
  if not tasks_lib.active(sizes):
    raise ValueError(f'config.{part}.{counts} are all 0; allowed: at least one task')


def _check_rewards(config: types.Config) -> None:
  """Requires a kind and a weight of rewards, and a reward with a weight for every task."""
  align = config.align
  for task, rewards in align.rewards.items():
    for name, settings in rewards.items():
      key = f'config.align.rewards.{task}.{name}'
      if isinstance(settings, (int, float)) or not {'kind', 'weight'} <= set(settings):
        found = settings if isinstance(settings, (int, float)) else dict(settings)
        raise ValueError(f'{key} is {found}; allowed: a dict with kind and weight')
      if settings.weight < 0:
        raise ValueError(f'{key}.weight is {settings.weight}; allowed: at least 0')
      setting = REWARD_COUNTS.get(settings.kind)
      count = settings.get(setting) if setting else 1
      if count is None or not COUNT.holds(count):
        raise ValueError(f'{key}.{setting} is {count}; allowed: {COUNT.allowed}')
      if settings.weight and not settings.kind:
        raise ValueError(
          f"{key}.kind is '' and its weight {settings.weight}; allowed: the name of a reward, or "
          "the import path 'module:name' of your own"
        )
      remote = settings.kind == 'remote' and settings.weight and align.prompts[task]
      if remote and not align.remote_judge.url:
        raise ValueError(
          "config.align.remote_judge.url is ''; allowed: the address of a judge, as "
          f'{key}.weight is {settings.weight}'
        )
    if align.prompts[task] and not any(settings.weight for settings in rewards.values()):
      raise ValueError(
        f'config.align.rewards.{task} has no weight above 0; allowed: at least one reward for a '
        'task with prompts'
      )


def uses_kind(config: types.Config, task: str, kind: str) -> bool:
  """Whether an active task has a weight for a reward of a kind."""
  rewards = config.align.rewards[task].values()
  return bool(config.align.prompts[task]) and any(
    settings.weight and settings.kind == kind for settings in rewards
  )


def _check_answer_shown(config: types.Config) -> None:
  """Refuses a chat template without the answer: all answers to a question would get one score."""
  judge, task = config.align.remote_judge, tasks_lib.UNDERSTAND
  name = f'templates.{task}' if judge.templates[task] else 'template'
  text = get(judge, name)
  asked = uses_kind(config, task, 'remote') and judge.protocol == 'chat'
  if asked and text and '{answer}' not in text:
    raise ValueError(
      f'config.align.remote_judge.{name} is {text!r}; allowed: a text with {{answer}} '
      f'where a reward of config.align.rewards.{task} asks the judge; '
      'config.align.remote_judge.templates has a text for every task'
    )


def _check_combinations(config: types.Config) -> None:
  """Refuses values that exclude each other."""
  align, cache = config.align, config.align.remote_judge.cache
  if config.program == 'study' and config.study.workers > 1 and cache:
    raise ValueError(
      f"config.align.remote_judge.cache is {cache!r}; allowed: '' with config.study.workers = "
      f'{config.study.workers}: runs at once do not share the file'
    )
  ruled = any(uses_kind(config, task, 'rules') for task in align.rewards)
  if align.checkpoints.finish == 'best' and not align.checkpoints.metric and not ruled:
    raise ValueError(
      "config.align.checkpoints.finish is 'best'; allowed: 'last', unless "
      'config.align.checkpoints.metric names a metric, or a task has a reward of the kind rules, '
      'whose verdicts rank checkpoints by default'
    )
  if config.control.repa and config.parallel.joint:
    raise ValueError(
      f'config.control.repa is {config.control.repa}; allowed: 0 with config.parallel.joint'
    )
  rollout, text = align.rollout, align.text
  if rollout.sampler == 'cps' and rollout.noise_level > 1:
    raise ValueError(
      f'config.align.rollout.noise_level is {rollout.noise_level}; allowed: at most 1 with '
      "config.align.rollout.sampler = 'cps'"
    )
  if text.objective == 'cispo' and text.clip_high < 1:
    raise ValueError(
      f'config.align.text.clip_high is {text.clip_high}; allowed: at least 1 with '
      "config.align.text.objective = 'cispo', which cuts its weights at 1 + that (4 is usual)"
    )
  if rollout.noise_low >= rollout.noise_high:
    raise ValueError(
      f'config.align.rollout.noise_low is {rollout.noise_low}; allowed: below '
      f'config.align.rollout.noise_high = {rollout.noise_high}'
    )


def _check_shapes(config: types.Config) -> None:
  """Refuses sizes that do not divide others."""
  model, parallel = config.model, config.parallel
  divides = (
    ('model.heads', 'model.width'),
    ('model.kv_heads', 'model.heads'),
    ('model.vit_heads', 'model.vit_width'),
    ('dual_encoder.heads', 'dual_encoder.width'),
    *((('parallel.group_parts', 'align.rollout.group_size'),) if parallel.group_parts else ()),
    *(
      ('parallel.micro_batches', f'{part}.{task}')
      for part in ('pretrain.rows', 'align.prompts')
      for task in tasks_lib.TASKS
    ),
  )
  for part, whole in divides:
    if get(config, whole) % get(config, part):
      raise ValueError(
        f'config.{part} is {get(config, part)}; allowed: a divisor of config.{whole} = '
        f'{get(config, whole)}'
      )
  if (model.width // model.heads) % 2:
    raise ValueError(
      f'config.model.heads is {model.heads}; allowed: a head width '
      f'config.model.width / heads that is even, not {model.width // model.heads}'
    )
  if model.width % 4:
    raise ValueError(f'config.model.width is {model.width}; allowed: a multiple of 4')
