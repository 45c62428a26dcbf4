"""The study: its plan, what it refuses, its tables, and a tiny one through the command line."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax_settings
import ml_collections
import numpy as np

from configs import study as study_config
from configs import tiny
from lvrpo_jax import saved
from lvrpo_jax import study
from lvrpo_jax import study_tables

ROOT = pathlib.Path(__file__).resolve().parent.parent


def config(**changes):
  out = study_config.get_config()
  out.update(changes)
  return out


def tiny_config():
  """A study of one seed and one variant at the size of the tests."""
  out = tiny.get_config()
  out.update(study_config.get_config().to_dict() | {
      name: out[name].to_dict() for name in ('model', 'vae', 'judge', 'pretrain', 'align',
                                             'evaluate', 'sampling')})
  out.evaluate.guided = 0
  out.critic.changes = ml_collections.ConfigDict(dict(judge=dict(steps=2)))
  out.critic.pairs = 8
  out.variants = ml_collections.ConfigDict(
      {'repa': dict(program='control', control=dict(steps=2, repa=.5))})
  out.studies = ml_collections.ConfigDict(
      {'full': dict(seeds=(3,), variants=('repa',), changes=dict(seed=0))})
  return out


def records(rng, shift):
  """Predictions of a fake measurement: two captions and a question of two kinds each."""
  out = []
  def add(task, split, kind, **more):
    out.append(dict(task=task, split=split, kind=kind, meaning=f'{kind} {len(out)}',
                    correct=[int(x) for x in rng.random(4) < .4 + shift], **more))
  for kind in study_tables.grammar.GENERATE_KINDS:
    for _ in range(3):
      add('generate', 'eval', kind)
      add('generate', 'unseen', kind)
      add('edit', 'eval', 'recolor')
      add('understand', 'eval', 'reason', greedy_correct=1, format=[1, 1])
  return out


def done(variant, seed, shift):
  rng = np.random.default_rng(seed)
  mine = records(rng, shift)
  drawn = sum(r['task'] == 'generate' and r['split'] == 'eval' for r in mine)
  return dict(seed=seed, variant=variant, records=mine, seconds=120.,
              information=(rng.random(drawn) + shift).tolist())


class PlanTest(parameterized.TestCase):

  def test_every_variant_of_every_seed_after_its_pretraining(self):
    runs = study.plan(config(), pathlib.Path('w'))
    names = ['pretrained', *study_config.VARIANTS]
    self.assertEqual([(r.seed, r.variant) for r in runs],
                     [(seed, name) for seed in (0, 1, 2) for name in names])
    self.assertEqual(runs[1].workdir, pathlib.Path('w/full/seed0/default'))
    self.assertEqual({r.config.seed for r in runs[-len(names):]}, {2})
    by_name = {r.variant: r.config for r in runs[:len(names)]}
    self.assertEqual(by_name['pretrained'].program, 'pretrain')
    self.assertEqual(by_name['default'].program, 'run')
    self.assertEqual(by_name['paper'].align.advantage, 'sum')
    self.assertEqual(by_name['repa'].control.to_dict(),
                     dict(steps=2333, rate=.5, repa=.5, repa_layer=2))
    self.assertEqual({k: v for k, v in by_name['mutual'].align.rewards.edit.items() if v},
                     {'mutual': 1.})
    self.assertEqual(by_name['generation'].align.understand, 0)

  def test_variants_share_what_comes_before_alignment(self):
    runs = study.plan(config(), pathlib.Path('w'))
    for part in ('data', 'model', 'vae', 'judge', 'pretrain', 'optimizer', 'evaluate', 'sampling'):
      self.assertLen({json.dumps(r.config[part].to_dict(), sort_keys=True) for r in runs}, 1, part)

  def test_quick_holds_over_the_steps_of_a_variant(self):
    runs = study.plan(config(study='quick'), pathlib.Path('w'))
    steps = {r.variant: r.config.control.steps for r in runs}
    self.assertEqual(set(steps.values()), {150})
    self.assertEqual(runs[0].config.pretrain.steps, 400)

  @parameterized.parameters(
      (dict(study='brief'), "config.study is 'brief'; allowed: .'full', 'quick'."),
      (dict(studies={'full': dict(variants=('other',))}), "holds 'other'; allowed: .'both'"),
      (dict(variants={'default': {'align': {'grou': 4}}}), 'grou'),
      (dict(variants={'default': {'align': {'group': 'many'}}}), 'group'),
      (dict(variants={'default': {'align': {'group': 1}}}), "variant 'default'.*align.group is 1"))
  def test_what_does_not_fit_is_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      study.plan(config(**changes), pathlib.Path('w'))


class TablesTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    self.found = study_tables.Scores([
        done(variant, seed, shift) for seed in (0, 1)
        for variant, shift in (('pretrained', -.2), ('default', .3), ('paper', .2))])

  def test_value_is_the_mean_of_kinds_and_seeds(self):
    expected = []
    for seed in (0, 1):
      mine = [r for r in records(np.random.default_rng(seed), .3)
              if r['task'] == 'generate' and r['split'] == 'eval']
      for kind in study_tables.grammar.GENERATE_KINDS:
        expected.append(np.mean([r['correct'] for r in mine if r['kind'] == kind]))
    value, low, high = self.found.value('default', 'generation/overall')
    self.assertAlmostEqual(value, np.mean(expected))
    self.assertBetween(value, low, high)
    self.assertAlmostEqual(value, np.mean(self.found.by_seed('default', 'generation/overall')))

  def test_difference_is_that_of_the_values(self):
    for score in ('generation/overall', study_tables.INFORMATION):
      test = self.found.difference('pretrained', score)
      self.assertAlmostEqual(test['difference'], self.found.value('pretrained', score)[0]
                             - self.found.value('default', score)[0])
      self.assertLess(test['difference'], 0.)

  def test_missing_seeds_and_a_missing_reference(self):
    partial = study_tables.Scores([done('default', 0, .3), done('default', 1, .3),
                                   done('paper', 1, .2)])
    self.assertAlmostEqual(
        partial.difference('paper', 'editing/overall')['difference'],
        partial.by_seed('paper', 'editing/overall')[0]
        - partial.by_seed('default', 'editing/overall')[1])
    alone = study_tables.markdown(study_tables.Scores([done('pretrained', 0, 0.)]))
    self.assertNotIn('Differences', alone)

  def test_files(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    text = study_tables.write(folder, [done('default', 0, .3), done('paper', 0, .1)])
    self.assertEqual((folder / 'study.md').read_text(), text + '\n')
    self.assertIn('| default | 1 |', text)
    self.assertIn('| paper | ', text.split('Differences')[1])
    drawing = (folder / 'study.svg').read_text()
    self.assertEqual(drawing.count('<circle'), 2 * len(study_tables.HEADLINES))
    self.assertIn(drawing, (folder / 'study.html').read_text())


class CommandTest(absltest.TestCase):

  def test_tiny_study(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'study.json'
    path.write_text(tiny_config().to_json())
    environment = {**os.environ, **jax_settings.cached(folder / 'cache')}
    command = [sys.executable, '-m', 'lvrpo_jax.main', f'--config={saved.__file__}:{path}',
               f'--workdir={folder / "w"}']
    run = lambda: subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    first = run()
    self.assertEqual(first.returncode, 0, first.stderr[-4000:])
    self.assertIn('| repa | 1 |', first.stdout)
    seed = folder / 'w/full/seed3'
    self.assertTrue((seed / 'repa/eval/before/predictions.jsonl').is_file())
    lines = [json.loads(line) for line in (seed / 'repa/metrics.jsonl').read_text().splitlines()]
    found = [line for line in lines if line['stage'] == 'control']
    self.assertNotEmpty(found)
    # Cosines with the encoder's features, so between -1 and 1, with half their weight in the loss.
    for line in found:
      self.assertBetween(line['repa_loss'], -1., 1.)
      self.assertAlmostEqual(line['loss/repa'], .5 * line['repa_loss'], places=5)
    self.assertFalse({line['stage'] for line in lines} & {'pretrain', 'judge'})
    # What is done is not done again.
    again = run()
    self.assertEqual(again.returncode, 0, again.stderr[-4000:])
    self.assertEqual(again.stdout, first.stdout)
    self.assertNotIn('study: run', again.stderr)


if __name__ == '__main__':
  absltest.main()
