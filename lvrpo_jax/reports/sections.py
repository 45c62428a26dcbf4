"""Sections of a report on the run: curves, over-optimisation, timing and configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import json

from lvrpo_jax.reports import charts
from lvrpo_jax.reports import files
from lvrpo_jax.reports import html

Series = dict[str, list[tuple[float, float]]]
"""Name of a metric: (step, value) in the order of the file."""

STAGES = {'vae': 'Autoencoder', 'dual_encoder': 'Dual encoder', 'pretrain': 'Pretraining'}
"""Stages before alignment, as `metrics.jsonl` names them: their titles."""
HEADINGS = ('Rewards', 'What drives the advantage', 'Policy', 'Other')
"""Groups of alignment metrics, in order."""


def curve_section(measured: list[files.Json]) -> html.Html:
  """Charts everything measured, alignment first."""
  if not measured:
    return html.missing('metrics.jsonl has no lines yet.')
  note = (
    'Faint lines are what was measured, strong lines a running mean; the legend gives its last '
    'value.'
  )
  return html.join(
    html.el('p', note, class_='note'), *_alignment_curves(measured), *_earlier_curves(measured)
  )


def _alignment_curves(measured: list[files.Json]) -> list[html.Html | None]:
  groups: dict[str, dict[str, Series]] = {}
  for key, values in _series(measured, 'align').items():
    prefix, _, rest = key.partition('/')
    task, _, component = rest.rpartition('/')
    title = ' · '.join(filter(None, (charts.MEANING.get(prefix, prefix), task)))
    group = groups.setdefault(_heading(prefix), {})
    group.setdefault(title, {})[component or key] = values
  parts: list[html.Html | None] = []
  for heading in HEADINGS:
    drawn = charts.grouped(groups.get(heading, {}), 'iteration')
    if drawn and heading == 'Other':
      parts.append(html.folded('Other alignment measurements', drawn))
    elif drawn:
      parts.append(html.join(html.el('h3', heading), drawn))
  return parts


def _heading(prefix: str) -> str:
  """Returns the heading for metrics whose name begins so."""
  if prefix == 'reward':
    return 'Rewards'
  if prefix == 'share':
    return 'What drives the advantage'
  return 'Policy' if prefix in charts.MEANING else 'Other'


def _earlier_curves(measured: list[files.Json]) -> list[html.Html | None]:
  losses: dict[str, Series] = {}
  others: dict[str, Series] = {}
  for stage, name in STAGES.items():
    for key, values in _series(measured, stage).items():
      into, title = (losses, f'{name} loss') if 'loss' in key else (others, f'{name} · {key}')
      into.setdefault(title, {})[key] = values
  if not losses and not others:
    return []
  return [
    html.el('h3', 'Before alignment'),
    charts.grouped(losses, 'step'),
    html.folded('Other measurements', charts.grouped(others, 'step')),
  ]


def _series(measured: Iterable[files.Json], stage: str) -> Series:
  """Returns the finite values of a stage by metric."""
  series: Series = {}
  for line in measured:
    if line['stage'] == stage:
      for key in line.keys() - {'stage', 'step', 'seconds'}:
        if html.is_number(line[key]):
          series.setdefault(key, []).append((line['step'], line[key]))
  return dict(sorted(series.items()))


def over_optimization_section(panel: files.Json) -> html.Html:
  """Lists signs that the reward was over-optimised: alarms, scalars, distributions."""
  before, after = panel.get('before', {}), panel.get('after', {})
  if not before:
    return html.missing('scores.json has no over-optimisation monitors yet.')
  if panel.get('alarms'):
    alarms = html.el('ul', *(html.el('li', text) for text in panel['alarms']))
    box = html.el('div', html.el('b', 'Warning'), alarms, class_='alarm', role='alert')
  elif after:
    box = html.el('div', 'No sign of over-optimisation was flagged.', class_='calm')
  else:
    box = html.missing('The model after alignment has not been scored yet.')
  rows, bars = [], []
  for name, was in before.items():
    now = after.get(name)
    if isinstance(was, Mapping):
      title = html.el('h4', html.human(name))
      bars.append(html.el('div', title, html.bar_pairs(was, now), class_='card'))
      continue
    change = now - was if html.is_number(was) and html.is_number(now) else None
    texts = (html.human(name), html.number(was), html.number(now), html.number(change, '+'))
    rows.append(html.el('tr', *(html.el('td', text) for text in texts)))
  head = html.el('tr', *(html.el('th', text) for text in ('measure', 'before', 'after', 'change')))
  table = html.el(
    'div', html.el('table', html.el('thead', head), html.el('tbody', *rows)), class_='scroll'
  )
  note = (
    'Over-optimising a reward narrows the variety of images. Colours and shapes are counted '
    'where the prompt leaves them free.'
  )
  distributions = html.join(
    html.el('h3', 'What is drawn when the choice is free'),
    html.color_key(),
    html.el('div', *bars, class_='cards'),
  )
  return html.join(
    box,
    html.el('p', note, class_='note'),
    table if rows else None,
    distributions if bars else None,
  )


def timing_section(scores: files.Json, measured: list[files.Json]) -> html.Html:
  """Draws the seconds of each stage, from the scores or, before there are any, the metrics."""
  seconds = dict(scores.get('seconds', {}))
  if not seconds:
    for line in measured:
      seconds[line['stage']] = max(line['seconds'], seconds.get(line['stage'], 0.0))
  if not seconds:
    return html.missing('No stage has been timed yet.')
  longest, total = max(seconds.values()) or 1.0, sum(seconds.values())
  rows = [
    html.join(
      html.el('span', STAGES.get(files.present_stage(stage)) or html.human(stage)),
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


def config_section(config: files.Json) -> html.Html | None:
  """Writes the resolved configuration, folded away."""
  if not config:
    return html.missing('There is no config.json yet.')
  return html.folded('config.json', html.el('pre', json.dumps(config, indent=2)))
