"""Pretrains the unified model on answers (next tokens) and images (flow matching)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax

from lvrpo_jax import types
from lvrpo_jax.data import examples
from lvrpo_jax.data import tasks
from lvrpo_jax.objectives import repa as repa_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.training import losses
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import prompts
from lvrpo_jax.training import step as step_lib

CONTROL_OFFSET = 1 << 29
"""First row of continued pretraining; pretraining does not reach it."""


def check(experiment: experiment_lib.Experiment) -> None:
  """Refuses settings of continued pretraining that do not fit, before any stage runs.

  Raises:
    ValueError: names the key.
  """
  settings, depth = experiment.config.control, experiment.policy.depth
  if settings.repa and settings.repa_layer > depth:
    raise ValueError(
      f'config.control.repa_layer is {settings.repa_layer}; allowed: at most the {depth} '
      'layers of the model'
    )


class Plan(NamedTuple):
  """Settings in which pretraining and continued pretraining differ.

  Attributes:
    stage: name in metrics and of the checkpoints.
    steps: optimizer steps.
    rate: factor of the learning rates.
    offset: first row.
    repa: weight of representation alignment; 0 leaves it out.
  """

  stage: str
  steps: int
  rate: float = 1.0
  offset: int = 0
  repa: float = 0.0


def pretraining_plan(experiment: experiment_lib.Experiment) -> Plan:
  """Returns the plan of the stage 'pretrain'."""
  return Plan('pretrain', experiment.config.pretrain.steps)


def control_plan(experiment: experiment_lib.Experiment) -> Plan:
  """Returns the plan of the stage 'control', which continues on fresh rows."""
  settings = experiment.config.control
  return Plan(
    stage='control',
    steps=settings.steps,
    rate=settings.rate,
    offset=CONTROL_OFFSET,
    repa=settings.repa,
  )


def run(
  experiment: experiment_lib.Experiment,
  plan: Plan,
  vae_params: types.Params,
  writer: metrics_lib.MetricWriter,
  params: types.Params | None = None,
  dual_encoder_params: types.Params | None = None,
) -> types.Params:
  """Pretrains from the newest checkpoint, or from the beginning; returns the policy's parameters.

  Args:
    experiment: what the run is made of.
    plan: of the stage.
    vae_params: the autoencoder.
    writer: of metrics.
    params: to begin with; None for fresh ones.
    dual_encoder_params: the dual encoder; read where the plan aligns representations.

  Raises:
    preemption.Preempted: asked to stop; the last step is saved.
  """
  config, settings = experiment.config, experiment.config.pretrain
  repa = None
  if plan.repa:
    repa = repa_lib.Repa(plan.repa, config.control.repa_layer, experiment.dual_encoder)
  optimizer = optimizer_lib.from_config(settings.optimizer, plan.steps, plan.rate)
  step = step_lib.compile_step(
    losses.pretraining(
      experiment.policy,
      settings.task_weights,
      settings.draws,
      settings.shift,
      config.seed,
      repa,
    ),
    optimizer,
    experiment.mesh,
    ema_decay=settings.ema,
    micro_batches=config.parallel.micro_batches,
    runner=config.parallel.runner,
  )
  first = experiment.policy.init(jax.random.key(config.seed)) if params is None else params
  if repa:
    key = jax.random.key(config.seed + 3)
    first = {**first, repa_lib.PROJECTOR: repa.init(experiment.policy, key)}
  state = placement.shard_state(
    step_lib.init(first, optimizer, ema=settings.ema > 0), experiment.mesh
  )
  frozen = {'vae': vae_params}
  if repa:
    frozen['dual_encoder'] = dual_encoder_params
  state = _loop(experiment, plan, step, state, frozen, writer)
  trained = state.params if state.ema is None else state.ema
  return {name: part for name, part in trained.items() if name != repa_lib.PROJECTOR}


def _loop(
  experiment: experiment_lib.Experiment,
  plan: Plan,
  step: step_lib.Step,
  state: types.TrainState,
  frozen: dict[str, types.Params],
  writer: metrics_lib.MetricWriter,
) -> types.TrainState:
  """Runs the steps of a plan, with checkpoints and metrics."""
  stage, steps, every = plan.stage, plan.steps, experiment.config.pretrain.save_every
  data = prompts.task_batches(
    experiment,
    examples.PRETRAIN,
    tasks.active(experiment.config.pretrain.rows),
    lambda task: functools.partial(experiment.encoder, task),
    plan.offset,
  )
  store = checkpoint.Checkpoints(experiment.workdir / 'checkpoints' / stage)
  restored = store.restore(state)
  if restored:
    state, record = restored
    for task, iterator in data.items():
      iterator.set_state(record['data'][task])
  start = int(state.step)
  writer.begin(stage, start if restored else -1)
  progress = metrics_lib.Progress(
    stage, steps, start, ('loss', 'grad_norm'), experiment.config.log_every
  )
  with preemption.StopSignal() as stop, progress:

    def consume(number: int, scalars: dict[str, float]) -> None:
      progress.update(number, scalars)
      if number % 10 == 0 or number == steps:
        writer.write(stage, number, scalars)

    late = metrics_lib.Late(stage, consume)
    for number in range(start + 1, steps + 1):
      batch = {task: experiment.place(next(iterator)) for task, iterator in data.items()}
      state, metrics = step(state, frozen, batch)
      late.push(number, metrics)
      stopped = stop.asked()
      if number % every == 0 or number == steps or stopped:
        late.flush()
        states = {task: iterator.get_state() for task, iterator in data.items()}
        store.save(number, state, {'data': states})
      if stopped:
        store.close()
        raise preemption.Preempted(f'{stage} stopped after step {number} of {steps}')
    late.flush()
  store.close()
  return state
