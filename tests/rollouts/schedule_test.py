"""Tests of lvrpo_jax.rollouts.schedule: which steps are noisy, and which are replayed."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax.rollouts import schedule as schedule_lib

GRID = flow.time_grid(7, 2.2)


class NoiseLevelsTest(absltest.TestCase):
  def test_the_time_that_bounds_it(self):
    """Flow-GRPO-Fast: windows at random in the first half of the steps."""
    for steps, shift in ((10, 2.2), (16, 3.0), (28, 1.0)):
      grid = flow.time_grid(steps + 1, shift)
      eta = schedule_lib.noise_levels(0.7, steps, shift / (1 + shift), 1.0, grid)
      noisy = np.flatnonzero(np.asarray(eta))
      np.testing.assert_array_equal(noisy, np.arange(len(noisy)))
      self.assertBetween(len(noisy), steps // 2 - 1, steps // 2)

  def test_interval_of_noise(self):
    grid = np.asarray(GRID)
    for low, high in ((0.0, 0.5), (0.5, 0.9), (0.9, 1.0)):
      eta = np.asarray(schedule_lib.noise_levels(0.7, 6, low, high, GRID))
      want = [0.7 if low < t <= high and i < 5 else 0.0 for i, t in enumerate(grid[:-1])]
      np.testing.assert_allclose(eta, want, rtol=1e-6)


class WindowTest(parameterized.TestCase):
  @parameterized.product(
    schedule=schedule_lib.SCHEDULES,
    seed=(0, 1, 2, 3),
    sizes=((6, 2), (4, 1), (3, 3), (12, 1), (13, 2), (20, 1), (24, 5)),
  )
  def test_uniform_and_repeatable(self, schedule, seed, sizes):
    def draw(seed):
      return [schedule_lib.window_start(schedule, seed, i, *sizes, 1) for i in range(1, 1001)]

    found = draw(seed)
    self.assertEqual(found, draw(seed))
    starts = sizes[0] - sizes[1] + 1
    counts = np.bincount(found, minlength=starts)
    self.assertLen(counts, starts)
    np.testing.assert_allclose(counts, 1000 / starts, rtol=0.2)
    if starts > 1 and schedule == 'random':
      self.assertNotEqual(found, draw(seed + 1))
      self.assertGreater(len({tuple(found[i : i + starts]) for i in range(0, 900, starts)}), 1)

  def test_processes_that_seed_with_their_rank_disagree(self):
    # As elsewhere: siblings would replay unlike steps. Here all pass the seed of the run.
    ranks = [
      [schedule_lib.window_start('random', rank, i, 6, 2, 1) for i in range(1, 101)]
      for rank in range(4)
    ]
    agree = [len(set(starts)) == 1 for starts in zip(*ranks)]
    self.assertLess(np.mean(agree), 0.2)

  def test_calls_in_any_order_agree(self):
    def at(i):
      return schedule_lib.window_start('random', 0, i, 6, 2, 1)

    want = [at(i) for i in range(1, 21)]
    np.random.seed(0)
    np.random.random(7)
    self.assertEqual([at(i) for i in reversed(range(1, 21))], want[::-1])

  def test_sliding(self):
    def at(i, size=4):
      return schedule_lib.window_start('sliding', 0, i, 6, size, 3)

    self.assertEqual([at(i) for i in range(1, 13)], [0] * 3 + [1] * 3 + [2] * 3 + [0] * 3)
    self.assertEqual({at(i, 6) for i in range(50)}, {0})  # All steps: it cannot move.
    with self.assertRaisesRegex(ValueError, "align.rollout.window_schedule is 'decay'"):
      schedule_lib.window_start('decay', 0, 1, 6, 2, 1)


if __name__ == '__main__':
  absltest.main()
