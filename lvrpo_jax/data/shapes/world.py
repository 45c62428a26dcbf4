"""The grammar of the shapes world: captions, questions and edits by random access.

`World` turns (task, split, index) into an item. The index is the seed, so any index works, in any
order and in any process. Captions carry GenEval's records (https://arxiv.org/abs/2310.11513):
{"tag", "include": [{"class", "count", "color"?, "position"?, "region"?}], "exclude", "prompt"},
where "region" (an addition of this world) names a corner or a half of the image.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data.shapes import edits
from lvrpo_jax.data.shapes import questions
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

GENERATE_KINDS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
UNSEEN_GENERATE_KINDS = ('colors', 'color_attr', 'position')
QUESTION_KINDS = questions.KINDS
EDIT_KINDS = edits.KINDS
MIN_COUNT, MAX_COUNT = 2, 4  # of counting prompts
SCENE_DRAWS = 20  # attempts to find a seen scene for a caption before the caption is dropped

_TASK_SALTS = {'generate': 11, 'question': 22, 'edit': 33}
_OPPOSITE = {'left': 'right', 'right': 'left', 'top': 'bottom', 'bottom': 'top'}


@dataclasses.dataclass(frozen=True)
class GenerateItem:
  """A caption, its GenEval record, and a scene that shows exactly what the caption describes.

  Attributes:
    index: index of the item in its task and split.
    kind: one of `GENERATE_KINDS`.
    caption: the text.
    spec: JSON-able GenEval record.
    meaning: canonical text of the caption, the same for all wordings.
    scene: an image of the caption.
  """

  index: int
  kind: str
  caption: str
  spec: dict[str, types.Json]
  meaning: str
  scene: render.Scene


@dataclasses.dataclass(frozen=True)
class _Entry:
  """One noun phrase of a caption; None where the caption leaves an attribute free."""

  shape: str
  color: str | None = None
  count: int = 1
  region: str | None = None

  def text(self, rng: np.random.Generator, plain: bool) -> str:
    """Words the entry: 'two red circles', 'a square in the top left corner'.

    `plain` words the region in its shortest form.
    """
    name = wording.noun(self.shape, self.color, self.count)
    name = f'a {name}' if self.count == 1 else f'{wording.NUMBERS[self.count]} {name}'
    if self.region is None:
      return name
    phrases = wording.REGION_PHRASES[self.region]
    return f'{name} {phrases[0] if plain else wording.pick(rng, phrases)}'

  def key(self) -> str:
    """Canonical text of the entry."""
    region = '' if self.region is None else f' in {self.region}'
    return f'{self.count} {self.color or "any"} {self.shape}{region}'


@dataclasses.dataclass(frozen=True)
class _Meaning:
  """Content of a caption: its entries, and the relation of entry 0 to entry 1 if it states one."""

  entries: tuple[_Entry, ...]
  relation: str | None = None

  def key(self) -> str:
    """Canonical text of the meaning, the same for all wordings."""
    if self.relation is None:
      return ' + '.join(sorted(entry.key() for entry in self.entries))
    first, second = (entry.key() for entry in self.entries)
    return ' '.join(splits.canonical_relation(first, self.relation, second))

  def needs_unseen(self) -> bool:
    """Whether the caption names an unseen combination."""
    if any((entry.shape, entry.color) in splits.UNSEEN_PAIRS for entry in self.entries):
      return True
    return self.relation is not None and splits.is_unseen_relation(
      self.entries[0].shape, self.relation, self.entries[1].shape
    )


def _draw_meaning(rng: np.random.Generator, kind: str) -> _Meaning:
  """Draws uniformly what each kind leaves open; unseen combinations are included.

  Raises:
    ValueError: `kind` is unknown.
  """
  colors = tuple(render.COLORS)
  first, second = splits.shuffled(rng, render.SHAPES)[:2]
  region = wording.pick(rng, (None, *wording.REGIONS))
  if kind == 'single_object':
    return _Meaning((_Entry(shape=first, region=region),))
  if kind == 'colors':
    return _Meaning((_Entry(shape=first, color=wording.pick(rng, colors), region=region),))
  if kind == 'counting':
    count = MIN_COUNT + int(rng.random() * (MAX_COUNT + 1 - MIN_COUNT))
    color = wording.pick(rng, (None, *colors))
    return _Meaning((_Entry(shape=first, color=color, count=count),))
  if kind == 'two_object':
    other = None
    if region is not None and rng.random() < 0.5:
      corners = [corner for corner in render.CORNERS if corner != region]
      other = _OPPOSITE[region] if region in _OPPOSITE else wording.pick(rng, corners)
    return _Meaning((_Entry(shape=first, region=region), _Entry(shape=second, region=other)))
  if kind == 'color_attr':
    color, other = splits.shuffled(rng, colors)[:2]
    return _Meaning((_Entry(shape=first, color=color), _Entry(shape=second, color=other)))
  if kind == 'position':
    color, other = (wording.pick(rng, (None, *colors)) for _ in range(2))
    return _Meaning(
      (_Entry(shape=first, color=color), _Entry(shape=second, color=other)),
      wording.pick(rng, wording.RELATIONS),
    )
  raise ValueError(f'unknown kind of caption {kind!r}')


def _draw_scene(rng: np.random.Generator, meaning: _Meaning) -> tuple[render.Object, ...] | None:
  """Draws objects that show exactly the meaning; None where the regions clash in this draw."""
  cells = splits.draw_cells(rng, render.MAX_OBJECTS)
  if meaning.relation is not None:
    cells = list(splits.relation_cells(rng, meaning.relation))
  objects = []
  # Entries with a region are placed first, and the others in the remaining cells.
  for entry in sorted(meaning.entries, key=lambda entry: entry.region is None):
    for _ in range(entry.count):
      allowed = [
        cell for cell in cells if entry.region is None or cell in wording.REGION_CELLS[entry.region]
      ]
      if not allowed:
        return None
      cells.remove(allowed[0])
      color = entry.color or splits.draw_pair(rng, shape=entry.shape)[1]
      objects.append(render.draw_object(rng, entry.shape, color, allowed[0]))
  return tuple(sorted(objects, key=lambda item: (item.row, item.col)))


def _word_caption(rng: np.random.Generator, meaning: _Meaning) -> str:
  """Words a caption of a meaning."""
  plain = sum(entry.region is not None for entry in meaning.entries) > 1
  texts = [entry.text(rng, plain) for entry in meaning.entries]
  if meaning.relation is not None:
    joint = wording.pick(rng, wording.RELATION_PHRASES[meaning.relation])
  else:
    joint = 'and'
    texts = splits.shuffled(rng, texts)
  phrase = f' {joint} '.join(texts)
  be = 'are' if meaning.entries[0].count > 1 else 'is'
  return wording.pick_text(rng, [text.format(p=phrase, be=be) for text in wording.CAPTIONS])


def _spec(kind: str, meaning: _Meaning, caption: str) -> dict[str, types.Json]:
  """Builds GenEval's record; `position` refers to an earlier entry, so entry 1 is written first."""
  include = []
  entries = meaning.entries if meaning.relation is None else meaning.entries[::-1]
  for entry in entries:
    record: dict[str, types.Json] = {'class': entry.shape, 'count': entry.count}
    if entry.color is not None:
      record['color'] = entry.color
    if entry.region is not None:
      record['region'] = entry.region
    include.append(record)
  if meaning.relation is not None:
    include[1]['position'] = [meaning.relation, 0]
  exclude = []
  if kind == 'counting':
    # Of any colour, as in GenEval: a third circle in blue also violates 'two red circles'.
    exclude = [{'class': include[0]['class'], 'count': include[0]['count'] + 1}]
  return {'tag': kind, 'include': include, 'exclude': exclude, 'prompt': caption}


