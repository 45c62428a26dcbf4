"""Plans: short readings of a scene that lead to the answer of a question.

A plan is made of the world's words. It says what stands in the cells, or names the objects that a
question is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lvrpo_jax.data.shapes import render


def reading(objects: Iterable[render.Object], words: Sequence[str] = ('color', 'shape')) -> str:
  """Lists the content of all cells: 'red circle , nothing , nothing , blue square'.

  Cells are in reading order. `words` chooses the attributes that are named of every object.
  """
  names = {item.cell: ' '.join(getattr(item, word) for word in words) for item in objects}
  return ' , '.join(names.get(cell, 'nothing') for cell in range(render.MAX_OBJECTS))


def listing(objects: Iterable[render.Object], fits: Callable[[render.Object], bool]) -> str:
  """Lists the objects that fit: 'red circle blue circle', in reading order, or 'nothing'."""
  found = sorted((item.cell, f'{item.color} {item.shape}') for item in objects if fits(item))
  return ' '.join(name for _, name in found) or 'nothing'


def sides(item: render.Object, axes: tuple[int, ...] = (0, 1)) -> str:
  """Names an object and its place: 'circle red top red left'; axis 0 is vertical.

  The colour stands before each side, because a small model finds an object in the image by the word
  right before the one that it predicts. In 'red circle top left' it takes the sides of any object.
  """
  words = item.corner.split()
  return ' '.join([item.shape, *(f'{item.color} {words[axis]}' for axis in axes)])


def relation(first: render.Object, name: str, second: render.Object) -> str:
  """Names both objects' places along the axis of a relation, and their order along it."""
  axis = 1 if name in ('left of', 'right of') else 0
  here, there = ((item.row, item.col)[axis] for item in (first, second))
  if here == there:
    verdict = 'equal'
  else:
    verdict = (('above', 'below'), ('left', 'right'))[axis][int(here > there)]
  return f'{sides(first, (axis,))} {sides(second, (axis,))} , {verdict}'
