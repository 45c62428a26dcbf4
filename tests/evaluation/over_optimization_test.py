"""Tests of the over-optimisation panel on rendered scenes counted by hand."""

import json
import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data.shapes import render
from lvrpo_jax.evaluation import over_optimization


def picture(*objects, seed=0):
  """Renders (shape, colour, cell) objects."""
  rng = np.random.default_rng(seed)
  return render.render(render.Scene(tuple(render.draw_object(rng, *o) for o in objects)))


def example(kind='single_object', **entry):
  return examples_lib.Example(
    0,
    'a circle',
    kind=kind,
    spec={'tag': kind, 'exclude': [], 'include': [{'class': 'circle', 'count': 1, **entry}]},
  )


def shown(images, examples, task='generate', split='eval', kind='single_object'):
  return [(task, split, kind, np.asarray(images), examples)]


FOUR = [
  picture(('circle', 'red', 0)),
  picture(('circle', 'red', 1)),
  picture(('circle', 'blue', 3)),
  picture(('circle', 'green', 3)),
]


class MeasureTest(absltest.TestCase):
  def test_counts_of_a_free_caption(self):
    out = over_optimization.measure(shown([FOUR], [example()]))
    self.assertEqual(out['colors'], {'red': 0.5, 'blue': 0.25, 'green': 0.25})
    self.assertEqual(out['cells'], {'top left': 0.25, 'top right': 0.25, 'bottom right': 0.5})
    self.assertAlmostEqual(out['color_entropy'], 1.5 * math.log(2))
    self.assertAlmostEqual(out['cell_entropy'], 1.5 * math.log(2))
    self.assertEqual(out['scene_diversity'], 1.0)
    self.assertEqual(out['leftovers'], 0.0)

  def test_what_the_caption_fixes_is_not_counted(self):
    colored = over_optimization.measure(shown([FOUR], [example(color='red')]))
    self.assertEmpty(colored['colors'])
    self.assertNotEmpty(colored['cells'])
    placed = over_optimization.measure(shown([FOUR], [example(region='top')]))
    self.assertEmpty(placed['cells'])
    self.assertNotEmpty(placed['colors'])
    self.assertEmpty(over_optimization.measure(shown([FOUR], [example(kind='position')]))['cells'])

  def test_objects_the_caption_does_not_name_are_not_counted(self):
    extra = [picture(('circle', 'red', 0), ('cross', 'cyan', 3))] * 2
    self.assertEqual(over_optimization.measure(shown([extra], [example()]))['colors'], {'red': 1.0})

  def test_diversity_is_of_scenes_and_not_of_pixels(self):
    # Jitter changes the pixels of all four images, and none of their scenes.
    jittered = [picture(('circle', 'red', 0), seed=i) for i in range(4)]
    half = [FOUR[0], FOUR[0], FOUR[2], FOUR[2]]

    def measure(*groups):
      return over_optimization.measure(shown(list(groups), [example()] * len(groups)))

    self.assertEqual(measure(jittered)['scene_diversity'], 0.25)
    self.assertGreater(measure(jittered)['pixel_diversity'], 0.0)
    self.assertEqual(measure(half)['scene_diversity'], 0.5)
    self.assertEqual(measure(FOUR, half)['scene_diversity'], 0.75)
    self.assertEqual(measure([FOUR[0]] * 4)['pixel_diversity'], 0.0)

  def test_only_held_out_generation_is_measured(self):
    rest = shown([FOUR[:1] * 4], [example()], split='unseen') + shown(
      [FOUR[:1] * 4], [example()], task='edit'
    )
    self.assertEqual(
      over_optimization.measure(rest + shown([FOUR], [example()])),
      over_optimization.measure(shown([FOUR], [example()])),
    )

  def test_blobs_without_a_shape_are_left_over(self):
    broken = FOUR[0].copy()
    broken[18:30, 2:30] = render.COLORS['purple']
    out = over_optimization.measure(shown([[FOUR[0], broken]], [example()]))
    self.assertGreater(out['leftovers'], 0.0)

  def test_pixel_statistics_against_numpy(self):
    images = np.zeros((1, 2, 32, 32, 3), np.uint8)
    images[0, 0, :, :16] = (255, 0, 0)
    out = over_optimization.measure(shown(images, [example()]))
    self.assertAlmostEqual(out['luminance'], 1 / 12, places=6)
    self.assertAlmostEqual(out['saturation'], 1.0, places=6)
    # One edge of height 1/3 among 31 columns, in one of two images.
    self.assertAlmostEqual(out['edge_density'], 1 / 3 / 31 / 2, places=6)
    # Half of one channel takes the values 0 and 1, with deviation 1/2.
    self.assertAlmostEqual(out['pixel_diversity'], 0.5 / 2 / 3, places=6)

  def test_grey_images_have_no_saturation(self):
    grey = np.full((1, 2, 32, 32, 3), 128, np.uint8)
    self.assertEqual(over_optimization.measure(shown(grey, [example()]))['saturation'], 0.0)


