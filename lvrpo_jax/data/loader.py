"""Grain iterators over indexed sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grain


class IndexedSource(grain.sources.RandomAccessDataSource):
  """A procedural task as a random-access source: element i is `make(i)`.

  `length` bounds the epoch; indices beyond it are never asked for by grain.
  """

  def __init__(self, make: Callable[[int], Any], length: int):
    self._make, self._length = make, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Any:
    return self._make(int(index))


def batches(
  source: IndexedSource,
  batch_size: int,
  collate: Callable[[Sequence[Any]], Any],
  shard: tuple[int, int] = (0, 1),
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """Endless batches in source order, with a state of one integer.

  Args:
    batch_size: rows of this shard's part.
    shard: (index of this process, number of processes); rows are dealt out in turn.
    prefetch: batches made ahead by background threads.
  """
  index, count = shard
  data = grain.MapDataset.source(source).repeat(None)[index::count]
  data = data.batch(batch_size, batch_fn=collate)
  return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)))


EPOCH_ROWS = 1 << 29
"""Rows of a procedural source; no run reaches its end, and indices fit into int32."""
