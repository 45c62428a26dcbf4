"""The examples run, and each kind of thing is added without touching the package."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest

from examples import one_update
from tests.helpers import jax_settings

LONGEST = 60
"""Lines of an example."""

SMALL = {
  'align.iterations': 1,
  'pretrain.steps': 1,
  'dual_encoder.steps': 1,
  'align.evaluate.every': 0,
  'align.checks.gradients_every': 0,
  'evaluate.guided_prompts': 0,
  'report': False,
}

ADDED = {
  'all': {
    'align.rewards.generate.custom.kind': 'examples.custom_reward:brightness',
    'align.rewards.generate.custom.weight': 0.5,
    'align.rewards.edit.custom.kind': 'examples.custom_reward:Taste',
    'align.rewards.edit.custom.weight': 2.0,
    'align.image.objective': 'examples.custom_objective:UNCLIPPED',
    'align.text.objective': 'examples.custom_objective:REINFORCE',
    'align.rewards.generate.rules.detector': 'examples.custom_detector:detect',
    'model.family': 'examples.custom_family:FAMILY',
  },
  'data': {
    'data.source': 'examples.custom_data:Squares',
    'pretrain.rows.understand': 0,
    'pretrain.rows.edit': 0,
    'align.prompts.understand': 0,
    'align.prompts.edit': 0,
    'align.rewards.generate.knowledge.weight': 0.0,
  },
}
"""Changes to the tiny job. None needs a file of the package to change."""


class ExamplesTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.base = pathlib.Path(absltest.get_default_test_tmpdir()) / f'examples{os.getpid()}'

  def test_are_short(self):
    for path in (jax_settings.ROOT / 'examples').glob('*.py'):
      self.assertLessEqual(len(path.read_text().splitlines()), LONGEST, path.name)

  def test_one_update(self):
    metrics = one_update.main()
    self.assertEqual(metrics['step'], 1)
    self.assertEqual(metrics['skipped'], 0.0)
    # Before the first update the policy is the reference, and no ratio is clipped.
    self.assertEqual(metrics['generate/velocity_mse'], 0.0)
    self.assertEqual(metrics['generate/clip_fraction'], 0.0)
    self.assertGreater(metrics['grad_norm'], 0.0)

  def job(self, name):
    """Metrics of the tiny job with one thing added, by the command line."""
    workdir = self.base / name
    changes = {**SMALL, **ADDED[name]}
    done = subprocess.run(
      [
        *(sys.executable, '-m', 'lvrpo_jax.main', '--config=configs/tiny.py'),
        f'--workdir={workdir}',
        *(f'--config.{key}={value}' for key, value in changes.items()),
      ],
      cwd=jax_settings.ROOT,
      env={**os.environ, **jax_settings.cached(self.base / 'cache')},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return lines[-1]

  def test_rewards_objectives_detector_and_family_are_added_by_config_alone(self):
    line = self.job('all')
    self.assertEqual((line['stage'], line['skipped']), ('align', 0.0))
    self.assertBetween(line['reward/generate/custom'], 0.0, 1.0)
    self.assertNotEqual(line['reward/edit/custom'], 0.0)
    self.assertEqual(line['invalid/edit/custom'], 0.0)
    self.assertIn('generate/beyond_clip', line)
    self.assertEqual(line['understand/clip_fraction'], 0.0)
    # Images of the family are grey, so its detector finds nothing of a colour.
    self.assertEqual(line['accuracy/generate/correct'], 0.0)
    self.assertEqual(line['pictures/hue_entropy'], 0.0)

  def test_a_data_source_is_added_by_config_alone(self):
    line = self.job('data')
    self.assertEqual((line['stage'], line['skipped']), ('align', 0.0))
    self.assertIn('reward/generate/rules', line)
    self.assertNotIn('reward/understand/rules', line)


if __name__ == '__main__':
  absltest.main()
