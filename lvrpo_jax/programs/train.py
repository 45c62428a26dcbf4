"""The whole run, stage by stage; a stage that is complete is read back, not repeated."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import time
from typing import Any

from absl import logging
import jax
import ml_collections

from lvrpo_jax.evaluation import evaluate
from lvrpo_jax.evaluation import over_optimization
from lvrpo_jax.evaluation import scores
from lvrpo_jax.parallel import multihost
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.runtime import weights
from lvrpo_jax.runtime import workdir as workdir_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import fit
from lvrpo_jax.training import pretrain


class Clock:
  """Seconds by stage, kept across restarts in `<workdir>/seconds.json`."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
    """Runs a stage and adds its time.

    Raises:
      checkpoint.Preempted: several processes were asked to stop; one by itself just ends.
    """
    if preemption.StopSignal().asked():
      raise preemption.Preempted(f'stopped before the stage {stage}')
    logging.info('stage %s', stage)
    start = time.monotonic()
    out = work()
    self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 2)
    workdir_lib.write_json(self._path, self.seconds)
    return out


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
  """Builds the world, pretrains, measures, aligns, measures again; returns the scores.

  The program 'pretrain' ends after the first measurement.
  """
  job = experiment_lib.build(config, workdir)
  align.check(job)
  pretrain.check(job)
  workdir_lib.check_config(workdir, config)
  if jax.process_index() == 0:
    job.data.tokenizer.save(workdir / 'tokenizer.json')
  writer = metrics_lib.MetricWriter(workdir, jax.process_index())
  clock = Clock(workdir / 'seconds.json')
  siglip_params = lambda: clock(
    'judge',
    lambda: weights.make_or_restore(
      workdir,
      weights.JUDGE,
      weights.template(job, weights.JUDGE),
      lambda: fit.train_dual_encoder(job, writer),
    ),
  )
  if config.checkpoint:
    vae_params = clock('vae', lambda: weights.base(job, weights.VAE))
    siglip_params = siglip_params()
    params = clock('load', lambda: weights.base(job, weights.BASE))
  else:
    vae_params = clock(
      'vae',
      lambda: weights.make_or_restore(
        workdir, weights.VAE, weights.template(job, weights.VAE), lambda: fit.fit_autoencoder(job)
      ),
    )
    siglip_params = siglip_params()
    params = clock('pretrain', lambda: pretrain.run(job, vae_params, writer))
  tools = evaluate.samplers(job)
  measure = lambda name, p: evaluate.run(job, p, vae_params, tools, workdir / 'eval' / name)
  before = clock('evaluate_before', lambda: measure('before', params))
  path = workdir / 'scores.json'  # Written after the guided baseline, so it holds all of that.
  guided = (
    json.loads(path.read_text())['guidance']
    if multihost.path_exists(path)
    else clock('evaluate_guided', lambda: evaluate.guided(job, params, vae_params, tools))
  )
  found = write_scores(workdir, config, clock, guided, before, None)
  if config.program == 'pretrain':
    writer.close()
    return found
  if config.program == 'control':
    params = clock(
      'control', lambda: pretrain.run(job, vae_params, writer, 'control', params, siglip_params)
    )
  else:
    gold = lambda p: evaluate.held_out_reward(job, p, vae_params, tools, config.align.gold)
    params = clock('align', lambda: align.run(job, params, vae_params, siglip_params, writer, gold))
    weights.make_or_restore(workdir, weights.ALIGNED, params, lambda: params)
  after = clock('evaluate_after', lambda: measure('after', params))
  writer.close()
  return write_scores(workdir, config, clock, guided, before, after)


def write_scores(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  clock: Clock,
  guided: dict[str, Any],
  before: scores.Records,
  after: scores.Records | None,
) -> dict[str, Any]:
  """Writes `scores.json`, also of a run that is not finished."""
  split = lambda records: (
    [r for r in records if r.get('task') != 'panel'],
    next(r for r in records if r.get('task') == 'panel')['panel'],
  )
  old, old_panel = split(before)
  out: dict[str, Any] = {
    'seed': config.seed,
    'seconds': clock.seconds,
    'before': scores.table(old, config.seed),
    'guidance': guided,
    'panel': {'before': old_panel},
  }
  if guided:
    best = max(guided, key=lambda scale: guided[scale]['value'])
    out['before_guided'] = {'generation': {'overall': guided[best]}, 'scale': float(best)}
  if after is not None:
    new, new_panel = split(after)
    out['after'] = scores.table(new, config.seed)
    out['paired'] = scores.paired(old, new)
    out['panel'].update(after=new_panel, alarms=over_optimization.alarms(old_panel, new_panel))
  workdir_lib.write_json(workdir / 'scores.json', out)
  return out
