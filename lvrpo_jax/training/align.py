"""The alignment loop: iterations of a learner, with checkpoints, metrics and monitors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import contextlib
import math

from absl import logging
import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import over_optimization
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards import scorer
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rollouts import engine
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.training import learner as learner_lib
from lvrpo_jax.training import prompts as prompts_lib
from lvrpo_jax.training import update as update_lib

PICTURES_EVERY = 25
"""Iterations between image grids in TensorBoard."""

BELOW_EPS = 0.5
"""Share of an expert's gradients below the optimizer's eps from which on a warning is logged."""

HeldOutReward = Callable[[types.Params], dict[str, float]]
"""Scores a policy on held-out captions, by another detector than that of the reward."""


def score(scalars: dict[str, float], key: str) -> float:
  """Returns the score that ranks checkpoints: a metric, or the mean of the rules' verdicts.

  Args:
    scalars: metrics of an iteration.
    key: name of the metric; '' for the mean of all `accuracy/<task>/correct`, or NaN without any.

  Raises:
    ValueError: there is no such metric.
  """
  if not key:
    correct = [
      value
      for name, value in scalars.items()
      if name.startswith('accuracy/') and name.endswith('/correct')
    ]
    return sum(correct) / len(correct) if correct else math.nan
  if key not in scalars:
    raise ValueError(f'config.align.checkpoints.metric is {key!r}; allowed: {sorted(scalars)}')
  return scalars[key]


def check(experiment: experiment_lib.Experiment) -> None:
  """Refuses settings of alignment that do not fit, before any stage runs.

  Raises:
    ValueError: names the key.
  """
  align, measured = experiment.config.align, experiment.config.evaluate.guidance
  rewards = scorer.Scorer(experiment)
  engine.RolloutEngine(experiment, rewards.asks_server)
  update_lib.alignment_loss(experiment)
  coupled = flow_objectives.find(align.image.objective).coupled
  if coupled and align.rollout.guidance != measured:
    logging.warning(
      'config.align.rollout.guidance is %g and config.evaluate.guidance is %g: one policy is '
      'trained, and another one is scored',
      align.rollout.guidance,
      measured,
    )
  image_max = mismatch.limits(align.checks.mismatch, experiment.config.model.dtype)['image_max']
  if coupled and image_max > align.image.clip / 5:
    logging.warning(
      'config.align.checks.mismatch.image_max is %g and config.align.image.clip %g: above a fifth '
      'of the clip range, mismatch cannot be told from updates',
      image_max,
      align.image.clip,
    )
  if align.lora.rank:
    key = jax.random.key(0)
    params = jax.eval_shape(experiment.policy.init, key)
    jax.eval_shape(lambda tree: lora.init(tree, align.lora.rank, align.lora.target, key), params)


def warn_below_eps(iteration: int, scalars: dict[str, float], eps: float) -> None:
  """Logs a warning where Adam's eps is larger than most gradients of an expert."""
  prefix = 'gradient/below_eps/'
  for name, share in scalars.items():
    if name.startswith(prefix) and share > BELOW_EPS:
      logging.warning(
        'iteration %d: %.0f %% of the gradients of the %s are below '
        'config.align.optimizer.eps = %g, so Adam hardly changes these parameters; set a smaller '
        'eps',
        iteration,
        100 * share,
        name.removeprefix(prefix).replace('_', ' '),
        eps,
      )


def monitor_images(
  monitor: over_optimization.Monitor,
  learner: learner_lib.Learner,
  iteration: int,
  metrics: learner_lib.Metrics,
  images: dict[str, np.ndarray],
  held_out_reward: HeldOutReward | None,
) -> dict[str, float]:
  """Returns metrics of an iteration's images and of held-out captions, and the number of alarms.

  New alarms are logged.
  """
  task = next((name for name in (tasks.GENERATE, tasks.THINK_GENERATE) if name in images), None)
  if task is None:
    return {}
  seen = multihost.process_mean(over_optimization.appearance(images[task]))
  raised, out = monitor(seen), {f'pictures/{name}': value for name, value in seen.items()}
  every = learner.experiment.config.align.evaluate.every
  if held_out_reward and every and iteration % every == 0:
    held_out = held_out_reward(learner.params)
    reward = sum(
      weight * float(metrics[f'reward/{task}/{name}'])
      for name, weight in learner.scorer.weights[task].items()
    )
    raised += monitor.held_out(reward, held_out)
    out.update({f'held_out/{name}': value for name, value in held_out.items()})
  for sentence in raised:
    logging.warning('iteration %d: %s; the reward may be gamed', iteration, sentence)
  return {**out, 'alarms': float(len(monitor.state['raised']))}