class AlarmTest(parameterized.TestCase):
  before = {
    'color_entropy': 1.0,
    'cell_entropy': 1.2,
    'scene_diversity': 0.8,
    'leftovers': 0.05,
    'surplus': 0.05,
    'saturation': 0.7,
    'edge_density': 0.06,
  }

  def test_no_change_raises_none(self):
    self.assertEmpty(over_optimization.alarms(self.before, self.before))

  @parameterized.parameters(
    ('color_entropy', 0.86, 0.84),
    ('cell_entropy', 1.03, 1.01),
    ('scene_diversity', 0.65, 0.63),
    ('leftovers', 0.14, 0.16),
    ('surplus', 0.14, 0.16),
    ('saturation', 0.6, 0.59),
    ('edge_density', 0.043, 0.041),
  )
  def test_bounds(self, name, quiet, loud):
    self.assertEmpty(over_optimization.alarms(self.before, self.before | {name: quiet}))
    (sentence,) = over_optimization.alarms(self.before, self.before | {name: loud})
    direction = 'rose' if name in ('leftovers', 'surplus') else 'fell'
    self.assertEqual(
      sentence, f'{name.replace("_", " ")} {direction} from {self.before[name]:.3g} to {loud:.3g}'
    )

  def test_improvements_raise_none(self):
    better = {k: 0.0 if k in ('leftovers', 'surplus') else 2 * v for k, v in self.before.items()}
    self.assertEmpty(over_optimization.alarms(self.before, better))

  def test_a_collapse_that_pixels_hide(self):
    # All four images of the second run show one scene, at places that jitter.
    same = [picture(('circle', 'red', 0), seed=i) for i in range(4)]
    raised = over_optimization.alarms(
      over_optimization.measure(shown([FOUR], [example()])),
      over_optimization.measure(shown([same], [example()])),
    )
    for name in ('color entropy', 'cell entropy', 'scene diversity'):
      self.assertTrue(any(s.startswith(name) for s in raised), name)


def rollouts(rng, count=16):
  """Pictures of random scenes, as an iteration samples them."""
  colors, forms = list(render.COLORS), list(render.SHAPES)
  return np.stack(
    [
      picture(
        *(
          (forms[rng.integers(len(forms))], colors[rng.integers(len(colors))], c)
          for c in rng.choice(4, rng.integers(1, 4), replace=False)
        ),
        seed=int(rng.integers(1 << 30)),
      )
      for _ in range(count)
    ]
  )


class AppearanceTest(absltest.TestCase):
  def test_by_hand(self):
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[0, :, 2:] = 255  # A white half beside a black one.
    out = over_optimization.appearance(image)
    self.assertAlmostEqual(out['luminance'], 0.5)
    self.assertAlmostEqual(out['dark'], 0.5)
    self.assertAlmostEqual(out['edge_density'], 1 / 3)  # One of three steps along a row.
    self.assertEqual(out['hue_entropy'], 0.0)
    image[0, :2, 2:] = 255, 0, 0
    image[0, 2:, 2:] = 0, 0, 255
    self.assertAlmostEqual(over_optimization.appearance(image)['hue_entropy'], math.log(2))


