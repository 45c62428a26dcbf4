"""Questions about scenes, with their answers, plans and statements.

A draw function takes (rng, unseen) and returns a `_Draft`, or None where the draw does not work
out and should be repeated. Target answers of yes/no and counting questions are chosen before
anything else (`_Target`), so that rejected draws do not bias them.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses

import numpy as np

from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

KINDS = ('color', 'shape', 'count', 'relation', 'compare', 'reason')
UNSEEN_KINDS = ('color', 'shape', 'relation')
REGION_SHARE = 0.3  # of relation questions: 'is the circle in the top left ?'


@dataclasses.dataclass(frozen=True)
class QuestionItem:
  """A question with a unique one-word answer.

  `plan` is a short reading of the scene that leads to the answer ('' for colour and shape);
  `record` is JSON-able and holds what `statement` needs; `meaning` includes the scene's content.
  """

  index: int
  kind: str
  question: str
  answer: str
  plan: str
  meaning: str
  scene: render.Scene
  record: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Target:
  """Chosen once per item: a yes/no answer, a number 0..4, and a coin in [0, 1)."""

  yes: bool
  number: int
  coin: float


@dataclasses.dataclass(frozen=True)
class _Draft:
  objects: tuple[render.Object, ...]
  record: dict[str, str]
  key: str
  answer: str
  plan: str = ''
  needs_unseen: bool = False


def _place(rng: np.random.Generator, pairs: list[tuple[str, str]]) -> tuple[render.Object, ...]:
  cells = splits.draw_cells(rng, len(pairs))
  return tuple(render.draw_object(rng, s, c, cell) for (s, c), cell in zip(pairs, cells))


def _others(
  rng: np.random.Generator, count: int, fits: Callable[[tuple[str, str]], bool]
) -> list[tuple[str, str]]:
  """`count` seen pairs that do not fit the predicate."""
  pairs = [pair for pair in splits.SEEN_PAIRS if not fits(pair)]
  return [wording.pick(rng, pairs) for _ in range(count)]


def _draw_attribute(rng: np.random.Generator, kind: str, unseen: bool) -> _Draft:
  """'what colour is the circle ?' (kind color) and 'what shape is red ?' (kind shape)."""
  pair = wording.pick(rng, tuple(sorted(splits.UNSEEN_PAIRS)) if unseen else splits.SEEN_PAIRS)
  given, asked = (0, 1) if kind == 'color' else (1, 0)
  extra = int(rng.random() * render.MAX_OBJECTS)
  pairs = [pair] + _others(rng, extra, lambda other: other[given] == pair[given])
  return _Draft(
    _place(rng, pairs),
    {'type': kind, 'a': pair[given]},
    f'{kind} {pair[given]}',
    pair[asked],
    needs_unseen=unseen,
  )


def _draw_color(rng: np.random.Generator, target: _Target, unseen: bool) -> _Draft:
  del target
  return _draw_attribute(rng, 'color', unseen)


def _draw_shape(rng: np.random.Generator, target: _Target, unseen: bool) -> _Draft:
  del target
  return _draw_attribute(rng, 'shape', unseen)


def _draw_count(rng: np.random.Generator, target: _Target, unseen: bool) -> _Draft:
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
  fits = lambda pair: shape in (None, pair[0]) and color in (None, pair[1])
  pairs = [splits.draw_pair(rng, shape, color) for _ in range(number)]
  name = wording.noun(shape, color, count=2)
  objects = _place(rng, pairs + _others(rng, extra, fits))
  return _Draft(
    objects,
    {'type': 'count', 'a': name},
    f'count {name}',
    wording.NUMBERS[number],
    _listing(objects, lambda o: fits((o.shape, o.color))),
  )


def reading(objects: Iterable[render.Object], words: Sequence[str] = ('color', 'shape')) -> str:
  """What stands in the cells, in reading order: 'red circle , nothing , nothing , blue square'.

  `words` chooses what is said of every object.
  """
  said = {o.cell: ' '.join(getattr(o, word) for word in words) for o in objects}
  return ' , '.join(said.get(cell, 'nothing') for cell in range(render.MAX_OBJECTS))


def _listing(objects: Iterable[render.Object], fits: Callable[[render.Object], bool]) -> str:
  """The objects that fit, in reading order: 'red circle blue circle'; 'nothing' if none does."""
  found = sorted((o.cell, f'{o.color} {o.shape}') for o in objects if fits(o))
  return ' '.join(name for _, name in found) or 'nothing'


def _sides(item: render.Object, axes: tuple[int, ...] = (0, 1)) -> str:
  """An object and where it stands: 'circle red top red left'; axis 0 is vertical.

  The colour stands before each side: a small model finds an object in the image by the word that
  comes right before what it has to say. In 'red circle top left' it takes the sides of any object.
  """
  words = item.corner.split()
  return ' '.join([item.shape, *(f'{item.color} {words[axis]}' for axis in axes)])


def _relation_plan(a: render.Object, relation: str, b: render.Object) -> str:
  """Both objects along the axis of the relation, and how they stand there."""
  axis = 1 if relation in ('left of', 'right of') else 0
  here, there = ((o.row, o.col)[axis] for o in (a, b))
  verdict = (
    'equal' if here == there else (('above', 'below'), ('left', 'right'))[axis][int(here > there)]
  )
  return f'{_sides(a, (axis,))} {_sides(b, (axis,))} , {verdict}'


def _draw_relation(rng: np.random.Generator, target: _Target, unseen: bool) -> _Draft | None:
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
  free = [c for c in splits.draw_cells(rng, render.MAX_OBJECTS) if c not in cells][:extra]
  objects = tuple(render.draw_object(rng, *splits.draw_pair(rng), cell) for cell in (*cells, *free))
  a, b = objects[:2]
  needs_unseen = splits.is_unseen_relation(a.shape, relation, b.shape)
  name_a, name_b = (splits.name_object(rng, o, objects) for o in (a, b))
  if name_a is None or name_b is None:
    return None
  record = {'type': 'relation', 'a': name_a, 'r': relation, 'b': name_b}
  key = ' '.join(splits.canonical_relation(a.corner, relation, b.corner))
  return _Draft(
    objects,
    record,
    key,
    'yes' if target.yes else 'no',
    _relation_plan(a, relation, b),
    needs_unseen,
  )


def _draw_region(rng: np.random.Generator, target: _Target) -> _Draft | None:
  count = 1 + int(rng.random() * render.MAX_OBJECTS)
  objects = _place(rng, [splits.draw_pair(rng) for _ in range(count)])
  item = objects[0]
  name = splits.name_object(rng, item, objects)
  if name is None:
    return None
  # The size of the region is drawn first: by itself it must not tell the answer.
  size = wording.pick(rng, (1, 2))
  regions = [
    r
    for r in wording.REGIONS
    if len(wording.REGION_CELLS[r]) == size and (item.cell in wording.REGION_CELLS[r]) == target.yes
  ]
  region = wording.pick(rng, regions)
  record = {'type': 'region', 'a': name, 'r': region}
  axes = tuple(
    axis
    for axis, side in enumerate((('top', 'bottom'), ('left', 'right')))
    if set(side) & set(region.split())
  )
  return _Draft(
    objects, record, f'{item.corner} in {region}', 'yes' if target.yes else 'no', _sides(item, axes)
  )


def _draw_compare(rng: np.random.Generator, target: _Target, unseen: bool) -> _Draft:
  """'are there more red shapes than blue shapes ?'"""
  del unseen
  more = rng.random() < 0.5
  by = int(rng.random() * 2)
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
  given = (lambda v: (v, None)) if by == 0 else (lambda v: (None, v))
  pairs = [splits.draw_pair(rng, *given(v)) for v, k in ((first, m), (second, n)) for _ in range(k)]
  pairs += _others(rng, extra, lambda pair: pair[by] in (first, second))
  names = [wording.noun(*given(v), count=2) for v in (first, second)]
  record = {'type': 'compare', 'a': names[0], 'r': 'more' if more else 'fewer', 'b': names[1]}
  greater, less = names if more else names[::-1]
  objects = _place(rng, pairs)
  plan = ' than '.join(
    ' '.join([value] * k + [wording.NUMBERS[k]]) for value, k in ((first, m), (second, n))
  )
  plan += ' , ' + ('more' if m > n else 'fewer' if m < n else 'equal')
  return _Draft(objects, record, f'{greater} more than {less}', 'yes' if target.yes else 'no', plan)


def _draw_reason(rng: np.random.Generator, target: _Target, unseen: bool) -> _Draft | None:
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
  return _Draft(
    objects,
    {'type': 'others', 'a': 'shapes', 'b': color},
    f'not {color}',
    wording.NUMBERS[number],
    _listing(objects, lambda o: o.color != color),
  )


def _draw_neighbour(rng: np.random.Generator) -> _Draft | None:
  """One object lies on the named side of the anchor, in its row or column, and no other does."""
  relation = wording.pick(rng, wording.RELATIONS)
  cell, anchor_cell = splits.relation_cells(rng, relation)
  cells = [cell, anchor_cell]
  if rng.random() < 0.5:
    side = {'left of': 'right', 'right of': 'left', 'above': 'bottom', 'below': 'top'}[relation]
    cells += [c for c in wording.REGION_CELLS[side] if c != anchor_cell]
  objects = tuple(render.draw_object(rng, *splits.draw_pair(rng), c) for c in cells)
  item, anchor = objects[:2]
  name = splits.name_object(rng, anchor, objects)
  if name is None:
    return None
  kind = wording.pick(rng, ('neighbour_color', 'neighbour_shape'))
  answer = item.color if kind == 'neighbour_color' else item.shape
  return _Draft(
    objects,
    {'type': kind, 'r': relation, 'b': name},
    f'{kind} {relation} {anchor.corner}',
    answer,
    f'{_sides(anchor)} , {item.shape} {item.color}',
  )


_DRAWS = {
  'color': _draw_color,
  'shape': _draw_shape,
  'count': _draw_count,
  'relation': _draw_relation,
  'compare': _draw_compare,
  'reason': _draw_reason,
}


def draw(
  rng: np.random.Generator, index: int, split: str, kind: str, eval_fraction: float
) -> QuestionItem:
  """Draws a question of a kind whose meaning belongs to the split.

  Raises:
    ValueError: if `kind` has no questions in the split.
    RuntimeError: if no question is found, which a sane `eval_fraction` rules out.
  """
  if kind not in (UNSEEN_KINDS if split == 'unseen' else KINDS):
    raise ValueError(f'no {kind!r} questions in split {split!r}')
  unseen = split == 'unseen'
  target = _Target(rng.random() < 0.5, int(rng.random() * 5), rng.random())
  for _ in range(splits.MAX_DRAWS):
    draft = _DRAWS[kind](rng, target, unseen)
    if draft is None or draft.needs_unseen != unseen:
      continue
    meaning = f'{draft.key} | {splits.scene_key(draft.objects)}'
    if not unseen and splits.is_held_out(meaning, eval_fraction) != (split == 'eval'):
      continue
    if unseen or splits.scene_is_seen(draft.objects):
      question = ask(draft.record, rng)
      return QuestionItem(
        index,
        kind,
        question,
        draft.answer,
        draft.plan,
        meaning,
        render.Scene(draft.objects),
        draft.record,
      )
  raise RuntimeError(f'no {kind!r} question found in split {split!r}')


def ask(record: dict[str, str], rng: np.random.Generator | None = None) -> str:
  """Words a question record; the plainest wording where no `rng` is given."""
  fields = dict(record)
  if record['type'] == 'region':
    phrases = wording.REGION_PHRASES[record['r']]
    fields['r'] = phrases[0] if rng is None else wording.pick(rng, phrases)
  elif record['type'] != 'compare' and 'r' in record:
    phrases = wording.RELATION_PHRASES[record['r']]
    fields['r'] = phrases[0] if rng is None else wording.pick(rng, phrases)
  templates = wording.QUESTIONS[record['type']]
  if rng is None:
    return templates[0].format(**fields)
  return wording.pick_text(rng, [template.format(**fields) for template in templates])


def statement(record: dict[str, str], answer: str) -> str:
  """Puts any answer word into a statement about the image: 'two' to 'there are two circles'."""
  fields = dict(record, answer=answer, be='are')
  if record['type'] == 'region':
    fields['r'] = wording.REGION_PHRASES[record['r']][0]
  if record['type'] in ('count', 'others') and answer == 'one':
    fields.update(a=wording.singular(record['a']), be='is')
  fields['not'] = 'not ' if answer == 'no' else ''
  return wording.STATEMENTS[record['type']].format(**fields)


def describe(scene: render.Scene, rng: np.random.Generator) -> tuple[str, str]:
  """A request to describe a scene, and the description: its cells in reading order."""
  return wording.pick(rng, wording.DESCRIBE), reading(scene.objects)


def web_answer(item: QuestionItem, rng: np.random.Generator, wrong: float, chatty: float) -> str:
  """An answer as found on the web.

  Args:
    item: the question.
    rng: source of randomness; always consumes the same number of draws.
    wrong: probability of another answer of the same type.
    chatty: probability of an off-format sentence around the answer.
  """
  families = (tuple(render.COLORS), render.SHAPES, wording.NUMBERS, ('yes', 'no'))
  family = next(f for f in families if item.answer in f)
  is_wrong, is_chatty, which, template = rng.random(4).tolist()
  answer = item.answer
  if is_wrong < wrong:
    others = [word for word in family if word != answer]
    answer = others[int(which * len(others))]
  if is_chatty < chatty:
    return wording.CHATTY[int(template * len(wording.CHATTY))].format(answer=answer)
  return answer


def derived_questions(spec: dict) -> list[tuple[str, str]]:
  """Questions, with answers, that a judge should answer on an image drawn for a spec.

  Takes the spec of a `GenerateItem` or of an `EditItem` and stays within the grammar of questions.
  """
  if 'include' in spec:
    return _include_questions(spec['include'])
  kept = [(o['class'], o['color']) for o in spec['keep']]
  new = [(o['class'], o['color']) for o in spec['new']]
  everything = kept + new
  records = [({'type': 'count', 'a': 'shapes'}, wording.NUMBERS[len(everything)])]
  for entry, (shape, color) in zip(spec['new'], new):
    if sum(s == shape for s, _ in everything) == 1:
      records.append(({'type': 'color', 'a': shape}, color))
      records.append(({'type': 'region', 'a': shape, 'r': entry['region']}, 'yes'))
    else:
      number = wording.NUMBERS[everything.count((shape, color))]
      records.append(({'type': 'count', 'a': wording.noun(shape, color, 2)}, number))
  return [(ask(record), answer) for record, answer in records]


def _include_questions(include: list[dict]) -> list[tuple[str, str]]:
  records = []
  for entry in include:
    color = entry.get('color')
    if entry['count'] > 1 or color is None:
      name = wording.noun(entry['class'], color, 2)
      records.append(({'type': 'count', 'a': name}, wording.NUMBERS[entry['count']]))
    else:
      records.append(({'type': 'color', 'a': entry['class']}, color))
    if 'region' in entry:
      records.append(({'type': 'region', 'a': entry['class'], 'r': entry['region']}, 'yes'))
    if 'position' in entry:
      relation, other = entry['position']
      records.append(
        (
          {'type': 'relation', 'a': entry['class'], 'r': relation, 'b': include[other]['class']},
          'yes',
        )
      )
  return [(ask(record), answer) for record, answer in records]
