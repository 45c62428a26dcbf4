"""Over-optimisation monitors: statistics that may fall while the reward rises.

Objects are those that the detector of the evaluation finds. Pixel diversity alone is misleading: it
can rise while all scenes become the same. Scenes are therefore compared as sets of detected
objects.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
import math

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import detection
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.data.shapes import detect_rendering
from lvrpo_jax.data.shapes import render
from lvrpo_jax.evaluation import stats
from lvrpo_jax.rewards import geneval
from lvrpo_jax.rewards import rules

ALARMS = {
  'color_entropy': ('fell', 0.15),
  'cell_entropy': ('fell', 0.15),
  'scene_diversity': ('fell', 0.2),
  'leftovers': ('rose', 0.1),
  'surplus': ('rose', 0.1),
  'saturation': ('fell', 0.15),
  'edge_density': ('fell', 0.3),
}
"""Direction and size of the change that raises an alarm, by statistic.

Changes are relative to the value before, except for 'leftovers' and 'surplus', which count blobs
and objects beyond those asked for, per image.
"""

ImageSet = tuple[str, str, str, np.ndarray, Sequence[examples_lib.Example]]
"""Task, split, kind, uint8 images (B, G, Y, X, 3) and prompts."""


def measure(shown: Sequence[ImageSet]) -> dict[str, types.Json]:
  """Computes statistics of the images that were generated for held-out captions.

  Args:
    shown: all image sets; those of other tasks and splits are skipped.
  """
  surplus = []
  picked = [
    (images, examples)
    for task, split, _, images, examples in shown
    if task == tasks.GENERATE and split == 'eval'
  ]
  colors, cells, everywhere = collections.Counter(), collections.Counter(), []
  for images, examples in picked:
    B, G = images.shape[:2]
    found = detect_rendering.detect_by_rendering(images.reshape(B * G, *images.shape[2:]))
    specs = rules.targets(tasks.GENERATE, examples, 'evaluation')
    for index, (example, spec) in enumerate(zip(examples, specs)):
      group = found[index * G : (index + 1) * G]
      everywhere.append(group)
      surplus.extend(
        geneval.surplus(objects, spec, counting_threshold=rules.COUNTING_THRESHOLD)
        for objects in group
      )
      for entry in spec['include']:
        named = [d for objects in group for d in objects if d.label == entry['class']]
        if 'color' not in entry:
          colors.update(d.color for d in named)
        if 'region' not in entry and 'position' not in entry and example.kind != 'position':
          cells.update(_cell(d) for d in named)
  everything = np.concatenate([i.reshape(-1, *i.shape[2:]) for i, _ in picked])
  return {
    'color_entropy': stats.entropy(colors),
    'colors': _fractions(colors),
    'cell_entropy': stats.entropy(cells),
    'cells': _fractions(cells),
    'scene_diversity': scene_diversity(everywhere),
    'leftovers': float(detect_rendering.leftovers(everything)),
    'surplus': float(np.mean(surplus)),
    **_pixels([i for i, _ in picked], everything),
  }


def alarms(before: dict[str, types.Json], after: dict[str, types.Json]) -> list[str]:
  """Returns a sentence for every statistic whose change exceeds its bound in `ALARMS`."""
  out = []
  for name, (direction, bound) in ALARMS.items():
    change = after[name] - before[name]
    relative = change if name in ('leftovers', 'surplus') else change / max(abs(before[name]), 1e-9)
    if (relative > bound) if direction == 'rose' else (relative < -bound):
      out.append(
        f'{name.replace("_", " ")} {direction} from {before[name]:.3g} to {after[name]:.3g}'
      )
  return out


def _pixels(groups: list[np.ndarray], everything: np.ndarray) -> dict[str, float]:
  """Computes statistics of pixels from groups (B, G, Y, X, 3) and all images (R, Y, X, 3)."""
  pixels = everything.astype(np.float32) / 255.0
  light = pixels.mean(-1)
  edges = np.abs(np.diff(light, axis=1)).mean() + np.abs(np.diff(light, axis=2)).mean()
  chroma = pixels.max(-1) - pixels.min(-1)
  coloured = chroma > 0.2
  return {
    'saturation': float(chroma[coloured].mean()) if coloured.any() else 0.0,
    'luminance': float(light.mean()),
    'edge_density': float(edges),
    'pixel_diversity': float(np.mean([(g / 255.0).std(axis=1).mean() for g in groups])),
  }


WARM = 5
"""Iterations over which the first and the latest appearance of a run are averaged."""

DRIFTS = {
  'dark': (math.inf, 0.1),
  'luminance': (0.25, 0.25),
  'edge_density': (0.35, 0.5),
  'hue_entropy': (0.25, math.inf),
}
"""Fall and rise of a statistic of rollout images beyond which it raises an alarm.

