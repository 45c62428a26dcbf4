"""Runs the programs 'train', 'pretrain' and 'control': all stages of a run, each done once."""

from __future__ import annotations

from collections.abc import Callable
import json
import pathlib
import time
from typing import TypeVar

from absl import logging
import jax

from lvrpo_jax import types
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

Result = TypeVar('Result')
Scores = dict[str, types.Json]
"""Contents of `scores.json`."""


class Clock:
  """Measures the seconds of every stage, and keeps them across restarts in a JSON file.

  Attributes:
    seconds: time of every stage, over all starts of the run.
  """

  def __init__(self, path: pathlib.Path):
    """Reads the file, if there is one."""
    self._path = path
    self.seconds: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

  def __call__(self, stage: str, work: Callable[[], Result]) -> Result:
    """Runs a stage, adds its time, and returns the result of `work`.

    Raises:
      preemption.Preempted: several processes were asked to stop; a single process just ends.
    """
    if preemption.StopSignal().asked():
      raise preemption.Preempted(f'stopped before the stage {stage}')
    logging.info('stage %s', stage)
    start = time.monotonic()
    out = work()
    self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.monotonic() - start, 2)
    workdir_lib.write_json(self._path, self.seconds)
    return out


class Stages:
  """Runs the stages of a run; a stage is done once, and its result is read after a restart."""

  def __init__(self, config: types.Config, workdir: pathlib.Path):
    """Builds and checks the experiment; writes the config into the workdir.

    Raises:
      ValueError: settings do not fit; the message names the key.
    """
    self.config, self.workdir = config, workdir
    self.experiment = experiment_lib.build(config, workdir)
    align.check(self.experiment)
    pretrain.check(self.experiment)
    workdir_lib.check_config(workdir, config)
    if jax.process_index() == 0:
      self.experiment.data.tokenizer.save(workdir / 'tokenizer.json')
    self.writer = metrics_lib.MetricWriter(workdir, jax.process_index())
    self.clock = Clock(workdir / 'seconds.json')

  def _made(self, name: str, make: Callable[[], types.Params]) -> types.Params:
    """Reads parameters of the workdir; if they are missing, makes and saves them."""
    like = weights.template(self.experiment, name)
    return weights.make_or_restore(self.workdir, name, like, make)

  def autoencoder(self) -> types.Params:
    """Returns the autoencoder: fitted, or of the released model."""
    if self.config.checkpoint:
      return self.clock('vae', lambda: weights.base(self.experiment, weights.VAE))
    return self.clock(
      'vae',
      lambda: self._made(weights.VAE, lambda: fit.fit_autoencoder(self.experiment)),
    )

  def dual_encoder(self) -> types.Params:
    """Returns the dual encoder: trained, or of `config.dual_encoder.path`."""
    if self.config.dual_encoder.path:
      return self.clock(fit.STAGE, lambda: weights.read_dual_encoder(self.experiment))
    return self.clock(
      fit.STAGE,
      lambda: self._made(
        weights.DUAL_ENCODER, lambda: fit.train_dual_encoder(self.experiment, self.writer)
      ),
    )

  def policy(self, vae_params: types.Params) -> types.Params:
    """Returns the policy before alignment: pretrained, or of the released model."""
    if self.config.checkpoint:
      return self.clock('load', lambda: weights.base(self.experiment, weights.BASE))
    plan = pretrain.pretraining_plan(self.experiment)
    return self.clock(
      plan.stage, lambda: pretrain.run(self.experiment, plan, vae_params, self.writer)
    )

  def continued(
    self,
    params: types.Params,
    vae_params: types.Params,
    dual_encoder_params: types.Params,
  ) -> types.Params:
    """Continues pretraining, as the control of the alignment; returns the policy."""
    plan = pretrain.control_plan(self.experiment)
    return self.clock(
      plan.stage,
      lambda: pretrain.run(
        self.experiment, plan, vae_params, self.writer, params, dual_encoder_params
      ),
    )

  def aligned(
    self,
    params: types.Params,
    vae_params: types.Params,
    dual_encoder_params: types.Params,
    evaluator: evaluate.Evaluator,
  ) -> types.Params:
    """Aligns the policy; returns the one that is evaluated."""
    count = self.config.align.evaluate.prompts
    params = self.clock(
      'align',
      lambda: align.run(
        self.experiment,
        params,
        vae_params,
        dual_encoder_params,
        self.writer,
        lambda policy: evaluator.held_out_reward(policy, count),
      ),
    )
    return weights.make_or_restore(self.workdir, weights.ALIGNED, params, lambda: params)

  def measure(
    self, moment: str, evaluator: evaluate.Evaluator, params: types.Params
  ) -> scores.Records:
    """Evaluates a policy on held-out prompts; returns the prediction records.

    Args:
      moment: 'before' or 'after' the alignment.
      evaluator: of the run.
      params: the policy.
    """
    folder = self.workdir / 'eval' / moment
    return self.clock(f'evaluate_{moment}', lambda: evaluator.run(params, folder))

  def guided(self, evaluator: evaluate.Evaluator, params: types.Params) -> Scores:
    """Returns the scores of the guided baseline by guidance scale."""
    # The file is written after the guided baseline, so it holds all its scores.
    path = self.workdir / 'scores.json'
    if multihost.path_exists(path):
      return json.loads(path.read_text())['guidance']
    return self.clock('evaluate_guided', lambda: evaluator.guided(params))


def run(config: types.Config, workdir: pathlib.Path) -> Scores:
  """Pretrains, evaluates, aligns and evaluates again; returns the scores.

  The program 'pretrain' ends after the first evaluation.
  """
  stages = Stages(config, workdir)
  vae_params = stages.autoencoder()
  dual_encoder_params = stages.dual_encoder()
  params = stages.policy(vae_params)
  evaluator = evaluate.Evaluator(stages.experiment, vae_params)
  before = stages.measure('before', evaluator, params)
  guided = stages.guided(evaluator, params)
  found = write_scores(workdir, config, stages.clock, guided, before, None)
  if config.program != 'pretrain':
    if config.program == 'control':
      params = stages.continued(params, vae_params, dual_encoder_params)
    else:
      params = stages.aligned(params, vae_params, dual_encoder_params, evaluator)
    after = stages.measure('after', evaluator, params)
    found = write_scores(workdir, config, stages.clock, guided, before, after)
  stages.writer.close()
  return found


def write_scores(
  workdir: pathlib.Path,
  config: types.Config,
  clock: Clock,
  guided: Scores,
  before: scores.Records,
  after: scores.Records | None,
) -> Scores:
  """Writes `scores.json`, also of a run that is not finished; returns its contents.

  Args:
    workdir: folder of the run.
    config: of the run.
    clock: seconds of the stages.
    guided: scores of the guided baseline.
    before, after: prediction records; None before the alignment has ended.
  """

  def split(records: scores.Records) -> tuple[scores.Records, types.Json]:
    return (
      [record for record in records if record.get('task') != 'panel'],
      next(record for record in records if record.get('task') == 'panel')['panel'],
    )

  old, old_panel = split(before)
  out: Scores = {
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
