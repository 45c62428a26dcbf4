"""GenEval's rules against its executed behaviour, and every item against its own rule."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data import detection
from lvrpo_jax.data.shapes import detect_moments
from lvrpo_jax.data.shapes import detect_rendering
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import world
from lvrpo_jax.rewards import geneval

Detection = detection.Detection
DETECTORS = {
  'components': detect_moments.detect_components,
  'rendering': detect_rendering.detect_by_rendering,
}


def box_at(x, y, label='circle', color='red', side=100.0, score=0.99):
  half = side / 2
  return Detection(label, color, (x - half, y - half, x + half, y + half), score)


def relation_spec(relation):
  return {
    'tag': 'position',
    'exclude': [],
    'include': [
      {'class': 'square', 'count': 1},
      {'class': 'circle', 'count': 1, 'position': [relation, 0]},
    ],
  }


class RuleTest(parameterized.TestCase):
  @parameterized.parameters((0, False), (20, False), (40, False), (50, True), (200, True))
  def test_side_by_side_boxes_of_100_pixels(self, dx, right):
    holds = geneval.relations(box_at(dx, 0), box_at(0, 0))
    self.assertEqual(holds, {'right of'} if right else set())

  def test_at_45_degrees_both_relations_hold_unless_strict(self):
    a, b = box_at(300, 300), box_at(0, 0)
    self.assertEqual(geneval.relations(a, b), {'right of', 'below'})
    self.assertEqual(geneval.relations(b, a), {'left of', 'above'})
    self.assertEmpty(geneval.relations(a, b, strict=True))

  @parameterized.parameters(
    (0, True, True), (29, True, True), (31, True, False), (59, True, False), (61, False, False)
  )
  def test_angle_limits_of_distant_small_boxes(self, degrees, loose, strict):
    angle = math.radians(degrees)
    a = box_at(1000 * math.cos(angle), 1000 * math.sin(angle), side=0.1)
    b = box_at(0, 0, side=0.1)
    self.assertEqual('right of' in geneval.relations(a, b), loose)
    self.assertEqual('right of' in geneval.relations(a, b, strict=True), strict)

  def test_counting_fixture(self):
    spec = {
      'tag': 'counting',
      'include': [{'class': 'cat', 'count': 2}],
      'exclude': [{'class': 'cat', 'count': 3}],
    }
    boxes = [box_at(200 * i, 0, 'cat') for i in range(8)]
    verdicts = [geneval.evaluate(boxes[:n], spec) for n in range(8)]
    self.assertEqual([v.correct for v in verdicts[:5]], [False, False, True, False, False])
    np.testing.assert_allclose([v.parts for v in verdicts[:5]], [0.5, 0.75, 1.0, 0.75, 0.5])
    self.assertTrue(all(0.0 <= v.parts <= 1.0 for v in verdicts))

  def test_thresholds(self):
    one = {'tag': 'single_object', 'include': [{'class': 'cat', 'count': 1}], 'exclude': []}
    counting = dict(one, tag='counting')
    self.assertFalse(geneval.evaluate([box_at(0, 0, 'cat', score=0.3)], one).correct)
    self.assertTrue(geneval.evaluate([box_at(0, 0, 'cat', score=0.31)], one).correct)
    weak = [box_at(0, 0, 'cat', score=0.89)]
    self.assertFalse(geneval.evaluate(weak, counting).correct)
    self.assertTrue(geneval.evaluate(weak, counting, counting_threshold=0.5).correct)

  def test_color_is_asked_of_the_most_certain_box(self):
    spec = {
      'tag': 'colors',
      'include': [{'class': 'circle', 'count': 1, 'color': 'red'}],
      'exclude': [],
    }
    red, blue = box_at(0, 0, score=0.8), box_at(300, 0, color='blue', score=0.9)
    self.assertTrue(geneval.evaluate([red], spec).correct)
    verdict = geneval.evaluate([red, blue], spec)
    self.assertFalse(verdict.correct)
    self.assertEqual(verdict.parts, 0.5)

  def test_a_wrong_position_scores_nothing_for_its_part(self):
    pair = [box_at(0, 0, 'circle'), box_at(300, 0, 'square')]
    self.assertEqual(geneval.evaluate(pair, relation_spec('left of')), geneval.Verdict(True, 1.0))
    verdict = geneval.evaluate(pair, relation_spec('right of'))
    self.assertFalse(verdict.correct)
    self.assertAlmostEqual(verdict.parts, 2 / 3)

  def test_regions_in_both_modes(self):
    spec = {
      'tag': 'single_object',
      'exclude': [],
      'include': [{'class': 'circle', 'count': 1, 'region': 'top left'}],
    }
    for x, y, right in ((8, 8, True), (24, 8, False), (8, 24, False), (16, 8, False)):
      for strict in (False, True):
        verdict = geneval.evaluate([box_at(x, y, side=10)], spec, strict)
        self.assertEqual(verdict.correct, right)
    self.assertTrue(geneval.evaluate([box_at(24, 24, side=10)], spec, size=(64, 64)).correct)

  def test_strict_rejects_unknown_objects(self):
    spec = {'tag': 'single_object', 'include': [{'class': 'circle', 'count': 1}], 'exclude': []}
    image = [box_at(8, 8), Detection(detection.UNKNOWN, 'red', (20, 20, 30, 30), 0.5)]
    self.assertTrue(geneval.evaluate(image, spec).correct)
    self.assertFalse(geneval.evaluate(image, spec, strict=True).correct)


class ItemTest(parameterized.TestCase):
  @parameterized.product(name=tuple(DETECTORS), split=splits.SPLITS)
  def test_captions_are_met_by_their_own_scenes(self, name, split):
    items = [world.World().generate(i, split) for i in range(400)]
    results = DETECTORS[name](np.stack([render.render(item.scene) for item in items]))
    for strict in (False, True):
      verdicts = [geneval.evaluate(r, item.spec, strict) for r, item in zip(results, items)]
      self.assertGreaterEqual(np.mean([v.correct for v in verdicts]), 0.995)
      self.assertTrue(all(v.correct == (v.parts == 1.0) for v in verdicts))
    # Another prompt's image passes only by chance.
    shifted = [geneval.evaluate(r, item.spec) for r, item in zip(results[1:], items)]
    self.assertLess(np.mean([v.correct for v in shifted]), 0.2)

  @parameterized.product(name=tuple(DETECTORS), split=splits.SPLITS)
  def test_edits_are_met_by_their_targets_alone(self, name, split):
    items = [world.World().edit(i, split) for i in range(300)]
    sources = np.stack([render.render(item.scene) for item in items])
    targets = np.stack([render.render(item.target) for item in items])
    for strict in (False, True):
      verdicts = [
        geneval.evaluate_edit(*row, strict)
        for row in zip(sources, targets, DETECTORS[name](targets), [item.spec for item in items])
      ]
      self.assertGreaterEqual(np.mean([v.correct for v in verdicts]), 0.995)
      lazy = [
        geneval.evaluate_edit(*row, strict)
        for row in zip(sources, sources, DETECTORS[name](sources), [item.spec for item in items])
      ]
      self.assertFalse(any(v.correct for v in lazy))
      self.assertTrue(all(0.0 <= v.parts < 1.0 for v in lazy))

  def test_an_edit_may_not_touch_the_rest(self):
    item = world.World().edit(0, 'train', 'add')
    source, target = render.render(item.scene), render.render(item.target)
    found = detect_moments.detect_components(target[None])[0]
    self.assertTrue(geneval.evaluate_edit(source, target, found, item.spec).correct)
    rough = np.clip(target.astype(np.float64) + 4.0, 0, 255)
    self.assertTrue(geneval.evaluate_edit(source, rough, found, item.spec).correct)
    darker = np.clip(target.astype(np.float64) - 20.0, 0, 255)
    self.assertFalse(geneval.evaluate_edit(source, darker, found, item.spec).correct)
    with self.assertRaises(ValueError):
      geneval.evaluate_edit(source[:16], target, found, item.spec)

  def test_an_edit_may_not_move_or_add_others(self):
    item = next(
      e
      for e in (world.World().edit(i, 'train', 'remove') for i in range(99))
      if len(e.spec['keep']) == 1
    )
    target = render.render(item.target)
    (kept,) = detect_moments.detect_components(target[None])[0]

    def judge(found):
      return geneval.evaluate_edit(target, target, found, item.spec)

    self.assertTrue(judge([kept]).correct)
    x0, y0, x1, y1 = kept.box
    for shift, right in ((2, True), (4, False)):
      moved = Detection(kept.label, kept.color, (x0 + shift, y0, x1 + shift, y1), 1.0)
      self.assertEqual(judge([moved]).correct, right)
    ghost = Detection('circle', 'red', tuple(item.spec['gone'][0]), 0.9)
    self.assertFalse(judge([kept, ghost]).correct)
    self.assertFalse(judge([]).correct)


if __name__ == '__main__':
  absltest.main()
