"""A whole run at tiny size, through the command line: complete, resumable, exact."""

import json
import os
import pathlib
import signal
import subprocess
import sys

from absl.testing import absltest
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers import jax_settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 20
PROGRAM = '-m', 'lvrpo_jax.main'


def command(workdir, *overrides, program=PROGRAM):
  return [
    sys.executable,
    *program,
    '--config=configs/tiny.py',
    f'--workdir={workdir}',
    f'--config.align.iterations={STEPS}',
    '--config.align.checkpoints.every=4',
    f'--config.align.checks.gradients_every={STEPS}',
    # Both factors move with every iteration.
    '--config.align.text.kl_target=1e-5',
    '--config.align.image.kl_target=1e-6',
    '--config.align.rewards.generate.custom.kind=tests.helpers.brightness:reward',
    '--config.align.rewards.generate.custom.weight=1',
    *overrides,
  ]


def environment(cache):
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
  return {**os.environ, **jax_settings.cached(cache), 'PYTHONPATH': path}


def saved(workdir, stage, step):
  """Arrays of a checkpoint, and its record."""
  folder = epath.Path(workdir) / 'checkpoints' / stage / str(step)
  state = ocp.StandardCheckpointHandler().restore(folder / 'state')
  return (jax.tree.map(np.asarray, state), json.loads((folder / 'record' / 'metadata').read_text()))


def measured(workdir):
  """Everything that a run reports, without times."""
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  # Programs compiled are those of a process.
  lines = [{k: v for k, v in line.items() if k not in ('seconds', 'compiled')} for line in lines]
  scores = json.loads((workdir / 'scores.json').read_text())
  return lines, {name: part for name, part in scores.items() if name != 'seconds'}


class EndToEndTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.base = pathlib.Path(absltest.get_default_test_tmpdir()) / f'e2e{os.getpid()}'
    cls.cache = cls.base / 'cache'
    cls.whole = cls.base / 'whole'
    run = subprocess.run(
      command(cls.whole), cwd=ROOT, env=environment(cls.cache), capture_output=True, text=True
    )
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
        (
          'generation',
          (
            'overall',
            'single_object',
            'two_object',
            'counting',
            'colors',
            'position',
            'color_attr',
            'unseen',
          ),
        ),
        ('understanding', ('accuracy', 'greedy', 'reasoning', 'color', 'reason')),
        ('editing', ('overall', 'recolor', 'remove', 'add', 'move')),
      ):
        for key in keys:
          score = self.scores[moment][family][key]
          self.assertLessEqual(score['ci95'][0], score['value'] + 1e-9)
          self.assertGreaterEqual(score['ci95'][1], score['value'] - 1e-9)
          self.assertGreater(score['n'], 0)
    for headline in (
      'generation/overall',
      'generation/unseen',
      'understanding/accuracy',
      'editing/overall',
    ):
      self.assertContainsSubset(('difference', 'se', 'p', 'n'), self.scores['paired'][headline])
    self.assertContainsSubset(
      ('pretrain', 'align', 'evaluate_before', 'evaluate_after'), self.scores['seconds']
    )
    self.assertEqual(self.scores['seed'], 0)

  def test_predictions_and_pictures_lie_beside_each_other(self):
    for moment in ('before', 'after'):
      folder = self.whole / 'eval' / moment
      records = [
        json.loads(line) for line in (folder / 'predictions.jsonl').read_text().splitlines()
      ]
      tasks = {record['task'] for record in records}
      self.assertContainsSubset(('generate', 'understand', 'edit'), tasks)
      for record in records:
        for name in record.get('images', []) + [
          record[k] for k in ('image', 'source') if k in record
        ]:
          self.assertTrue((folder / name).is_file(), name)

  def test_rollout_and_replay_agree_before_any_update(self):
    lines = self.lines('align')
    self.assertLen(lines, STEPS)
    for line in lines:
      for task in ('generate', 'edit'):
        self.assertLessEqual(line[f'mismatch/{task}'], 1e-6)
      # Compiled as quickly as tests are, two programs round log-probabilities of order ten in their
      # own ways, by 1e-6 each; compiled as usual they agree to the last digit.
      self.assertLessEqual(line['mismatch/understand'], 2e-6)
      # Decoding adds up in another order, and logits of order ten are rounded to 1e-6.
      self.assertLessEqual(line['mismatch/decode'], 5e-6)

  def test_every_run_is_diagnosed(self):
    first, *_, last = self.lines('align')
    tasks = ('generate', 'edit', 'understand')
    self.assertContainsSubset(
      {
        f'{kind}/{task}/rules'
        for kind in ('reward', 'deviation', 'share', 'dead', 'invalid')
        for task in tasks
      }
      | {f'mismatch/{task}/step{k}' for task in ('generate', 'edit') for k in range(2)}
      | {f'{task}/velocity_mse' for task in ('generate', 'edit')}
      | {f'understand/{name}' for name in ('kl_k3', 'entropy', 'clip_fraction')}
      | {f'pictures/{name}' for name in ('luminance', 'dark', 'edge_density', 'hue_entropy')}
      | {
        f'gradient/{name}'
        for name in (
          'understanding_expert',
          'generation_expert',
          'answers_on_shared',
          'images_on_shared',
          'cosine',
        )
      }
      | {'alarms', 'mismatch/understand/mean', 'grad_norm'},
      first,
    )
    self.assertContainsSubset({'held_out/reward', 'held_out/diversity'}, last)

  def test_nothing_is_compiled_after_the_first_step_of_a_stage(self):
    for stage in ('dual_encoder', 'pretrain', 'align'):
      last = self.lines(stage)[-1]
      self.assertGreaterEqual(last['step'], 4)
      self.assertEqual(last['compiled'], 0, stage)

  def test_report_opens_without_a_server(self):
    text = (self.whole / 'report.html').read_text()
    self.assertIn('data:image/png;base64', text)
    self.assertNotIn('src="http', text)

  def test_a_second_start_repeats_nothing(self):
    before = (self.whole / 'metrics.jsonl').read_bytes()
    run = subprocess.run(
      command(self.whole), cwd=ROOT, env=environment(self.cache), capture_output=True, text=True
    )
    self.assertEqual(run.returncode, 0, run.stderr[-2000:])
    self.assertEqual((self.whole / 'metrics.jsonl').read_bytes(), before)
    self.assertNotIn('stage evaluate_guided', run.stderr)
    self.assertEqual(
      json.loads((self.whole / 'scores.json').read_text())['guidance'], self.scores['guidance']
    )

  def test_another_config_is_refused(self):
    run = subprocess.run(
      command(self.whole, '--config.align.iterations=5'),
      cwd=ROOT,
      env=environment(self.cache),
      capture_output=True,
      text=True,
    )
    self.assertEqual(run.returncode, 2)
    self.assertIn(f'align.iterations: {STEPS} there, 5 here', run.stderr)

  def interrupt(self, workdir, moment, stage, number, sent):
    """Starts the run, which ends by a signal, see `interruptions`; returns its log and report."""
    report = self.base / 'report'
    program = (
      '-m',
      'tests.helpers.interruptions',
      moment,
      stage,
      str(number),
      str(int(sent)),
      str(report),
    )
    run = subprocess.run(
      command(workdir, program=program),
      cwd=ROOT,
      capture_output=True,
      text=True,
      env=environment(self.cache),
    )
    self.assertEqual(
      run.returncode,
      -sent if sent == signal.SIGKILL else 128 + sent,
      (run.stdout + run.stderr)[-4000:],
    )
    seen = json.loads(report.read_text())
    report.unlink()
    return run.stderr, seen

  def found(self, workdir, stage):
    return sorted(path.name for path in (workdir / 'checkpoints' / stage).iterdir())

  def test_interrupted_and_started_again_equals_undisturbed(self):
    workdir = self.base / 'interrupted'
    log, _ = self.interrupt(workdir, 'done', 'pretrain', 1, signal.SIGTERM)
    self.assertIn('pretrain stopped after step 1 of 4 and saved', log)
    self.assertEqual(self.found(workdir, 'pretrain'), ['1'])
    # Killed during the first save: nothing is there.
    _, seen = self.interrupt(workdir, 'saving', 'align', 4, signal.SIGKILL)
    self.assertLen(seen['found'], 1)
    self.assertStartsWith(seen['found'][0], '4.orbax-checkpoint-tmp')
    self.assertEqual(self.found(workdir, 'align'), seen['found'])
    # Ten iterations, stop.
    log, _ = self.interrupt(workdir, 'done', 'align', 10, signal.SIGTERM)
    self.assertIn('align stopped after iteration 10 of 20 and saved', log)
    self.assertIn('10', self.found(workdir, 'align'))
    # Killed during a rollout: back to the last checkpoint.
    _, seen = self.interrupt(workdir, 'sampling', 'align', 14, signal.SIGKILL)
    self.assertIn(False, seen['ready'])  # Texts may be done, which are dispatched first.
    self.assertNoCommonElements(self.found(workdir, 'align'), ('13', '14'))
    # Asked to stop between rewards and update: the iteration before is saved.
    log, _ = self.interrupt(workdir, 'rewarded', 'align', 15, signal.SIGTERM)
    self.assertIn('align stopped after iteration 14 of 20 and saved', log)
    self.assertIn('14', self.found(workdir, 'align'))
    run = subprocess.run(
      command(workdir), cwd=ROOT, env=environment(self.cache), capture_output=True, text=True
    )
    self.assertEqual(run.returncode, 0, (run.stdout + run.stderr)[-4000:])
    for stage, step in (('pretrain', 4), ('align', STEPS), ('aligned', 0)):
      mine, wanted = (saved(folder, stage, step) for folder in (workdir, self.whole))
      jax.tree.map(np.testing.assert_array_equal, mine[0], wanted[0])
      self.assertEqual(mine[1], wanted[1])
    factors = saved(workdir, 'align', STEPS)[1]['factors']
    self.assertNotIn(1.0, (factors['answers_penalty'], factors['images_penalty']))
    self.assertEqual(measured(workdir), measured(self.whole))


if __name__ == '__main__':
  absltest.main()
