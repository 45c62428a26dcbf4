"""HTML of a report: elements with escaped text, number formats and small blocks."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
import html
import math
import pathlib
import re
from typing import Any, TypeGuard

VOID_TAGS = frozenset({'img', 'meta', 'br'})


class Html(str):
  """Markup whose text has been escaped."""


def el(name: str, /, *children: object, **attributes: object) -> Html:
  """Returns one element; children that are not `Html` are escaped, None is left out.

  Attribute names lose a trailing underscore and write `_` for `-`; None leaves one out.
  """
  written = ''.join(
    f' {key.rstrip("_").replace("_", "-")}="{_escape(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  if name in VOID_TAGS:
    return Html(f'<{name}{written}>')
  return Html(f'<{name}{written}>{join(*children)}</{name}>')


def join(*children: object) -> Html:
  """Joins children; those that are not markup are escaped, None is left out."""
  return Html(
    ''.join(
      child if isinstance(child, Html) else _escape(str(child))
      for child in children
      if child is not None
    )
  )


def _escape(text: str) -> str:
  # HTML allows no control characters, and a sampled answer may hold any.
  return html.escape(re.sub(r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]', '\ufffd', text))


def is_number(value: object) -> TypeGuard[float]:
  """Whether a value read from JSON is a finite number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: object) -> str:
  """Formats a fraction as a percentage, anything else as a dash."""
  return f'{100 * value:.1f}%' if is_number(value) else '–'


def points(value: object) -> str:
  """Formats a difference of fractions in signed percentage points, anything else as a dash."""
  return f'{100 * value:+.1f}'.replace('-', '\N{MINUS SIGN}') if is_number(value) else '–'


def number(value: object, sign: str = '') -> str:
  """Formats a number with three significant digits, anything else as a dash.

  `sign='+'` also marks positive values.
  """
  if not is_number(value):
    return '–'
  text = f'{value:{sign}.{3 if 1e-3 <= abs(value) < 1e5 or value == 0 else 2}g}'
  return text.replace('-', '\N{MINUS SIGN}')


def p_value(p: object) -> Html:
  """Formats a p-value, in powers of ten when small."""
  if not is_number(p):
    return Html('–')
  if p >= 0.001:
    return Html(f'{p:.3f}' if p < 0.0995 else f'{p:.2f}')
  if p < 1e-300:
    return Html('&lt; 10<sup>−300</sup>')
  mantissa, exponent = f'{p:.0e}'.split('e')
  return Html(f'{mantissa}\u00a0×\u00a010<sup>−{abs(int(exponent))}</sup>')


def duration(seconds: float) -> str:
  """Formats seconds as '8.2 s', '4 min 12 s' or '3 h 5 min'."""
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def human(name: str) -> str:
  """Formats 'single_object' as 'Single object'."""
  return (name[:1].upper() + name[1:]).replace('_', ' ').replace('/', ' · ')


def listed(parts: Sequence[Html]) -> Html:
  """Joins parts as 'a', 'a and b', 'a, b and c'."""
  return Html(' and '.join(filter(None, [', '.join(parts[:-1]), *parts[-1:]])))


def missing(text: str) -> Html:
  """Returns a statement that something is not there yet."""
  return el('p', text, class_='missing')


def folded(title: str, body: Html | None) -> Html | None:
  """Returns a block that opens on demand; None for no body."""
  return el('details', el('summary', title), body) if body else None


def color_key(*more: str) -> Html:
  """Returns the meaning of the two colours, and further entries."""
  before, after = (el('span', el('i', class_=side[0]), side) for side in ('before', 'after'))
  return el('div', before, after, *(el('span', text) for text in more), class_='key')


def picture(path: pathlib.Path, alt: str) -> Html:
  """Embeds a PNG file; a file that is not there leaves an empty place."""
  if not path.is_file():
    return el('div', class_='px', title=f'missing: {path.name}')
  data = base64.b64encode(path.read_bytes()).decode()
  return el('img', src=f'data:image/png;base64,{data}', alt=alt, class_='px')


def verdict(path: pathlib.Path, right: bool, alt: str) -> Html:
  """Embeds a PNG file in a green or red frame."""
  return el(
    'figure',
    picture(path, f'{alt}, {"right" if right else "wrong"}'),
    el('span', '✓' if right else '✗', class_='mark', aria_hidden='true'),
    class_='ok' if right else 'no',
  )


def interval(score: Mapping[str, Any]) -> Html | None:
  """Returns the 95% interval of a score in small print, if it has one."""
  if not score.get('ci95'):
    return None
  low, high = score['ci95']
  return el('small', f'{100 * low:.1f} to {100 * high:.1f}')


def track(part: str, headline: bool, scores: Sequence[Mapping[str, Any]]) -> Html:
  """Draws a line from 0 to 100% with dots and intervals of the scores before and after.

  Args:
    part: name of the score.
    headline: whether the name is bold.
    scores: before and after.
  """
  marks = []
  for score, side in zip(scores, ('before', 'after'), strict=True):
    if is_number(score.get('value')):
      low, high = score.get('ci95') or (score['value'],) * 2
      marks += [
        el(
          'i',
          class_=f'ci {side[0]}',
          style=f'left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%',
        ),
        el(
          'i',
          class_=f'dot {side[0]}',
          style=f'left:{100 * score["value"]:.1f}%',
          title=f'{side} {percent(score["value"])}',
        ),
      ]
  return join(
    el('span', human(part), class_='head' if headline else 'soft'),
    el('div', *marks, class_='track'),
  )


def bar_pairs(before: Mapping[str, float], after: Mapping[str, float] | None) -> Html:
  """Draws two bars a label: its fraction before and, if known, after."""
  after = after or {}
  longest = max([*before.values(), *after.values()], default=0) or 1
  rows = []
  for label in [*before, *(label for label in after if label not in before)]:
    shares = [
      (class_, side.get(label, 0.0)) for class_, side in (('b', before), ('a', after)) if side
    ]
    bars = [
      el('i', class_=class_, style=f'width:{100 * share / longest:.1f}%')
      for class_, share in shares
    ]
    rows.append(
      join(
        el('span', label),
        el('div', *bars, class_='bar'),
        el('small', ' → '.join(f'{100 * share:.0f}' for _, share in shares), '%'),
      )
    )
  return el('div', *rows, class_='bars')