class HeldOutTest(absltest.TestCase):
  def test_reward_up_and_held_out_reward_down_is_an_alarm_once(self):
    watch = over_optimization.Monitor()
    steady = {'reward': 0.6, 'diversity': 0.8}
    self.assertEmpty(watch.held_out(0.5, steady))
    self.assertEmpty(watch.held_out(0.9, steady))
    self.assertEmpty(watch.held_out(0.9, {'reward': 0.56, 'diversity': 0.6}))
    raised = watch.held_out(0.9, {'reward': 0.5, 'diversity': 0.6})
    self.assertLen(raised, 1)
    self.assertIn(
      'held-out reward fell from 0.6 to 0.5 while the training reward rose from 0.5 to 0.9',
      raised[0],
    )
    watch = over_optimization.Monitor(json.loads(json.dumps(watch.state)))
    self.assertEmpty(watch.held_out(0.9, {'reward': 0.4, 'diversity': 0.6}))
    self.assertLen(watch.held_out(0.9, {'reward': 0.4, 'diversity': 0.5}), 1)

  def test_a_run_that_gets_worse_as_a_whole_is_none(self):
    watch = over_optimization.Monitor()
    watch.held_out(0.5, {'reward': 0.6, 'diversity': 0.8})
    self.assertEmpty(watch.held_out(0.3, {'reward': 0.3, 'diversity': 0.3}))

  def test_a_former_state_goes_on(self):
    former = {
      'first': [],
      'recent': [],
      'raised': ['dark', 'gold'],
      'gold': {'training': 0.5, 'gold': 0.6, 'diversity': 0.8},
    }
    watch = over_optimization.Monitor(json.loads(json.dumps(former)))
    # One was told before; the other is compared with the first scores of the run.
    raised = watch.held_out(0.9, {'reward': 0.4, 'diversity': 0.5})
    self.assertLen(raised, 1)
    self.assertIn('held-out diversity fell from 0.8 to 0.5', raised[0])
    self.assertEqual(watch.state['raised'], ['dark', 'reward', 'diversity'])
    again = over_optimization.Monitor(json.loads(json.dumps(watch.state)))
    self.assertEqual(again.state, watch.state)


class WatchTest(parameterized.TestCase):
  def test_a_clean_run_raises_nothing(self):
    rng, watch = np.random.default_rng(0), over_optimization.Monitor()
    for _ in range(200):
      self.assertEmpty(watch(over_optimization.appearance(rollouts(rng))))

  def test_a_run_that_goes_dark_is_told_early(self):
    """The dark share rises from 0.45 to 0.93, as one run's did that gamed its reward."""
    rng, watch = np.random.default_rng(1), over_optimization.Monitor()
    side = np.arange(64)
    first = None
    for number in range(100):
      dark = 0.45 + 0.48 * number / 99
      images = rng.integers(120, 256, (8, 64, 64, 3)).astype(np.uint8)
      images[:, :, side < round(64 * dark)] //= 8
      now = over_optimization.appearance(images)
      if any(sentence.startswith('dark') for sentence in watch(now)):
        first = now['dark'] if first is None else self.fail('an alarm was raised twice')
    self.assertBetween(first, 0.5, 0.6)

  @parameterized.parameters(
    ('luminance', 0.76, 0.74, 'fell'),
    ('luminance', 1.24, 1.26, 'rose'),
    ('edge_density', 0.66, 0.64, 'fell'),
    ('edge_density', 1.49, 1.51, 'rose'),
    ('hue_entropy', 0.76, 0.74, 'fell'),
    ('dark', 1.24, 1.26, 'rose'),
  )
  def test_bounds(self, name, quiet, loud, direction):
    first = {'dark': 0.4, 'luminance': 0.5, 'edge_density': 0.1, 'hue_entropy': 2.0}

    def last(factor):
      watch = over_optimization.Monitor()
      for _ in range(over_optimization.WARM):
        self.assertEmpty(watch(first))
      return [
        s
        for _ in range(over_optimization.WARM)
        for s in watch({**first, name: factor * first[name]})
      ]

    self.assertEmpty(last(quiet))
    (sentence,) = last(loud)
    self.assertStartsWith(sentence, f'{name.replace("_", " ")} of rollouts {direction} from')

  def test_a_texture_over_everything_is_told(self):
    rng, watch = np.random.default_rng(3), over_optimization.Monitor()
    grid = np.indices((render.SIZE, render.SIZE)).sum(0)[..., None] % 2 * 60
    raised = [
      watch(
        over_optimization.appearance(
          np.minimum(rollouts(rng).astype(int) + (number > 10) * grid, 255)
        )
      )
      for number in range(20)
    ]
    self.assertTrue(any('edge density of rollouts rose' in s for s in sum(raised[11:], [])))
    self.assertEmpty(sum(raised[:11], []))

  def test_state_goes_on(self):
    rng = np.random.default_rng(2)
    seen = [over_optimization.appearance(rollouts(rng) // (1 + n // 6)) for n in range(20)]
    whole = over_optimization.Monitor()
    want = [whole(now) for now in seen]
    self.assertTrue(any(want))
    half = over_optimization.Monitor()
    got = [half(now) for now in seen[:9]]
    half = over_optimization.Monitor(json.loads(json.dumps(half.state)))
    self.assertEqual(got + [half(now) for now in seen[9:]], want)


if __name__ == '__main__':
  absltest.main()
