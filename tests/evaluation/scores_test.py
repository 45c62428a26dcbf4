"""Tests of scores on a handful of prediction records with answers worked out by hand."""

import math

from absl.testing import absltest
import numpy as np

from lvrpo_jax.evaluation import scores


def record(task, kind, meaning, split='eval', **values):
  return {'task': task, 'split': split, 'kind': kind, 'meaning': meaning, **values}


def question(kind, meaning, correct, greedy, well_formed):
  return record(
    'understand', kind, meaning, correct=correct, greedy_correct=greedy, format=well_formed
  )


RECORDS = [
  record('generate', 'position', 'a', correct=[1, 1, 0, 0]),
  record('generate', 'position', 'a', correct=[1, 1, 1, 1]),
  record('generate', 'position', 'b', correct=[0, 0, 0, 0]),
  record('generate', 'counting', 'c', correct=[1, 0, 0, 0]),
  record('generate', 'position', 'd', split='unseen', correct=[1, 1, 1, 0]),
  question('color', 'e', [1, 0], 1, [1, 1]),
  question('reason', 'f', [0, 0], 0, [1, 0]),
  question('compare', 'g', [1, 1], 1, [0, 0]),
  record('edit', 'move', 'h', correct=[0, 1]),
  {'task': 'panel', 'panel': {}, 'split': 'eval', 'kind': '', 'meaning': ''},
]


class GroupTest(absltest.TestCase):
  def test_prompts_by_kind_with_their_meanings(self):
    groups = scores.groups(RECORDS, 'generate', 'eval', 'correct')
    self.assertEqual(
      groups, {'position': ([0.5, 1.0, 0.0], ['a', 'a', 'b']), 'counting': ([0.25], ['c'])}
    )

  def test_a_filter_of_kinds(self):
    groups = scores.groups(RECORDS, 'generate', 'eval', 'correct', lambda kind: kind < 'd')
    self.assertEqual(list(groups), ['counting'])

  def test_headlines(self):
    names = scores.headlines(RECORDS)
    self.assertSetEqual(
      set(names),
      {
        'generation/overall',
        'generation/unseen',
        'generation/position',
        'generation/counting',
        'understanding/accuracy',
        'understanding/greedy',
        'understanding/format',
        'understanding/reasoning',
        'understanding/color',
        'understanding/reason',
        'understanding/compare',
        'editing/overall',
        'editing/move',
      },
    )
    self.assertSetEqual(set(names['understanding/reasoning']), {'reason', 'compare'})
    self.assertEqual(
      names['generation/position'], {'position': names['generation/overall']['position']}
    )

  def test_absent_tasks_have_no_score(self):
    self.assertEmpty(scores.headlines([]))
    only = [r for r in RECORDS if r['task'] == 'edit']
    self.assertSetEqual(set(scores.headlines(only)), {'editing/overall', 'editing/move'})


class TableTest(absltest.TestCase):
  def test_values_are_means_over_kinds(self):
    table = scores.table(RECORDS, seed=0)

    def value(family, key):
      return table[family][key]['value']

    self.assertAlmostEqual(value('generation', 'position'), 0.5)
    self.assertAlmostEqual(value('generation', 'overall'), (0.5 + 0.25) / 2)
    self.assertAlmostEqual(value('generation', 'unseen'), 0.75)
    self.assertAlmostEqual(value('understanding', 'accuracy'), (0.5 + 0.0 + 1.0) / 3)
    self.assertAlmostEqual(value('understanding', 'greedy'), 2 / 3)
    self.assertAlmostEqual(value('understanding', 'format'), (1.0 + 0.5 + 0.0) / 3)
    self.assertAlmostEqual(value('understanding', 'reasoning'), 0.5)
    self.assertAlmostEqual(value('editing', 'overall'), 0.5)
    self.assertEqual(table['generation']['overall']['n'], 4)
    self.assertEqual(table['generation']['unseen']['n'], 1)

  def test_intervals_draw_whole_meanings(self):
    low, high = scores.table(RECORDS, seed=0)['generation']['position']['ci95']
    # Meanings a (0.5, 1) and b (0): a resample holds a alone, b alone, or both.
    self.assertEqual((low, high), (0.0, 0.75))

  def test_the_seed_fixes_the_interval(self):
    self.assertEqual(scores.table(RECORDS, seed=3), scores.table(RECORDS, seed=3))


class PairedTest(absltest.TestCase):
  def records(self, values):
    return [record('edit', 'move', str(i), correct=[v]) for i, v in enumerate(values)]

  def test_difference_and_standard_error(self):
    before, after = [0, 0, 1, 0, 1, 0, 0, 1], [1, 0, 1, 1, 1, 1, 0, 0]
    test = scores.paired(self.records(before), self.records(after))['editing/overall']
    d = np.subtract(after, before)
    self.assertAlmostEqual(test['difference'], d.mean())
    self.assertAlmostEqual(test['se'], d.std(ddof=1) / math.sqrt(8))
    self.assertEqual(test['n'], 8)

  def test_sign_and_no_change(self):
    better, worse = self.records([1] * 8), self.records([0] * 7 + [1])
    self.assertGreater(scores.paired(worse, better)['editing/move']['difference'], 0)
    self.assertLess(scores.paired(better, worse)['editing/move']['difference'], 0)
    same = scores.paired(RECORDS, RECORDS)
    self.assertSetEqual(set(same), set(scores.headlines(RECORDS)))
    for test in same.values():
      self.assertEqual((test['difference'], test['p']), (0.0, 1.0))

  def test_kinds_weigh_the_same(self):
    def records(many, few):
      return [record('edit', 'move', f'm{i}', correct=[many]) for i in range(6)] + [
        record('edit', 'add', f'a{i}', correct=[few]) for i in range(2)
      ]

    test = scores.paired(records(0, 0), records(1, 0))['editing/overall']
    self.assertAlmostEqual(test['difference'], 0.5)


if __name__ == '__main__':
  absltest.main()