class Alignment:
  """Runs iterations of a learner, with its prompts, checkpoints, metrics and monitors."""

  def __init__(
    self,
    learner: learner_lib.Learner,
    writer: metrics_lib.MetricWriter,
    held_out_reward: HeldOutReward | None,
  ):
    """Restores the newest checkpoint, if there is one."""
    self.learner, self._writer, self._held_out = learner, writer, held_out_reward
    self.experiment = experiment = learner.experiment
    self._align = experiment.config.align
    self._bounds = mismatch.limits(self._align.checks.mismatch, experiment.config.model.dtype)
    self.data = prompts_lib.prompt_batches(experiment)
    self.store = checkpoint.Checkpoints(
      experiment.workdir / 'checkpoints' / 'align', best=self._align.checkpoints.keep_best
    )
    record = self._resume()
    self.start = self._saved = record.get('iteration', 0)
    self._monitor = over_optimization.Monitor(record.get('watch'))
    # Scores since the last due checkpoint; a checkpoint between two due ones does not clear them.
    # Records of former versions lack them.
    self._scores: list[float] = record.get('scores', [])
    writer.begin('align', self.start if record else -1)
    keys = tuple(f'accuracy/{task}/correct' for task in self.data)
    self.progress = metrics_lib.Progress(
      'align', self._align.iterations, self.start, keys, experiment.config.log_every
    )
    self._late = metrics_lib.Late('align', self._consume)

  def _resume(self) -> dict[str, types.Json]:
    """Restores learner and data from the newest checkpoint; returns its record, or {}."""
    restored = self.store.restore(self.learner.state)
    if not restored:
      return {}
    self.learner.state, record = restored
    self.learner.factors = record['factors']
    for task, iterator in self.data.items():
      iterator.set_state(record['data'][task])
    return record

  def _consume(self, iteration: int, scalars: dict[str, float]) -> None:
    """Writes and checks the metrics of an iteration, one iteration late."""
    self.progress.update(iteration, scalars)
    self._writer.write('align', iteration, scalars)
    warn_below_eps(iteration, scalars, self._align.optimizer.eps)
    try:  # After the metrics are written, so that they show what ends the run.
      mismatch.check(iteration, scalars, self._bounds)
    except ValueError:  # It is raised in all processes, as all have the same metrics.
      self.store.close()
      raise
    self._scores.append(score(scalars, self._align.checkpoints.metric))

  def data_states(self) -> dict[str, types.Json]:
    """Returns the states of the prompt iterators."""
    return {task: iterator.get_state() for task, iterator in self.data.items()}

  def save(self, iteration: int, data_states: dict[str, types.Json], due: bool) -> None:
    """Saves the state after an iteration; a due checkpoint gets the mean score since the last."""
    self._late.flush()
    mean = float(np.mean(self._scores)) if due and self._scores else math.nan
    if due:
      self._scores.clear()
    self.store.save(
      iteration,
      self.learner.state,
      {
        'iteration': iteration,
        'data': data_states,
        'factors': self.learner.factors,
        'watch': self._monitor.state,
        'scores': self._scores,
      },
      mean,
    )
    self._saved = iteration

  @property
  def stopped_by_alarm(self) -> bool:
    """Whether an alarm has ended the alignment."""
    return bool(self._align.checks.stop_on_alarm and self._monitor.state['raised'])

  def iterate(self, iteration: int, stop: preemption.StopSignal) -> None:
    """Runs one iteration, writes its metrics, and saves a checkpoint where one is due.

    Raises:
      preemption.Preempted: asked to stop; the last complete iteration is saved.
      client.JudgeUnavailable: the remote judge is unavailable; the same is saved.
    """
    settings, learner = self._align, self.learner

    def fresh(names: Iterable[str]) -> engine.PromptBatch:
      stop.check()  # Before every round of sampling.
      return prompts_lib.next_prompts(self.experiment, self.data, names)

    before = self.data_states()
    try:
      metrics, images = learner.iterate(fresh(self.data), iteration, fresh, stop.check)
    except (preemption.Preempted, remote_client.JudgeUnavailable) as error:
      # The state is still that after the previous iteration; this one will be sampled again.
      if iteration - 1 > self._saved:
        self.save(iteration - 1, before, due=False)
      self.store.close()
      if isinstance(error, remote_client.JudgeUnavailable):
        raise
      raise preemption.Preempted(
        f'align stopped after iteration {iteration - 1} of {settings.iterations}'
      ) from error
    seen = monitor_images(self._monitor, learner, iteration, metrics, images, self._held_out)
    self._late.push(iteration, {**metrics, **seen})
    if iteration % PICTURES_EVERY == 0:
      for task, group in images.items():
        rows = group[:4].reshape(-1, *group.shape[2:])
        self._writer.images(task, iteration, rows, settings.rollout.group_size)
    ends = iteration == settings.iterations or self.stopped_by_alarm
    if iteration % settings.checkpoints.every == 0 or ends:
      self.save(iteration, self.data_states(), due=True)

  def finish(self, stop: preemption.StopSignal) -> types.Params:
    """Waits until everything is written, and returns the policy that is evaluated."""
    settings = self._align
    self._late.flush()
    if stop.asked():
      self.store.close()
      total = settings.iterations
      raise preemption.Preempted(f'align stopped after iteration {total} of {total}')
    if settings.checkpoints.finish == 'best':
      restore_best(self.learner, self.store)
    self.store.close()
    return self.learner.params

  def log_alarm(self, iteration: int) -> None:
    """Logs why the alignment ends early."""
    logging.warning(
      'alignment ends after iteration %d of %d: %s',
      iteration,
      self._align.iterations,
      ', '.join(self._monitor.state['raised']),
    )


