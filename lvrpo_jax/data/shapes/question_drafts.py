"""Random drafts of questions: scene, record, answer and plan, before the question is worded.

A draw function takes (rng, target, unseen) and returns a `Draft`, or None where the draw fails and
has to be repeated. The answers of yes/no and counting questions are chosen before anything else
(`Target`), so that rejected draws do not bias them.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

import numpy as np

from lvrpo_jax.data.shapes import plans
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

REGION_SHARE = 0.3  # of relation questions: 'is the circle in the top left ?'

Pair = tuple[str, str]
"""A shape and a colour."""


@dataclasses.dataclass(frozen=True)
class Target:
  """Choices made once per item, before any draft.

  Attributes:
    yes: the answer of a yes/no question.
    number: 0..4, the answer of a counting question.
    coin: in [0, 1), chooses between variants of a kind.
  """

  yes: bool
  number: int
  coin: float

  @property
  def yes_or_no(self) -> str:
    """The answer word of a yes/no question."""
    return 'yes' if self.yes else 'no'


@dataclasses.dataclass(frozen=True)
class Draft:
  """A question before it is worded.

  Attributes:
    objects: objects of the scene.
    record: what is asked, in the form of `questions.QuestionItem.record`.
    key: canonical text of what is asked.
    answer: one word.
    plan: a reading of the scene that leads to the answer, or ''.
    needs_unseen: whether the question names an unseen combination.
  """

  objects: tuple[render.Object, ...]
  record: dict[str, str]
  key: str
  answer: str
  plan: str = ''
  needs_unseen: bool = False


def draw_target(rng: np.random.Generator) -> Target:
  """Draws the choices of an item."""
  return Target(yes=rng.random() < 0.5, number=int(rng.random() * 5), coin=rng.random())


def draw_draft(rng: np.random.Generator, kind: str, target: Target, unseen: bool) -> Draft | None:
  """Draws one draft of a kind; None where the draw fails.

  Args:
    rng: source of randomness.
    kind: one of `questions.KINDS`.
    target: from `draw_target`, the same for all draws of an item.
    unseen: whether an unseen combination is wanted; kinds without one ignore it.
  """
  return _DRAWS[kind](rng, target, unseen)


def _place(rng: np.random.Generator, pairs: list[Pair]) -> tuple[render.Object, ...]:
  """Places shapes in distinct random cells."""
  cells = splits.draw_cells(rng, len(pairs))
  return tuple(
    render.draw_object(rng, shape, color, cell)
    for (shape, color), cell in zip(pairs, cells, strict=True)
  )


def _others(rng: np.random.Generator, count: int, fits: Callable[[Pair], bool]) -> list[Pair]:
  """Draws `count` seen pairs that do not fit the predicate."""
  pairs = [pair for pair in splits.SEEN_PAIRS if not fits(pair)]
  return [wording.pick(rng, pairs) for _ in range(count)]


def _draw_attribute(rng: np.random.Generator, kind: str, unseen: bool) -> Draft:
  """'what colour is the circle ?' (kind color) and 'what shape is red ?' (kind shape)."""
  pair = wording.pick(rng, tuple(sorted(splits.UNSEEN_PAIRS)) if unseen else splits.SEEN_PAIRS)
  given, asked = (0, 1) if kind == 'color' else (1, 0)
  extra = int(rng.random() * render.MAX_OBJECTS)
  pairs = [pair] + _others(rng, extra, lambda other: other[given] == pair[given])
  return Draft(
    objects=_place(rng, pairs),
    record={'type': kind, 'a': pair[given]},
    key=f'{kind} {pair[given]}',
    answer=pair[asked],
    needs_unseen=unseen,
  )


def _draw_color(rng: np.random.Generator, target: Target, unseen: bool) -> Draft:
  del target
  return _draw_attribute(rng, 'color', unseen)


def _draw_shape(rng: np.random.Generator, target: Target, unseen: bool) -> Draft:
  del target
  return _draw_attribute(rng, 'shape', unseen)


def _draw_count(rng: np.random.Generator, target: Target, unseen: bool) -> Draft:
  """'how many circles / red shapes / red circles / shapes are there ?'"""
  del unseen
  by = wording.pick(
    rng, ('class', 'color', 'both', 'all') if target.number else ('class', 'color', 'both')
  )
  shape, color = splits.draw_pair(rng)
  shape = shape if by in ('class', 'both') else None
  color = color if by in ('color', 'both') else None
  number = target.number
  room = render.MAX_OBJECTS - number
  least = 0 if number else 1
  extra = 0 if by == 'all' else least + int(rng.random() * (room + 1 - least))

  def fits(pair: Pair) -> bool:
    return shape in (None, pair[0]) and color in (None, pair[1])

  pairs = [splits.draw_pair(rng, shape, color) for _ in range(number)]
  name = wording.noun(shape, color, count=2)
  objects = _place(rng, pairs + _others(rng, extra, fits))
  return Draft(
    objects=objects,
    record={'type': 'count', 'a': name},
    key=f'count {name}',
    answer=wording.NUMBERS[number],
    plan=plans.listing(objects, lambda item: fits((item.shape, item.color))),
  )


def _draw_relation(rng: np.random.Generator, target: Target, unseen: bool) -> Draft | None:
  """'is the circle left of the square ?', and 'is the circle in the top left ?'"""
  if target.coin < REGION_SHARE and not unseen:
    return _draw_region(rng, target)
  relation = wording.pick(rng, wording.RELATIONS)
  true_relation = relation
  if not target.yes:
    across = wording.RELATIONS[2:] if relation in wording.RELATIONS[:2] else wording.RELATIONS[:2]
    inverse = rng.random() < 0.5
    true_relation = wording.INVERSE[relation] if inverse else wording.pick(rng, across)
  cells = splits.relation_cells(rng, true_relation)
  extra = int(rng.random() * (render.MAX_OBJECTS - 1))
  free = [cell for cell in splits.draw_cells(rng, render.MAX_OBJECTS) if cell not in cells][:extra]
  objects = tuple(render.draw_object(rng, *splits.draw_pair(rng), cell) for cell in (*cells, *free))
  first, second = objects[:2]
  first_name, second_name = (splits.name_object(rng, item, objects) for item in (first, second))
  if first_name is None or second_name is None:
    return None
  return Draft(
    objects=objects,
    record={'type': 'relation', 'a': first_name, 'r': relation, 'b': second_name},
    key=' '.join(splits.canonical_relation(first.corner, relation, second.corner)),
    answer=target.yes_or_no,
    plan=plans.relation(first, relation, second),
    needs_unseen=splits.is_unseen_relation(first.shape, relation, second.shape),
  )


def _draw_region(rng: np.random.Generator, target: Target) -> Draft | None:
  """'is the circle in the top left ?', of a corner or a half."""
  count = 1 + int(rng.random() * render.MAX_OBJECTS)
  objects = _place(rng, [splits.draw_pair(rng) for _ in range(count)])
  item = objects[0]
  name = splits.name_object(rng, item, objects)
  if name is None:
    return None
  # The size of the region is drawn first, so that it does not reveal the answer.
  size = wording.pick(rng, (1, 2))
  regions = [
    region
    for region in wording.REGIONS
    if len(wording.REGION_CELLS[region]) == size
    and (item.cell in wording.REGION_CELLS[region]) == target.yes
  ]
  region = wording.pick(rng, regions)
  axes = tuple(
    axis
    for axis, ends in enumerate((('top', 'bottom'), ('left', 'right')))
    if set(ends) & set(region.split())
  )
  return Draft(
    objects=objects,
    record={'type': 'region', 'a': name, 'r': region},
    key=f'{item.corner} in {region}',
    answer=target.yes_or_no,
    plan=plans.sides(item, axes),
  )


def _draw_compare(rng: np.random.Generator, target: Target, unseen: bool) -> Draft:
  """'are there more red shapes than blue shapes ?'"""
  del unseen
  more = rng.random() < 0.5
  by = int(rng.random() * 2)  # Compares shapes (0) or colours (1).
  first, second = splits.shuffled(rng, render.SHAPES if by == 0 else tuple(render.COLORS))[:2]
  limit = render.MAX_OBJECTS
  counts = [
    (m, n)
    for m in range(limit + 1)
    for n in range(limit + 1 - m)
    if m + n > 0 and ((m > n) if more else (m < n)) == target.yes
  ]
  m, n = wording.pick(rng, counts)
  extra = int(rng.random() * (limit + 1 - m - n))

  def given(value: str) -> tuple[str | None, str | None]:
    """(shape, colour) of which only the compared attribute is fixed."""
    return (value, None) if by == 0 else (None, value)

  sides = ((first, m), (second, n))
  pairs = [splits.draw_pair(rng, *given(value)) for value, count in sides for _ in range(count)]
  pairs += _others(rng, extra, lambda pair: pair[by] in (first, second))
  names = [wording.noun(*given(value), count=2) for value in (first, second)]
  greater, less = names if more else names[::-1]
  listed = ' than '.join(
    ' '.join([value] * count + [wording.NUMBERS[count]]) for value, count in sides
  )
  verdict = 'more' if m > n else 'fewer' if m < n else 'equal'
  return Draft(
    objects=_place(rng, pairs),
    record={'type': 'compare', 'a': names[0], 'r': 'more' if more else 'fewer', 'b': names[1]},
    key=f'{greater} more than {less}',
    answer=target.yes_or_no,
    plan=f'{listed} , {verdict}',
  )


def _draw_reason(rng: np.random.Generator, target: Target, unseen: bool) -> Draft | None:
  """Two-step questions: 'how many shapes are not red ?', 'what shape is left of the square ?'"""
  del unseen
  if target.coin < 0.5:
    return _draw_neighbour(rng)
  color = wording.pick(rng, tuple(render.COLORS))
  number = target.number
  least = 0 if number else 1
  matching = least + int(rng.random() * (render.MAX_OBJECTS + 1 - number - least))
  pairs = [splits.draw_pair(rng, color=color) for _ in range(matching)]
  pairs += _others(rng, number, lambda pair: pair[1] == color)
  objects = _place(rng, pairs)
  return Draft(
    objects=objects,
    record={'type': 'others', 'a': 'shapes', 'b': color},
    key=f'not {color}',
    answer=wording.NUMBERS[number],
    plan=plans.listing(objects, lambda item: item.color != color),
  )


def _draw_neighbour(rng: np.random.Generator) -> Draft | None:
  """'what shape is left of the square ?': exactly one object is there, in the row or column."""
  relation = wording.pick(rng, wording.RELATIONS)
  cell, anchor_cell = splits.relation_cells(rng, relation)
  cells = [cell, anchor_cell]
  if rng.random() < 0.5:
    side = {'left of': 'right', 'right of': 'left', 'above': 'bottom', 'below': 'top'}[relation]
    cells += [other for other in wording.REGION_CELLS[side] if other != anchor_cell]
  objects = tuple(render.draw_object(rng, *splits.draw_pair(rng), place) for place in cells)
  item, anchor = objects[:2]
  name = splits.name_object(rng, anchor, objects)
  if name is None:
    return None
  kind = wording.pick(rng, ('neighbour_color', 'neighbour_shape'))
  return Draft(
    objects=objects,
    record={'type': kind, 'r': relation, 'b': name},
    key=f'{kind} {relation} {anchor.corner}',
    answer=item.color if kind == 'neighbour_color' else item.shape,
    plan=f'{plans.sides(anchor)} , {item.shape} {item.color}',
  )


_DRAWS: dict[str, Callable[[np.random.Generator, Target, bool], Draft | None]] = {
  'color': _draw_color,
  'shape': _draw_shape,
  'count': _draw_count,
  'relation': _draw_relation,
  'compare': _draw_compare,
  'reason': _draw_reason,
}
