"""The study: its plan, what it refuses, its tables, and a tiny one through the command line."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import ml_collections
import numpy as np

from configs import from_json
from configs import study as study_config
from configs import tiny
from lvrpo_jax.programs import study
from lvrpo_jax.reports import study_tables
from tests.helpers import jax_settings

ROOT = pathlib.Path(__file__).resolve().parents[2]


def config(**changes):
  out = study_config.get_config()
  out.update(changes)
  return out


def tiny_config():
  """A study of one seed and one variant at the size of the tests."""
  out = tiny.get_config()
  out.update(
    study_config.get_config().to_dict()
    | {
      name: out[name].to_dict()
      for name in ('model', 'vae', 'dual_encoder', 'pretrain', 'align', 'evaluate')
    }
  )
  out.evaluate.guided_prompts = 0
  out.study.critic.changes = ml_collections.ConfigDict({'dual_encoder': {'steps': 2}})
  out.study.critic.pairs = 8
  out.study.workers = 2
  out.study.variants = ml_collections.ConfigDict(
    {'repa': {'program': 'control', 'control': {'steps': 2, 'repa': 0.5}}}
  )
  out.study.plans = ml_collections.ConfigDict(
    {'full': {'seeds': (3,), 'variants': ('repa',), 'changes': {'seed': 0}}}
  )
  return out


def records(rng, shift):
  """Predictions of a fake measurement: two captions and a question of two kinds each."""
  out = []

  def add(task, split, kind, **more):
    out.append(
      dict(
        task=task,
        split=split,
        kind=kind,
        meaning=f'{kind} {len(out)}',
        correct=[int(x) for x in rng.random(4) < 0.4 + shift],
        **more,
      )
    )

  for kind in study_tables.world.GENERATE_KINDS:
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
  return {
    'seed': seed,
    'variant': variant,
    'number': len(variant),
    'records': mine,
    'seconds': 120.0,
    'information': (rng.random(drawn) + shift).tolist(),
  }


class PlanTest(parameterized.TestCase):
  def weights(self, config, task):
    """Returns the weights of a task's rewards that are not 0."""
    rewards = config.align.rewards[task].items()
    return {name: reward.weight for name, reward in rewards if reward.weight}

  def test_every_variant_of_every_seed_after_its_pretraining(self):
    runs = study.plan(config(), pathlib.Path('w'))
    names = ['pretrained', *study_config.VARIANTS]
    self.assertEqual(
      [(r.seed, r.variant) for r in runs], [(seed, name) for seed in (0, 1, 2) for name in names]
    )
    self.assertEqual(runs[1].workdir, pathlib.Path('w/full/seed0/default'))
    self.assertEqual({r.config.seed for r in runs[-len(names) :]}, {2})
    by_name = {r.variant: r.config for r in runs[: len(names)]}
    self.assertEqual(by_name['pretrained'].program, 'pretrain')
    self.assertEqual(by_name['default'].program, 'train')
    self.assertEqual(by_name['paper'].align.advantage.method, 'sum_then_normalize')
    self.assertFalse(by_name['paper'].align.rewards.generate.rules.graded)
    self.assertEqual(
      self.weights(by_name['paper'], 'generate'), {'rules': 1.0, 'semantic': 1.0, 'knowledge': 1.0}
    )
    self.assertEqual(
      by_name['repa'].control.to_dict(), {'steps': 2333, 'rate': 0.5, 'repa': 0.5, 'repa_layer': 2}
    )
    self.assertEqual(self.weights(by_name['mutual'], 'edit'), {'mutual': 1.0})
    self.assertEqual(by_name['generation'].align.prompts.understand, 0)

  def test_variants_share_what_comes_before_alignment(self):
    runs = study.plan(config(), pathlib.Path('w'))
    for part in ('data', 'model', 'vae', 'dual_encoder', 'pretrain', 'evaluate'):
      self.assertLen({json.dumps(r.config[part].to_dict(), sort_keys=True) for r in runs}, 1, part)

  def test_quick_holds_over_the_steps_of_a_variant(self):
    runs = study.plan(config(study={'name': 'quick'}), pathlib.Path('w'))
    steps = {r.variant: r.config.control.steps for r in runs}
    self.assertEqual(set(steps.values()), {150})
    self.assertEqual(runs[0].config.pretrain.steps, 400)

  @parameterized.parameters(
    ({'name': 'brief'}, "config.study.name is 'brief'; allowed: .'full', 'quick'."),
    ({'plans': {'full': {'variants': ('other',)}}}, "holds 'other'; allowed: .'both'"),
    ({'variants': {'default': {'align': {'grou': 4}}}}, 'grou'),
    ({'variants': {'default': {'align': {'rollout': {'group_size': 'many'}}}}}, 'group_size'),
    (
      {'variants': {'default': {'align': {'rollout': {'group_size': 1}}}}},
      "variant 'default'.*align.rollout.group_size is 1",
    ),
  )
  def test_what_does_not_fit_is_named(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      study.plan(config(study=changes), pathlib.Path('w'))


class FakeWorker:
  """A worker whose runs are complete, or fail, at the second look."""

  under_way = 0
  most = 0

  def __init__(self, failing=''):
    self.run, self.started, self.ended, self._looks, self._failing = None, [], [], 0, failing

  def start(self, run):
    self.run, self._looks = run, 0
    self.started.append(run.variant)
    FakeWorker.under_way += 1
    FakeWorker.most = max(FakeWorker.most, FakeWorker.under_way)

  def finished(self):
    self._looks += 1
    if self.run is None or self._looks < 2:
      return None
    run, self.run = self.run, None
    FakeWorker.under_way -= 1
    if run.variant == self._failing:
      raise RuntimeError('failed')
    run.workdir.mkdir(parents=True, exist_ok=True)
    (run.workdir / 'scores.json').write_text(json.dumps({run.moment: {}}))
    return run

  def terminate(self):
    self.ended.append('asked')

  def wait(self):
    self.ended.append('waited')


class WorkersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.object(study, 'POLL', 0.0))
    self.enter_context(mock.patch.object(study, 'prepare', lambda run, pretrained: None))
    FakeWorker.under_way = FakeWorker.most = 0
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.runs = study.plan(config(), self.folder)

  def test_every_run_once_and_no_variant_before_its_pretraining(self):
    workers = [FakeWorker(), FakeWorker()]
    done = list(study.execute(self.runs, workers))
    self.assertCountEqual(
      [(r.seed, r.variant) for r in done], [(r.seed, r.variant) for r in self.runs]
    )
    for seed in (0, 1, 2):
      mine = [r.variant for r in done if r.seed == seed]
      self.assertEqual(mine[0], 'pretrained')
    self.assertEqual(FakeWorker.most, 2)
    self.assertEqual(len(workers[0].started) + len(workers[1].started), len(self.runs))
    self.assertEqual(list(study.execute(self.runs, workers)), [])

  def test_a_failure_ends_the_others(self):
    workers = [FakeWorker('paper'), FakeWorker('paper')]
    with self.assertRaisesRegex(RuntimeError, 'failed'):
      list(study.execute(self.runs[:4], workers))
    for worker in workers:
      self.assertEqual(worker.ended, ['asked', 'waited'])

  def test_workers_share_the_cores(self):
    with mock.patch.object(os, 'sched_getaffinity', lambda pid: {0, 1, 4, 5, 6}):
      self.assertEqual(study.shares(2), [{0, 4, 6}, {1, 5}])
      self.assertEqual(study.shares(1), [set()])
      with self.assertRaisesRegex(ValueError, 'config.study.workers is 6; allowed: 1 to 5'):
        study.shares(6)

  def test_processes_keep_to_their_cores(self):
    before = os.sched_getaffinity(0)
    with study.bound({min(before)}):
      found = subprocess.run(
        [sys.executable, '-c', 'import os; print(os.sched_getaffinity(0))'],
        capture_output=True,
        text=True,
        check=True,
      ).stdout
    self.assertEqual(found.strip(), str({min(before)}))
    self.assertEqual(os.sched_getaffinity(0), before)


class TablesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.found = study_tables.Scores(
      [
        done(variant, seed, shift)
        for seed in (0, 1)
        for variant, shift in (('pretrained', -0.2), ('default', 0.3), ('paper', 0.2))
      ]
    )

  def test_value_is_the_mean_of_kinds_and_seeds(self):
    expected = []
    for seed in (0, 1):
      mine = [
        r
        for r in records(np.random.default_rng(seed), 0.3)
        if r['task'] == 'generate' and r['split'] == 'eval'
      ]
      for kind in study_tables.world.GENERATE_KINDS:
        expected.append(np.mean([r['correct'] for r in mine if r['kind'] == kind]))
    value, low, high = self.found.value('default', 'generation/overall')
    self.assertAlmostEqual(value, np.mean(expected))
    self.assertBetween(value, low, high)
    self.assertAlmostEqual(value, np.mean(self.found.by_seed('default', 'generation/overall')))

  def test_difference_is_that_of_the_values(self):
    for score in ('generation/overall', study_tables.INFORMATION):
      test = self.found.difference('pretrained', score)
      self.assertAlmostEqual(
        test['difference'],
        self.found.value('pretrained', score)[0] - self.found.value('default', score)[0],
      )
      self.assertLess(test['difference'], 0.0)

  def test_missing_seeds_and_a_missing_reference(self):
    partial = study_tables.Scores(
      [done('default', 0, 0.3), done('default', 1, 0.3), done('paper', 1, 0.2)]
    )
    self.assertAlmostEqual(
      partial.difference('paper', 'editing/overall')['difference'],
      partial.by_seed('paper', 'editing/overall')[0]
      - partial.by_seed('default', 'editing/overall')[1],
    )
    alone = study_tables.markdown(study_tables.Scores([done('pretrained', 0, 0.0)]))
    self.assertNotIn('Differences', alone)

  def test_files(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    text = study_tables.write(folder, [done('default', 0, 0.3), done('paper', 0, 0.1)])
    self.assertEqual((folder / 'study.md').read_text(), text + '\n')
    self.assertIn('| default | 1 |', text)
    self.assertIn('| paper | ', text.split('Differences')[1])
    drawing = (folder / 'study.svg').read_text()
    self.assertEqual(drawing.count('<circle'), 2 * len(study_tables.HEADLINES))
    self.assertIn(drawing, (folder / 'study.html').read_text())

  def test_kept_runs_give_the_same_tables(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    runs = [done('paper', 0, 0.1), done('default', 0, 0.3), done('default', 1, 0.2)]
    for one in runs:
      one['information'] = np.round(one['information'], 5).tolist()
      one['records'][0]['images'] = ['large']
      study_tables.save(folder / 'measured' / f'{one["variant"]}_seed{one["seed"]}.json.gz', one)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      study_tables.main([str(folder / 'measured')])
    self.assertEqual(printed.getvalue().strip(), study_tables.markdown(study_tables.Scores(runs)))
    self.assertTrue((folder / 'study.svg').is_file())
    kept = study_tables.load(folder / 'measured/paper_seed0.json.gz')
    self.assertNotIn('images', kept['records'][0])

  def test_empty_folder_is_named(self):
    with contextlib.redirect_stderr(io.StringIO()) as said, self.assertRaises(SystemExit):
      study_tables.main([self.create_tempdir().full_path])
    self.assertIn('holds no *.json.gz', said.getvalue())


class CommandTest(absltest.TestCase):
  def test_tiny_study(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = folder / 'study.json'
    path.write_text(tiny_config().to_json())
    environment = {**os.environ, **jax_settings.cached(folder / 'cache')}
    command = [
      sys.executable,
      '-m',
      'lvrpo_jax.main',
      f'--config={from_json.__file__}:{path}',
      f'--workdir={folder / "w"}',
    ]

    def run():
      return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

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
      self.assertBetween(line['repa_loss'], -1.0, 1.0)
      self.assertAlmostEqual(line['loss/repa'], 0.5 * line['repa_loss'], places=5)
    self.assertFalse({line['stage'] for line in lines} & {'pretrain', 'dual_encoder'})
    # What is done is not done again.
    again = run()
    self.assertEqual(again.returncode, 0, again.stderr[-4000:])
    self.assertEqual(again.stdout, first.stdout)
    self.assertNotIn('study: run', again.stderr)


if __name__ == '__main__':
  absltest.main()
