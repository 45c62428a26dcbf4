"""LVRPO: iterations of an `learner.Learner`, with checkpoints, logs and alarms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
import contextlib
import math
from typing import Any

from absl import logging
import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import over_optimization
from lvrpo_jax.models import lora
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.training import experience
from lvrpo_jax.training import learner
from lvrpo_jax.training import pretrain

PICTURES_EVERY = 25
"""Iterations between picture grids in TensorBoard."""


def score(scalars: dict[str, float], key: str) -> float:
  """The number that ranks checkpoints: a metric, or by default the mean of what is correct (nan
  where nothing is).

  Raises:
    ValueError: there is no such metric.
  """
  if not key:
    correct = [
      v for k, v in scalars.items() if k.startswith('accuracy/') and k.endswith('/correct')
    ]
    return sum(correct) / len(correct) if correct else math.nan
  if key not in scalars:
    raise ValueError(f'config.align.score is {key!r}; allowed: {sorted(scalars)}')
  return scalars[key]


def prompt_batches(job: experiment_lib.Experiment) -> dict[str, Iterator[Any]]:
  """Endless (examples, prompts) of every task."""

  def collate(task):
    return lambda rows: (rows, job.encoder(task, rows).prompts)

  return pretrain.task_batches(job, job.data.prompt, pretrain.sizes(job.config.align), collate)


def draw(
  job: experiment_lib.Experiment, data: dict[str, Iterator[Any]], names: Iterable[str]
) -> experience.Tasks:
  """The next prompts of the named tasks."""
  drawn = {task: next(data[task]) for task in names}
  return experience.Tasks(
    {task: list(rows) for task, (rows, _) in drawn.items()},
    {task: job.place(prompts) for task, (_, prompts) in drawn.items()},
  )


def check(job: experiment_lib.Experiment):
  """Refuses settings of alignment that do not fit, before any work."""
  experience.Collector(job).close()
  a, measured = job.config.align, job.config.evaluate.guidance
  if a.objective in flow_objectives.COUPLED and a.guidance != measured:
    logging.warning(
      'config.align.guidance is %g and config.evaluate.guidance is %g: one policy is '
      'trained, and another one is scored',
      a.guidance,
      measured,
    )
  if a.objective in flow_objectives.COUPLED and a.gap_limit.images > a.image_clip / 5:
    logging.warning(
      'config.align.gap_limit.images is %g and config.align.image_clip %g: at most a '
      'fifth of the clip range would keep gaps from being taken for updates',
      a.gap_limit.images,
      a.image_clip,
    )
  if a.lora.rank:
    jax.eval_shape(
      lambda: lora.init(
        bagel.init(job.policy.config, jax.random.key(0)),
        a.lora.rank,
        a.lora.target,
        jax.random.key(0),
      )
    )


HeldOutReward = Callable[[types.Params], dict[str, float]]
"""Scores of a policy on held-out captions, by another detector than the one that pays."""


def monitor_pictures(
  watch: over_optimization.Monitor,
  aligner: learner.Learner,
  number: int,
  metrics: dict[str, Any],
  pictures: dict[str, np.ndarray],
  gold: HeldOutReward | None,
) -> dict[str, float]:
  """How an iteration's pictures look, what held-out captions score, and how many alarms there
  were, with warnings of new ones."""
  task = next((t for t in (tasks.GENERATE, tasks.THINK_GENERATE) if t in pictures), None)
  if task is None:
    return {}
  seen = multihost.process_mean(over_optimization.appearance(pictures[task]))
  raised, out = watch(seen), {f'pictures/{name}': value for name, value in seen.items()}
  every = aligner.job.config.align.gold_every
  if gold and every and number % every == 0:
    held_out = gold(aligner.params)
    reward = sum(
      weight * float(metrics[f'reward/{task}/{name}'])
      for name, weight in aligner.collector.weights(task).items()
    )
    raised += watch.gold(reward, held_out)
    out.update({f'held_out/{name}': value for name, value in held_out.items()})
  for sentence in raised:
    logging.warning('iteration %d: %s; the reward may be gamed', number, sentence)
  return {**out, 'alarms': float(len(watch.state['raised']))}


def resume(
  aligner: learner.Learner, store: checkpoint.Checkpoints, data: dict[str, Iterator[Any]]
) -> dict[str, Any]:
  """Puts the newest checkpoint into the aligner and the data; its record, or {} without one."""
  restored = store.restore(aligner.state)
  if not restored:
    return {}
  aligner.state, record = restored
  aligner.factors = record['factors']
  for task, iterator in data.items():
    iterator.set_state(record['data'][task])
  return record


def end_on_mismatch(
  number: int, scalars: dict[str, float], limits: dict[str, float], store: checkpoint.Checkpoints
) -> None:
  """`mismatch.check`; where it raises, what was saved before is whole when the process ends."""
  try:
    mismatch.check(number, scalars, limits)
  except ValueError:  # In all processes: these numbers are everybody's.
    store.close()
    raise


def run(
  job: experiment_lib.Experiment,
  params: types.Params,
  vae_params: types.Params,
  siglip_params: types.Params,
  writer: metrics_lib.MetricWriter,
  gold: HeldOutReward | None = None,
) -> types.Params:
  """Aligns from the pretrained parameters or from the last checkpoint.

  Args:
    gold: asked every `align.gold_every` iterations.

  Raises:
    checkpoint.Preempted: asked to stop; the last whole iteration is saved.
    remote.JudgeUnavailable: the same holds.
    ValueError: rollouts and replay do not agree, see `mismatch.check`; the last checkpoint stays.
  """
  a = job.config.align
  aligner = learner.Learner(job, params, vae_params, siglip_params)
  data = prompt_batches(job)
  store = checkpoint.Checkpoints(job.workdir / 'checkpoints' / 'align', best=a.keep_best)
  record = resume(aligner, store, data)
  start, watch = record.get('iteration', 0), over_optimization.Monitor(record.get('watch'))
  # Since the last checkpoint that was due: one more in between ranks nothing. Older ones lack them.
  scores = record.get('scores', [])
  writer.begin('align', start if record else -1)
  keys = tuple(f'accuracy/{task}/correct' for task in data)
  with (
    contextlib.closing(aligner.collector),
    preemption.StopSignal() as stop,
    metrics_lib.Progress('align', a.steps, start, keys, job.config.log_every) as progress,
  ):

    def consume(number, scalars):
      progress.update(number, scalars)
      writer.write('align', number, scalars)
      end_on_mismatch(number, scalars, a.gap_limit, store)  # The record shows what ends a run.
      scores.append(score(scalars, a.score))

    late = metrics_lib.Late('align', consume)

    def fresh(names):
      stop.check()  # Before every round of sampling.
      return draw(job, data, names)

    states = lambda: {task: iterator.get_state() for task, iterator in data.items()}

    def save(number, at, due):
      late.flush()
      mean = float(np.mean(scores)) if due and scores else math.nan
      if due:
        scores.clear()
      store.save(
        number,
        aligner.state,
        {
          'iteration': number,
          'data': at,
          'factors': aligner.factors,
          'watch': watch.state,
          'scores': scores,
        },
        mean,
      )

    saved = start
    for number in range(start + 1, a.steps + 1):
      if a.stop_on_alarm and watch.state['raised']:
        logging.warning(
          'alignment ends after iteration %d of %d: %s',
          number - 1,
          a.steps,
          ', '.join(watch.state['raised']),
        )
        break
      at = states()
      try:
        metrics, pictures = aligner.iterate(fresh(data), number, fresh, stop.check)
      except (preemption.Preempted, remote_client.JudgeUnavailable) as error:
        # The state is that of the iteration before; this one will be drawn again.
        if number - 1 > saved:
          save(number - 1, at, due=False)
        store.close()
        if isinstance(error, remote_client.JudgeUnavailable):
          raise
        raise preemption.Preempted(
          f'align stopped after iteration {number - 1} of {a.steps}'
        ) from error
      late.push(
        number, {**metrics, **monitor_pictures(watch, aligner, number, metrics, pictures, gold)}
      )
      if number % PICTURES_EVERY == 0:
        for task, images in pictures.items():
          writer.images(task, number, images[:4].reshape(-1, *images.shape[2:]), a.group)
      ends = number == a.steps or (a.stop_on_alarm and watch.state['raised'])
      if number % a.save_every == 0 or ends:
        save(number, states(), due=True)
        saved = number
    late.flush()
    if stop.asked():
      store.close()
      raise preemption.Preempted(f'align stopped after iteration {a.steps} of {a.steps}')
  if a.finish == 'best':
    restore_best(aligner, store)
  store.close()
  return aligner.params


def restore_best(aligner: learner.Learner, store: checkpoint.Checkpoints) -> None:
  """Puts the policy of the best score in the place of the last, where any has a score."""
  best = store.best()
  if best is not None:
    logging.info('the policy of iteration %d has the best score', best)
    aligner.state = store.restore(aligner.state, best)[0]
