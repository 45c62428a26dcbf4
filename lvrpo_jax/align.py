"""LVRPO: rollout -> reward -> advantage -> step. The only arrow back is `state.params`."""

from __future__ import annotations

from collections.abc import Iterator
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import checkpoint
from lvrpo_jax import experience
from lvrpo_jax import job as job_lib
from lvrpo_jax import losses
from lvrpo_jax import metrics as metrics_lib
from lvrpo_jax import optim
from lvrpo_jax import pretrain
from lvrpo_jax import sharding
from lvrpo_jax import step as step_lib
from lvrpo_jax import types
from lvrpo_jax.data import pipeline
from lvrpo_jax.objectives import flow as flow_objectives

PICTURES_EVERY = 25
"""Iterations between picture grids in TensorBoard."""


def alignment_loss(job: job_lib.Job) -> step_lib.Loss:
  """The loss of the update, from the config."""
  a = job.config.align
  return losses.alignment(job.policy, losses.Alignment(
      weights={task: a.weights[task] for task in pretrain.sizes(a)}, objective=a.objective,
      sampler=a.sampler, seed=job.config.seed, draws=a.draws, shift=job.config.pretrain.shift,
      nft_beta=a.nft_beta, nft_scale=a.nft_scale, image_clip=a.image_clip,
      velocity_penalty=a.velocity_penalty, text_low=a.text_low, text_high=a.text_high,
      text_aggregation=a.text_aggregation, text_penalty=a.text_penalty))


