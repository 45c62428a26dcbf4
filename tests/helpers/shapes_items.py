"""Items of the shapes world for its tests, and relations recomputed from cells."""

import functools

from lvrpo_jax.data.shapes import edits
from lvrpo_jax.data.shapes import world

WORLD = world.World()
TASKS = {'generate': WORLD.generate, 'question': WORLD.question, 'edit': WORLD.edit}
COUNT = 1000


@functools.cache
def items(task, split, count=COUNT):
  return [TASKS[task](index, split) for index in range(count)]


def text_of(item):
  if isinstance(item, world.GenerateItem):
    return item.caption
  if isinstance(item, edits.EditItem):
    return item.instruction
  return item.question


def scenes_of(item):
  return [item.scene, item.target] if isinstance(item, edits.EditItem) else [item.scene]


def canonical(a, relation, b):
  return {
    'left of': (a, 'left of', b),
    'right of': (b, 'left of', a),
    'above': (a, 'above', b),
    'below': (b, 'above', a),
  }[relation]


def strictly(a, relation, b):
  """Independent of the package: cells as (row, col) and the sign of their difference."""
  step = (b.row - a.row, b.col - a.col)
  return (
    step == {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 0), 'below': (-1, 0)}[relation]
  )
