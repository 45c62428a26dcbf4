"""Rewards of samples: what is computed for which weights, of which data, and what is logged."""

import dataclasses
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import rules
from lvrpo_jax.rewards import scorer as scorer_lib
from lvrpo_jax.training import align
from tests.helpers import scene as scene_lib

ROWS, GROUP, Scene = scene_lib.ROWS, scene_lib.GROUP, scene_lib.Scene


class WeightsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(rules=1.0), dict(reference=None, vae=None, dual_encoder=None)),
    (dict(semantic=1.0), dict(reference=None, vae=None)),
    (dict(dense=1.0, rules=1.0), dict(reference=None, vae=None)),
    (dict(knowledge=1.0), dict(dual_encoder=None)),
    (dict(mutual=1.0), dict(dual_encoder=None)),
  )
  def test_what_has_no_weight_is_not_computed(self, weights, absent):
    scene = Scene(weights, frozen=absent)
    for task in ('generate', 'edit'):
      self.assertEqual(scene.score(task).rewards.keys(), weights.keys())
    if 'dense' not in weights:
      self.assertEqual(scene.score('understand').rewards.keys(), weights.keys())

  def test_a_reward_does_not_depend_on_the_others(self):
    halves = ('semantic', 'knowledge'), ('dense', 'mutual')
    tasks = ('generate', 'understand')
    scene = Scene(dict.fromkeys(sum(halves, ()), 1.0))
    everything = {task: scene.values(task) for task in tasks}
    for names in halves:
      half = Scene(dict.fromkeys(names, 1.0))
      for task in tasks:
        for name, value_BG in half.values(task).items():
          want = everything[task][name]
          np.testing.assert_allclose(value_BG, want, rtol=1e-5, atol=1e-6)
          self.assertGreater(value_BG.std(), 1e-5)

  def test_weights_by_task_and_name(self):
    weights = dict(rules=1.0, semantic=0.25, dense=0.5)
    scorer = scorer_lib.Scorer(scene_lib.build(weights, prompts=dict(edit=0)))
    understand = {name: weights[name] for name in ('rules', 'semantic')}
    self.assertEqual(scorer.weights, {'generate': weights, 'understand': understand})
    self.assertFalse(scorer.asks_server)

  @parameterized.parameters('nothing', 'no.such.module:reward', 'math:no_such_name')
  def test_a_kind_that_is_not_there_stops_before_any_work(self, kind):
    entries = {'taste': dict(kind=kind, weight=0.5)}
    with self.assertRaisesRegex(
      ValueError, f"config.align.rewards.edit.taste.kind is '{kind}'.*'rules', 'semantic'"
    ):
      align.check(scene_lib.build(dict(rules=1.0), {'edit': entries}))
    # One without a weight, or of a task without prompts, is not looked up.
    entries['taste']['weight'] = 0.0
    align.check(scene_lib.build(dict(rules=1.0), {'edit': entries}))
    entries['taste']['weight'] = 0.5
    align.check(scene_lib.build(dict(rules=1.0), {'edit': entries}, prompts=dict(edit=0)))


class OwnDataTest(parameterized.TestCase):
  """Examples of a data source that knows less, or other things, than the shapes world."""

  def examples(self, scene, task, **changes):
    return [dataclasses.replace(e, **changes) for e in scene.examples(task, first=5)]

  @parameterized.parameters('generate', 'edit')
  def test_no_spec_where_rules_have_no_weight(self, task):
    scene = Scene(dict(semantic=1.0))
    rewards, facts = scene.score(task, self.examples(scene, task, spec=None))
    self.assertEqual(rewards.keys(), {'semantic'})
    self.assertEqual(facts, {})

  def test_no_answer_where_rules_have_no_weight(self):
    scene = Scene(dict(semantic=1.0))
    rewards, facts = scene.score('understand', self.examples(scene, 'understand', answer=None))
    self.assertEqual(rewards.keys(), {'semantic'})
    self.assertEqual(facts.keys(), {'truncated/captions'})

  def test_rules_name_the_example_without_a_record(self):
    scene = Scene(dict(rules=0.5))
    for task, changes in (
      ('generate', dict(spec=None)),
      ('edit', dict(spec=None)),
      ('understand', dict(answer=None)),
    ):
      examples = self.examples(scene, task, **changes)
      with self.assertRaisesRegex(
        ValueError,
        f"example {examples[0].index} of '{task}' has no .*"
        f'config.align.rewards.{task}.rules.weight is 0.5.*expected',
      ):
        scene.score(task, examples)

  def test_semantic_names_the_example_without_a_statement(self):
    scene = Scene(dict(semantic=1.0))
    examples = self.examples(scene, 'understand', statement=None)
    with self.assertRaisesRegex(
      ValueError, f'example {examples[0].index} .* has no statement, .*understand.semantic'
    ):
      scene.score('understand', examples)

  def test_answers_are_read_as_the_data_says(self):
    scene = Scene(dict(rules=1.0))
    examples = self.examples(scene, 'understand', answer='nothing')
    with (
      mock.patch.object(scene.data, 'read_answer', {'red': 'nothing'}.get),
      mock.patch.object(scene.data, 'well_formed', lambda text: text == 'two'),
    ):
      rewards, facts = scene.score('understand', examples)
    np.testing.assert_array_equal(facts['correct'], [[1, 0, 0, 0]] * ROWS)
    np.testing.assert_array_equal(facts['format'], [[0, 1, 0, 0]] * ROWS)
    np.testing.assert_array_equal(
      rewards['rules'].value_BG, rules.text_reward(facts['correct'], facts['format'])
    )


