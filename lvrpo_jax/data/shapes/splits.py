"""Membership of meanings in train, eval and unseen, and random draws that respect it.

Whether a meaning is held out depends only on a hash of the meaning, never on an index or a seed, so
worlds of different seeds share one split. Pairs and relations listed as unseen occur in no image
and no text of train and eval.
"""

from __future__ import annotations

from collections.abc import Iterable
import hashlib
from typing import TypeVar

import numpy as np

from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import wording

Item = TypeVar('Item')

SPLITS = ('train', 'eval', 'unseen')
UNSEEN_PAIRS = frozenset(
  {('circle', 'yellow'), ('square', 'purple'), ('triangle', 'cyan'), ('diamond', 'red')}
)
# (a, 'left of' or 'above', b); the converse wordings mean the same.
UNSEEN_RELATIONS = frozenset(
  {
    ('cross', 'left of', 'circle'),
    ('triangle', 'left of', 'square'),
    ('circle', 'above', 'diamond'),
    ('square', 'above', 'cross'),
  }
)
ALL_PAIRS = tuple((shape, color) for shape in render.SHAPES for color in render.COLORS)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS)
MAX_DRAWS = 20_000
_SALT = b'shapes-world-split-5:'  # chosen so that every kind, also a small one, has eval captions


def is_held_out(meaning: str, eval_fraction: float) -> bool:
  """Whether a meaning belongs to eval: its 64-bit BLAKE2b hash is below that fraction of 2**64."""
  digest = hashlib.blake2b(_SALT + meaning.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < eval_fraction * 2**64


def canonical_relation(a: str, relation: str, b: str) -> tuple[str, str, str]:
  """Rewrites 'right of' as 'left of' and 'below' as 'above', with the operands exchanged."""
  if relation in ('right of', 'below'):
    return b, wording.INVERSE[relation], a
  return a, relation, b


def is_unseen_relation(a: str, relation: str, b: str) -> bool:
  """Whether the relation between two shapes is one of UNSEEN_RELATIONS, in either wording."""
  return canonical_relation(a, relation, b) in UNSEEN_RELATIONS


def scene_is_seen(objects: Iterable[render.Object]) -> bool:
  """Whether objects have no unseen pair and no unseen relation.

  Relations count in the loose sense here: any object of the left column is left of any object of
  the right column, also diagonally.
  """
  objects = tuple(objects)
  if any((item.shape, item.color) in UNSEEN_PAIRS for item in objects):
    return False
  for first in objects:
    for second in objects:
      if first.col < second.col and (first.shape, 'left of', second.shape) in UNSEEN_RELATIONS:
        return False
      if first.row < second.row and (first.shape, 'above', second.shape) in UNSEEN_RELATIONS:
        return False
  return True


def scene_key(objects: Iterable[render.Object]) -> str:
  """Canonical text of the set of (cell, colour, shape), for use in meanings."""
  return ' , '.join(sorted(f'{item.corner} {item.color} {item.shape}' for item in objects))


def draw_pair(
  rng: np.random.Generator, shape: str | None = None, color: str | None = None, unseen: bool = False
) -> tuple[str, str]:
  """Draws a uniform (shape, colour) that has the given shape and colour.

  Without `unseen`, only seen pairs are drawn.

  Raises:
    ValueError: the given shape and colour leave no pair.
  """
  pairs = ALL_PAIRS if unseen else SEEN_PAIRS
  if shape is not None or color is not None:
    pairs = [pair for pair in pairs if shape in (None, pair[0]) and color in (None, pair[1])]
  if not pairs:
    raise ValueError(f'no seen pair is left for {shape} and {color}')
  return wording.pick(rng, pairs)


def shuffled(rng: np.random.Generator, items: Iterable[Item]) -> list[Item]:
  """Returns a shuffled list; Fisher-Yates in Python is faster than NumPy for a few items."""
  order = list(items)
  for last in range(len(order) - 1, 0, -1):
    other = int(rng.random() * (last + 1))
    order[last], order[other] = order[other], order[last]
  return order


def draw_cells(rng: np.random.Generator, count: int) -> list[int]:
  """Draws distinct cells."""
  return shuffled(rng, range(render.MAX_OBJECTS))[:count]


def relation_cells(rng: np.random.Generator, relation: str) -> tuple[int, int]:
  """Draws cells (of a, of b) in the same row or column such that a is `relation` b."""
  line = int(rng.random() * render.GRID)
  if relation in ('left of', 'right of'):
    first, second = line * render.GRID, line * render.GRID + 1
  else:
    first, second = line, line + render.GRID
  return (first, second) if relation in ('left of', 'above') else (second, first)


def name_object(
  rng: np.random.Generator, item: render.Object, objects: Iterable[render.Object]
) -> str | None:
  """Draws a name that fits only `item` among `objects`: 'circle' or 'red circle'; else None.

  Where the class alone identifies the object, the colour is added half of the time.
  """
  same_shape = [other for other in objects if other.shape == item.shape]
  if len(same_shape) == 1 and rng.random() < 0.5:
    return item.shape
  if sum(other.color == item.color for other in same_shape) == 1:
    return f'{item.color} {item.shape}'
  return None