def run(
  experiment: experiment_lib.Experiment,
  params: types.Params,
  vae_params: types.Params,
  dual_encoder_params: types.Params,
  writer: metrics_lib.MetricWriter,
  held_out_reward: HeldOutReward | None = None,
) -> types.Params:
  """Aligns from the pretrained parameters or from the newest checkpoint.

  Args:
    experiment: what the run is made of.
    params: the pretrained policy.
    vae_params: the autoencoder.
    dual_encoder_params: the dual encoder.
    writer: of metrics.
    held_out_reward: called every `align.evaluate.every` iterations.

  Returns:
    The policy that is evaluated.

  Raises:
    preemption.Preempted: asked to stop; the last complete iteration is saved.
    client.JudgeUnavailable: the remote judge is unavailable; the same is saved.
    ValueError: rollouts and replay do not agree, see `mismatch.check`; the last checkpoint stays.
  """
  learner = learner_lib.Learner(experiment, params, vae_params, dual_encoder_params)
  loop = Alignment(learner, writer, held_out_reward)
  with contextlib.closing(learner.scorer), preemption.StopSignal() as stop, loop.progress:
    for iteration in range(loop.start + 1, experiment.config.align.iterations + 1):
      if loop.stopped_by_alarm:
        loop.log_alarm(iteration - 1)
        break
      loop.iterate(iteration, stop)
    return loop.finish(stop)


def restore_best(learner: learner_lib.Learner, store: checkpoint.Checkpoints) -> None:
  """Restores the best-scoring checkpoint, if there is one."""
  best = store.best()
  if best is None:
    return
  logging.info('the policy of iteration %d has the best score', best)
  restored = store.restore(learner.state, best)
  if restored:
    learner.state = restored[0]
