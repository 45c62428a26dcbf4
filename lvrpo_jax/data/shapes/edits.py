"""Edit instructions on scenes: recolor, remove, add and move, with their targets and specs."""

from __future__ import annotations

import dataclasses

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

KINDS = ('recolor', 'remove', 'add', 'move')
UNSEEN_KINDS = ('recolor', 'add')
MAX_SOURCE_OBJECTS = render.MAX_OBJECTS - 1


@dataclasses.dataclass(frozen=True)
class EditItem:
  """An edit instruction with its source and target scene.

  Attributes:
    index: index of the item in its task and split.
    kind: one of `KINDS`.
    instruction: the text.
    spec: JSON-able record {"tag", "keep": [{"class", "color", "box"}], "gone": [box, ...],
      "new": [{"class", "color", "region"}], "prompt"} with boxes (x0, y0, x1, y1) in pixels.
    meaning: canonical text of the edit and of the source's content.
    scene: the source.
    target: the result; it differs from `scene` only in the cells that the instruction names.
  """

  index: int
  kind: str
  instruction: str
  spec: dict[str, types.Json]
  meaning: str
  scene: render.Scene
  target: render.Scene


@dataclasses.dataclass(frozen=True)
class _Draft:
  """An edit before it is worded.

  Attributes:
    objects: objects of the source.
    old: the object that the edit takes away, or None.
    new: the object that the edit adds, or None.
  """

  objects: tuple[render.Object, ...]
  old: render.Object | None
  new: render.Object | None

  @property
  def kept(self) -> tuple[render.Object, ...]:
    """Objects that stay as they are."""
    return tuple(item for item in self.objects if item is not self.old)

  @property
  def target(self) -> tuple[render.Object, ...]:
    """Objects of the result."""
    return self.kept + (() if self.new is None else (self.new,))


def _reading_order(objects: tuple[render.Object, ...]) -> tuple[render.Object, ...]:
  return tuple(sorted(objects, key=lambda item: (item.row, item.col)))


def _draw_draft(rng: np.random.Generator, kind: str, unseen: bool) -> _Draft:
  """Draws an edit of a kind, of an unseen pair or of any."""
  least = 2 if kind == 'remove' else 1
  count = least + int(rng.random() * (MAX_SOURCE_OBJECTS + 1 - least))
  cells = splits.draw_cells(rng, count + 1)
  wanted = splits.draw_pair(rng)
  if unseen:
    wanted = wording.pick(rng, tuple(sorted(splits.UNSEEN_PAIRS)))
  first = splits.draw_pair(rng, shape=wanted[0]) if kind == 'recolor' else splits.draw_pair(rng)
  pairs = [first] + [splits.draw_pair(rng) for _ in range(count - 1)]
  objects = tuple(
    render.draw_object(rng, shape, color, cell)
    for (shape, color), cell in zip(pairs, cells, strict=False)  # The last cell stays empty.
  )
  old, empty = objects[0], cells[-1]
  if kind == 'recolor':
    return _Draft(objects=objects, old=old, new=dataclasses.replace(old, color=wanted[1]))
  if kind == 'remove':
    return _Draft(objects=objects, old=old, new=None)
  if kind == 'add':
    shape, color = wanted
    return _Draft(objects=objects, old=None, new=render.draw_object(rng, shape, color, empty))
  row, col = divmod(empty, render.GRID)
  moved = dataclasses.replace(
    old,
    row=row,
    col=col,
    x=old.x + (col - old.col) * render.CELL,
    y=old.y + (row - old.row) * render.CELL,
  )
  return _Draft(objects=objects, old=old, new=moved)


def _word(rng: np.random.Generator, kind: str, draft: _Draft) -> str | None:
  """Words an instruction; None where no name fits only the object that is meant."""
  fields = {}
  old, new = draft.old, draft.new
  if old is not None:
    name = splits.name_object(rng, old, draft.objects)
    if name is None:
      return None
    fields['a'] = f'the {name}'
  if new is not None and kind == 'add':
    fields['a'] = wording.noun(new.shape, new.color)
    fields['r'] = wording.pick(rng, wording.REGION_PHRASES[new.corner])
  if new is not None and kind == 'recolor':
    fields['c'] = new.color
  if new is not None and kind == 'move':
    fields['r'] = wording.pick(rng, (f'the {new.corner}', f'the {new.corner} corner'))
    fields['i'] = wording.pick(rng, wording.REGION_PHRASES[new.corner])
  return wording.pick_text(rng, [template.format(**fields) for template in wording.EDITS[kind]])


def _spec(kind: str, draft: _Draft, instruction: str) -> dict[str, types.Json]:
  """Record of an edit for rule rewards, see `EditItem.spec`."""
  old, new = draft.old, draft.new
  return {
    'tag': kind,
    'keep': [
      {'class': item.shape, 'color': item.color, 'box': list(item.box)}
      for item in _reading_order(draft.kept)
    ],
    'gone': [] if old is None else [list(old.box)],
    'new': [] if new is None else [{'class': new.shape, 'color': new.color, 'region': new.corner}],
    'prompt': instruction,
  }


def _meaning(kind: str, draft: _Draft) -> str:
  """Canonical text of an edit and of the source's content."""
  old = '' if draft.old is None else draft.old.corner
  new = '' if draft.new is None else f'{draft.new.corner} {draft.new.color} {draft.new.shape}'
  return f'{kind} {old} : {new} | {splits.scene_key(draft.objects)}'


def draw(
  rng: np.random.Generator, index: int, split: str, kind: str, eval_fraction: float
) -> EditItem:
  """Draws an edit of a kind whose meaning belongs to the split.

  Raises:
    ValueError: `kind` has no edits in the split.
    RuntimeError: no edit is found, which happens only with an extreme `eval_fraction`.
  """
  if kind not in (UNSEEN_KINDS if split == 'unseen' else KINDS):
    raise ValueError(f'no {kind!r} edits in split {split!r}')
  unseen = split == 'unseen'
  for _ in range(splits.MAX_DRAWS):
    draft = _draw_draft(rng, kind, unseen)
    if kind == 'recolor' and draft.old == draft.new:
      continue
    meaning = _meaning(kind, draft)
    if not unseen and (
      splits.is_held_out(meaning, eval_fraction) != (split == 'eval')
      or not splits.scene_is_seen(draft.objects)
      or not splits.scene_is_seen(draft.target)
    ):
      continue
    instruction = _word(rng, kind, draft)
    if instruction is not None:
      return EditItem(
        index=index,
        kind=kind,
        instruction=instruction,
        spec=_spec(kind, draft, instruction),
        meaning=meaning,
        scene=render.Scene(_reading_order(draft.objects)),
        target=render.Scene(_reading_order(draft.target)),
      )
  raise RuntimeError(f'no {kind!r} edit found in split {split!r}')