def _draw_generate(
  rng: np.random.Generator, index: int, split: str, kind: str, eval_fraction: float
) -> GenerateItem:
  """Draws a caption of a kind whose meaning belongs to the split, and a scene of it.

  Raises:
    ValueError: `kind` has no captions in the split.
    RuntimeError: no caption is found, which happens only with an extreme `eval_fraction`.
  """
  if kind not in (UNSEEN_GENERATE_KINDS if split == 'unseen' else GENERATE_KINDS):
    raise ValueError(f'no {kind!r} captions in split {split!r}')
  unseen = split == 'unseen'
  for _ in range(splits.MAX_DRAWS):
    meaning = _draw_meaning(rng, kind)
    if meaning.needs_unseen() != unseen:
      continue
    key = meaning.key()
    if not unseen and splits.is_held_out(key, eval_fraction) != (split == 'eval'):
      continue
    for _ in range(SCENE_DRAWS):
      objects = _draw_scene(rng, meaning)
      if objects is not None and (unseen or splits.scene_is_seen(objects)):
        caption = _word_caption(rng, meaning)
        return GenerateItem(
          index=index,
          kind=kind,
          caption=caption,
          spec=_spec(kind, meaning, caption),
          meaning=key,
          scene=render.Scene(objects),
        )
  raise RuntimeError(f'no {kind!r} caption found in split {split!r}')


