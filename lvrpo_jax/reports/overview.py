"""Sections of a report that give the scores: in sentences, as cards, as a table."""

from __future__ import annotations

from lvrpo_jax.reports import files
from lvrpo_jax.reports import html

SIGNIFICANT = 0.05
"""Largest p-value that a mark is given to."""
HEADLINES = {
  'generation/overall': 'generation',
  'understanding/accuracy': 'understanding',
  'editing/overall': 'editing',
  'generation/unseen': 'generation (unseen)',
}
FIRST_SCORES = ('overall', 'accuracy')
"""Scores that stand first in their task, in bold."""
MARKS = {'up': '▲ ', 'down': '▼ ', '': ''}


def summary(scores: files.Json) -> html.Html:
  """Writes in a few sentences what rose, what fell, by how much and with which p-value."""
  if not scores.get('before'):
    return html.Html('This run has not been scored yet.')
  paired = scores.get('paired', {})
  if not scores.get('after') or not paired:
    return html.Html(
      'Only the model before alignment has been scored; there is nothing to compare it with yet.'
    )
  told: dict[str, list[html.Html]] = {'up': [], 'down': [], '': []}
  for key in [key for key in HEADLINES if key in paired] or list(paired):
    test, name = paired[key], HEADLINES.get(key, key.replace('/', ' '))
    before, after = (
      files.find_score(scores, side, key).get('value') for side in ('before', 'after')
    )
    direction = _direction(test)
    values = f'from {html.percent(before)} to {html.percent(after)} ' if direction else ''
    told[direction].append(
      html.join(
        html.el('b', name),
        f' {values}({html.points(test["difference"])} points, p\u00a0=\u00a0',
        html.p_value(test['p']),
        ')',
      )
    )
  openings = {
    'up': 'Alignment raised ',
    'down': 'It lowered ' if told['up'] else 'Alignment lowered ',
    '': 'No measurable change in ',
  }
  sentences = [
    html.join(openings[key], html.listed(parts), '. ') for key, parts in told.items() if parts
  ]
  return html.join(*sentences, _alarm_sentence(len(scores.get('panel', {}).get('alarms', []))))


def _alarm_sentence(count: int) -> html.Html:
  if not count:
    return html.Html('No sign of over-optimisation was flagged.')
  signs = f'{count} sign{"s" * (count > 1)} of over-optimisation'
  return html.join(
    html.el('a', signs, href='#over-optimisation'), f' {"were" if count > 1 else "was"} flagged.'
  )


def stat_cards(scores: files.Json) -> html.Html | None:
  """Draws one card a headline: before, after, difference."""
  cards = []
  for key, name in HEADLINES.items():
    before, after = (files.find_score(scores, side, key) for side in ('before', 'after'))
    test = scores.get('paired', {}).get(key)
    if not before:
      continue
    big = html.join(
      html.el('span', html.percent(before.get('value')), ' → ' if after else None, class_='was'),
      html.percent(after.get('value')) if after else None,
    )
    chip = None
    if test:
      difference = html.points(test['difference'])
      chip = html.join(
        html.el('span', difference, ' points', class_=f'chip {_direction(test)}'),
        ' ',
        html.el('small', 'p = ', html.p_value(test['p'])),
      )
    cards.append(
      html.el(
        'div',
        html.el('div', name[0].upper() + name[1:], class_='soft'),
        html.el('div', big, class_='big'),
        chip,
        class_='card',
      )
    )
  return html.el('div', *cards, class_='cards stat') if cards else None


def score_section(scores: files.Json) -> html.Html:
  """Draws every score as dots with intervals, then as a table with paired tests."""
  if not scores.get('before'):
    return html.missing('scores.json has no scores yet.')
  sides = {'before': 'before', 'before_guided': 'before, guided', 'after': 'after'}
  if not scores.get('before_guided'):
    del sides['before_guided']
  titles = ('score', *sides.values(), 'difference', 'standard error', 'p', 'n')
  head = html.el('thead', html.el('tr', *(html.el('th', title) for title in titles)))
  rows, panels = [], []
  for task, parts in scores['before'].items():
    rows.append(html.el('tr', html.el('td', html.human(task), colspan=len(titles)), class_='group'))
    ordered = sorted(parts, key=lambda part: part not in FIRST_SCORES)
    rows += [_score_row(scores, f'{task}/{part}', list(sides)) for part in ordered]
    tracks = [
      html.track(
        part,
        part in FIRST_SCORES,
        [files.find_score(scores, side, f'{task}/{part}') for side in ('before', 'after')],
      )
      for part in ordered
    ]
    panels.append(
      html.el(
        'div',
        html.el('h4', html.human(task)),
        html.el('div', *tracks, class_='glance'),
        class_='card',
      )
    )
  after = (
    None
    if scores.get('after')
    else html.missing('The model after alignment has not been scored yet: its columns are empty.')
  )
  return html.join(
    after,
    html.el('div', *panels, class_='cards'),
    html.color_key('bar: 95% interval', 'scale: 0 to 100%'),
    html.el('div', html.el('table', head, html.el('tbody', *rows)), class_='scroll'),
    html.el(
      'p',
      'Small print under a value is its 95% bootstrap interval. Differences are paired '
      'on the same prompts and the same noise, errors are robust to prompts that share a '
      'meaning; ',
      html.el('span', '▲', class_='up'),
      ' and ',
      html.el('span', '▼', class_='down'),
      f' mark p < {SIGNIFICANT}, not corrected for the number of rows. A grey difference was '
      'not tested.',
      class_='note',
    ),
  )


def _score_row(scores: files.Json, key: str, sides: list[str]) -> html.Html:
  """Writes a row of the table: the values of all sides and the paired test."""
  cells = [
    html.el('td', html.percent(score.get('value')), html.interval(score))
    for score in (files.find_score(scores, side, key) for side in sides)
  ]
  test = scores.get('paired', {}).get(key)
  before, after = (files.find_score(scores, side, key) for side in ('before', 'after'))
  if test:
    direction = _direction(test)
    cells += [
      html.el('td', MARKS[direction], html.points(test['difference']), class_=direction),
      html.el('td', html.points(test['se']).lstrip('+')),
      html.el('td', html.p_value(test['p'])),
    ]
  else:
    both = before and after and html.is_number(before['value'])
    cells += [
      html.el('td', html.points(after['value'] - before['value']) if both else '–', class_='soft'),
      html.el('td', '–'),
      html.el('td', '–'),
    ]
  part = key.split('/', 1)[1]
  return html.el(
    'tr',
    html.el('td', html.human(part)),
    *cells,
    html.el('td', before.get('n', '–')),
    class_='head' if part in FIRST_SCORES else 'part',
  )


def _direction(test: files.Json) -> str:
  """Returns 'up' or 'down' for a significant difference, else ''."""
  if not html.is_number(test['p']) or test['p'] >= SIGNIFICANT:
    return ''
  return 'up' if test['difference'] > 0 else 'down'
