"""Turns the files of a run into one HTML page: `python -m lvrpo_jax.reports.report WORKDIR`.

Reads `config.json`, `metrics.jsonl`, `scores.json` and `eval/{before,after}/predictions.jsonl`,
recomputes no score and starts no device. Whatever a run has not written yet is named as missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import json
import pathlib
import sys
from typing import Any

from lvrpo_jax.reports import html

Json = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]

SIGNIFICANT = 0.05
PICTURE_PROMPTS = 6  # prompts shown of each kind of picture
EDIT_PROMPTS = 3
QUESTION_PROMPTS = 3
HEADLINES = {
  'generation/overall': 'generation',
  'understanding/accuracy': 'understanding',
  'editing/overall': 'editing',
  'generation/unseen': 'generation (unseen)',
}
FIRST_SCORES = ('overall', 'accuracy')
MARKS = {'up': '▲ ', 'down': '▼ ', '': ''}
STAGES = {'vae': 'Image tokenizer', 'judge': 'Judge', 'pretrain': 'Pretraining'}
SCORE_AGAIN = """# every picture, answer, record and verdict; no model is needed to score them
WORKDIR/eval/{before,after}/predictions.jsonl

# draw this page again
python -m lvrpo_jax.reports.report WORKDIR"""


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
  """Writes `<workdir>/report.html`, one page that needs no other file and no network.

  Args:
    workdir: the folder of a run, finished or not.

  Returns:
    The path of the page.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: a file is not the JSON it should be.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f'no such folder: {workdir}')
  scores = _read_json(workdir / 'scores.json')
  measured = _read_lines(workdir / 'metrics.jsonl')
  sections = [
    ('scores', 'Scores', score_section(scores)),
    ('pictures', 'Pictures', picture_section(workdir, scores)),
    ('edits', 'Edits', edit_section(workdir, scores)),
    ('answers', 'Answers', answer_section(workdir, scores)),
    ('curves', 'Curves', curve_section(measured)),
    ('over-optimisation', 'Over-optimisation', panel_section(scores.get('panel', {}))),
    ('timing', 'Timing', timing_section(scores, measured)),
    ('config', 'Configuration', config_section(_read_json(workdir / 'config.json'))),
    ('again', 'How to score again', html.el('pre', SCORE_AGAIN)),
  ]
  title = f'LVRPO run {workdir.resolve().name}'
  page = html.el(
    'html',
    html.el(
      'head',
      html.el('meta', charset='utf-8'),
      html.el('title', title),
      html.el('meta', name='viewport', content='width=device-width, initial-scale=1'),
      html.el('style', html.Html(html.STYLE)),
    ),
    html.el(
      'body',
      html.el(
        'header',
        html.el('div', 'Alignment report', class_='kicker'),
        html.el('h1', title),
        html.el('p', summary(scores), class_='lead'),
        stat_cards(scores),
      ),
      html.el(
        'nav',
        html.el(
          'ul', *(html.el('li', html.el('a', name, href=f'#{key}')) for key, name, _ in sections)
        ),
      ),
      html.el(
        'main',
        *(html.el('section', html.el('h2', name), body, id=key) for key, name, body in sections),
      ),
      html.el('footer', f'Seed {scores["seed"]}.' if 'seed' in scores else None),
    ),
    lang='en',
  )
  path = workdir / 'report.html'
  partial = path.with_suffix('.html.tmp')
  partial.write_text('<!doctype html>\n' + page, encoding='utf-8')
  partial.replace(path)
  return path


def summary(scores: Json) -> html.Html:
  """What rose, what fell, by how much and how surely, in a few sentences."""
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
    before, after = (_score(scores, side, key).get('value') for side in ('before', 'after'))
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
  alarms = len(scores.get('panel', {}).get('alarms', []))
  sentences.append(
    html.Html('No sign of over-optimisation was flagged.')
    if not alarms
    else html.join(
      html.el(
        'a', f'{alarms} sign{"s" * (alarms > 1)} of over-optimisation', href='#over-optimisation'
      ),
      f' {"were" if alarms > 1 else "was"} flagged.',
    )
  )
  return html.join(*sentences)


