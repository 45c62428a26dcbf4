"""The whole job at tiny size, through the command line: complete, resumable, exact."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl.testing import absltest
import interrupting_reward
import jax_settings
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent


def command(workdir, *overrides):
  return [sys.executable, '-m', 'lvrpo_jax.main', '--config=configs/tiny.py',
          f'--workdir={workdir}',
          '--config.align.custom.generate=interrupting_reward:reward', *overrides]


def environment(cache):
  path = os.pathsep.join(filter(None, (str(ROOT / 'tests'), os.environ.get('PYTHONPATH'))))
  return {**os.environ, **jax_settings.cached(cache), 'PYTHONPATH': path}


def start(workdir, cache, *overrides):
  return subprocess.Popen(command(workdir, *overrides), cwd=ROOT, env=environment(cache),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def final_state(workdir):
  """Bytes of the last alignment checkpoint's arrays, read through orbax in a fresh process."""
  program = (
      'import sys, pathlib, numpy as np, jax, orbax.checkpoint as ocp\n'
      'm = ocp.CheckpointManager(pathlib.Path(sys.argv[1]).resolve())\n'
      's = m.restore(m.latest_step(), args=ocp.args.Composite(state=ocp.args.StandardRestore()))\n'
      'leaves = jax.tree.leaves(s["state"])\n'
      'np.savez(sys.argv[2], *[np.asarray(x) for x in leaves])\n')
  out = pathlib.Path(workdir) / 'final.npz'
  subprocess.run([sys.executable, '-c', program, str(pathlib.Path(workdir) / 'checkpoints/align'),
                  str(out)], check=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
                 capture_output=True)
  data = np.load(out)
  return [data[name] for name in data.files]


class EndToEndTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.base = pathlib.Path(absltest.get_default_test_tmpdir()) / f'e2e{os.getpid()}'
    cls.cache = cls.base / 'cache'
    cls.whole = cls.base / 'whole'
    run = subprocess.run(command(cls.whole), cwd=ROOT, env=environment(cls.cache),
                         capture_output=True, text=True)
    cls.log = run.stdout + run.stderr
    if run.returncode:
      raise AssertionError(cls.log[-4000:])
    cls.scores = json.loads((cls.whole / 'scores.json').read_text())

  def lines(self, stage):
    text = (self.whole / 'metrics.jsonl').read_text()
    return [line for line in map(json.loads, text.splitlines()) if line['stage'] == stage]

  def test_scores_are_complete(self):
    for moment in ('before', 'after'):
      for family, keys in (
          ('generation', ('overall', 'single_object', 'two_object', 'counting', 'colors',
                          'position', 'color_attr', 'unseen')),
          ('understanding', ('accuracy', 'greedy', 'reasoning', 'color', 'reason')),
          ('editing', ('overall', 'recolor', 'remove', 'add', 'move'))):
        for key in keys:
          score = self.scores[moment][family][key]
          self.assertLessEqual(score['ci95'][0], score['value'] + 1e-9)
          self.assertGreaterEqual(score['ci95'][1], score['value'] - 1e-9)
          self.assertGreater(score['n'], 0)
    for headline in ('generation/overall', 'generation/unseen', 'understanding/accuracy',
                     'editing/overall'):
      self.assertContainsSubset(('difference', 'se', 'p', 'n'), self.scores['paired'][headline])
    self.assertContainsSubset(('pretrain', 'align', 'evaluate_before', 'evaluate_after'),
                              self.scores['seconds'])
    self.assertEqual(self.scores['seed'], 0)

  def test_predictions_and_pictures_lie_beside_each_other(self):
    for moment in ('before', 'after'):
      folder = self.whole / 'eval' / moment
      records = [json.loads(line) for line in
                 (folder / 'predictions.jsonl').read_text().splitlines()]
      tasks = {record['task'] for record in records}
      self.assertContainsSubset(('generate', 'understand', 'edit'), tasks)
      for record in records:
        for name in record.get('images', []) + [record[k] for k in ('image', 'source')
                                                if k in record]:
          self.assertTrue((folder / name).is_file(), name)

  def test_rollout_and_replay_agree_before_any_update(self):
    lines = self.lines('align')
    self.assertLen(lines, 4)
    for line in lines:
      for task in ('generate', 'edit', 'understand'):
        self.assertLessEqual(line[f'gap/{task}'], 1e-6)
      # Decoding adds up in another order, and logits of order ten are rounded to 1e-6.
      self.assertLessEqual(line['gap/decode'], 5e-6)

  def test_nothing_is_compiled_after_the_first_step_of_a_stage(self):
    for stage in ('judge', 'pretrain', 'align'):
      last = self.lines(stage)[-1]
      self.assertGreaterEqual(last['step'], 4)
      self.assertEqual(last['compiled'], 0, stage)

  def test_report_opens_without_a_server(self):
    text = (self.whole / 'report.html').read_text()
    self.assertIn('data:image/png;base64', text)
    self.assertNotIn('src="http', text)

  def test_a_second_start_repeats_nothing(self):
    before = (self.whole / 'metrics.jsonl').read_bytes()
    run = subprocess.run(command(self.whole), cwd=ROOT, env=environment(self.cache),
                         capture_output=True, text=True)
    self.assertEqual(run.returncode, 0, run.stderr[-2000:])
    self.assertEqual((self.whole / 'metrics.jsonl').read_bytes(), before)
    self.assertNotIn('stage evaluate_guided', run.stderr)
    self.assertEqual(json.loads((self.whole / 'scores.json').read_text())['guidance'],
                     self.scores['guidance'])

  def test_another_config_is_refused(self):
    run = subprocess.run(command(self.whole, '--config.align.steps=5'), cwd=ROOT,
                         env=environment(self.cache), capture_output=True, text=True)
    self.assertEqual(run.returncode, 2)
    self.assertIn('align.steps: 4 there, 5 here', run.stderr)

  def kill_while_saving(self, workdir, stage, step):
    """Starts the job and kills it as soon as a step of a stage is being saved."""
    process = start(workdir, self.cache)
    deadline = time.monotonic() + 400
    folder = workdir / 'checkpoints' / stage
    # The step's folder appears under a temporary name while it is being written.
    seen = False
    while not seen and process.poll() is None and time.monotonic() < deadline:
      seen = folder.exists() and any(p.name.startswith(step) for p in folder.iterdir())
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    self.assertTrue(seen, f'no step {step} in {folder}')
    self.assertEqual(process.returncode, -signal.SIGKILL)

  def test_killed_and_started_again_equals_undisturbed(self):
    wanted = final_state(self.whole)
    workdir = self.base / 'killed'
    self.kill_while_saving(workdir, 'pretrain', '2')
    # Asked to stop in the second iteration, so the first is saved; killed between two saves later.
    for call, number, code in ((2, signal.SIGTERM, 128 + signal.SIGTERM),
                               (2, signal.SIGKILL, -signal.SIGKILL)):
      request = self.base / 'signal'
      request.write_text(f'{call} {int(number)}')
      run = subprocess.run(command(workdir), cwd=ROOT, capture_output=True, text=True,
                           env=environment(self.cache) |
                           {interrupting_reward.VARIABLE: str(request)})
      self.assertEqual(run.returncode, code, run.stderr[-2000:])
      self.assertFalse(request.exists())
      if number == signal.SIGTERM:
        self.assertIn('stopped after iteration 1 of 4 and saved', run.stderr)
        self.assertTrue((workdir / 'checkpoints' / 'align' / '1').is_dir())
    self.kill_while_saving(workdir, 'align', '4')
    run = subprocess.run(command(workdir), cwd=ROOT, env=environment(self.cache),
                         capture_output=True, text=True)
    self.assertEqual(run.returncode, 0, (run.stdout + run.stderr)[-4000:])
    for mine, theirs in zip(final_state(workdir), wanted, strict=True):
      np.testing.assert_array_equal(mine, theirs)


if __name__ == '__main__':
  absltest.main()
