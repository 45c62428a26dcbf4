"""Tests of the loop of alignment, with iterations that cost nothing: what it saves, when."""

import json
import os
import pathlib
import signal
import types as python_types
from unittest import mock

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.training import align
from lvrpo_jax.training import learner

STEPS = 8
CORRECT = (0.9, 0.1, 0.1, 0.9, 0.6, 0.6, 0.2, 0.2)
"""By iteration: of pairs the third is best, of iterations the first and the fourth."""


class Light:
  """Stands for `learner.Learner`: its one parameter depends on all prompts, on their order and on a
  factor that changes with every iteration.

  Attributes:
    interrupt: iteration between whose rewards and update the process is asked to stop.
  """

  interrupt = 0

  def __init__(self, experiment, *params):
    del params
    self.experiment = experiment
    self.state = types.TrainState(jnp.int32(0), {'x': jnp.zeros(())}, {'count': jnp.int32(0)})
    self.scorer = python_types.SimpleNamespace(close=lambda: None)
    self.factors = {'answers_penalty': 1.0}

  @property
  def params(self):
    return self.state.params

  def iterate(self, batch, iteration, next_prompts, check):
    del next_prompts
    seen = sum(float(np.sum(p.index_B % 100)) for p in batch.prompts.values())
    if iteration == self.interrupt:
      os.kill(os.getpid(), signal.SIGTERM)
    check()
    x = self.state.params['x'] * 0.9 + seen * self.factors['answers_penalty']
    self.state = self.state.replace(step=self.state.step + 1, params={'x': x})
    self.factors['answers_penalty'] *= 1.1  # In place, as `Learner` does.
    return {'accuracy/generate/correct': CORRECT[iteration - 1]}, {}


class Gamed(Light):
  """Its reward rises all the time."""

  def __init__(self, experiment, *params):
    super().__init__(experiment, *params)
    self.scorer.weights = {'generate': {'rules': 1.0, 'semantic': 0.5}}

  def iterate(self, batch, iteration, next_prompts, check):
    metrics, _ = super().iterate(batch, iteration, next_prompts, check)
    picture = np.random.default_rng(0).integers(0, 255, (2, 2, 32, 32, 3), np.uint8)
    return {
      **metrics,
      'reward/generate/rules': 0.1 * iteration,
      'reward/generate/semantic': 0.2,
    }, {'generate': picture}


class RunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.base = pathlib.Path(self.create_tempdir().full_path)
    self.enterContext(mock.patch.object(learner, 'Learner', Light))

  def run_job(self, name, interrupt=0, held_out=None, **settings):
    """What a run in the folder `name` returns."""
    config = tiny.get_config()
    config.align.update(dict(iterations=STEPS, checkpoints=dict(every=4)))
    config.align.update(settings)
    experiment = experiment_lib.build(config, self.base / name)
    writer = metrics_lib.MetricWriter(experiment.workdir)
    with mock.patch.object(Light, 'interrupt', interrupt):
      out = align.run(experiment, {}, {}, {}, writer, held_out)
    writer.close()
    return jax.device_get(out)

  def steps(self, name):
    return {int(p.name) for p in (self.base / name / 'checkpoints' / 'align').iterdir()}

  def lines(self, name):
    """The lines of `metrics.jsonl`, without times."""
    text = (self.base / name / 'metrics.jsonl').read_text()
    return [
      {k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in text.splitlines()
    ]

  def test_asked_to_stop_before_an_update_it_saves_the_iteration_before(self):
    whole = self.run_job('whole')
    with self.assertRaisesRegex(preemption.Preempted, 'after iteration 2 of 8'):
      self.run_job('stopped', interrupt=3)
    self.assertEqual(self.steps('stopped'), {2})
    # Nothing is left to save right after a save.
    with self.assertRaisesRegex(preemption.Preempted, 'after iteration 4 of 8'):
      self.run_job('stopped', interrupt=5)
    self.assertEqual(self.steps('stopped'), {2, 4})
    self.assertEqual(self.run_job('stopped'), whole)
    self.assertEqual(self.lines('stopped'), self.lines('whole'))

  def test_the_best_is_what_it_would_have_been_without_a_stop(self):
    best = dict(checkpoints=dict(finish='best', every=2))
    whole = self.run_job('whole', **best)
    self.assertEqual(whole, self.run_job('short', iterations=6, checkpoints=dict(every=2)))
    for interrupt in (2, 4):
      with self.assertRaises(preemption.Preempted):
        self.run_job('stopped', interrupt, **best)
    self.assertEqual(self.run_job('stopped', **best), whole)

  def test_a_reward_that_rises_while_held_out_scores_fall_ends_the_run_if_asked(self):
    self.enterContext(mock.patch.object(learner, 'Learner', Gamed))
    asked = []

    def held_out(params):
      asked.append(float(params['x']))
      return {'reward': 1.0 - 0.25 * len(asked), 'diversity': 1.0}

    with self.assertLogs(level='WARNING') as said:
      self.run_job('watched', held_out=held_out, evaluate=dict(every=2))
    self.assertLen(asked, 4)
    self.assertLen(
      [
        line
        for line in said.output
        if 'held-out reward fell from 0.75 to 0.5 while the '
        'training reward rose from 0.3 to 0.5' in line
      ],
      1,
    )
    lines = [line for line in self.lines('watched') if line['stage'] == 'align']
    self.assertEqual([line.get('held_out/reward') for line in lines[:4]], [None, 0.75, None, 0.5])
    self.assertEqual([line['alarms'] for line in lines], [0.0] * 3 + [1.0] * 5)

    asked.clear()
    settings = dict(
      held_out=held_out,
      evaluate=dict(every=2),
      checks=dict(stop_on_alarm=True),
      checkpoints=dict(every=3),
    )
    ended = self.run_job('ended', **settings)
    self.assertLen([line for line in self.lines('ended') if line['stage'] == 'align'], 4)
    self.assertIn(4, self.steps('ended'))
    # Started again it does not go on.
    self.assertEqual(self.run_job('ended', **settings), ended)
    self.assertLen(asked, 2)

  def test_a_mismatch_ends_the_run_and_a_higher_limit_goes_on(self):
    iterate = Light.iterate

    def mismatched(learner, batch, iteration, *rest):
      metrics, pictures = iterate(learner, batch, iteration, *rest)
      return {**metrics, 'mismatch/generate': 0.3 if iteration == 4 else 0.0}, pictures

    def settings(limit):
      return dict(checks=dict(mismatch=dict(image_max=limit)), checkpoints=dict(every=2))

    self.enterContext(mock.patch.object(Light, 'iterate', mismatched))
    whole = self.run_job('whole', **settings(0.5))
    with self.assertRaisesRegex(
      ValueError, 'iteration 4: mismatch/generate is 0.3, .*image_max is 0.1'
    ):
      self.run_job('ended', **settings(0.1))
    self.assertEqual(self.steps('ended'), {2})  # Not the one that the mismatch is of,
    self.assertEqual(self.lines('ended')[-1]['mismatch/generate'], 0.3)  # which is on record.
    self.assertEqual(self.run_job('ended', **settings(0.5)), whole)
    self.assertEqual(self.lines('ended'), self.lines('whole'))

  def test_gradients_below_eps_are_told_where_they_are(self):
    iterate = Light.iterate

    def faint(learner, batch, iteration, *rest):
      metrics, pictures = iterate(learner, batch, iteration, *rest)
      share = {3: 0.75, 5: 0.5}.get(iteration)
      shares = {} if share is None else {'gradient/below_eps/generation_expert': share}
      return {**metrics, **shares}, pictures

    self.enterContext(mock.patch.object(Light, 'iterate', faint))
    with self.assertLogs(level='WARNING') as said:
      self.run_job('faint', optimizer=dict(eps=1e-6))
    (line,) = [line for line in said.output if 'gradients' in line]
    self.assertIn('iteration 3: 75 % of the gradients of the generation expert', line)
    self.assertIn('config.align.optimizer.eps = 1e-06', line)

  def test_asked_to_stop_before_the_first_update_it_has_nothing_to_save(self):
    with self.assertRaisesRegex(preemption.Preempted, 'after iteration 0 of 8'):
      self.run_job('stopped', interrupt=1)
    self.assertEmpty(self.steps('stopped'))


if __name__ == '__main__':
  absltest.main()
