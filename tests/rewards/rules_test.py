"""Tests of the rule rewards on small scenes."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data import detection
from lvrpo_jax.data import examples
from lvrpo_jax.data.shapes import detect_moments
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import source as shapes_source
from lvrpo_jax.data.shapes import world
from lvrpo_jax.rewards import rules

DATA = shapes_source.ShapesData(
  seed=0,
  generate_kinds={'colors': 1.0},
  question_kinds={'color': 1.0},
  wrong=0.0,
  chatty=0.0,
  plan=0.0,
  describe=0.0,
  drop=0.0,
)


def scene(*objects):
  """A scene of (shape, colour, cell)."""
  rng = np.random.default_rng(0)
  return render.Scene(tuple(render.draw_object(rng, *o) for o in objects))


def one(shape, color=None):
  entry = {'class': shape, 'count': 1} | ({'color': color} if color else {})
  return {'tag': 'colors' if color else 'single_object', 'include': [entry], 'exclude': []}


class RuleTest(parameterized.TestCase):
  def test_images_meet_their_own_record_in_order(self):
    circle, cross, pair = (
      render.render(s)
      for s in (
        scene(('circle', 'red', 0)),
        scene(('cross', 'blue', 3)),
        scene(('circle', 'red', 0), ('cross', 'blue', 3)),
      )
    )
    images = np.stack([[circle, cross, pair], [cross, pair, circle]])
    correct, parts = rules.images(
      detect_moments.detect_components, images, [one('circle', 'red'), one('cross')]
    )
    np.testing.assert_array_equal(correct, [[1, 0, 1], [1, 1, 0]])
    self.assertEqual((correct.dtype, parts.dtype), (np.float32, np.float32))
    self.assertTrue(np.all(parts[correct == 0] < 1))
    # A right image with an object that nobody asked for is paid less.
    fewer = 1 - rules.SURPLUS_PENALTY
    np.testing.assert_array_equal(parts[correct == 1], [1, fewer, 1, fewer])
    self.assertGreaterEqual(parts.min(), 0)

  def test_the_detector_sees_pixels_only(self):
    seen = []

    def detector(images_RYXC):
      seen.append(images_RYXC)
      return [[] for _ in images_RYXC]

    images = np.arange(2 * 3 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 3, 32, 32, 3)
    correct, parts = rules.images(detector, images, [one('circle')] * 2)
    np.testing.assert_array_equal(seen[0], images.reshape(6, 32, 32, 3))
    np.testing.assert_array_equal(correct, np.zeros((2, 3)))
    np.testing.assert_array_equal(parts, np.zeros((2, 3)))

  def test_edits_are_judged_against_their_own_source(self):
    items = [world.World().edit(i, 'train', kind) for i, kind in enumerate(('recolor', 'add'))]
    source, target = (
      np.stack([render.render(s) for s in side])
      for side in ([i.scene for i in items], [i.target for i in items])
    )
    images = np.stack([target, source], axis=1)
    specs = [item.spec for item in items]
    correct, parts = rules.edits(detect_moments.detect_components, source, images, specs)
    np.testing.assert_array_equal(correct, [[1, 0], [1, 0]])
    self.assertTrue(np.all(parts[:, 0] == 1) and np.all(parts[:, 1] < 1))
    swapped, _ = rules.edits(detect_moments.detect_components, source[::-1], images, specs)
    np.testing.assert_array_equal(swapped, np.zeros((2, 2)))

  def test_answers(self):
    texts = [['red', 'it is red .', 'think : a red circle ; red', 'blue'], ['two', '', '?', 'yes']]
    correct, well_formed = rules.answers(texts, ['red', 'two'], DATA.read_answer, DATA.well_formed)
    np.testing.assert_array_equal(correct, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(well_formed, [[1, 0, 1, 1], [1, 0, 0, 1]])

  def test_answers_are_read_as_the_data_says(self):
    def read(text):
      return text.rstrip('.').split()[-1] if text else None

    correct, well_formed = rules.answers(
      [['Paris', 'It is Paris.', 'Rome', '']], ['Paris'], read, lambda text: text.endswith('.')
    )
    np.testing.assert_array_equal(correct, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(well_formed, [[0, 1, 0, 0]])

  def test_regions_are_those_of_the_images(self):
    width, height = 96, 64

    def detector(images_RYXC):
      # At (40, 20): to the left and at the top here, to the right and at the bottom of 32 pixels.
      return [[detection.Detection('circle', 'red', (35, 15, 45, 25), 0.9)] for _ in images_RYXC]

    spec = one('circle')
    spec['include'][0]['region'] = 'top left'
    images = np.zeros((1, 2, height, width, 3), np.uint8)
    correct, parts = rules.images(detector, images, [spec])
    np.testing.assert_array_equal(correct, np.ones((1, 2)))
    np.testing.assert_array_equal(parts, np.ones((1, 2)))

  @parameterized.parameters(
    ('generate', 'spec', "'include': .*'class': 'circle'"),
    ('edit', 'spec', "'keep': .*'new': "),
    ('understand', 'answer', "such as 'red'"),
  )
  def test_what_rules_compare_with_must_be_there(self, task, field, form):
    known = examples.Example(3, 'a', answer='red', spec=one('circle'))
    self.assertEqual(rules.targets(task, [known], 'it'), [getattr(known, field)])
    unknown = dataclasses.replace(known, index=7, **{field: None})
    with self.assertRaisesRegex(
      ValueError, f"example 7 of '{task}' has no {field}, .*the weight.*expected .*{form}"
    ):
      rules.targets(task, [known, unknown], 'the weight')

  @parameterized.parameters('images', 'edits')
  def test_the_records_shown_can_be_read(self, kind):
    images = np.zeros((1, 1, 32, 32, 3), np.uint8)

    def nothing(images_RYXC):
      return [[] for _ in images_RYXC]

    given = (images[0],) if kind == 'edits' else ()
    correct, parts = getattr(rules, kind)(nothing, *given, images, [rules.RECORDS[kind]])
    self.assertEqual(correct, 0.0)
    self.assertLess(parts, 1.0)

  def test_text_reward_pays_the_answer_more_than_the_format(self):
    correct, well_formed = np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 1.0, 0.0]])
    np.testing.assert_allclose(rules.text_reward(correct, well_formed), [[1.0, 0.8, 0.2, 0.0]])


if __name__ == '__main__':
  absltest.main()