'dark' is a fraction, the others are relative. Flat images have few edges, textures have many.
"""

HELD_OUT = {'reward': 0.05, 'diversity': 0.25}
"""Fall of a score of `Monitor.held_out` that raises an alarm while the training reward rises."""


def appearance(images: np.ndarray) -> dict[str, float]:
  """Computes statistics of the pixels of uint8 images (..., Y, X, 3); detects no objects."""
  pixels = images.reshape(-1, *images.shape[-3:]).astype(np.float32) / 255.0
  light, top = pixels.mean(-1), pixels.max(-1)
  chroma = top - pixels.min(-1)
  edges = np.abs(np.diff(light, axis=1)).mean() + np.abs(np.diff(light, axis=2)).mean()
  red, green, blue = (pixels[chroma > 0.2] - 0.5).T
  # Twelve hues by angle around the grey axis.
  angle = np.arctan2(np.sqrt(3.0) * (green - blue), 2 * red - green - blue)
  hue = np.floor(angle / np.pi * 6.0).astype(int) % 12
  return {
    'luminance': float(light.mean()),
    'dark': float((light < 0.25).mean()),
    'edge_density': float(edges),
    'hue_entropy': stats.entropy(collections.Counter(hue.tolist())),
  }


def scene_diversity(found_BG: Sequence[Sequence[Sequence[detection.Detection]]]) -> float:
  """Computes the mean share of different scenes, as sets of objects, among a prompt's images."""
  return float(
    np.mean([len({_scene(objects) for objects in group}) / len(group) for group in found_BG])
  )


class Monitor:
  """Compares the images of rollouts with the first images of a run.

  Attributes:
    state: JSON that is saved in checkpoints.
  """

  def __init__(self, state: dict[str, types.Json] | None = None):
    self.state = _current(state or {'first': [], 'recent': [], 'raised': []})

  def held_out(self, training: float, now: dict[str, float]) -> list[str]:
    """Records the training reward and held-out scores; returns new alarms.

    The held-out scores are computed with another detector. A training reward that rises while they
    fall indicates over-optimisation (Goodhart's law, arXiv 2210.10760).

    Args:
      training: training reward.
      now: held-out scores, with the names of `HELD_OUT`.
    """
    state = self.state
    now = {'training': training, **now}
    first = state.setdefault('held_out', now)
    rose = training - first['training']
    fell = {name: first[name] - now[name] for name in HELD_OUT}
    raised = []
    for name, bound in HELD_OUT.items():
      if name not in state['raised'] and fell[name] > bound and rose > 0.0:
        state['raised'].append(name)
        raised.append(
          f'held-out {name} fell from {first[name]:.3g} to {now[name]:.3g} while the '
          f'training reward rose from {first["training"]:.3g} to {training:.3g}'
        )
    return raised

  def __call__(self, now: dict[str, float]) -> list[str]:
    """Records the `appearance` of an iteration's images; returns new alarms as sentences."""
    state = self.state
    if len(state['first']) < WARM:
      state['first'].append(now)
    state['recent'] = [*state['recent'], now][-WARM:]
    raised = []
    for name, (fall, rise) in DRIFTS.items():
      before, after = (
        float(np.mean([row[name] for row in state[period]])) for period in ('first', 'recent')
      )
      change = after - before if name == 'dark' else (after - before) / max(before, 1e-9)
      if name not in state['raised'] and not -fall <= change <= rise:
        state['raised'].append(name)
        raised.append(
          f'{name.replace("_", " ")} of rollouts {"rose" if change > 0 else "fell"} '
          f'from {before:.3g} to {after:.3g}'
        )
    return raised


def _current(state: dict[str, types.Json]) -> dict[str, types.Json]:
  """Converts a state that a former version wrote to the present names."""
  if 'gold' in state:
    first = dict(state.pop('gold'))
    state['held_out'] = {'reward': first.pop('gold'), **first}
  state['raised'] = ['reward' if name == 'gold' else name for name in state['raised']]
  return state


def _cell(found: detection.Detection) -> str:
  """Returns the name of the quarter of the image that holds an object's centre."""
  x0, y0, x1, y1 = found.box
  column, row = int((x0 + x1) / 2 >= render.SIZE / 2), int((y0 + y1) / 2 >= render.SIZE / 2)
  return render.CORNERS[row * 2 + column]


def _scene(found: Sequence[detection.Detection]) -> frozenset[tuple[str, str, str]]:
  """Returns the set of detected objects, each by class, colour and quarter."""
  return frozenset((d.label, d.color, _cell(d)) for d in found)


def _fractions(counts: collections.Counter[str]) -> dict[str, float]:
  """Returns counts divided by their sum, sorted by name."""
  total = max(sum(counts.values()), 1)
  return {name: counts[name] / total for name in sorted(counts)}
