"""Renders of the shapes world: cells, antialiasing, and scenes that are refused."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data.shapes import render


class RenderTest(parameterized.TestCase):
  def test_objects_stay_in_their_cells_and_order_does_not_matter(self):
    rng = np.random.default_rng(0)
    for _ in range(200):
      objects = [
        render.draw_object(rng, shape, 'red', cell)
        for cell, shape in enumerate(rng.choice(render.SHAPES, 4))
      ]
      image = render.render(render.Scene(tuple(objects)))
      np.testing.assert_array_equal(image, render.render(render.Scene(tuple(objects[::-1]))))
      for item in objects:
        alone = render.render(render.Scene((item,)))
        x0, y0, x1, y1 = item.box
        self.assertGreaterEqual(x0, item.col * 16)
        self.assertLessEqual(x1, item.col * 16 + 16)
        self.assertGreaterEqual(y0, item.row * 16)
        self.assertLessEqual(y1, item.row * 16 + 16)
        outside = np.ones((32, 32), bool)
        outside[item.row * 16 : item.row * 16 + 16, item.col * 16 : item.col * 16 + 16] = False
        self.assertTrue((alone[outside] == render.BACKGROUND).all())

  @parameterized.parameters(*render.SHAPES)
  def test_coverage_matches_supersampling(self, shape):
    centre, radius, factor = (8.3, 7.6), 5.4, 16
    fine = (np.arange(16 * factor) + 0.5) / factor
    x, y = fine[None] - centre[0], fine[:, None] - centre[1]
    inside = {
      'circle': lambda: x**2 + y**2 <= radius**2,
      'square': lambda: (abs(x) <= 0.9 * radius) & (abs(y) <= 0.9 * radius),
      'diamond': lambda: abs(x) + abs(y) <= radius,
      'triangle': lambda: (y <= radius) & (2 * abs(x) <= y + radius),
      'cross': lambda: (
        ((abs(x) <= radius) & (abs(y) <= render.CROSS_HALF_WIDTH * radius))
        | ((abs(y) <= radius) & (abs(x) <= render.CROSS_HALF_WIDTH * radius))
      ),
    }[shape]()
    expected = inside.reshape(16, factor, 16, factor).mean((1, 3))
    pixel = np.arange(16) + 0.5
    actual = render.coverage(shape, pixel[None] - centre[0], pixel[:, None] - centre[1], radius)
    self.assertLess(abs(actual - expected).max(), 0.35)  # corners are bounds, not exact
    self.assertLess(abs(actual - expected).mean(), 0.01)

  def test_scene_rejects_shared_cells_and_empty_scenes(self):
    rng = np.random.default_rng(0)
    item = render.draw_object(rng, 'circle', 'red', 0)
    with self.assertRaises(ValueError):
      render.Scene((item, render.draw_object(rng, 'square', 'blue', 0)))
    with self.assertRaises(ValueError):
      render.Scene(())
    with self.assertRaises(ValueError):
      render.coverage('hexagon', np.zeros(1), np.zeros(1), 1.0)


if __name__ == '__main__':
  absltest.main()
