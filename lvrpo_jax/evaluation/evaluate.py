"""Scores a policy on held-out prompts; the same prompts and noise before and after alignment.

The strict detector reports; it is of another construction than the one that pays the reward.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import over_optimization
from lvrpo_jax.evaluation import scores
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards import rules
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import think as think_lib
from lvrpo_jax.runtime import experiment as experiment_lib

SEED = 1 << 20
"""Offset of the evaluation's noise from all noise of training."""
HELD_OUT_FIRST = 100_000
"""Number of the first held-out prompt of `gold`."""


@dataclasses.dataclass(frozen=True)
class Samplers:
  """Compiled samplers of evaluation.

  Attributes:
    draw: (params, vae_params, prompts[, guidance]) -> uint8 images (B, G, Y, X, 3).
    answer: (params, vae_params, prompts) -> sampled (B, G, T) and greedy (B, 1, T) tokens.
    think: what `draw` takes -> plans (B, G, T), and uint8 images after them.
  """

  draw: Callable[..., Any]
  answer: Callable[..., Any]
  think: Callable[..., Any]


def samplers(job: experiment_lib.Experiment) -> Samplers:
  """Builds the samplers; every task and guidance compiles once."""
  e, s, policy = job.config.evaluate, job.config.sampling, job.policy
  grid = flow.time_grid(s.steps + 1, s.shift)
  root = jax.random.key(job.config.seed + SEED)

  def keys(index_B, salt, group):
    key = jax.random.fold_in(root, salt)
    key_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B)
    return jax.vmap(lambda k: ops.fold_rows(k, (group,)))(key_B)

  def pictures(params, vae_params, cache, prompts, noise, scale):
    bare = None if scale is None else policy_lib.without_text(cache, prompts)
    latents = image_rollout.sample_ode(
      guidance_lib.policy_velocity(policy, params, cache, bare, scale),
      noise,
      policy.latent_shape,
      grid,
    )
    return policy.decode(vae_params, latents.reshape(-1, e.images, *policy.latent_shape))

  @job.sampler
  def draw(params, vae_params, prompts, scale):
    return pictures(
      params,
      vae_params,
      policy.prefill(params, vae_params, prompts),
      prompts,
      keys(prompts.index_B, 0, e.images),
      scale,
    )

  @job.sampler
  def answer(params, vae_params, prompts):
    cache = policy.prefill(params, vae_params, prompts)
    length = job.config.data.answer_words + 1

    def sample(group, temperature):
      key_BG = keys(prompts.index_B, 1, group)
      return think_lib.sample_text(policy, params, cache, key_BG, length, temperature).tokens_BGT

    return sample(e.images, 1.0), sample(1, 0.0)

  @job.sampler
  def think(params, vae_params, prompts, scale):
    cache = policy.prefill(params, vae_params, prompts)
    plan = think_lib.sample_text(
      policy,
      params,
      cache,
      keys(prompts.index_B, 1, e.images),
      job.config.data.answer_words + 1,
      1.0,
    )
    after = policy_lib.after_plans(prompts, plan.tokens_BGT, plan.mask_BGT, policy.bos)
    # The noise of `draw`: the same pictures but for the plans.
    noise = keys(prompts.index_B, 0, e.images).reshape(-1, 1)
    return plan.tokens_BGT, pictures(
      params, vae_params, policy.prefill(params, vae_params, after), after, noise, scale
    )

  def scaled(sampler):
    def run(params, vae_params, prompts, guidance=e.guidance):
      scale = None if guidance == 1 else jnp.float32(guidance)
      return sampler(params, vae_params, prompts, scale)

    return run

  return Samplers(scaled(draw), answer, scaled(think))


def prompt_sets(
  job: experiment_lib.Experiment, count: Callable[[str, str], int]
) -> list[tuple[str, str, str, list[examples_lib.Example]]]:
  """(task, split, kind, examples) of all held-out prompts."""
  out = []
  for task in tasks.TASKS:
    for split in ('eval', 'unseen'):
      for kind in job.data.kinds(task, split):
        number = count(task, split)
        if number:
          out.append(
            (task, split, kind, [job.data.evaluation(task, split, kind, i) for i in range(number)])
          )
  return out