class SamplesTest(absltest.TestCase):
  def test_images_and_texts(self):
    scene = Scene(dict(rules=1.0))
    images = scene.scorer.samples('edit', scene.examples('edit'), scene.pixels, 3)
    np.testing.assert_array_equal(images.images_BGYXC, scene.pixels)
    self.assertEqual((images.task, images.iteration, images.shape), ('edit', 3, (ROWS, GROUP)))
    with self.assertRaisesRegex(ValueError, "'edit' are images, not texts"):
      _ = images.texts_BG
    texts = scene.scorer.samples('understand', scene.examples('understand'), scene.tokens, 3)
    self.assertEqual(texts.texts_BG, [list(scene_lib.WORDS)] * ROWS)
    self.assertEqual((texts.are_texts, texts.shape), (True, (ROWS, GROUP)))
    with self.assertRaisesRegex(ValueError, "'understand' are texts, not images"):
      _ = texts.images_BGYXC


class CheckedTest(parameterized.TestCase):
  KEY = 'config.align.rewards.edit.taste.kind'

  @parameterized.parameters(
    ((2, 3), (2, 1)),
    ((2, 1), (2, 3)),
    ((3,), (2, 3)),
    ((2, 3), ()),
    ((6,), (6,)),
    ((2, 3, 1), (2, 3, 1)),
  )
  def test_other_shapes(self, value, valid):
    with self.assertRaises(ValueError) as caught:
      base.checked(self.KEY, (np.zeros(value), np.ones(valid, bool)), (2, 3))
    self.assertIn(f'{self.KEY} names a reward that gave arrays of shapes', str(caught.exception))
    self.assertIn(f'{[value, valid]}; expected', str(caught.exception))
    self.assertIn('shape (B, G) = (2, 3)', str(caught.exception))

  def test_rows_of_different_lengths(self):
    with self.assertRaisesRegex(
      ValueError, f"{self.KEY} .*'rows of different lengths', \\(2, 3\\)"
    ):
      base.checked(self.KEY, ([[1.0, 2.0, 3.0], [4.0]], np.ones((2, 3))), (2, 3))

  @parameterized.parameters(
    (np.zeros((2, 3)),), (None,), ([[0.5] * 3] * 2,), ((np.zeros((2, 3)),),)
  )
  def test_values_without_validity(self, scored):
    with self.assertRaisesRegex(
      ValueError, f'{self.KEY} names a reward that gave {type(scored).__name__}; expected value and'
    ):
      base.checked(self.KEY, scored, (2, 3))

  def test_what_is_no_number(self):
    with self.assertRaisesRegex(ValueError, f'{self.KEY} .*are not numbers'):
      base.checked(self.KEY, ([['good', 'bad', 'bad']] * 2, np.ones((2, 3))), (2, 3))

  def test_numbers_of_any_kind(self):
    valid = [[True, True, False], [1, 0, 1]]
    scores = base.checked(self.KEY, ([[1, 2.5, None], [None, True, np.inf]], valid), (2, 3))
    np.testing.assert_array_equal(scores.value_BG, [[1, 2.5, np.nan], [np.nan, 1, np.inf]])
    np.testing.assert_array_equal(scores.valid_BG, np.array(valid, bool))
    self.assertEqual((scores.value_BG.dtype, scores.valid_BG.dtype), (np.float32, bool))
    self.assertEqual(scores.facts, {})


if __name__ == '__main__':
  absltest.main()
