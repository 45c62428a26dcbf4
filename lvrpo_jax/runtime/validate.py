"""Checks of a config before any work: each failure names the key, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

TASKS = ('generate', 'understand', 'edit', 'think_generate')
PROGRAMS = ('run', 'pretrain', 'control', 'study', 'sample', 'convert', 'describe', 'compile')
Check = tuple[str, Callable[[Any], bool], str]

POSITIVE = (lambda v: v > 0, 'a number above 0')
COUNT = (lambda v: v >= 1, 'an integer of at least 1')
NATURAL = (lambda v: v >= 0, 'at least 0')
FRACTION = (lambda v: 0 <= v <= 1, 'between 0 and 1')


def one_of(*values: Any) -> tuple[Callable[[Any], bool], str]:
  """Membership, with its message."""
  return (lambda v: v in values), 'one of ' + ', '.join(map(repr, values))


CHECKS: tuple[tuple[str, tuple[Callable[[Any], bool], str]], ...] = (
  ('program', one_of(*PROGRAMS)),
  ('seed', NATURAL),
  *((f'data.{k}', FRACTION) for k in ('wrong', 'chatty', 'plan', 'describe', 'drop')),
  *((f'data.{k}', COUNT) for k in ('prompt_words', 'answer_words', 'prefetch')),
  *(
    (f'model.{k}', COUNT)
    for k in (
      'width',
      'depth',
      'heads',
      'kv_heads',
      'ff_width',
      'unroll',
      'vit_width',
      'vit_depth',
      'vit_heads',
      'vit_ff_width',
      'vit_patch',
      'position_side',
    )
  ),
  *((f'model.{k}', POSITIVE) for k in ('rope_theta', 'eps')),
  ('model.dtype', one_of('float32', 'bfloat16')),
  (
    'model.remat',
    (
      lambda v: v in ('none', 'full') or v in dir(jax.checkpoint_policies),
      "'none', 'full', or a name in jax.checkpoint_policies",
    ),
  ),
  *((f'vae.{k}', COUNT) for k in ('patch', 'channels', 'images')),
  *((f'judge.{k}', COUNT) for k in ('width', 'depth', 'heads', 'ff_width', 'patch', 'steps')),
  ('judge.batch', (lambda v: v >= 2, 'an integer of at least 2')),
  *((f'{k}.learning_rate', POSITIVE) for k in ('judge', 'optimizer', 'align')),
  *((f'pretrain.{k}', COUNT) for k in ('steps', 'draws', 'save_every')),
  ('control.steps', COUNT),
  ('control.rate', POSITIVE),
  ('control.repa', NATURAL),
  ('control.repa_layer', COUNT),
  ('pretrain.shift', POSITIVE),
  ('sampling.shift', POSITIVE),
  ('pretrain.ema', (lambda v: 0 <= v < 1, 'at least 0 and below 1')),
  ('optimizer.kind', one_of('adamw', 'muon')),
  ('optimizer.muon_rate', POSITIVE),
  ('vae.whiten', FRACTION),
  ('optimizer.schedule', one_of('linear', 'constant')),
  *((f'optimizer.{k}', (lambda v: 0 <= v < 1, 'at least 0 and below 1')) for k in ('b1', 'b2')),
  ('optimizer.clip_norm', POSITIVE),
  ('align.clip_norm', POSITIVE),
  ('sampling.steps', COUNT),
  *(
    (f'align.{k}', COUNT)
    for k in ('steps', 'updates', 'draws', 'save_every', 'window_every', 'dense_top')
  ),
  ('align.window', NATURAL),
  ('align.window_schedule', one_of('random', 'sliding')),
  ('align.text_kl', one_of('k1', 'k2', 'k3', 'k3_ratio')),
  ('align.image_kl', one_of('velocity', 'gaussian', 'gaussian_per_time')),
  *((f'align.{k}', NATURAL) for k in ('text_target', 'image_target', 'adapt')),
  *((f'align.{k}', NATURAL) for k in ('keep_best', 'refill', 'diagnose_every', 'gold_every')),
  ('align.gold', COUNT),
  ('align.questions', COUNT),
  ('align.finish', one_of('last', 'best')),
  ('align.group', (lambda v: v >= 2, 'an integer of at least 2: one sample has no siblings')),
  ('align.steps_per_image', (lambda v: v >= 2, 'an integer of at least 2')),
  ('align.advantage', one_of('gdpo', 'sum')),
  ('align.ddof', one_of(0, 1)),
  ('align.scope', one_of('group', 'batch', 'none')),
  ('align.floor_form', one_of('max', 'add', 'root')),
  ('align.objective', one_of('nft', 'awm', 'sde', 'cps', 'guard', 'guard_plain')),
  ('align.sampler', one_of('sde', 'cps', 'dance')),
  ('align.text_objective', one_of('grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo')),
  *(
    (f'align.{k}', POSITIVE)
    for k in ('floor', 'eta', 'nft_beta', 'nft_scale', 'image_clip', 'temperature')
  ),
  *(
    (f'align.{k}', NATURAL)
    for k in ('velocity_penalty', 'text_penalty', 'understand_rate', 'old_flat', 'old_rise')
  ),
  *((f'align.{k}', FRACTION) for k in ('text_low', 'old_hold', 'noise_low', 'noise_high')),
  ('align.text_high', NATURAL),
  ('align.lora.rank', NATURAL),
  ('align.lora.alpha', POSITIVE),
  *(
    (f'evaluate.{k}', COUNT)
    for k in ('generate', 'unseen', 'understand', 'edit', 'images', 'batch')
  ),
  *(
    (f'{k}.guidance', (lambda v: v >= 1, 'at least 1, which is none'))
    for k in ('align', 'evaluate')
  ),
  *((f'align.gap_limit.{k}', NATURAL) for k in ('texts', 'texts_mean', 'images', 'decode')),
  ('evaluate.guided', NATURAL),
  ('evaluate.think_generate', NATURAL),
  ('sample.task', one_of(*TASKS[:3])),
  ('convert.direction', one_of('import', 'export')),
  ('sample.points', (lambda v: v >= 2, 'an integer of at least 2')),
  *((f'{k}', COUNT) for k in ('sample.max_tokens', 'convert.shards', 'workers')),
  ('sample.shift', POSITIVE),
  ('sample.temperature', NATURAL),
  (
    'sample.size',
    (
      lambda v: len(v) == 2 and all(isinstance(x, int) and x >= 0 for x in v),
      "(width, height) in pixels, 0 for the model's own",
    ),
  ),
  ('sample.top_p', (lambda v: 0 < v <= 1, 'above 0 and at most 1')),
  *(
    (f'sample.guidance.{task}.renorm', one_of('global', 'channel', 'text_channel'))
    for task in ('generate', 'edit')
  ),
  ('model.attention', one_of('auto', 'xla', 'splash', 'cudnn')),
  ('compile.image_size', NATURAL),
  (
    'compile.programs',
    (lambda v: v and set(v) <= {'text', 'image', 'step'}, "some of 'text', 'image', 'step'"),
  ),
  ('parallel.rollout_mesh', (lambda v: len(v) in (0, 3), '() or three sizes')),
  ('parallel.runner', one_of('jit', 'pmap')),
  ('parallel.micro_batches', COUNT),
  ('parallel.group_parts', NATURAL),
  ('log_every', POSITIVE),
)


def get(config: ml_collections.ConfigDict, key: str) -> Any:
  """Value at a dotted key."""
  for part in key.split('.'):
    config = config[part]
  return config


def validate(config: ml_collections.ConfigDict):
  """Checks every value and how they fit together.

  Raises:
    ValueError: names the key, its value and what is allowed.
  """
  for key, (good, allowed) in CHECKS:
    value = get(config, key)
    if not good(value):
      raise ValueError(f'config.{key} is {value!r}; allowed: {allowed}')
  _check_shapes(config)
  for part in ('pretrain', 'align'):
    sizes = {task: get(config, f'{part}.{task}') for task in TASKS}
    for task, size in sizes.items():
      if size < 0:
        raise ValueError(f'config.{part}.{task} is {size}; allowed: at least 0 rows')
      if size and not get(config, f'{part}.weights.{task}') > 0:
        raise ValueError(
          f'config.{part}.weights.{task} is '
          f'{get(config, f"{part}.weights.{task}")}; allowed: above 0 where '
          f'config.{part}.{task} is not 0'
        )
    if not any(sizes.values()):
      raise ValueError(f'config.{part}.{", .".join(TASKS)} are all 0; allowed: at least one task')
  for task in TASKS:
    rewards, custom = config.align.rewards[task], config.align.custom
    if any(weight < 0 for weight in rewards.values()):
      raise ValueError(
        f'config.align.rewards.{task} is {rewards.to_dict()}; allowed: weights of at least 0'
      )
    if config.align[task] and not any(rewards.values()) and not custom[task]:
      raise ValueError(
        f'config.align.rewards.{task} is {rewards.to_dict()}; allowed: at least '
        'one weight above 0, or a reward of your own'
      )
    if config.align[task] and rewards.remote and not config.align.remote.url:
      raise ValueError(
        f"config.align.remote.url is ''; allowed: the address of a judge, as "
        f'config.align.rewards.{task}.remote is {rewards.remote}'
      )
  _check_answer_shown(config)
  cache = config.align.remote.cache
  if config.program == 'study' and config.workers > 1 and cache:
    raise ValueError(
      f"config.align.remote.cache is {cache!r}; allowed: '' with config.workers = "
      f'{config.workers}: runs at once do not share the file'
    )
  paid = any(config.align[task] and config.align.rewards[task].rules for task in TASKS)
  if config.align.finish == 'best' and not config.align.score and not paid:
    raise ValueError(
      "config.align.finish is 'best'; allowed: 'last', unless config.align.score "
      'names a metric, or config.align.rewards pay the rules of a task, whose '
      'verdicts rank checkpoints by default'
    )
  if config.control.repa and config.parallel.joint:
    raise ValueError(
      f'config.control.repa is {config.control.repa}; allowed: 0 with config.parallel.joint'
    )
  if config.align.sampler == 'cps' and config.align.eta > 1:
    raise ValueError(
      f'config.align.eta is {config.align.eta}; allowed: at most 1 with '
      "config.align.sampler = 'cps'"
    )
  if config.align.text_objective == 'cispo' and config.align.text_high < 1:
    raise ValueError(
      f'config.align.text_high is {config.align.text_high}; allowed: at least 1 '
      "with config.align.text_objective = 'cispo', which cuts its weights at 1 + "
      'that (4 is usual)'
    )
  if config.align.noise_low >= config.align.noise_high:
    raise ValueError(
      f'config.align.noise_low is {config.align.noise_low}; allowed: below '
      f'config.align.noise_high = {config.align.noise_high}'
    )


def _check_answer_shown(config: ml_collections.ConfigDict):
  """A chat that does not show the answer would score all answers to a question alike."""
  a = config.align
  r, name = a.remote, 'templates.understand' if a.remote.templates.understand else 'template'
  text = get(r, name)
  if (
    a.understand
    and a.rewards.understand.remote
    and r.protocol == 'chat'
    and text
    and '{answer}' not in text
  ):
    raise ValueError(
      f'config.align.remote.{name} is {text!r}; allowed: a text with {{answer}} '
      'where config.align.rewards.understand.remote is not 0; '
      'config.align.remote.templates has a text for every task'
    )


def _check_shapes(config: ml_collections.ConfigDict):
  m = config.model
  divides = (
    ('model.heads', m.heads, 'model.width', m.width),
    ('model.kv_heads', m.kv_heads, 'model.heads', m.heads),
    ('model.vit_heads', m.vit_heads, 'model.vit_width', m.vit_width),
    ('judge.heads', config.judge.heads, 'judge.width', config.judge.width),
    ('parallel.group_parts', config.parallel.group_parts or 1, 'align.group', config.align.group),
    *(
      (
        'parallel.micro_batches',
        config.parallel.micro_batches,
        f'{part}.{task}',
        config[part][task],
      )
      for part in ('pretrain', 'align')
      for task in TASKS
    ),
  )
  for name, part, whole_name, whole in divides:
    if whole % part:
      raise ValueError(
        f'config.{name} is {part}; allowed: a divisor of config.{whole_name} = {whole}'
      )
  if (m.width // m.heads) % 2:
    raise ValueError(
      f'config.model.heads is {m.heads}; allowed: a head width '
      f'config.model.width / heads that is even, not {m.width // m.heads}'
    )
  if m.width % 4:
    raise ValueError(f'config.model.width is {m.width}; allowed: a multiple of 4')
