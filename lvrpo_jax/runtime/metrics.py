"""Writes metrics: a JSON line a step, TensorBoard events and a progress line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import math
import pathlib
import sys
import time
from typing import Any

from absl import logging
import jax
from jax import typing as jax_typing
import numpy as np
import tensorboardX
import tqdm

Scalars = Mapping[str, jax_typing.ArrayLike]
"""Name of a metric: a number or an array of one element, on the host or on a device."""


class MetricWriter:
  """Writes scalars and images under `workdir`, on process 0 only.

  `metrics.jsonl` holds one object a line: 'stage', 'step', 'seconds' (spent in the stage so far,
  over all its runs) and the scalars. A value that is not finite is written as null, and the line
  counts such values under 'nonfinite'. TensorBoard events lie in `tensorboard/<stage>`.
  """

  def __init__(
    self,
    workdir: str | pathlib.Path,
    process_index: int = 0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Prepares the writer; files are opened by `begin`. `clock` returns seconds."""
    self._workdir = pathlib.Path(workdir)
    self._path = self._workdir / 'metrics.jsonl'
    self._active = process_index == 0
    self._clock = clock
    self._started: dict[str, float] = {}
    self._events: dict[str, tensorboardX.SummaryWriter] = {}
    self._stage = ''
    self.nonfinite_count = 0

  def begin(self, stage: str, restored_step: int = -1) -> None:
    """Opens a stage: drops its lines beyond `restored_step` and starts its clock there.

    The file of a resumed run then equals that of an uninterrupted run. Lines of other stages stay.
    A last line cut short by a crash is dropped.

    Args:
      stage: name of the stage.
      restored_step: the last step whose effect is in the restored state; -1 for a fresh start.

    Raises:
      ValueError: a line other than the last is not JSON.
    """
    self._stage = stage
    if not self._active:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    text = self._path.read_text() if self._path.exists() else ''
    lines = _parse_lines(text, self._path)
    kept = [line for line in lines if line['stage'] != stage or line['step'] <= restored_step]
    kept_text = ''.join(json.dumps(line) + '\n' for line in kept)
    if kept_text != text:
      partial = self._path.with_suffix('.jsonl.tmp')
      partial.write_text(kept_text)
      partial.replace(self._path)
    spent = max((line['seconds'] for line in kept if line['stage'] == stage), default=0.0)
    self._started[stage] = self._clock() - spent
    if stage in self._events:
      self._events.pop(stage).close()
    # Event files are named by the second; the suffix keeps a quick restart from overwriting one.
    self._events[stage] = tensorboardX.SummaryWriter(
      str(self._workdir / 'tensorboard' / stage),
      purge_step=restored_step + 1,
      filename_suffix=f'.from{restored_step + 1}',
    )

  def write(self, stage: str, step: int, scalars: Scalars) -> None:
    """Appends one line and the same scalars as events.

    Args:
      stage: a stage that `begin` opened.
      step: index of the step.
      scalars: what was measured, by name.

    Raises:
      KeyError: `begin` did not open the stage.
      ValueError: a value has more than one element, or a name is reserved for the writer.
    """
    if not self._active:
      return
    seconds = round(self._clock() - self._started[stage], 3)
    line: dict[str, Any] = {'stage': stage, 'step': int(step), 'seconds': seconds}
    taken = {*line, 'nonfinite'} & set(scalars)
    if taken:
      raise ValueError(f'{stage} step {step}: the names {sorted(taken)} belong to the writer')
    values = {key: _as_float(key, value) for key, value in scalars.items()}
    bad = [key for key, value in values.items() if not math.isfinite(value)]
    line.update({key: None if key in bad else value for key, value in values.items()})
    if bad:
      line['nonfinite'] = len(bad)
      self.nonfinite_count += len(bad)
      logging.warning('%s step %d: not finite: %s', stage, step, ', '.join(bad))
    with self._path.open('a') as file:
      file.write(json.dumps(line) + '\n')
    for key, value in values.items():
      if key not in bad:
        self._events[stage].add_scalar(key, value, int(step))

  def images(self, tag: str, step: int, images_RYXC: np.ndarray, columns: int = 8) -> None:
    """Adds a grid of uint8 images to the events of the stage that was opened last."""
    if self._active:
      self._events[self._stage].add_image(
        tag, picture_grid(images_RYXC, columns), int(step), dataformats='HWC'
      )

  def flush(self) -> None:
    """Writes events that are still in memory; lines are on disk already."""
    for events in self._events.values():
      events.flush()

  def close(self) -> None:
    """Closes the event files."""
    for events in self._events.values():
      events.close()
    self._events.clear()


