"""Alignment with a remote judge that fails: the production loop against a server on loopback."""

import functools
import pathlib
import tempfile
import threading
import time
from unittest import mock

from absl.testing import absltest
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np

from configs import tiny
from launch import judge_server
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import validate
from lvrpo_jax.training import align
from lvrpo_jax.training import learner
from lvrpo_jax.training import prompts as prompts_lib
from tests.helpers import judge_fixtures
from tests.helpers import noise

ROWS, GROUP, STEPS = 4, 4, 3
FLOOR = 0.05


def judge_alone(rewards):
  """Leaves out all rewards of a task but the server's."""
  for name, settings in rewards.items():
    settings.weight = float(name == 'remote')


def make_config(url):
  config = tiny.get_config()
  config.model.depth = 1
  config.align.update(
    iterations=STEPS,
    rollout={'group_size': GROUP, 'window': 1, 'steps': 3},
    prompts={'generate': ROWS, 'understand': 0, 'edit': 0},
    checkpoints={'every': STEPS},
    advantage={'floor': FLOOR},
  )
  judge_alone(config.align.rewards.generate)
  config.align.remote_judge.update(url=url, batch=1, retries=0, timeout_s=0.6, deadline_s=20.0)
  validate.validate(config)
  return config


@functools.cache
def parameters():
  """Noise on every leaf: the pictures of a fresh model would all be alike."""
  return noise.parameters(experiment_lib.build(make_config('http://x'), pathlib.Path('unused')))


def fault(image):
  """What happens to a sample: nothing to nine of ten; it depends on the picture alone."""
  number = int(np.asarray(image, np.int64).sum()) % 30
  return ('status', 'slow', 'garbage')[number] if number < 3 else None


def script(number, body, handler):
  """Gives the brightness of one picture, unless its fault comes first."""
  del number, handler
  (sample,) = body['samples']
  image = judge_server.decode(sample['image'])
  kind = fault(image)
  if kind == 'status':
    return 500, {'error': 'out of memory'}
  if kind == 'slow':
    time.sleep(1.5)
  if kind == 'garbage':
    return 200, b'<html>busy</html>'
  return 200, {'scores': [{'id': sample['id'], 'value': float(image.mean() / 255.0)}]}


class RemoteAlignTest(judge_fixtures.JudgeTestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    # The cache is opened once a process, and this folder does not outlive the test.
    cls.addClassCleanup(compilation_cache.reset_cache)
    for name, value in (
      ('jax_compilation_cache_dir', folder.name),
      ('jax_persistent_cache_min_compile_time_secs', 0.0),
    ):
      cls.addClassCleanup(jax.config.update, name, getattr(jax.config, name))
      jax.config.update(name, value)

  def run_job(self, url, name):
    """Runs the loop; returns final parameters, and (batch, pictures) of every iteration."""
    config = make_config(url)
    # A stopped run leaves no lock.
    config.align.remote_judge.cache = str(self.folder / f'{name}.scores')
    experiment = experiment_lib.build(config, self.folder / name)
    experiment.workdir.mkdir(exist_ok=True)
    writer, seen = metrics_lib.MetricWriter(experiment.workdir, 0), []
    collect = learner.Learner.collect

    def spy(aligner, *args):
      out = collect(aligner, *args)
      seen.append(jax.tree.map(np.asarray, (out[0], out[2])))
      return out

    try:
      with mock.patch.object(learner.Learner, 'collect', spy):
        params = align.run(experiment, *parameters(), writer)
    finally:
      writer.close()
    return jax.tree.map(np.asarray, params), seen

  def test_faults_cost_their_samples_and_nothing_else(self):
    params, seen = self.run_job(self.script(script).url, 'whole')
    self.assertLen(seen, STEPS)
    failed = 0
    for batch, pictures in seen:
      b, images = batch['generate'], pictures['generate']
      valid = np.array([[fault(image) is None for image in row] for row in images])
      np.testing.assert_array_equal(b.valid_BG, valid)
      failed += np.sum(~valid)
      x = np.where(valid, images.mean(axis=(2, 3, 4)) / 255.0, np.nan)
      centred = x - np.nanmean(x, axis=1, keepdims=True)
      centred /= np.maximum(np.nanstd(x, axis=1, keepdims=True), FLOOR)
      want = np.nan_to_num(centred / max(np.nanstd(centred), FLOOR))
      np.testing.assert_allclose(b.advantage_BG, want, atol=2e-4)
    self.assertBetween(failed, 1, STEPS * ROWS * GROUP // 3)

    # The server dies in the second iteration.
    def dying(number, body, handler):
      if number >= ROWS * GROUP:
        handler.wfile.close()
        return None
      return script(number, body, handler)

    start = time.monotonic()
    with self.assertRaisesRegex(remote_client.JudgeUnavailable, 'config.align.remote_judge'):
      self.run_job(self.script(dying).url, 'stopped')
    self.assertLess(time.monotonic() - start, 60.0)
    again, rest = self.run_job(self.script(script).url, 'stopped')
    self.assertLen(rest, STEPS - 1)
    jax.tree.map(np.testing.assert_array_equal, again, params)

  def test_a_judge_scores_one_task_while_the_next_is_sampled(self):
    first, second, waited = threading.Event(), threading.Event(), []

    def script(number, body, handler):
      del number, handler
      first.set()
      if not second.is_set():  # Only sampling the other task can end this.
        waited.append(second.wait(20.0))
      return 200, judge_fixtures.scores(body)

    config = make_config(self.script(script).url)
    config.align.update(prompts={'edit': ROWS}, iterations=1)
    judge_alone(config.align.rewards.edit)
    config.align.remote_judge.update(timeout_s=30.0, deadline_s=30.0)
    experiment = experiment_lib.build(config, self.folder)
    aligner = learner.Learner(experiment, *parameters())
    self.addCleanup(aligner.scorer.close)
    submit, tasks = remote_client.Judge.submit, []

    def spy(judge, task, *args):
      tasks.append(task)
      if len(tasks) == 2:
        first.wait(20.0)
        second.set()  # It has been sampled: its pictures are at hand.
      return submit(judge, task, *args)

    data = prompts_lib.prompt_batches(experiment)
    with mock.patch.object(remote_client.Judge, 'submit', spy):
      batch, _, _ = aligner.collect(prompts_lib.next_prompts(experiment, data, data), 1)
    self.assertEqual(tasks, ['generate', 'edit'])
    self.assertNotEmpty(waited)
    self.assertTrue(all(waited))
    for task in tasks:
      self.assertTrue(np.all(batch[task].valid_BG))


if __name__ == '__main__':
  absltest.main()
