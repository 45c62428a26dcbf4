"""Before alignment: fits the autoencoder, trains the judge, pretrains the unified model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import checkpoint
from lvrpo_jax import job as job_lib
from lvrpo_jax import losses
from lvrpo_jax import metrics as metrics_lib
from lvrpo_jax import optim
from lvrpo_jax import policy as policy_lib
from lvrpo_jax import repa as repa_lib
from lvrpo_jax import sharding
from lvrpo_jax import step as step_lib
from lvrpo_jax import types
from lvrpo_jax.data import pipeline
from lvrpo_jax.models import siglip
from lvrpo_jax.models import unified
from lvrpo_jax.models import vae as vae_lib

CONTROL_OFFSET = 1 << 29
"""First row of continued pretraining: rows that the first run has not seen."""
EPOCH = 1 << 29
"""Rows of a procedural source; no run reaches its end, and indices fit into int32."""


def fit_autoencoder(job: job_lib.Job) -> types.Params:
  """The small autoencoder in closed form: the first stage, deterministic in the seed.

  A latent's deviation is proportional to (what it moves in pixels)^(1 - whiten), with mean square 1
  over channels: between unit latents (1) and principal components as they are (0).
  """
  images = job.data.images(job.config.vae.images)
  params = vae_lib.fit_patch_autoencoder(job.policy.vae, policy_lib.to_unit(images),
                                           job.config.seed)
  pixels_C = np.linalg.norm(params['decoder']['kernel'] / params['scale'][:, None], axis=1)
  factor_C = pixels_C ** (1 - job.config.vae.whiten)
  return {**params, 'scale': params['scale'] * factor_C / np.sqrt(np.mean(factor_C ** 2))}


def initial(job: job_lib.Job) -> types.Params:
  """Fresh parameters."""
  return unified.init(job.policy.config, jax.random.key(job.config.seed))


def train_judge(job: job_lib.Job, writer: metrics_lib.MetricWriter) -> types.Params:
  """Trains the dual encoder on true pairs of the pretraining split (arXiv 2303.15343)."""
  j = job.config.judge

  def collate(pairs):
    images, texts = zip(*pairs)
    return np.stack(images), job.captions(list(texts))
  data = pipeline.batches(pipeline.Source(job.data.judge_pair, EPOCH), j.batch, collate)

  def weights(batch):
    return {'judge': jnp.float32(batch[0].shape[0])}

  def sums(params, state, frozen, batch):
    del state, frozen
    images, ids = batch
    out = job.judge.apply({'params': params}, policy_lib.to_unit(images), ids)
    loss = siglip.siglip_loss(*out) * images.shape[0]
    return {'judge': loss}, {}

  optimizer = optim.build('adamw', optim.schedule('linear', j.learning_rate, j.steps, 20), .9,
                          .98, 1e-8, 0., 1.)
  step = jax.jit(step_lib.make_step(step_lib.Loss(weights, sums, {'judge': 1.}), optimizer),
                 donate_argnums=0)
  images, ids = next(data)
  params = jax.jit(job.judge.init)(jax.random.key(job.config.seed + 1),
                                   policy_lib.to_unit(images[:1]), ids[:1])['params']
  # A fresh encoder then predicts the share of true pairs; -10 is meant for batches of 32k.
  params['logit_bias'] = jnp.float32(-np.log(j.batch - 1))
  state = step_lib.init(params, optimizer)
  writer.begin('judge')
  with metrics_lib.Progress('judge', j.steps, keys=('loss',),
                            interval=job.config.log_every) as progress:
    def consume(number, scalars):
      progress.update(number, scalars)
      if number % 20 == 0 or number == j.steps:
        writer.write('judge', number, scalars)
    late = metrics_lib.Late('judge', consume)
    for number in range(1, j.steps + 1):
      state, metrics = step(state, {}, (images, ids))
      late.push(number, metrics)
      images, ids = next(data)
    late.flush()
  return state.params


def task_batches(job: job_lib.Job, make: Callable[[str, int], pipeline.Example],
                 sizes: dict[str, int], collate: Callable[[str], Callable[..., Any]]
                 ) -> dict[str, Iterator[Any]]:
  """One endless iterator a task, over this process's share of the rows.

  Raises:
    ValueError: the rows of a task do not divide over the processes that hold different ones.
  """
  index, count = sharding.row_block(job.mesh)
  for task, size in sizes.items():
    if size % count:
      raise ValueError(f'{size} rows of task {task!r} a batch do not divide over {count} processes '
                       f'with rows of their own; allowed: multiples of {count}')
  return {
      task: pipeline.batches(
          pipeline.Source(functools.partial(make, task), EPOCH), size // count, collate(task),
          (index, count), job.config.data.prefetch)
      for task, size in sizes.items() if size}


def sizes(config: Any) -> dict[str, int]:
  """Rows of every task in a batch; tasks with none are left out."""
  return {task: config[task] for task in pipeline.TASKS if config[task]}


def check(job: job_lib.Job):
  """Refuses settings of continued pretraining that do not fit, before any work."""
  c, depth = job.config.control, job.policy.config.depth
  if c.repa and c.repa_layer > depth:
    raise ValueError(f'config.control.repa_layer is {c.repa_layer}; allowed: at most the {depth} '
                     'layers of the model')


def run(job: job_lib.Job, vae_params: types.Params, writer: metrics_lib.MetricWriter,
        stage: str = 'pretrain', params: types.Params | None = None,
        judge_params: types.Params | None = None) -> types.Params:
  """Pretrains from scratch or from the last checkpoint; returns the policy's parameters.

  With `stage='control'` it goes on from `params` on fresh rows for `config.control.steps`, and
  aligns representations with those of the judge where `config.control.repa` is not 0.
  """
  c, o = job.config.pretrain, job.config.optimizer
  control = stage == 'control'
  steps = job.config.control.steps if control else c.steps
  factor = job.config.control.rate if control else 1.
  rate = lambda peak: optim.schedule(o.schedule, peak * factor, steps, o.warmup)
  optimizer = optim.build(o.kind, rate(o.learning_rate), o.b1, o.b2, o.eps, o.weight_decay,
                          o.clip_norm, rate(o.muon_rate))
  repa = None
  if control and job.config.control.repa:
    repa = repa_lib.Repa(job.config.control.repa, job.config.control.repa_layer, job.judge)
  loss = losses.pretraining(job.policy, c.weights, c.draws, c.shift, job.config.seed, repa)
  step = step_lib.compile_step(
      loss, optimizer, job.mesh, ema_decay=c.ema, micro_batches=job.config.parallel.micro_batches,
      runner=job.config.parallel.runner)
  offset = CONTROL_OFFSET if control else 0
  data = task_batches(job, lambda task, index: job.data.pretraining(task, index + offset), sizes(c),
                      lambda task: functools.partial(job.encoder, task))
  params = initial(job) if params is None else params
  if repa:
    params = {**params, repa_lib.PROJECTOR: repa.init(job.policy, jax.random.key(
        job.config.seed + 3))}
  state = sharding.shard_state(step_lib.init(params, optimizer, ema=c.ema > 0), job.mesh)
  frozen = {'vae': vae_params, **({'judge': judge_params} if repa else {})}
  store = checkpoint.Checkpoints(job.workdir / 'checkpoints' / stage)
  restored = store.restore(state)
  if restored:
    state, record = restored
    for task, iterator in data.items():
      iterator.set_state(record['data'][task])
  start = int(state.step)
  writer.begin(stage, start if restored else -1)
  with (checkpoint.StopSignal() as stop,
        metrics_lib.Progress(stage, steps, start, ('loss', 'grad_norm'), job.config.log_every
                             ) as progress):
    def consume(number, scalars):
      progress.update(number, scalars)
      if number % 10 == 0 or number == steps:
        writer.write(stage, number, scalars)
    late = metrics_lib.Late(stage, consume)
    for number in range(start + 1, steps + 1):
      batch = {task: job.place(next(iterator)) for task, iterator in data.items()}
      state, metrics = step(state, frozen, batch)
      late.push(number, metrics)
      stopped = stop.asked()
      if number % c.save_every == 0 or number == steps or stopped:
        late.flush()
        store.save(number, state, {'data': {t: i.get_state() for t, i in data.items()}})
      if stopped:
        store.close()
        raise checkpoint.Preempted(f'{stage} stopped after step {number} of {steps}')
    late.flush()
  store.close()
  trained = state.params if state.ema is None else state.ema
  return {name: part for name, part in trained.items() if name != repa_lib.PROJECTOR}
