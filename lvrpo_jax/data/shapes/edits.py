"""Edit instructions on scenes: recolor, remove, add and move, with their targets and specs."""

import dataclasses

import numpy as np

from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

KINDS = ('recolor', 'remove', 'add', 'move')
UNSEEN_KINDS = ('recolor', 'add')
MAX_SOURCE_OBJECTS = render.MAX_OBJECTS - 1


@dataclasses.dataclass(frozen=True)
class EditItem:
  """An edit. `target` differs from `scene` only in the cells that the instruction names.

  `spec` is JSON-able: {"tag", "keep": [{"class", "color", "box"}], "gone": [box, ...],
  "new": [{"class", "color", "region"}], "prompt"} with boxes (x0, y0, x1, y1) in pixels.
  """

  index: int
  kind: str
  instruction: str
  spec: dict
  meaning: str
  scene: render.Scene
  target: render.Scene


@dataclasses.dataclass(frozen=True)
class _Draft:
  """An edit before it is worded: `old` leaves, `new` comes (either may be None)."""

  objects: tuple[render.Object, ...]
  old: render.Object | None
  new: render.Object | None

  @property
  def kept(self) -> tuple[render.Object, ...]:
    return tuple(o for o in self.objects if o is not self.old)

  @property
  def target(self) -> tuple[render.Object, ...]:
    return self.kept + (() if self.new is None else (self.new,))


def _draw_draft(rng: np.random.Generator, kind: str, unseen: bool) -> _Draft:
  least = 2 if kind == 'remove' else 1
  count = least + int(rng.random() * (MAX_SOURCE_OBJECTS + 1 - least))
  cells = splits.draw_cells(rng, count + 1)
  wanted = splits.draw_pair(rng)
  if unseen:
    wanted = wording.pick(rng, tuple(sorted(splits.UNSEEN_PAIRS)))
  first = splits.draw_pair(rng, shape=wanted[0]) if kind == 'recolor' else splits.draw_pair(rng)
  pairs = [first] + [splits.draw_pair(rng) for _ in range(count - 1)]
  objects = tuple(render.draw_object(rng, *pair, cell) for pair, cell in zip(pairs, cells))
  old, empty = objects[0], cells[-1]
  if kind == 'recolor':
    return _Draft(objects, old, dataclasses.replace(old, color=wanted[1]))
  if kind == 'remove':
    return _Draft(objects, old, None)
  if kind == 'add':
    return _Draft(objects, None, render.draw_object(rng, *wanted, empty))
  row, col = divmod(empty, render.GRID)
  moved = dataclasses.replace(
    old,
    row=row,
    col=col,
    x=old.x + (col - old.col) * render.CELL,
    y=old.y + (row - old.row) * render.CELL,
  )
  return _Draft(objects, old, moved)


def _word(rng: np.random.Generator, kind: str, draft: _Draft) -> str | None:
  """Words an instruction; None where no name fits only the object that is meant."""
  fields = {}
  if kind == 'add':
    fields['a'] = wording.noun(draft.new.shape, draft.new.color)
    fields['r'] = wording.pick(rng, wording.REGION_PHRASES[draft.new.corner])
  else:
    name = splits.name_object(rng, draft.old, draft.objects)
    if name is None:
      return None
    fields['a'] = f'the {name}'
  if kind == 'recolor':
    fields['c'] = draft.new.color
  if kind == 'move':
    fields['r'] = wording.pick(rng, (f'the {draft.new.corner}', f'the {draft.new.corner} corner'))
    fields['i'] = wording.pick(rng, wording.REGION_PHRASES[draft.new.corner])
  return wording.pick_text(rng, [t.format(**fields) for t in wording.EDITS[kind]])


def _spec(kind: str, draft: _Draft, instruction: str) -> dict:
  spec = {'tag': kind, 'keep': [], 'gone': [], 'new': [], 'prompt': instruction}
  for o in sorted(draft.kept, key=lambda o: (o.row, o.col)):
    spec['keep'].append({'class': o.shape, 'color': o.color, 'box': list(o.box)})
  if draft.old is not None:
    spec['gone'].append(list(draft.old.box))
  if draft.new is not None:
    spec['new'].append(
      {'class': draft.new.shape, 'color': draft.new.color, 'region': draft.new.corner}
    )
  return spec


def draw(
  rng: np.random.Generator, index: int, split: str, kind: str, eval_fraction: float
) -> EditItem:
  """Draws an edit of a kind whose meaning belongs to the split.

  Raises:
    ValueError: if `kind` has no edits in the split.
    RuntimeError: if no edit is found, which a sane `eval_fraction` rules out.
  """
  if kind not in (UNSEEN_KINDS if split == 'unseen' else KINDS):
    raise ValueError(f'no {kind!r} edits in split {split!r}')
  unseen = split == 'unseen'
  for _ in range(splits.MAX_DRAWS):
    draft = _draw_draft(rng, kind, unseen)
    if kind == 'recolor' and draft.old.color == draft.new.color:
      continue
    old = '' if draft.old is None else draft.old.corner
    new = '' if draft.new is None else f'{draft.new.corner} {draft.new.color} {draft.new.shape}'
    meaning = f'{kind} {old} : {new} | {splits.scene_key(draft.objects)}'
    if not unseen and (
      splits.is_held_out(meaning, eval_fraction) != (split == 'eval')
      or not splits.scene_is_seen(draft.objects)
      or not splits.scene_is_seen(draft.target)
    ):
      continue
    instruction = _word(rng, kind, draft)
    if instruction is not None:
      objects = tuple(sorted(draft.objects, key=lambda o: (o.row, o.col)))
      target = tuple(sorted(draft.target, key=lambda o: (o.row, o.col)))
      return EditItem(
        index,
        kind,
        instruction,
        _spec(kind, draft, instruction),
        meaning,
        render.Scene(objects),
        render.Scene(target),
      )
  raise RuntimeError(f'no {kind!r} edit found in split {split!r}')
