"""Batches of an indexed source: order, resume, and shards of several processes."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data import loader


class BatchesTest(parameterized.TestCase):
  def make(self, shard=(0, 1), length=8, size=2):
    return loader.batches(loader.IndexedSource(lambda i: i * 10, length), size, np.array, shard)

  def take(self, iterator, count):
    return [next(iterator).tolist() for _ in range(count)]

  def test_source_order_and_repetition(self):
    self.assertEqual(self.take(self.make(), 5), [[0, 10], [20, 30], [40, 50], [60, 70], [0, 10]])

  def test_deterministic(self):
    self.assertEqual(self.take(self.make(), 6), self.take(self.make(), 6))

  @parameterized.parameters(0, 1, 4, 7)
  def test_resume(self, done):
    first = self.make()
    self.take(first, done)
    state = first.get_state()
    want = self.take(first, 5)
    second = self.make()
    self.take(second, 2)
    second.set_state(state)
    self.assertEqual(self.take(second, 5), want)

  def test_shards_cover_all_rows_once(self):
    parts = [self.take(self.make((index, 2)), 2) for index in range(2)]
    flat = [list(itertools.chain(*part)) for part in parts]
    self.assertEqual(flat, [[0, 20, 40, 60], [10, 30, 50, 70]])

  def test_shards_together_equal_one_process(self):
    whole = self.take(self.make(size=4), 3)
    parts = [self.take(self.make((index, 2)), 3) for index in range(2)]
    for step in range(3):
      self.assertEqual(sorted(parts[0][step] + parts[1][step]), sorted(whole[step]))


if __name__ == '__main__':
  absltest.main()