def batched(
  job: experiment_lib.Experiment, task: str, examples: list[examples_lib.Example]
) -> list[tuple[int, types.Prompts]]:
  """(rows that count, prompts) of one shape; the last batch is filled with its own first row."""
  size = -(-job.config.evaluate.batch // job.mesh.size) * job.mesh.size
  out = []
  for start in range(0, len(examples), size):
    part = examples[start : start + size]
    rows = part + [part[0]] * (size - len(part))
    out.append((len(part), job.place_copies(job.encoder(task, rows).prompts)))
  return out


def run(
  job: experiment_lib.Experiment,
  params: types.Params,
  vae_params: types.Params,
  tools: Samplers,
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """Samples, scores and writes all predictions and pictures; returns the prediction records.

  `predictions.jsonl` is written last and in one piece: where it exists, the folder is complete.
  """
  path = folder / 'predictions.jsonl'
  if multihost.path_exists(path):
    return [json.loads(line) for line in path.read_text().split('\n') if line]
  c = job.config.evaluate
  count = lambda task, split: c.unseen if split == 'unseen' else c[task]
  records, shown = [], []
  for task, split, kind, examples in prompt_sets(job, count):
    if task == tasks.UNDERSTAND:
      part = _answers(job, params, vae_params, tools, examples)
    else:
      part, drawn = _pictures(job, params, vae_params, tools, task, examples)
      _save_pictures(folder, task, split, kind, examples, drawn, part)
      shown.append((task, split, kind, drawn, examples))
    for number, (record, example) in enumerate(zip(part, examples)):
      name = f'{task}/{split}/{kind}/{number:03d}'
      if task == tasks.UNDERSTAND:
        record['image'] = _save(folder, f'{name}.png', example.source)
      records.append(
        dict(
          task=task,
          split=split,
          kind=kind,
          id=name,
          prompt=example.prompt,
          meaning=example.meaning,
          **record,
        )
      )
  records.append(dict(task='panel', panel=over_optimization.measure(shown)))
  if jax.process_index():
    return records
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(json.dumps(r) + '\n' for r in records))
  temporary.replace(path)
  return records


def _drawn(params, vae_params, tools, batches, *guidance):
  """uint8 images (B, G, Y, X, 3) of all prompts."""
  return np.concatenate(
    [
      multihost.gather_rows(tools.draw(params, vae_params, prompts, *guidance))[:rows]
      for rows, prompts in batches
    ]
  )


def _pictures(job, params, vae_params, tools, task, examples, *guidance):
  batches = batched(job, task, examples)
  plans = []
  if task == tasks.THINK_GENERATE:
    found = [
      [multihost.gather_rows(x)[:rows] for x in tools.think(params, vae_params, prompts, *guidance)]
      for rows, prompts in batches
    ]
    decode = job.data.tokenizer.decode
    plans = [[decode(ids) for ids in row] for tokens, _ in found for row in tokens]
    drawn = np.concatenate([images for _, images in found])
  else:
    drawn = _drawn(params, vae_params, tools, batches, *guidance)
  specs = rules.targets(task, examples, 'evaluation')
  detector = experiment_lib.load_symbol(job.config.evaluate.detector, 'config.evaluate.detector')
  if task == tasks.EDIT:
    source = np.stack([e.source for e in examples])
    correct, _ = rules.edits(detector, source, drawn, specs, strict=True)
  else:
    correct, _ = rules.images(detector, drawn, specs, strict=True)
  records = [dict(spec=spec, correct=row.astype(int).tolist()) for spec, row in zip(specs, correct)]
  for record, row in zip(records, plans):
    record['plans'] = row
  return records, drawn


def held_out_reward(
  job: experiment_lib.Experiment,
  params: types.Params,
  vae_params: types.Params,
  tools: Samplers,
  count: int,
) -> dict[str, float]:
  """Scores by the strict detector of `count` held-out captions of every kind, for use during
  training: none of them is among those of `run`, so a run may be stopped by them."""
  examples = [
    job.data.evaluation(tasks.GENERATE, 'eval', kind, HELD_OUT_FIRST + i)
    for kind in job.data.kinds(tasks.GENERATE, 'eval')
    for i in range(count)
  ]
  drawn = _drawn(params, vae_params, tools, batched(job, tasks.GENERATE, examples))
  B, G = drawn.shape[:2]
  detector = experiment_lib.load_symbol(job.config.evaluate.detector, 'config.evaluate.detector')
  found = detector(drawn.reshape(B * G, *drawn.shape[2:]))
  specs = rules.targets(tasks.GENERATE, examples, 'evaluation')
  correct, _ = rules.images(lambda _: found, drawn, specs, strict=True)
  return {
    'gold': float(np.mean(correct)),
    'diversity': over_optimization.scene_diversity([found[b * G : (b + 1) * G] for b in range(B)]),
  }


def _answers(job, params, vae_params, tools, examples):
  out = []
  decode = job.data.tokenizer.decode
  for rows, prompts in batched(job, tasks.UNDERSTAND, examples):
    for sampled, greedy in list(
      zip(*map(multihost.gather_rows, tools.answer(params, vae_params, prompts)))
    )[:rows]:
      out.append((([decode(x) for x in sampled]), decode(greedy[0])))
  answers = rules.targets(tasks.UNDERSTAND, examples, 'evaluation')
  score = lambda texts: rules.answers(texts, answers, job.data.read_answer, job.data.well_formed)
  correct, well_formed = score([s for s, _ in out])
  greedy, _ = score([[g] for _, g in out])
  return [
    dict(
      answer=answer,
      samples=samples,
      correct=c.astype(int).tolist(),
      format=f.astype(int).tolist(),
      greedy=text,
      greedy_correct=int(g[0]),
    )
    for answer, (samples, text), c, f, g in zip(answers, out, correct, well_formed, greedy)
  ]


def _save(folder, name, image):
  path = folder / name
  if jax.process_index():
    return name
  path.parent.mkdir(parents=True, exist_ok=True)
  image_files.save_png(path, image)
  return name


def _save_pictures(folder, task, split, kind, examples, drawn, records):
  for number, (example, row, record) in enumerate(zip(examples, drawn, records)):
    name = f'{task}/{split}/{kind}/{number:03d}'
    record['images'] = [_save(folder, f'{name}_{i}.png', image) for i, image in enumerate(row)]
    if task == tasks.EDIT:
      record['source'] = _save(folder, f'{name}_source.png', example.source)
      record['target'] = _save(folder, f'{name}_target.png', example.target)


def guided(
  job: experiment_lib.Experiment, params: types.Params, vae_params: types.Params, tools: Samplers
) -> dict[str, Any]:
  """Generation scores of every guidance scale, on fewer prompts of the same kinds.

  Empty where `evaluate.guided` is 0.
  """
  c = job.config
  count = lambda task, split: c.evaluate.guided if task == tasks.GENERATE and split == 'eval' else 0
  sets, out = prompt_sets(job, count), {}
  for scale in (1.0, *c.sampling.guidance) if sets else ():
    groups = {}
    for task, _, kind, examples in sets:
      records, _ = _pictures(job, params, vae_params, tools, task, examples, scale)
      groups[kind] = ([np.mean(r['correct']) for r in records], [e.meaning for e in examples])
    out[f'{scale:g}'] = scores.summary(groups, c.seed)
  return out
