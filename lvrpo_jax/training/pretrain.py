"""Before alignment: fits the autoencoder, trains the judge, pretrains the unified model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax

from lvrpo_jax import types
from lvrpo_jax.data import examples
from lvrpo_jax.data import loader
from lvrpo_jax.data import tasks
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.objectives import repa as repa_lib
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.training import losses
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib

CONTROL_OFFSET = 1 << 29
"""First row of continued pretraining: rows that the first run has not seen."""


def initial(job: experiment_lib.Experiment) -> types.Params:
  """Fresh parameters."""
  return bagel.init(job.policy.config, jax.random.key(job.config.seed))


def task_batches(
  job: experiment_lib.Experiment,
  make: Callable[[str, int], examples.Example],
  sizes: dict[str, int],
  collate: Callable[[str], Callable[..., Any]],
) -> dict[str, Iterator[Any]]:
  """One endless iterator a task, over this process's share of the rows.

  Raises:
    ValueError: the rows of a task do not divide over the processes that hold different ones.
  """
  index, count = multihost.row_block(job.mesh)
  for task, size in sizes.items():
    if size % count:
      raise ValueError(
        f'{size} rows of task {task!r} a batch do not divide over {count} processes '
        f'with rows of their own; allowed: multiples of {count}'
      )
  return {
    task: loader.batches(
      loader.IndexedSource(functools.partial(make, task), loader.EPOCH_ROWS),
      size // count,
      collate(task),
      (index, count),
      job.config.data.prefetch,
    )
    for task, size in sizes.items()
    if size
  }


def sizes(config: Any) -> dict[str, int]:
  """Rows of every task in a batch; tasks with none are left out."""
  return {task: config[task] for task in tasks.TASKS if config[task]}


def check(job: experiment_lib.Experiment):
  """Refuses settings of continued pretraining that do not fit, before any work."""
  c, depth = job.config.control, job.policy.config.depth
  if c.repa and c.repa_layer > depth:
    raise ValueError(
      f'config.control.repa_layer is {c.repa_layer}; allowed: at most the {depth} '
      'layers of the model'
    )


def run(
  job: experiment_lib.Experiment,
  vae_params: types.Params,
  writer: metrics_lib.MetricWriter,
  stage: str = 'pretrain',
  params: types.Params | None = None,
  judge_params: types.Params | None = None,
) -> types.Params:
  """Pretrains from scratch or from the last checkpoint; returns the policy's parameters.

  With `stage='control'` it goes on from `params` on fresh rows for `config.control.steps`, and
  aligns representations with those of the judge where `config.control.repa` is not 0.
  """
  c, o = job.config.pretrain, job.config.optimizer
  control = stage == 'control'
  steps = job.config.control.steps if control else c.steps
  factor = job.config.control.rate if control else 1.0
  rate = lambda peak: optimizer_lib.schedule(o.schedule, peak * factor, steps, o.warmup)
  optimizer = optimizer_lib.build(
    o.kind, rate(o.learning_rate), o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm, rate(o.muon_rate)
  )
  repa = None
  if control and job.config.control.repa:
    repa = repa_lib.Repa(job.config.control.repa, job.config.control.repa_layer, job.judge)
  loss = losses.pretraining(job.policy, c.weights, c.draws, c.shift, job.config.seed, repa)
  step = step_lib.compile_step(
    loss,
    optimizer,
    job.mesh,
    ema_decay=c.ema,
    micro_batches=job.config.parallel.micro_batches,
    runner=job.config.parallel.runner,
  )
  offset = CONTROL_OFFSET if control else 0
  data = task_batches(
    job,
    lambda task, index: job.data.pretraining(task, index + offset),
    sizes(c),
    lambda task: functools.partial(job.encoder, task),
  )
  params = initial(job) if params is None else params
  if repa:
    params = {
      **params,
      repa_lib.PROJECTOR: repa.init(job.policy, jax.random.key(job.config.seed + 3)),
    }
  state = placement.shard_state(step_lib.init(params, optimizer, ema=c.ema > 0), job.mesh)
  frozen = {'vae': vae_params, **({'judge': judge_params} if repa else {})}
  store = checkpoint.Checkpoints(job.workdir / 'checkpoints' / stage)
  restored = store.restore(state)
  if restored:
    state, record = restored
    for task, iterator in data.items():
      iterator.set_state(record['data'][task])
  start = int(state.step)
  writer.begin(stage, start if restored else -1)
  with (
    preemption.StopSignal() as stop,
    metrics_lib.Progress(
      stage, steps, start, ('loss', 'grad_norm'), job.config.log_every
    ) as progress,
  ):

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
        raise preemption.Preempted(f'{stage} stopped after step {number} of {steps}')
    late.flush()
  store.close()
  trained = state.params if state.ema is None else state.ema
  return {name: part for name, part in trained.items() if name != repa_lib.PROJECTOR}
