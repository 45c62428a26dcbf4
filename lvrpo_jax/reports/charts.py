"""Line charts of a report as SVG, with round ticks, thinning and a running mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import math

from lvrpo_jax.reports import html
from lvrpo_jax.reports import style

Points = Sequence[tuple[float, float]]
"""(x, y) in order of x."""

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
"""Drawing units of a chart and of its margins."""
MAX_POINTS = 240
"""Points of a line; more are averaged."""
LOG_AXIS_RATIO = 30.0
"""Ratio of the largest to the smallest value from which on the axis is logarithmic."""
SCALE_RATIO = 4.0
"""Largest ratio of the maxima of two lines in one chart."""
MEANING = {
  'reward': 'Reward',
  'share': 'Share of variance',
  'dead': 'Groups without spread',
  'mismatch': 'Rollout-training mismatch, log-ratio before an update',
  'loss': 'Loss',
  'grad_norm': 'Gradient norm',
  'velocity_mse': 'Velocity MSE to the reference',
  'kl_k3': 'KL to the reference (k3)',
  'entropy': 'Token entropy, nats',
}
"""First part of a metric's name: title of its chart."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
  """Returns about `count` round numbers in [low, high], in steps of 1, 2 or 5 times 10^k."""
  if high <= low:
    return [low]
  rough = (high - low) / count
  scale = 10.0 ** math.floor(math.log10(rough))
  step = next(scale * unit for unit in (1, 2, 5, 10) if scale * unit >= rough * 0.999)
  first = math.ceil(low / step - 1e-9)
  return [step * index for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Returns powers of ten in [low, high], thinned to five; 1 and 3 times powers if few."""
  exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  powers = [10.0**e for e in exponents if low <= 10.0**e <= high]
  if len(powers) >= 3:
    return powers[:: math.ceil(len(powers) / 5)]
  finer = [unit * 10.0**e for e in exponents for unit in (1, 3)]
  return [value for value in finer if low <= value <= high]


def thinned(series: Points, limit: int = MAX_POINTS) -> list[tuple[float, float]]:
  """Returns at most `limit` points, each the mean of neighbours."""
  size = math.ceil(len(series) / limit) if series else 1
  chunks = [series[at : at + size] for at in range(0, len(series), size)]
  return [
    (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
    for chunk in chunks
  ]


def smoothed(series: Points, half_width: int) -> list[tuple[float, float]]:
  """Returns running means over up to 2 * half_width + 1 points, fewer at the ends."""
  windows = [series[max(0, at - half_width) : at + half_width + 1] for at in range(len(series))]
  return [
    (x, sum(y for _, y in window) / len(window))
    for (x, _), window in zip(series, windows, strict=True)
  ]


def line_chart(title: str, series: Mapping[str, Points], x_label: str) -> html.Html:
  """Draws one line a series: the measured values faint, their running mean strong.

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
  place_x = _scale(min(x_all), max(x_all), LEFT, WIDTH - RIGHT, False)
  place_y = _scale(*y_range, HEIGHT - BOTTOM, TOP, logarithmic)
  parts = [_rule(y, place_y(y)) for y in (log_ticks(*y_range) if logarithmic else ticks(*y_range))]
  parts += [
    html.el('text', f'{x:g}', x=f'{place_x(x):.1f}', y=HEIGHT - 7, text_anchor='middle')
    for x in ticks(min(x_all), max(x_all))
    if place_x(x) < WIDTH - 70
  ]
  parts.append(
    html.el('text', x_label, x=WIDTH - RIGHT, y=HEIGHT - 7, text_anchor='end', class_='unit')
  )
  legend = []
  for index, name in enumerate(series):
    color = f'c{index % style.PALETTE_SIZE}'
    parts.append(_line(raw[name], place_x, place_y, f'{color} raw'))
    parts.append(_line(smooth[name], place_x, place_y, f'{color} mean'))
    last = html.el('b', html.number(smooth[name][-1][1]))
    legend.append(html.el('li', html.el('i', class_=color), name, ' ', last))
  caption = html.el('figcaption', html.el('strong', title), ' log scale' if logarithmic else None)
  drawing = html.el('svg', *parts, viewBox=f'0 0 {WIDTH} {HEIGHT}', role='img', aria_label=title)
  return html.el(
    'figure', caption, drawing, html.el('ul', *legend, class_='legend'), class_='chart'
  )


def _rule(value: float, y: float) -> html.Html:
  """Draws the grid line of a value, with its label, at `y` drawing units."""
  return html.join(
    html.el('line', x1=LEFT, x2=WIDTH - RIGHT, y1=f'{y:.1f}', y2=f'{y:.1f}', class_='rule'),
    html.el('text', html.number(value), x=LEFT - 6, y=f'{y + 3.5:.1f}', text_anchor='end'),
  )


def _padded(low: float, high: float, logarithmic: bool) -> tuple[float, float]:
  """Returns the range of an axis that leaves a margin around [low, high]."""
  if logarithmic:
    return low / 1.15, high * 1.15
  margin = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
  return (0.0 if 0 <= low < margin else low - margin), high + margin


def _scale(
  low: float, high: float, start: float, end: float, logarithmic: bool
) -> Callable[[float], float]:
  """Returns the map from [low, high] to drawing units [start, end].

  If low equals high, it returns the middle.
  """
  transform = math.log10 if logarithmic else float
  width = transform(high) - transform(low)

  def place(value: float) -> float:
    fraction = (transform(value) - transform(low)) / width if width else 0.5
    return start + (end - start) * fraction

  return place


def _line(
  values: Points,
  place_x: Callable[[float], float],
  place_y: Callable[[float], float],
  class_: str,
) -> html.Html:
  """Draws a line through points, or a dot for a single one."""
  if len(values) == 1:
    x, y = values[0]
    return html.el('circle', cx=f'{place_x(x):.1f}', cy=f'{place_y(y):.1f}', r=2.5, class_=class_)
  path = ' '.join(f'{place_x(x):.1f},{place_y(y):.1f}' for x, y in values)
  return html.el('polyline', points=path, class_=class_)


def by_scale(series: Mapping[str, Points]) -> list[dict[str, Points]]:
  """Splits lines so that the largest values in a part differ by less than `SCALE_RATIO`."""
  size = {key: max(abs(y) for _, y in values) for key, values in series.items()}
  parts: list[list[str]] = []
  smallest = 0.0
  for key in sorted(series, key=size.__getitem__):
    apart = smallest > 0 and size[key] > SCALE_RATIO * smallest
    if not parts or apart or len(parts[-1]) == style.PALETTE_SIZE:
      parts.append([])
      smallest = size[key]
    smallest = smallest or size[key]
    parts[-1].append(key)
  return [{key: series[key] for key in series if key in part} for part in parts]


def grouped(groups: Mapping[str, Mapping[str, Points]], x_label: str) -> html.Html | None:
  """Draws the charts of each titled group; lines of very different size get their own chart."""
  drawn = []
  for title, series in groups.items():
    for part in by_scale(series):
      only = next(iter(part)) if len(part) == 1 else ''
      named = title.endswith(only) or only in MEANING
      drawn.append(line_chart(title if named else f'{title} · {only}', part, x_label))
  return html.el('div', *drawn, class_='cards') if drawn else None
