"""Train, eval and unseen: which meanings belong where, and random draws that respect it.

Whether a meaning is held out depends only on a hash of the meaning, never on an index or a seed:
worlds of different seeds share one split. Pairs and relations listed as unseen occur in no image
and no text of train and eval.
"""

from collections.abc import Iterable
import hashlib

import numpy as np

from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import wording

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
ALL_PAIRS = tuple((s, c) for s in render.SHAPES for c in render.COLORS)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS)
MAX_DRAWS = 20_000
_SALT = b'shapes-world-split-5:'  # leaves some captions of every kind, also of the small ones


def is_held_out(meaning: str, eval_fraction: float) -> bool:
  """Whether a meaning belongs to eval: its 64-bit BLAKE2b hash, as a fraction, is small enough."""
  digest = hashlib.blake2b(_SALT + meaning.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < eval_fraction * 2**64


def canonical_relation(a: str, relation: str, b: str) -> tuple[str, str, str]:
  """Writes 'right of' as 'left of' and 'below' as 'above', with the operands exchanged."""
  if relation in ('right of', 'below'):
    return b, wording.INVERSE[relation], a
  return a, relation, b


def is_unseen_relation(a: str, relation: str, b: str) -> bool:
  """Whether the relation between two shapes is one of UNSEEN_RELATIONS, in either wording."""
  return canonical_relation(a, relation, b) in UNSEEN_RELATIONS


def scene_is_seen(objects: Iterable[render.Object]) -> bool:
  """Whether objects hold no unseen pair and no unseen relation.

  Relations count in the loose sense here: any object of the left column is left of any object of
  the right column, also diagonally.
  """
  objects = tuple(objects)
  if any((o.shape, o.color) in UNSEEN_PAIRS for o in objects):
    return False
  for a in objects:
    for b in objects:
      if a.col < b.col and (a.shape, 'left of', b.shape) in UNSEEN_RELATIONS:
        return False
      if a.row < b.row and (a.shape, 'above', b.shape) in UNSEEN_RELATIONS:
        return False
  return True


def scene_key(objects: Iterable[render.Object]) -> str:
  """Canonical text of the set of (cell, colour, shape), for use in meanings."""
  return ' , '.join(sorted(f'{o.corner} {o.color} {o.shape}' for o in objects))


def draw_pair(
  rng: np.random.Generator, shape: str | None = None, color: str | None = None, unseen: bool = False
) -> tuple[str, str]:
  """Uniform (shape, colour), with what is given kept; seen pairs only unless `unseen`.

  Raises:
    ValueError: if the given shape and colour leave no pair.
  """
  pairs = ALL_PAIRS if unseen else SEEN_PAIRS
  if shape is not None or color is not None:
    pairs = [p for p in pairs if shape in (None, p[0]) and color in (None, p[1])]
  if not pairs:
    raise ValueError(f'no seen pair is left for {shape} and {color}')
  return wording.pick(rng, pairs)


def shuffled(rng: np.random.Generator, items: Iterable) -> list:
  """A shuffled list; Fisher-Yates on Python objects is faster than NumPy for a few items."""
  items = list(items)
  for last in range(len(items) - 1, 0, -1):
    other = int(rng.random() * (last + 1))
    items[last], items[other] = items[other], items[last]
  return items


def draw_cells(rng: np.random.Generator, count: int) -> list[int]:
  """Distinct random cells."""
  return shuffled(rng, range(render.MAX_OBJECTS))[:count]


def relation_cells(rng: np.random.Generator, relation: str) -> tuple[int, int]:
  """Cells (of a, of b) in the same row or column such that a is `relation` b."""
  line = int(rng.random() * render.GRID)
  if relation in ('left of', 'right of'):
    first, second = line * render.GRID, line * render.GRID + 1
  else:
    first, second = line, line + render.GRID
  return (first, second) if relation in ('left of', 'above') else (second, first)


def name_object(
  rng: np.random.Generator, item: render.Object, objects: Iterable[render.Object]
) -> str | None:
  """A name that fits only `item` among `objects`: 'circle' or 'red circle'; None if there is none.

  Where the class alone would do, the colour is added half of the time.
  """
  objects = tuple(objects)
  same_shape = [o for o in objects if o.shape == item.shape]
  if len(same_shape) == 1 and rng.random() < 0.5:
    return item.shape
  if sum(o.color == item.color for o in same_shape) == 1:
    return f'{item.color} {item.shape}'
  return None