class Progress:
  """Shows a bar on a terminal, else a log line every `interval` seconds, on process 0 only."""

  def __init__(
    self,
    stage: str,
    total: int,
    start: int = 0,
    keys: Sequence[str] = (),
    interval: float = 30.0,
    process_index: int = 0,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      stage: name shown.
      total: the last step.
      start: the step that was reached before; the rate does not count it.
      keys: names of the scalars to show.
      interval: seconds between log lines.
      process_index: only process 0 shows anything.
      clock: returns seconds.
    """
    self._stage, self._total, self._start, self._keys = stage, total, start, tuple(keys)
    self._interval, self._active, self._clock = interval, process_index == 0, clock
    self._began = self._shown = clock()
    self._bar = None
    if self._active and sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=total, initial=start, desc=stage, dynamic_ncols=True)

  def update(self, step: int, scalars: Scalars) -> None:
    """Shows that `step` steps are done; the last one is always shown."""
    if not self._active:
      return
    shown = {key: f'{_as_float(key, scalars[key]):.4g}' for key in self._keys if key in scalars}
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = self._clock()
    if now - self._shown < self._interval and step < self._total:
      return
    self._shown = now
    rate = (step - self._start) / max(now - self._began, 1e-9)
    left = f'{_format_time((self._total - step) / rate)} left' if rate > 0 else 'time left unknown'
    logging.info(
      '%s %d/%d, %.3g steps/s, %s%s',
      self._stage,
      step,
      self._total,
      rate,
      left,
      ''.join(f', {key} {value}' for key, value in shown.items()),
    )

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> Progress:
    return self

  def __exit__(self, *exception_info: object) -> None:
    self.close()


class Compilations:
  """Counts the programs that XLA compiles in this process."""

  total = 0

  @classmethod
  def listen(cls, event: str, duration_secs: float, **kwargs: str | int) -> None:
    """Receives events of JAX; see https://docs.jax.dev/en/latest/jax.monitoring.html."""
    del duration_secs, kwargs
    cls.total += event == '/jax/core/compile/backend_compile_duration'


jax.monitoring.register_event_duration_secs_listener(Compilations.listen)


class Late:
  """Holds the device metrics of one step until the next step has been dispatched.

  Fetching a metric waits for the device. One step later the device has its next work queued
  already, so the wait costs no time. Adds 'compiled', the number of programs compiled since the
  first step; it grows where an array changes its shape.
  """

  def __init__(self, stage: str, consume: Callable[[int, dict[str, float]], None]):
    """Takes `consume(step, scalars)`, which receives each step's metrics in order, as floats."""
    self._stage, self._consume = stage, consume
    self._held: tuple[int, Scalars] | None = None
    self._compiled: int | None = None

  def push(self, step: int, metrics: Scalars) -> None:
    """Takes the metrics of a step just dispatched and consumes those of the step before.

    Raises:
      FloatingPointError: a loss of the step before is not finite. Its metrics were consumed first,
        so they are on record.
    """
    self.flush()
    if self._compiled is None:
      self._compiled = Compilations.total
    self._held = (step, {**metrics, 'compiled': Compilations.total - self._compiled})

  def flush(self) -> None:
    """Consumes the metrics that are held; call it before a checkpoint and after the last step.

    Raises:
      FloatingPointError: as `push`.
    """
    if self._held is None:
      return
    (step, metrics), self._held = self._held, None
    scalars = {key: _as_float(key, value) for key, value in jax.device_get(dict(metrics)).items()}
    self._consume(step, scalars)
    for key, value in scalars.items():
      if 'loss' in key.split('/') and not math.isfinite(value):
        raise FloatingPointError(f'{self._stage} step {step}: {key} is {value}')


def picture_grid(images_RYXC: np.ndarray, columns: int) -> np.ndarray:
  """Lays images out row by row, with a white line of one pixel between neighbours.

  Args:
    images_RYXC: uint8, at least one image, 1 or 3 channels.
    columns: images in a full row.

  Returns:
    uint8 [rows * (Y + 1) - 1, columns * (X + 1) - 1, C]; places without an image are white.
    With fewer images than columns there are as many columns as images.

  Raises:
    ValueError: another dtype or rank, no image, or no column.
  """
  images_RYXC = np.asarray(images_RYXC)
  if images_RYXC.dtype != np.uint8 or images_RYXC.ndim != 4 or not len(images_RYXC):
    raise ValueError(
      f'expected uint8 images [R, Y, X, C], got {images_RYXC.dtype} {images_RYXC.shape}'
    )
  if columns < 1:
    raise ValueError(f'expected at least one column, got {columns}')
  count, height, width, channels = images_RYXC.shape
  columns = min(columns, count)
  rows = math.ceil(count / columns)
  grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
  for index, image_YXC in enumerate(images_RYXC):
    top, left = (index // columns) * (height + 1), (index % columns) * (width + 1)
    grid[top : top + height, left : left + width] = image_YXC
  return grid


def _parse_lines(text: str, path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the objects of a JSON-lines text, without a last line that was cut short."""
  lines: list[dict[str, Any]] = []
  texts = text.splitlines()
  for index, line in enumerate(texts, 1):
    try:
      lines.append(json.loads(line))
    except json.JSONDecodeError as error:
      if index < len(texts):
        raise ValueError(f'{path}: line {index} is not JSON') from error
  return lines


def _as_float(key: str, value: jax_typing.ArrayLike) -> float:
  """Returns a scalar; `key` is its name, for messages."""
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f'{key}: expected a scalar, got shape {array.shape}')
  return float(array.reshape(()))


def _format_time(seconds: float) -> str:
  """Formats seconds as 'm:ss' below an hour, then as 'h:mm:ss'."""
  minutes, rest = divmod(int(round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{rest:02d}' if hours else f'{minutes}:{rest:02d}'