class Aligner:
  """One iteration of alignment, and the state it carries."""

  def __init__(self, job: job_lib.Job, params: types.Params, vae_params: types.Params,
               siglip_params: types.Params):
    self.job, a = job, job.config.align
    optimizer = optim.build(
        optim.schedule('constant', a.learning_rate, a.steps * a.updates, 10), .9, .98, 1e-8, 0.,
        a.clip_norm, ((r'layers/und/|norm_und|embed_tokens|lm_head|vit|connector',
                       a.understand_rate),))
    self.collector = experience.Collector(job)
    self.step = step_lib.compile_step(
        alignment_loss(job), optimizer, job.mesh,
        micro_batches=job.config.parallel.micro_batches, runner=job.config.parallel.runner)
    self.gaps = jax.jit(functools.partial(losses.gaps, job.policy, a.sampler))
    self.mix = jax.jit(lambda old, new, d: jax.tree.map(lambda o, n: d * o + (1 - d) * n, old, new))
    self.state = sharding.shard_state(
        step_lib.init(params, optimizer, old=a.objective == 'nft', reference=True), job.mesh)
    self.frozen = {'vae': vae_params}
    self.judges = experience.Judges(
        jax.tree.map(jnp.copy, self.state.reference), siglip_params,
        job_lib.word_table(job, siglip_params))

  def collect(self, tasks: experience.Tasks, iteration: int
              ) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """Rollouts, rewards and advantages: (batch for the update, metrics, pictures)."""
    c, a, vae_params = self.collector, self.job.config.align, self.frozen['vae']
    rollouts, pixels = c.rollout(self.state.params, vae_params, tasks, iteration)
    first = experience.window(self.job.config.seed, iteration, len(c.noisy), a.window)
    steps = c.noisy[first:first + a.window]
    batch, metrics = {}, {'window': first}
    for task, rollout in rollouts.items():
      if task == pipeline.UNDERSTAND:
        rewards, facts = c.text_rewards(tasks, rollout.tokens_BGT, self.judges, vae_params)
      else:
        rewards, facts = c.image_rewards(task, tasks, pixels[task], self.judges, vae_params,
                                         iteration)
      advantage = c.advantages[task](self.job.place(rewards))
      if task == pipeline.UNDERSTAND:
        batch[task] = experience.text_experience(tasks.prompts[task], rollout, advantage)
      else:
        batch[task] = experience.image_experience(
            tasks.prompts[task], rollout, steps, c.grid, c.eta_T, advantage)
      metrics.update(reward_metrics(task, rewards, facts, advantage))
    return batch, metrics, {task: np.asarray(image) for task, image in pixels.items()}

  def iterate(self, tasks: experience.Tasks, iteration: int
              ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One whole iteration; returns its metrics and pictures."""
    a = self.job.config.align
    batch, metrics, pictures = self.collect(tasks, iteration)
    metrics.update(self.gaps(self.state.params, self.frozen, batch))
    for _ in range(a.updates):
      self.state, update = self.step(self.state, self.frozen, batch)
    metrics.update(update)
    if a.objective == 'nft':
      decay = flow_objectives.old_policy_decay(iteration, a.old_flat, a.old_rise, a.old_hold)
      self.state = self.state.replace(
          old=self.mix(self.state.old, self.state.params, jnp.float32(decay)))
      metrics['old_decay'] = decay
    return metrics, pictures


def reward_metrics(task: str, rewards: dict[str, types.Rewards], facts: dict[str, np.ndarray],
                   advantage: Any) -> dict[str, Any]:
  """Per component: mean, deviation in the group, share of the advantage, dead groups."""
  out = {f'accuracy/{task}/{name}': value.mean() for name, value in facts.items()}
  for name, reward in rewards.items():
    valid = np.asarray(reward.valid_BG)
    value = np.where(valid, reward.value_BG, np.nan)
    whole = valid.any(axis=1)
    out[f'reward/{task}/{name}'] = np.nanmean(value) if whole.any() else 0.
    out[f'deviation/{task}/{name}'] = (
        np.nanstd(value[whole], axis=1).mean() if whole.any() else 0.)
    out[f'invalid/{task}/{name}'] = 1. - valid.mean()
    out[f'share/{task}/{name}'] = advantage.share[name]
    out[f'dead/{task}/{name}'] = advantage.dead[name]
  return out


def prompt_batches(job: job_lib.Job) -> dict[str, Iterator[Any]]:
  """Endless (examples, prompts) of every task."""
  def collate(task):
    return lambda rows: (rows, job.encoder(task, rows).prompts)
  return pretrain.task_batches(job, job.data.prompt, pretrain.sizes(job.config.align), collate)


def run(job: job_lib.Job, params: types.Params, vae_params: types.Params,
        siglip_params: types.Params, writer: metrics_lib.MetricWriter) -> types.Params:
  """Aligns from the pretrained parameters or from the last checkpoint."""
  a = job.config.align
  aligner = Aligner(job, params, vae_params, siglip_params)
  data = prompt_batches(job)
  store = checkpoint.Checkpoints(job.workdir / 'checkpoints' / 'align')
  start, restored = 0, store.restore(aligner.state)
  if restored:
    aligner.state, record = restored
    start = record['iteration']
    for task, iterator in data.items():
      iterator.set_state(record['data'][task])
  writer.begin('align', start if restored else -1)
  keys = tuple(f'accuracy/{task}/correct' for task in data)
  with metrics_lib.Progress('align', a.steps, start, keys, job.config.log_every) as progress:
    def consume(number, scalars):
      progress.update(number, scalars)
      writer.write('align', number, scalars)
    late = metrics_lib.Late('align', consume)
    for number in range(start + 1, a.steps + 1):
      drawn = {task: next(iterator) for task, iterator in data.items()}
      tasks = experience.Tasks({t: list(d[0]) for t, d in drawn.items()},
                               {t: job.place(d[1]) for t, d in drawn.items()})
      metrics, pictures = aligner.iterate(tasks, number)
      late.push(number, metrics)
      if number % PICTURES_EVERY == 0:
        for task, images in pictures.items():
          writer.images(task, number, images[:4].reshape(-1, *images.shape[2:]), a.group)
      if number % a.save_every == 0 or number == a.steps:
        late.flush()
        store.save(number, aligner.state, {
            'iteration': number, 'data': {t: i.get_state() for t, i in data.items()}})
    late.flush()
  store.close()
  return aligner.state.params
