"""Sections of a report that show samples: images, edits and answers, before and after."""

from __future__ import annotations

from collections.abc import Callable
import pathlib
from typing import NamedTuple

from lvrpo_jax.data import tasks
from lvrpo_jax.reports import files
from lvrpo_jax.reports import html

GENERATE_PROMPTS = 6
"""Prompts shown of each kind of image."""
EDIT_PROMPTS = 3
QUESTION_PROMPTS = 3

Shots = Callable[[str, files.Json | None], html.Html]
"""Draws the samples of a record of one side; None where that side is not scored yet."""


class Gallery(NamedTuple):
  """What a section shows.

  Attributes:
    task: of the prediction records.
    score_task: of the scores.
    note: text above the samples.
    limit: prompts of each kind.
    kind: kind of a record, which is also the part of the score.
    card: draws a record before, that after (or None) and their samples.
  """

  task: str
  score_task: str
  note: str
  limit: int
  kind: Callable[[files.Json], str]
  card: Callable[[files.Json, files.Json | None, Shots], html.Html]


def picture_section(workdir: pathlib.Path, scores: files.Json) -> html.Html:
  """Shows images generated before and after for the first prompts of each kind."""

  def kind(item: files.Json) -> str:
    return 'unseen' if item['split'] == 'unseen' else item['kind']

  def card(item: files.Json, after: files.Json | None, shots: Shots) -> html.Html:
    title = html.el('h4', item['prompt'])
    return html.el('article', title, shots('before', item), shots('after', after), class_='card')

  note = (
    f'The first {GENERATE_PROMPTS} prompts of each kind, chosen by their place in the list '
    'and not by their result. Pictures above each other start from the same noise. Green '
    'and ✓: the detector finds what the prompt asks for; red and ✗: it does not.'
  )
  gallery = Gallery(
    task=tasks.GENERATE,
    score_task='generation',
    note=note,
    limit=GENERATE_PROMPTS,
    kind=kind,
    card=card,
  )
  return _by_kind(workdir, scores, gallery)


def edit_section(workdir: pathlib.Path, scores: files.Json) -> html.Html:
  """Shows instruction, source and target, and the edits before and after."""

  def card(item: files.Json, after: files.Json | None, shots: Shots) -> html.Html:
    given = [
      html.el(
        'figure',
        html.picture(workdir / 'eval' / 'before' / item[name], name),
        html.el('figcaption', name),
      )
      for name in ('source', 'target')
    ]
    return html.el(
      'article',
      html.el('h4', item['prompt']),
      html.el('div', html.el('span', 'given', class_='soft'), *given, class_='pair'),
      shots('before', item),
      shots('after', after),
      class_='card',
    )

  note = (
    f'The first {EDIT_PROMPTS} instructions of each kind. The target is one right answer; '
    'an edit counts when the detector finds the change and the rest kept.'
  )
  gallery = Gallery(
    task=tasks.EDIT, score_task='editing', note=note, limit=EDIT_PROMPTS, kind=_kind, card=card
  )
  return _by_kind(workdir, scores, gallery)


def answer_section(workdir: pathlib.Path, scores: files.Json) -> html.Html:
  """Shows image, question and right answer, and sampled and greedy answers before and after."""

  def card(item: files.Json, after: files.Json | None, shots: Shots) -> html.Html:
    del shots
    image = html.picture(workdir / 'eval' / 'before' / item['image'], 'the picture')
    asked = html.el(
      'div',
      html.el('h4', item['prompt']),
      html.el('span', 'right answer: ', class_='soft'),
      html.el('b', item['answer']),
    )
    return html.el(
      'article',
      html.el('div', html.el('div', image, class_='pic'), asked, class_='ask'),
      html.el('div', _answers('before', item), _answers('after', after), class_='sides'),
      class_='card',
    )

  note = (
    f'The first {QUESTION_PROMPTS} questions of each kind, with four sampled answers and '
    'the greedy one.'
  )
  gallery = Gallery(
    task=tasks.UNDERSTAND,
    score_task='understanding',
    note=note,
    limit=QUESTION_PROMPTS,
    kind=_kind,
    card=card,
  )
  return _by_kind(workdir, scores, gallery)


def _kind(item: files.Json) -> str:
  return item['kind']


def _answers(side: str, item: files.Json | None) -> html.Html:
  """Lists the sampled answers of a record, then the greedy one."""
  if item is None:
    return html.el('div', html.el('b', side), html.el('p', 'not scored yet', class_='soft'))
  rows = [
    html.el('li', text or '(empty)', class_='ok' if right else 'no')
    for text, right in zip(item['samples'], item['correct'], strict=False)
  ]
  greedy = html.el(
    'li',
    html.el('small', 'greedy '),
    item['greedy'] or '(empty)',
    class_='greedy ok' if item['greedy_correct'] else 'greedy no',
  )
  return html.el('div', html.el('b', side), html.el('ul', *rows, greedy))


def _by_kind(workdir: pathlib.Path, scores: files.Json, gallery: Gallery) -> html.Html:
  """Draws cards for the first records of each kind."""
  before, after = (
    [
      item
      for item in files.read_lines(workdir / 'eval' / side / 'predictions.jsonl')
      if item['task'] == gallery.task
    ]
    for side in ('before', 'after')
  )
  if not before:
    return html.missing(f'eval/before/predictions.jsonl has no {gallery.task} lines yet.')
  after_of = {item['id']: item for item in after}

  def shots(side: str, item: files.Json | None) -> html.Html:
    return _shots(workdir / 'eval' / side, side, item)

  parts = [] if after else [html.missing('The model after alignment has not been scored yet.')]
  kinds: dict[str, list[files.Json]] = {}
  for item in before:
    kinds.setdefault(gallery.kind(item), []).append(item)
  for name, items in kinds.items():
    values = [
      html.percent(files.find_score(scores, side, f'{gallery.score_task}/{name}').get('value'))
      for side in ('before', 'after')
    ]
    of_all = html.el('small', f' all prompts: {values[0]} → {values[1]}')
    cards = [gallery.card(item, after_of.get(item['id']), shots) for item in items[: gallery.limit]]
    parts += [html.el('h3', html.human(name), of_all), html.el('div', *cards, class_='cards')]
  return html.join(html.el('p', gallery.note, class_='note'), *parts)


def _shots(folder: pathlib.Path, side: str, item: files.Json | None) -> html.Html:
  """Draws the images of a record in a row, each with its verdict."""
  if item is None:
    empty = html.el('span', 'not scored yet', class_='empty')
    return html.el('div', html.el('span', side), empty, class_='shots')
  figures = [
    html.verdict(folder / path, bool(right), f'{side}, sample {number}')
    for number, (path, right) in enumerate(zip(item['images'], item['correct'], strict=False), 1)
  ]
  tally = f'{sum(item["correct"])} of {len(item["correct"])}'
  title = html.el('span', side, html.el('small', tally, style='display:block'))
  return html.el('div', title, *figures, class_='shots')