class World:
  """Random access to captions, questions and edits.

  Worlds of any seed share one vocabulary and one split of meanings. The seed only chooses the items
  and their order.

  Args:
    seed: at least 0.
    eval_fraction: share of meanings held out for eval, in (0, 1).

  Raises:
    ValueError: `eval_fraction` is out of range.
  """

  def __init__(self, seed: int = 0, eval_fraction: float = 0.2):
    if not 0.0 < eval_fraction < 1.0:
      raise ValueError(f'eval_fraction must lie between 0 and 1, not {eval_fraction}')
    self.seed = seed
    self.eval_fraction = eval_fraction

  def generate(self, index: int, split: str, kind: str | None = None) -> GenerateItem:
    """Returns a caption and its scene; `kind` is one of GENERATE_KINDS, or None for any."""
    kinds = UNSEEN_GENERATE_KINDS if split == 'unseen' else GENERATE_KINDS
    rng, kind = self._start('generate', index, split, kind, kinds)
    return _draw_generate(rng, index, split, kind, self.eval_fraction)

  def question(self, index: int, split: str, kind: str | None = None) -> questions.QuestionItem:
    """Returns a question about a scene; `kind` is one of QUESTION_KINDS, or None for any."""
    kinds = questions.UNSEEN_KINDS if split == 'unseen' else questions.KINDS
    rng, kind = self._start('question', index, split, kind, kinds)
    return questions.draw(rng, index, split, kind, self.eval_fraction)

  def edit(self, index: int, split: str, kind: str | None = None) -> edits.EditItem:
    """Returns an edit instruction; `kind` is one of EDIT_KINDS, or None for any."""
    kinds = edits.UNSEEN_KINDS if split == 'unseen' else edits.KINDS
    rng, kind = self._start('edit', index, split, kind, kinds)
    return edits.draw(rng, index, split, kind, self.eval_fraction)

  def _start(
    self, task: str, index: int, split: str, kind: str | None, kinds: tuple[str, ...]
  ) -> tuple[np.random.Generator, str]:
    """Returns the generator of an item and its kind, drawn where none is given.

    Raises:
      ValueError: the split is unknown.
    """
    if split not in splits.SPLITS:
      raise ValueError(f'split must be one of {splits.SPLITS}, not {split!r}')
    rng = np.random.default_rng((self.seed, _TASK_SALTS[task], splits.SPLITS.index(split), index))
    return rng, (kind or wording.pick(rng, kinds))
