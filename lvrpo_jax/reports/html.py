"""What a report is drawn with: escaped markup, number formats, line charts and the style sheet."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
import html
import math
import pathlib
import re
from typing import Any

Points = Sequence[tuple[float, float]]

VOID_TAGS = frozenset({'img', 'meta', 'br'})
PALETTE_SIZE = 8
CHART_WIDTH, CHART_HEIGHT = 380, 200
CHART_LEFT, CHART_RIGHT, CHART_TOP, CHART_BOTTOM = 46, 12, 10, 24
MAX_POINTS = 240
LOG_AXIS_RATIO = 30.0
SCALE_RATIO = 4.0
MEANING = {
  'reward': 'Reward',
  'share': 'Share of variance',
  'dead': 'Groups without spread',
  'gap': 'Log-ratio gap before an update',
  'loss': 'Loss',
  'grad_norm': 'Gradient norm',
  'velocity_mse': 'Velocity MSE to the reference',
  'kl_k3': 'KL to the reference (k3)',
  'entropy': 'Token entropy, nats',
}


class Html(str):
  """Markup whose text has been escaped."""


def el(name: str, /, *children: object, **attributes: object) -> Html:
  """One element; children that are not `Html` are escaped, None is left out.

  Attribute names lose a trailing underscore and write `_` for `-`; None leaves one out.
  """
  written = ''.join(
    f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
    for key, value in attributes.items()
    if value is not None
  )
  if name in VOID_TAGS:
    return Html(f'<{name}{written}>')
  return Html(f'<{name}{written}>{join(*children)}</{name}>')


def join(*children: object) -> Html:
  """Children one after another, escaped where they are not markup."""
  return Html(
    ''.join(
      child if isinstance(child, Html) else _escaped(str(child))
      for child in children
      if child is not None
    )
  )


def _escaped(text: str) -> str:
  # Control characters are not allowed in HTML and a sampled answer may hold any.
  return html.escape(re.sub(r'[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]', '\ufffd', text))


def is_number(value: object) -> bool:
  """Whether a value read from JSON is a finite number."""
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: object) -> str:
  """A share as a percentage, or a dash."""
  return f'{100 * value:.1f}%' if is_number(value) else '–'


def points(value: object) -> str:
  """A signed difference of shares in percentage points, or a dash."""
  return f'{100 * value:+.1f}'.replace('-', '\N{MINUS SIGN}') if is_number(value) else '–'


def number(value: object, sign: str = '') -> str:
  """Three significant digits, or a dash; `sign='+'` also marks positive values."""
  if not is_number(value):
    return '–'
  text = f'{value:{sign}.{3 if 1e-3 <= abs(value) < 1e5 or value == 0 else 2}g}'
  return text.replace('-', '\N{MINUS SIGN}')


def p_value(p: object) -> Html:
  """A p-value, in powers of ten when small."""
  if not is_number(p):
    return Html('–')
  if p >= 0.001:
    return Html(f'{p:.3f}' if p < 0.0995 else f'{p:.2f}')
  if p < 1e-300:
    return Html('&lt; 10<sup>−300</sup>')
  mantissa, exponent = f'{p:.0e}'.split('e')
  return Html(f'{mantissa} × 10<sup>−{abs(int(exponent))}</sup>')


def duration(seconds: float) -> str:
  """Seconds as '8.2 s', '4 min 12 s' or '3 h 5 min'."""
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest} s'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Round numbers in [low, high], about `count` of them, with steps of 1, 2 or 5 times 10^k."""
  if high <= low:
    return [low]
  rough = (high - low) / count
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(scale * unit for unit in (1, 2, 5, 10) if scale * unit >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten in [low, high], thinned to five; 1 and 3 times powers if those are few."""
  exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  powers = [10.0**e for e in exponents if low <= 10.0**e <= high]
  if len(powers) >= 3:
    return powers[:: math.ceil(len(powers) / 5)]
  finer = [unit * 10.0**e for e in exponents for unit in (1, 3)]
  return [value for value in finer if low <= value <= high]


def thinned(series: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
  """At most `limit` points, each the mean of neighbours."""
  size = math.ceil(len(series) / limit) if series else 1
  chunks = [series[at : at + size] for at in range(0, len(series), size)]
  return [
    (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
    for chunk in chunks
  ]


def smoothed(series: Points, half_width: int) -> list[tuple[float, float]]:
  """Running mean over up to 2 * half_width + 1 points, fewer at the ends."""
  windows = [series[max(0, at - half_width) : at + half_width + 1] for at in range(len(series))]
  return [(x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(series, windows)]


def line_chart(title: str, series: Mapping[str, Points], x_label: str) -> Html:
  """A figure with one line a series: the measured values faint, their running mean strong.

  The value axis is logarithmic when all values are positive and span a factor of 30. The
  legend gives the last running mean.

  Args:
    title: caption.
    series: name -> (x, y) points in order of x, at least one point each.
    x_label: unit of x.
  """
  raw = {name: thinned(list(values)) for name, values in series.items()}
  smooth = {name: smoothed(values, len(values) // 24) for name, values in raw.items()}
  x_all = [x for values in raw.values() for x, _ in values]
  y_all = [y for values in raw.values() for _, y in values]
  logarithmic = min(y_all) > 0 and max(y_all) / min(y_all) >= LOG_AXIS_RATIO
  y_range = _padded(min(y_all), max(y_all), logarithmic)
  across = _scale(min(x_all), max(x_all), CHART_LEFT, CHART_WIDTH - CHART_RIGHT, False)
  up = _scale(*y_range, CHART_HEIGHT - CHART_BOTTOM, CHART_TOP, logarithmic)
  y_ticks = log_ticks(*y_range) if logarithmic else ticks(*y_range)
  parts = [
    join(
      el(
        'line',
        x1=CHART_LEFT,
        x2=CHART_WIDTH - CHART_RIGHT,
        y1=f'{up(y):.1f}',
        y2=f'{up(y):.1f}',
        class_='rule',
      ),
      el('text', number(y), x=CHART_LEFT - 6, y=f'{up(y) + 3.5:.1f}', text_anchor='end'),
    )
    for y in y_ticks
  ]
  parts += [
    el('text', f'{x:g}', x=f'{across(x):.1f}', y=CHART_HEIGHT - 7, text_anchor='middle')
    for x in ticks(min(x_all), max(x_all))
    if across(x) < CHART_WIDTH - 70
  ]
  parts.append(
    el(
      'text',
      x_label,
      x=CHART_WIDTH - CHART_RIGHT,
      y=CHART_HEIGHT - 7,
      text_anchor='end',
      class_='unit',
    )
  )
  legend = []
  for index, name in enumerate(series):
    colour = f'c{index % PALETTE_SIZE}'
    parts.append(_line(raw[name], across, up, f'{colour} raw'))
    parts.append(_line(smooth[name], across, up, f'{colour} mean'))
    legend.append(el('li', el('i', class_=colour), name, ' ', el('b', number(smooth[name][-1][1]))))
  caption = el('figcaption', el('strong', title), ' log scale' if logarithmic else None)
  drawing = el(
    'svg', *parts, viewBox=f'0 0 {CHART_WIDTH} {CHART_HEIGHT}', role='img', aria_label=title
  )
  return el('figure', caption, drawing, el('ul', *legend, class_='legend'), class_='chart')


def _padded(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
  if logarithmic:
    return low / 1.15, high * 1.15
  margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
  return (0.0 if 0 <= low < margin else low - margin), high + margin


def _scale(
  low: float, high: float, start: float, end: float, logarithmic: bool
) -> Callable[[float], float]:
  """The map from [low, high] to drawing units [start, end]; the middle if low equals high."""
  place = math.log10 if logarithmic else float
  width = place(high) - place(low)
  return lambda value: (
    start + (end - start) * ((place(value) - place(low)) / width if width else 0.5)
  )


def _line(
  values: Points, across: Callable[[float], float], up: Callable[[float], float], class_: str
) -> Html:
  path = ' '.join(f'{across(x):.1f},{up(y):.1f}' for x, y in values)
  if len(values) == 1:
    x, y = values[0]
    return el('circle', cx=f'{across(x):.1f}', cy=f'{up(y):.1f}', r=2.5, class_=class_)
  return el('polyline', points=path, class_=class_)


def by_scale(series: Mapping[str, Points]) -> list[dict[str, Points]]:
  """Splits lines so that the largest values in a part differ by less than SCALE_RATIO."""
  size = {key: max(abs(y) for _, y in values) for key, values in series.items()}
  parts: list[list[str]] = []
  smallest = 0.0
  for key in sorted(series, key=size.__getitem__):
    apart = smallest > 0 and size[key] > SCALE_RATIO * smallest
    if not parts or apart or len(parts[-1]) == PALETTE_SIZE:
      parts.append([])
      smallest = size[key]
    smallest = smallest or size[key]
    parts[-1].append(key)
  return [{key: series[key] for key in series if key in part} for part in parts]


def bar_pairs(before: Mapping[str, float], after: Mapping[str, float] | None) -> Html:
  """Two bars a label: its share before and, if known, after."""
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


def picture(path: pathlib.Path, alt: str) -> Html:
  """A PNG file inside the page, or an empty place if it is not there."""
  if not path.is_file():
    return el('div', class_='px', title=f'missing: {path.name}')
  data = base64.b64encode(path.read_bytes()).decode()
  return el('img', src=f'data:image/png;base64,{data}', alt=alt, class_='px')


def verdict(path: pathlib.Path, right: bool, alt: str) -> Html:
  """A picture in a green or red frame."""
  return el(
    'figure',
    picture(path, f'{alt}, {"right" if right else "wrong"}'),
    el('span', '✓' if right else '✗', class_='mark', aria_hidden='true'),
    class_='ok' if right else 'no',
  )


def missing(text: str) -> Html:
  """A plain statement that something is not there yet."""
  return el('p', text, class_='missing')


def folded(title: str, body: Html | None) -> Html | None:
  """A block that opens on demand; nothing for nothing."""
  return el('details', el('summary', title), body) if body else None


def human(name: str) -> str:
  """'single_object' as 'Single object'."""
  return (name[:1].upper() + name[1:]).replace('_', ' ').replace('/', ' · ')


def key(*more: str) -> Html:
  """What the two colours stand for."""
  before, after = (el('span', el('i', class_=side[0]), side) for side in ('before', 'after'))
  return el('div', before, after, *(el('span', text) for text in more), class_='key')


def listed(parts: Sequence[Html]) -> Html:
  """'a', 'a and b', 'a, b and c'."""
  return Html(' and '.join(filter(None, [', '.join(parts[:-1]), *parts[-1:]])))


def track(part: str, headline: bool, scores: Sequence[Mapping[str, Any]]) -> Html:
  """A name and its line from 0 to 100%: dots and intervals of the scores before and after."""
  marks = []
  for score, side in zip(scores, ('before', 'after')):
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


def interval(score: Mapping[str, Any]) -> Html | None:
  """The 95% interval of a score in small print, if it has one."""
  if not score.get('ci95'):
    return None
  low, high = score['ci95']
  return el('small', f'{100 * low:.1f} to {100 * high:.1f}')


def charts(groups: Mapping[str, Mapping[str, Points]], x_label: str) -> Html | None:
  """Line charts of each titled group, lines of very different size apart."""
  drawn = []
  for title, series in groups.items():
    for part in by_scale(series):
      only = next(iter(part)) if len(part) == 1 else ''
      named = title.endswith(only) or only in MEANING
      drawn.append(line_chart(title if named else f'{title} · {only}', part, x_label))
  return el('div', *drawn, class_='cards') if drawn else None


STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f4;--card:#fff;--ink:#1b1f24;--soft:#5c6570;--rule:#e2e3de;
--accent:#2461c4;--before:#98a1ac;--good:#15803d;--bad:#c0342b;--goodbg:#e4f4ea;--badbg:#fbe8e6;
--warnbg:#fff3d1;--warn:#8a5700;--p0:#2461c4;--p1:#d2691e;--p2:#188a5b;--p3:#8e44ad;--p4:#c0342b;
--p5:#0e8a99;--p6:#8a6d1b;--p7:#6b7280}@media(prefers-color-scheme:dark){:root{--bg:#131619;
--card:#1c2024;--ink:#e7e9ec;--soft:#9ba5b0;--rule:#31373d;--accent:#7db0ff;--before:#7c8792;
--good:#4fc981;--bad:#ff8278;--goodbg:#17321f;--badbg:#3a1d1b;--warnbg:#372a0c;--warn:#f2c14e;
--p0:#7db0ff;--p1:#f5a05a;--p2:#56d09a;--p3:#cf96ea;--p4:#ff8278;--p5:#56ccd8;--p6:#dcbf62;
--p7:#a3acb7}}*{box-sizing:border-box}sup{line-height:0}a{color:var(--accent)}
h3 small{font-weight:400}.scroll+.note{margin-top:.7rem}header{padding-bottom:.7rem}
html{scroll-behavior:smooth;scroll-padding-top:3.5rem;
-webkit-text-size-adjust:100%}body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}main,header,nav ul,footer{max-width:1180px;margin:0 auto;
padding:0 clamp(1rem,3vw,2rem)}header{padding-top:clamp(1.5rem,4vw,3rem)}h1{font-size:clamp(1.6rem,
4vw,2.4rem);line-height:1.15;letter-spacing:-.02em;margin:.2rem 0 .8rem}h2{font-size:1.4rem;
letter-spacing:-.01em;margin:3rem 0 .4rem}h3{font-size:1.05rem;margin:1.8rem 0 .6rem}h4{
font-size:.95rem;line-height:1.35;margin:0 0 .7rem;font-weight:600;overflow-wrap:anywhere}.kicker{
color:var(--soft);font-size:.8rem;letter-spacing:.08em;text-transform:uppercase}.lead{
font-size:1.1rem;max-width:46rem;margin:0 0 1.2rem}.note{color:var(--soft);font-size:.9rem;
max-width:46rem;margin:.2rem 0 1rem}.missing{border:1px dashed var(--before);border-radius:10px;
padding:.8rem 1rem;color:var(--soft)}nav{position:sticky;top:0;z-index:2;background:var(--bg);
border-bottom:1px solid var(--rule)}nav ul{display:flex;gap:1.2rem;overflow-x:auto;list-style:none;
padding-top:.6rem;padding-bottom:.6rem;font-size:.9rem;white-space:nowrap}nav a{color:var(--soft);
text-decoration:none}nav a:hover{color:var(--accent)}.cards{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--w,320px)),1fr))}.card,figure.chart{
background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:1rem;margin:0;
min-width:0}.stat{--w:215px}.stat .big{font-size:1.55rem;font-weight:650;letter-spacing:-.02em;
line-height:1.3}.stat .was{color:var(--soft);font-weight:400}.chip{display:inline-block;
border-radius:99px;padding:.05rem .6rem;font-size:.85rem;background:var(--rule)}.chip.up{
background:var(--goodbg);color:var(--good)}.chip.down{background:var(--badbg);color:var(--bad)}
.soft{color:var(--soft)}.up{color:var(--good)}.down{color:var(--bad)}small{font-size:.8rem;
color:var(--soft)}.glance{display:grid;grid-template-columns:minmax(5.5rem,auto) 1fr;
gap:.3rem .8rem;align-items:center;font-size:.88rem}.glance .head{font-weight:650}.track{
position:relative;height:1.15rem;border-radius:4px;background:linear-gradient(90deg,var(--rule) 1px,
transparent 1px) 0 0/25% 100%,linear-gradient(var(--rule),var(--rule)) 0 50%/100% 1px no-repeat;
border-right:1px solid var(--rule)}.track i{position:absolute;display:block}.track .ci{height:4px;
border-radius:2px;opacity:.45}.track .dot{width:10px;height:10px;border-radius:50%;
margin:-5px 0 0 -5px}.track .b{background:var(--before)}.track .a{background:var(--accent)}
.track .ci.b{top:calc(50% - 5px)}.track .ci.a{top:calc(50% + 1px)}.track .dot{top:50%}.key{
display:flex;gap:1.2rem;font-size:.85rem;color:var(--soft);margin:.4rem 0 1rem;flex-wrap:wrap}
.key i{display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:.4rem}.key .b{
background:var(--before)}.key .a{background:var(--accent)}.scroll{overflow-x:auto;
border:1px solid var(--rule);border-radius:12px;background:var(--card)}table{
border-collapse:collapse;width:100%;font-size:.9rem}th,td{text-align:right;padding:.4rem .8rem;
border-bottom:1px solid var(--rule);white-space:nowrap}td small{display:block;line-height:1.2}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card)}
thead th{color:var(--soft);font-weight:500;font-size:.82rem}tr:last-child td{border-bottom:0}
tr.group td{font-weight:650;padding-top:.9rem}tr.part td:first-child{padding-left:1.6rem}tr.head td{
font-weight:650}tr.head small{font-weight:400}.shots{display:grid;
grid-template-columns:3.4rem repeat(4,minmax(0,1fr));gap:.6rem;align-items:center;font-size:.82rem;
margin-top:.75rem}.shots figure,.pair figure,.pic{margin:0;position:relative}.px{display:block;
width:100%;aspect-ratio:1;image-rendering:pixelated;border-radius:4px;background:var(--rule)}
.ok .px{outline:3px solid var(--good)}.no .px{outline:3px solid var(--bad)}.mark{position:absolute;
right:-5px;bottom:-5px;width:1.1rem;height:1.1rem;border-radius:50%;color:var(--card);
font-size:.7rem;line-height:1.1rem;text-align:center;font-weight:700}.ok .mark{
background:var(--good)}.no .mark{background:var(--bad)}.empty{grid-column:2/-1;color:var(--soft);
font-style:italic}.pair{display:grid;grid-template-columns:3.4rem repeat(4,minmax(0,1fr));gap:.5rem;
align-items:center;font-size:.82rem}.pair figcaption{color:var(--soft);font-size:.75rem;
text-align:center}.ask{display:grid;grid-template-columns:84px 1fr;gap:.9rem;margin-bottom:.6rem}
.ask h4{margin:0 0 .3rem}.sides{display:grid;grid-template-columns:1fr 1fr;gap:.9rem;
font-size:.84rem}.sides ul{list-style:none;margin:.2rem 0 0;padding:0}.sides li{
padding:.15rem 0 .15rem 1.3rem;position:relative;overflow-wrap:anywhere;max-height:11rem;
overflow-y:auto;line-height:1.35}.sides li::before{position:absolute;left:0;font-weight:700}
.sides li.ok::before{content:"\\2713";color:var(--good)}.sides li.no::before{content:"\\2717";
color:var(--bad)}.sides li.greedy{border-top:1px solid var(--rule);margin-top:.25rem;
padding-top:.35rem}figure.chart{padding:.8rem .8rem .6rem}figcaption strong{font-size:.9rem}
figcaption{color:var(--soft);font-size:.8rem}figcaption strong{color:var(--ink);font-weight:600}svg{
display:block;width:100%;height:auto;overflow:visible}svg text{font-size:11px;fill:var(--soft)}
svg .rule{stroke:var(--rule)}polyline{fill:none;stroke:var(--c);stroke-linejoin:round}polyline.raw{
opacity:.3;stroke-width:1}polyline.mean{stroke-width:2}circle{fill:var(--c)}.legend{list-style:none;
display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.3rem 0 0;padding:0;font-size:.82rem;
color:var(--soft)}.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;
background:var(--c);margin-right:.4rem;vertical-align:middle}.legend b{color:var(--ink);
font-weight:600}.alarm,.calm{border-radius:12px;padding:.8rem 1.1rem;margin:.6rem 0 1rem}.alarm{
background:var(--warnbg);color:var(--warn);border:1px solid currentColor}.alarm ul{margin:.3rem 0 0;
padding-left:1.2rem}.calm{background:var(--goodbg);color:var(--good)}.bars{display:grid;
grid-template-columns:minmax(4rem,auto) 1fr auto;gap:.25rem .7rem;align-items:center;
font-size:.84rem}.bars .bar{display:grid;gap:2px}.bars .bar i{display:block;height:7px;
border-radius:2px;min-width:1px}.bars .b{background:var(--before)}.bars .a{background:var(--accent)}
.bars small{text-align:right;white-space:nowrap}
details{background:var(--card);border:1px solid var(--rule);
border-radius:12px;padding:.7rem 1rem;margin-top:1rem}summary{cursor:pointer;font-weight:600}
details .cards{margin-top:1rem}pre{overflow-x:auto;font:.84rem/1.5 ui-monospace,SFMono-Regular,
Menlo,Consolas,monospace;background:var(--card);border:1px solid var(--rule);border-radius:10px;
padding:.8rem 1rem}details pre{border:0;padding:0}footer{color:var(--soft);font-size:.85rem;
padding-top:2rem;padding-bottom:3rem}@media(max-width:560px){.sides{gap:.6rem}.card{padding:.8rem}
th,td{padding:.4rem .55rem}.shots,.pair{grid-template-columns:3rem repeat(4,minmax(0,1fr))}}
""" + ''.join(f'.c{i}{{--c:var(--p{i})}}' for i in range(PALETTE_SIZE))
