"""Both detectors read renders exactly, lower scores as images degrade, and find faint remains."""

import time

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from scipy import ndimage

from lvrpo_jax.data import detection
from lvrpo_jax.data.shapes import detect_moments
from lvrpo_jax.data.shapes import detect_rendering
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import world as world_lib
from lvrpo_jax.rewards import geneval

DETECTORS = {
  'components': detect_moments.detect_components,
  'rendering': detect_rendering.detect_by_rendering,
}
BLURS, NOISES, MIXES = (0.5, 1.0, 1.5), (10.0, 20.0, 40.0), (0.25, 0.5)


def make_scenes(count):
  world = world_lib.World()
  scenes = [world.question(i, 'train').scene for i in range(count // 2)]
  return scenes + [world.generate(i, 'unseen').scene for i in range(count - len(scenes))]


def found_content(detections):
  """Content of the detections in the form of `Scene.content`, with repetitions."""
  return sorted(
    (found.label, found.color, int(found.centre[1] > 16) * 2 + int(found.centre[0] > 16))
    for found in detections
  )


def read_exactly(results, scenes):
  """Whether the detections of each image are the content of its scene."""
  return [
    found_content(result) == sorted(scene.content())
    for result, scene in zip(results, scenes, strict=True)
  ]


def mean_score(results):
  scores = [
    found.score for result in results for found in result if found.label != detection.UNKNOWN
  ]
  return np.mean(scores) if scores else 0.0


def degraded(images, kind, amount):
  floats = images.astype(np.float32)
  if kind == 'blur':
    return ndimage.gaussian_filter(floats, (0, amount, amount, 0))
  if kind == 'noise':
    noise = np.random.default_rng(0).normal(0, amount, floats.shape)
    return np.clip(floats + noise, 0, 255)
  return (1 - amount) * floats + amount * np.asarray(render.BACKGROUND)


class DetectTest(parameterized.TestCase):
  @parameterized.parameters(*DETECTORS)
  def test_renders_are_read_exactly(self, name):
    scenes = make_scenes(1000)
    images = np.stack([render.render(scene) for scene in scenes])
    results = DETECTORS[name](images)
    self.assertGreaterEqual(np.mean(read_exactly(results, scenes)), 0.995)
    scores = [found.score for result in results for found in result]
    self.assertGreater(np.mean(scores), 0.95)
    self.assertGreater(np.mean(np.asarray(scores) > 0.9), 0.995)
    floats = DETECTORS[name](images[:8].astype(np.float64))
    self.assertEqual(floats, results[:8])

  @parameterized.parameters(*DETECTORS)
  def test_boxes_are_right_to_a_pixel(self, name):
    scenes = make_scenes(100)
    results = DETECTORS[name](np.stack([render.render(scene) for scene in scenes]))
    for scene, found in zip(scenes, results, strict=True):
      for item in scene.objects:
        distances = [np.hypot(*np.subtract(other.centre, (item.x, item.y))) for other in found]
        nearest = found[int(np.argmin(distances))]
        self.assertLess(np.abs(np.subtract(nearest.box, item.box)).max(), 1.3)

  @parameterized.product(name=tuple(DETECTORS), kind=('blur', 'noise', 'mix'))
  def test_scores_fall_as_images_degrade(self, name, kind):
    images = np.stack([render.render(scene) for scene in make_scenes(120)])
    amounts = {'blur': BLURS, 'noise': NOISES, 'mix': MIXES}[kind]
    scores = [mean_score(DETECTORS[name](images))]
    scores += [mean_score(DETECTORS[name](degraded(images, kind, amount))) for amount in amounts]
    self.assertEqual(scores, sorted(scores, reverse=True))
    self.assertGreater(scores[0] - scores[-1], 0.2)

  @parameterized.product(
    name=tuple(DETECTORS), case=(('blur', 0.5), ('noise', 10.0), ('mix', 0.25))
  )
  def test_slight_degradation_changes_no_reading(self, name, case):
    scenes = make_scenes(200)
    images = np.stack([render.render(scene) for scene in scenes])
    results = DETECTORS[name](degraded(images, *case))
    self.assertGreaterEqual(np.mean(read_exactly(results, scenes)), 0.98)

  @parameterized.parameters(0.25, 0.4)
  def test_rendering_sees_faint_remains(self, opacity):
    rng = np.random.default_rng(0)
    clean, ghost = [], []
    for _ in range(50):
      colors = rng.choice(tuple(render.COLORS), 2)
      kinds = rng.choice(render.SHAPES, 2)
      first, second = (
        render.draw_object(rng, shape, color, cell)
        for shape, color, cell in zip(kinds, colors, (0, 3), strict=True)
      )
      image = render.render(render.Scene((first,))).astype(np.float32)
      faint = render.render(render.Scene((second,))).astype(np.float32) - render.BACKGROUND
      clean.append(image)
      ghost.append(image + opacity * faint)
    clean, ghost = np.stack(clean), np.stack(ghost)
    self.assertEqual(detect_rendering.leftovers(clean), 0.0)
    self.assertGreater(detect_rendering.leftovers(ghost), 0.95)
    spec = {'tag': 'single_object', 'include': [], 'exclude': []}
    passed = [
      geneval.evaluate(result, spec, strict=True).correct
      for result in detect_rendering.detect_by_rendering(ghost)
    ]
    self.assertLess(np.mean(passed), 0.05)

  def test_rendering_distrusts_doubled_objects(self):
    rng = np.random.default_rng(0)
    images = []
    for _ in range(40):
      item = render.draw_object(rng, 'circle', 'red', 0)
      image = render.render(render.Scene((item,)))
      images.append(np.minimum(image, np.roll(image, 4, axis=1)))
    for found in detect_rendering.detect_by_rendering(np.stack(images)):
      scores = [item.score for item in found if item.label != detection.UNKNOWN]
      self.assertLess(max(scores, default=0.0), 0.8)

  @parameterized.parameters(*DETECTORS)
  def test_empty_images_and_other_sizes(self, name):
    empty = np.full((2, 48, 40, 3), render.BACKGROUND, np.uint8)
    self.assertEqual(DETECTORS[name](empty), [[], []])
    item = render.Object(shape='cross', color='blue', row=0, col=0, x=8.0, y=8.0, radius=5.0)
    empty[1, 20:36, 16:32] = render.render(render.Scene((item,)))[:16, :16]
    first, (found,) = DETECTORS[name](empty)
    self.assertEmpty(first)
    self.assertEqual((found.label, found.color), ('cross', 'blue'))
    np.testing.assert_allclose(found.centre, (24, 28), atol=0.6)
    with self.assertRaises(ValueError):
      DETECTORS[name](empty[0])

  @parameterized.parameters(('components', 0.15), ('rendering', 0.6))
  def test_speed(self, name, limit):
    images = np.stack([render.render(scene) for scene in make_scenes(128)])
    DETECTORS[name](images[:2])  # fills the caches
    seconds = []
    for _ in range(3):
      start = time.process_time()
      DETECTORS[name](images)
      seconds.append(time.process_time() - start)
    self.assertLess(min(seconds), limit)


if __name__ == '__main__':
  absltest.main()
