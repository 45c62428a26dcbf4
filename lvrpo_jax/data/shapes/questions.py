"""Questions about scenes, with their answers, plans and statements."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data.shapes import plans
from lvrpo_jax.data.shapes import question_drafts
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

KINDS = ('color', 'shape', 'count', 'relation', 'compare', 'reason')
UNSEEN_KINDS = ('color', 'shape', 'relation')


@dataclasses.dataclass(frozen=True)
class QuestionItem:
  """A question with a unique one-word answer.

  Attributes:
    index: index of the item in its task and split.
    kind: one of `KINDS`.
    question: the text.
    answer: one word.
    plan: a short reading of the scene that leads to the answer; '' for colour and shape.
    meaning: canonical text of what is asked and of the scene's content.
    scene: what the question is about.
    record: JSON-able record of what is asked; `ask` and `statement` read it.
  """

  index: int
  kind: str
  question: str
  answer: str
  plan: str
  meaning: str
  scene: render.Scene
  record: dict[str, str]


def draw(
  rng: np.random.Generator, index: int, split: str, kind: str, eval_fraction: float
) -> QuestionItem:
  """Draws a question of a kind whose meaning belongs to the split.

  Raises:
    ValueError: `kind` has no questions in the split.
    RuntimeError: no question is found, which happens only with an extreme `eval_fraction`.
  """
  if kind not in (UNSEEN_KINDS if split == 'unseen' else KINDS):
    raise ValueError(f'no {kind!r} questions in split {split!r}')
  unseen = split == 'unseen'
  target = question_drafts.draw_target(rng)
  for _ in range(splits.MAX_DRAWS):
    draft = question_drafts.draw_draft(rng, kind, target, unseen)
    if draft is None or draft.needs_unseen != unseen:
      continue
    meaning = f'{draft.key} | {splits.scene_key(draft.objects)}'
    if not unseen and splits.is_held_out(meaning, eval_fraction) != (split == 'eval'):
      continue
    if unseen or splits.scene_is_seen(draft.objects):
      return QuestionItem(
        index=index,
        kind=kind,
        question=ask(draft.record, rng),
        answer=draft.answer,
        plan=draft.plan,
        meaning=meaning,
        scene=render.Scene(draft.objects),
        record=draft.record,
      )
  raise RuntimeError(f'no {kind!r} question found in split {split!r}')


def ask(record: dict[str, str], rng: np.random.Generator | None = None) -> str:
  """Words a question record; without `rng` in the plainest wording."""
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
  """States any answer word as a sentence about the image: 'two' as 'there are two circles'."""
  fields = dict(record, answer=answer, be='are')
  if record['type'] == 'region':
    fields['r'] = wording.REGION_PHRASES[record['r']][0]
  if record['type'] in ('count', 'others') and answer == 'one':
    fields.update(a=wording.singular(record['a']), be='is')
  fields['not'] = 'not ' if answer == 'no' else ''
  return wording.STATEMENTS[record['type']].format(**fields)


def describe(scene: render.Scene, rng: np.random.Generator) -> tuple[str, str]:
  """Draws a request to describe a scene; returns it and the cells in reading order."""
  return wording.pick(rng, wording.DESCRIBE), plans.reading(scene.objects)


def web_answer(item: QuestionItem, rng: np.random.Generator, wrong: float, chatty: float) -> str:
  """Draws an answer as found on the web.

  Args:
    item: the question.
    rng: source of randomness; the count of draws is always the same.
    wrong: probability of another answer of the same type.
    chatty: probability of an off-format sentence around the answer.
  """
  families = (tuple(render.COLORS), render.SHAPES, wording.NUMBERS, ('yes', 'no'))
  family = next(words for words in families if item.answer in words)
  is_wrong, is_chatty, which, template = rng.random(4).tolist()
  answer = item.answer
  if is_wrong < wrong:
    others = [word for word in family if word != answer]
    answer = others[int(which * len(others))]
  if is_chatty < chatty:
    return wording.CHATTY[int(template * len(wording.CHATTY))].format(answer=answer)
  return answer


def derived_questions(spec: dict[str, types.Json]) -> list[tuple[str, str]]:
  """Returns (question, answer) pairs that hold for a correct image of a spec.

  Takes the spec of a `GenerateItem` or of an `EditItem` and stays within the grammar of questions.
  """
  records = _include_records(spec['include']) if 'include' in spec else _edit_records(spec)
  return [(ask(record), answer) for record, answer in records]


def _edit_records(spec: dict[str, types.Json]) -> list[tuple[dict[str, str], str]]:
  """(record, answer) pairs of an edit: the count of shapes, and every new object."""
  kept = [(entry['class'], entry['color']) for entry in spec['keep']]
  new = [(entry['class'], entry['color']) for entry in spec['new']]
  everything = kept + new
  records = [({'type': 'count', 'a': 'shapes'}, wording.NUMBERS[len(everything)])]
  for entry, (shape, color) in zip(spec['new'], new, strict=True):
    if sum(other == shape for other, _ in everything) == 1:
      records.append(({'type': 'color', 'a': shape}, color))
      records.append(({'type': 'region', 'a': shape, 'r': entry['region']}, 'yes'))
    else:
      number = wording.NUMBERS[everything.count((shape, color))]
      records.append(({'type': 'count', 'a': wording.noun(shape, color, 2)}, number))
  return records


def _include_records(include: Sequence[types.Json]) -> list[tuple[dict[str, str], str]]:
  """(record, answer) pairs of the entries of a caption."""
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
      record = {'type': 'relation', 'a': entry['class'], 'r': relation}
      records.append(({**record, 'b': include[other]['class']}, 'yes'))
  return records
