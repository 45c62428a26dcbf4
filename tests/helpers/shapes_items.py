"""Items of the shapes world for its tests, and relations recomputed from cells."""

import functools

from lvrpo_jax.data.shapes import edits
from lvrpo_jax.data.shapes import world

WORLD = world.World()
TASKS = {'generate': WORLD.generate, 'question': WORLD.question, 'edit': WORLD.edit}
COUNT = 1000
"""Items of a task and split that the tests look at."""


@functools.cache
def items(task, split, count=COUNT):
  """The first items of a task in a split."""
  return [TASKS[task](index, split) for index in range(count)]


def text_of(item):
  """Caption, instruction or question of an item."""
  if isinstance(item, world.GenerateItem):
    return item.caption
  if isinstance(item, edits.EditItem):
    return item.instruction
  return item.question


def scenes_of(item):
  """All scenes of an item."""
  return [item.scene, item.target] if isinstance(item, edits.EditItem) else [item.scene]


def canonical(a, relation, b):
  """The relation in terms of 'left of' and 'above'."""
  return {
    'left of': (a, 'left of', b),
    'right of': (b, 'left of', a),
    'above': (a, 'above', b),
    'below': (b, 'above', a),
  }[relation]


def strictly(a, relation, b):
  """Whether a is `relation` b in one row or column, by the difference of their cells (row, col)."""
  step = (b.row - a.row, b.col - a.col)
  return (
    step == {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 0), 'below': (-1, 0)}[relation]
  )
