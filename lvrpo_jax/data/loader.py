"""Grain iterators over indexed sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import grain

from lvrpo_jax import types

EPOCH_ROWS = 1 << 29
"""Rows of a procedural source. No run reaches its end, and indices fit into int32."""

Element = TypeVar('Element')


class IndexedSource(grain.sources.RandomAccessDataSource, Generic[Element]):
  """A random-access source whose element i is `make(i)`.

  `length` bounds the epoch; grain never asks for an index beyond it.
  """

  def __init__(self, make: Callable[[int], Element], length: int):
    self._make, self._length = make, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Element:
    return self._make(int(index))


def batches(
  source: IndexedSource[Element],
  batch_size: int,
  collate: Callable[[Sequence[Element]], types.Tree],
  shard: tuple[int, int] = (0, 1),
  prefetch: int = 4,
) -> grain.DatasetIterator:
  """Returns endless batches in source order; the iterator's state is one integer.

  Args:
    source: the elements.
    batch_size: rows of a batch that belong to this shard.
    collate: makes one batch of the elements of its rows.
    shard: (index, count) of this process's shard; rows are dealt out in turn.
    prefetch: batches that background threads make ahead.
  """
  index, count = shard
  data = grain.MapDataset.source(source).repeat(None)[index::count]
  data = data.batch(batch_size, batch_fn=collate)
  return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)))