def stat_cards(scores: Json) -> html.Html | None:
  """One card a headline: before, after, difference."""
  cards = []
  for key, name in HEADLINES.items():
    before, after = _score(scores, 'before', key), _score(scores, 'after', key)
    test = scores.get('paired', {}).get(key)
    if not before:
      continue
    big = html.join(
      html.el('span', html.percent(before.get('value')), ' → ' if after else None, class_='was'),
      html.percent(after.get('value')) if after else None,
    )
    chip = (
      html.join(
        html.el(
          'span', html.points(test['difference']), ' points', class_=f'chip {_direction(test)}'
        ),
        ' ',
        html.el('small', 'p = ', html.p_value(test['p'])),
      )
      if test
      else None
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


def score_section(scores: Json) -> html.Html:
  """Every score as dots with intervals, then as a table with paired tests."""
  if not scores.get('before'):
    return html.missing('scores.json has no scores yet.')
  sides = [('before', 'before'), ('before_guided', 'before, guided'), ('after', 'after')]
  sides = [(side, name) for side, name in sides if scores.get(side) or side != 'before_guided']
  head = html.el(
    'thead',
    html.el(
      'tr',
      *(
        html.el('th', text)
        for text in (
          'score',
          *(name for _, name in sides),
          'difference',
          'standard error',
          'p',
          'n',
        )
      ),
    ),
  )
  rows, panels = [], []
  for task, parts in scores['before'].items():
    rows.append(
      html.el('tr', html.el('td', html.human(task), colspan=len(sides) + 5), class_='group')
    )
    ordered = sorted(parts, key=lambda part: part not in FIRST_SCORES)
    rows += [_score_row(scores, f'{task}/{part}', [side for side, _ in sides]) for part in ordered]
    tracks = [
      html.track(
        part,
        part in FIRST_SCORES,
        [_score(scores, side, f'{task}/{part}') for side in ('before', 'after')],
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
    html.key('bar: 95% interval', 'scale: 0 to 100%'),
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


def _score_row(scores: Json, key: str, sides: list[str]) -> html.Html:
  cells = [
    html.el('td', html.percent(score.get('value')), html.interval(score))
    for score in (_score(scores, side, key) for side in sides)
  ]
  test = scores.get('paired', {}).get(key)
  before, after = (_score(scores, side, key) for side in ('before', 'after'))
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


def picture_section(workdir: pathlib.Path, scores: Json) -> html.Html:
  """Pictures drawn before and after for the first prompts of each kind."""

  def kind(item: Json) -> str:
    return 'unseen' if item['split'] == 'unseen' else item['kind']

  def card(item: Json, after: Json | None, shot: Callable[..., html.Html]) -> html.Html:
    return html.el(
      'article',
      html.el('h4', item['prompt']),
      shot('before', item),
      shot('after', after),
      class_='card',
    )

  note = (
    f'The first {PICTURE_PROMPTS} prompts of each kind, chosen by their place in the list '
    'and not by their result. Pictures above each other start from the same noise. Green '
    'and ✓: the detector finds what the prompt asks for; red and ✗: it does not.'
  )
  return _by_kind(workdir, scores, 'generate', 'generation', note, PICTURE_PROMPTS, kind, card)


def edit_section(workdir: pathlib.Path, scores: Json) -> html.Html:
  """Instruction, source and target, edits before and after."""

  def card(item: Json, after: Json | None, shot: Callable[..., html.Html]) -> html.Html:
    plain = [
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
      html.el('div', html.el('span', 'given', class_='soft'), *plain, class_='pair'),
      shot('before', item),
      shot('after', after),
      class_='card',
    )

  note = (
    f'The first {EDIT_PROMPTS} instructions of each kind. The target is one right answer; '
    'an edit counts when the detector finds the change and the rest kept.'
  )
  return _by_kind(
    workdir, scores, 'edit', 'editing', note, EDIT_PROMPTS, lambda item: item['kind'], card
  )


def answer_section(workdir: pathlib.Path, scores: Json) -> html.Html:
  """Picture, question and right answer, sampled and greedy answers before and after."""

  def side(name: str, item: Json | None) -> html.Html:
    if item is None:
      return html.el('div', html.el('b', name), html.el('p', 'not scored yet', class_='soft'))
    rows = [
      html.el('li', text or '(empty)', class_='ok' if right else 'no')
      for text, right in zip(item['samples'], item['correct'])
    ]
    greedy = html.el(
      'li',
      html.el('small', 'greedy '),
      item['greedy'] or '(empty)',
      class_='greedy ok' if item['greedy_correct'] else 'greedy no',
    )
    return html.el('div', html.el('b', name), html.el('ul', *rows, greedy))

  def card(item: Json, after: Json | None, shot: Callable[..., html.Html]) -> html.Html:
    picture = html.el(
      'div', html.picture(workdir / 'eval' / 'before' / item['image'], 'the picture'), class_='pic'
    )
    asked = html.el(
      'div',
      html.el('h4', item['prompt']),
      html.el('span', 'right answer: ', class_='soft'),
      html.el('b', item['answer']),
    )
    return html.el(
      'article',
      html.el('div', picture, asked, class_='ask'),
      html.el('div', side('before', item), side('after', after), class_='sides'),
      class_='card',
    )

  note = (
    f'The first {QUESTION_PROMPTS} questions of each kind, with four sampled answers and '
    'the greedy one.'
  )
  return _by_kind(
    workdir,
    scores,
    'understand',
    'understanding',
    note,
    QUESTION_PROMPTS,
    lambda item: item['kind'],
    card,
  )


def _by_kind(
  workdir: pathlib.Path,
  scores: Json,
  task: str,
  score_task: str,
  note: str,
  limit: int,
  kind: Callable[[Json], str],
  card: Callable[..., html.Html],
) -> html.Html:
  """Cards for the first items of each kind; `card(before, after or None, shot)` draws one."""
  before, after = (
    [
      item
      for item in _read_lines(workdir / 'eval' / side / 'predictions.jsonl')
      if item['task'] == task
    ]
    for side in ('before', 'after')
  )
  if not before:
    return html.missing(f'eval/before/predictions.jsonl has no {task} lines yet.')
  after_of = {item['id']: item for item in after}

  def shot(side: str, item: Json | None) -> html.Html:
    if item is None:
      return html.el(
        'div',
        html.el('span', side),
        html.el('span', 'not scored yet', class_='empty'),
        class_='shots',
      )
    figures = [
      html.verdict(workdir / 'eval' / side / path, bool(right), f'{side}, sample {n}')
      for n, (path, right) in enumerate(zip(item['images'], item['correct']), 1)
    ]
    tally = f'{sum(item["correct"])} of {len(item["correct"])}'
    return html.el(
      'div',
      html.el('span', side, html.el('small', tally, style='display:block')),
      *figures,
      class_='shots',
    )

  parts = [] if after else [html.missing('The model after alignment has not been scored yet.')]
  kinds: dict[str, list[Json]] = {}
  for item in before:
    kinds.setdefault(kind(item), []).append(item)
  for name, items in kinds.items():
    values = [
      html.percent(_score(scores, side, f'{score_task}/{name}').get('value'))
      for side in ('before', 'after')
    ]
    of_all = html.el('small', f' all prompts: {values[0]} → {values[1]}')
    parts += [
      html.el('h3', html.human(name), of_all),
      html.el(
        'div',
        *(card(item, after_of.get(item['id']), shot) for item in items[:limit]),
        class_='cards',
      ),
    ]
  return html.join(html.el('p', note, class_='note'), *parts)


def curve_section(measured: list[Json]) -> html.Html:
  """Charts of everything measured, alignment first."""
  if not measured:
    return html.missing('metrics.jsonl has no lines yet.')
  parts = []
  groups: dict[str, dict[str, Series]] = {}
  for key, values in _series(measured, 'align').items():
    prefix, _, rest = key.partition('/')
    task, _, component = rest.rpartition('/')
    title = ' · '.join(filter(None, (html.MEANING.get(prefix, prefix), task)))
    heading = {'reward': 'Rewards', 'share': 'What drives the advantage'}.get(
      prefix, 'Policy' if prefix in html.MEANING else 'Other'
    )
    groups.setdefault(heading, {}).setdefault(title, {})[component or key] = values
  for heading in ('Rewards', 'What drives the advantage', 'Policy', 'Other'):
    charts = html.charts(groups.get(heading, {}), 'iteration')
    if charts:
      parts.append(
        html.folded('Other alignment measurements', charts)
        if heading == 'Other'
        else html.join(html.el('h3', heading), charts)
      )
  losses: dict[str, Series] = {}
  rest: dict[str, Series] = {}
  for stage, name in STAGES.items():
    for key, values in _series(measured, stage).items():
      into, title = (losses, f'{name} loss') if 'loss' in key else (rest, f'{name} · {key}')
      into.setdefault(title, {})[key] = values
  if losses or rest:
    parts += [
      html.el('h3', 'Before alignment'),
      html.charts(losses, 'step'),
      html.folded('Other measurements', html.charts(rest, 'step')),
    ]
  return html.join(
    html.el(
      'p',
      'Faint lines are what was measured, strong lines a running mean; the '
      'legend gives its last value.',
      class_='note',
    ),
    *parts,
  )


def panel_section(panel: Json) -> html.Html:
  """Signs that the rewards were gamed: alarms, scalars, distributions."""
  before, after = panel.get('before', {}), panel.get('after', {})
  if not before:
    return html.missing('scores.json has no panel yet.')
  alarms = html.el('ul', *(html.el('li', text) for text in panel.get('alarms', [])))
  if panel.get('alarms'):
    box = html.el('div', html.el('b', 'Warning'), alarms, class_='alarm', role='alert')
  else:
    box = (
      html.el('div', 'No sign of over-optimisation was flagged.', class_='calm')
      if after
      else html.missing('The model after alignment has not been scored yet.')
    )
  rows, bars = [], []
  for name, was in before.items():
    now = after.get(name)
    if isinstance(was, Mapping):
      bars.append(
        html.el('div', html.el('h4', html.human(name)), html.bar_pairs(was, now), class_='card')
      )
      continue
    change = now - was if html.is_number(was) and html.is_number(now) else None
    rows.append(
      html.el(
        'tr',
        *(
          html.el('td', text)
          for text in (
            html.human(name),
            html.number(was),
            html.number(now),
            html.number(change, '+'),
          )
        ),
      )
    )
  head = html.el('tr', *(html.el('th', text) for text in ('measure', 'before', 'after', 'change')))
  table = html.el(
    'div', html.el('table', html.el('thead', head), html.el('tbody', *rows)), class_='scroll'
  )
  note = (
    'A policy that games its reward narrows what it draws. Colours and shapes are counted '
    'where the prompt leaves them free.'
  )
  return html.join(
    box,
    html.el('p', note, class_='note'),
    table if rows else None,
    html.join(
      html.el('h3', 'What is drawn when the choice is free'),
      html.key(),
      html.el('div', *bars, class_='cards'),
    )
    if bars
    else None,
  )


def timing_section(scores: Json, measured: list[Json]) -> html.Html:
  """Seconds by stage, from the scores or, before there are any, from the measurements."""
  seconds = dict(scores.get('seconds', {}))
  if not seconds:
    for line in measured:
      seconds[line['stage']] = max(line['seconds'], seconds.get(line['stage'], 0.0))
  if not seconds:
    return html.missing('No stage has been timed yet.')
  longest, total = max(seconds.values()) or 1.0, sum(seconds.values())
  rows = [
    html.join(
      html.el('span', html.human(stage)),
      html.el(
        'div', html.el('i', class_='a', style=f'width:{100 * spent / longest:.1f}%'), class_='bar'
      ),
      html.el('small', html.duration(spent)),
    )
    for stage, spent in seconds.items()
  ]
  return html.el(
    'div',
    html.el('h4', f'{html.duration(total)} in all'),
    html.el('div', *rows, class_='bars wide'),
    class_='card',
  )


def config_section(config: Json) -> html.Html:
  """The resolved configuration, folded away."""
  return (
    html.folded('config.json', html.el('pre', json.dumps(config, indent=2)))
    if config
    else html.missing('There is no config.json yet.')
  )


def _read_json(path: pathlib.Path) -> Json:
  """The object in a file, empty if there is no file."""
  return _parsed(path, path.read_text(encoding='utf-8')) if path.exists() else {}


def _read_lines(path: pathlib.Path) -> list[Json]:
  """Objects of a JSON-lines file; a last line still being written is left out."""
  texts = path.read_text(encoding='utf-8').splitlines(keepends=True) if path.exists() else []
  if texts and not texts[-1].endswith('\n'):
    texts.pop()
  return [_parsed(path, text) for text in texts]


def _parsed(path: pathlib.Path, text: str) -> Json:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}: {error}') from error


def _series(measured: Iterable[Json], stage: str) -> Series:
  """Finite values of a stage: key -> (step, value) in the order of the file."""
  series: Series = {}
  for line in measured:
    if line['stage'] == stage:
      for key in line.keys() - {'stage', 'step', 'seconds'}:
        if html.is_number(line[key]):
          series.setdefault(key, []).append((line['step'], line[key]))
  return dict(sorted(series.items()))


def _score(scores: Json, side: str, key: str) -> Json:
  """The score `task/part` of a side, or nothing."""
  task, _, part = key.partition('/')
  return scores.get(side, {}).get(task, {}).get(part, {})


def _direction(test: Json) -> str:
  """'up' or 'down' for a significant difference, else ''."""
  if not html.is_number(test['p']) or test['p'] >= SIGNIFICANT:
    return ''
  return 'up' if test['difference'] > 0 else 'down'


if __name__ == '__main__':
  if len(sys.argv) != 2:
    sys.exit('usage: python -m lvrpo_jax.reports.report WORKDIR')
  print(write_report(sys.argv[1]))
