"""Over-optimisation panel: what a rising reward may hide.

Attributes are those that the strict detector finds. Pixel diversity alone misleads: it can rise
while every drawn scene becomes the same, so scenes are compared as sets of detected objects.
"""

from __future__ import annotations

import collections
import math
from typing import Any

import numpy as np

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
"""Statistic: direction and size of the change that raises an alarm; relative to the value before,
except for leftovers and surplus, which are blobs and unasked objects an image."""


def measure(
  shown: list[tuple[str, str, str, np.ndarray, list[examples_lib.Example]]],
) -> dict[str, Any]:
  """Statistics of generated images.

  Args:
    shown: (task, split, kind, images_BGYXC uint8, examples) of all picture sets.
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
    for number, example in enumerate(examples):
      group = found[number * G : (number + 1) * G]
      everywhere.append(group)
      surplus.extend(
        geneval.surplus(objects, example.spec, counting_threshold=rules.COUNTING_THRESHOLD)
        for objects in group
      )
      for entry in example.spec['include']:
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


def alarms(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
  """A sentence for every statistic that moved further than it should."""
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
"""Iterations that make the first picture of a run, and that a later one is averaged over."""

DRIFTS = {
  'dark': (math.inf, 0.1),
  'luminance': (0.25, 0.25),
  'edge_density': (0.35, 0.5),
  'hue_entropy': (0.25, math.inf),
}
"""Statistic of pictures of rollouts: the fall and the rise beyond which it raises an alarm; 'dark'
is a fraction, the others are relative. Edges vanish from flat pictures and abound in textures."""


HELD_OUT = {'reward': 0.05, 'diversity': 0.25}
"""Held-out scores of `Monitor.held_out`, and falls that raise an alarm while the training reward
rises."""


def appearance(images: np.ndarray) -> dict[str, float]:
  """How uint8 pictures (..., Y, X, 3) look, whatever they show."""
  pixels = images.reshape(-1, *images.shape[-3:]).astype(np.float32) / 255.0
  light, top = pixels.mean(-1), pixels.max(-1)
  chroma = top - pixels.min(-1)
  edges = np.abs(np.diff(light, axis=1)).mean() + np.abs(np.diff(light, axis=2)).mean()
  r, g, b = (pixels[chroma > 0.2] - 0.5).T
  # Twelve hues by angle around the grey axis.
  hue = np.floor(np.arctan2(np.sqrt(3.0) * (g - b), 2 * r - g - b) / np.pi * 6.0).astype(int) % 12
  return {
    'luminance': float(light.mean()),
    'dark': float((light < 0.25).mean()),
    'edge_density': float(edges),
    'hue_entropy': stats.entropy(collections.Counter(hue.tolist())),
  }


def scene_diversity(found_BG: list[list[list[detection.Detection]]]) -> float:
  """Mean share of different scenes among the pictures of a prompt, by what is detected in them."""
  return float(
    np.mean([len({_scene(objects) for objects in group}) / len(group) for group in found_BG])
  )


class Monitor:
  """Compares the images of rollouts with the first ones of a run.

  `state` is JSON and belongs to a checkpoint.
  """

  def __init__(self, state: dict[str, Any] | None = None):
    self.state = _current(state or {'first': [], 'recent': [], 'raised': []})

  def held_out(self, training: float, now: dict[str, float]) -> list[str]:
    """Takes the training reward and held-out scores by another detector; returns new alarms.

    A reward that rises while what it stands for falls is Goodhart's law at work (arXiv 2210.10760).
    """
    s = self.state
    now = {'training': training, **now}
    first = s.setdefault('held_out', now)
    rose = training - first['training']
    fell = {name: first[name] - now[name] for name in HELD_OUT}
    raised = []
    for name, bound in HELD_OUT.items():
      if name not in s['raised'] and fell[name] > bound and rose > 0.0:
        s['raised'].append(name)
        raised.append(
          f'held-out {name} fell from {first[name]:.3g} to {now[name]:.3g} while the '
          f'training reward rose from {first["training"]:.3g} to {training:.3g}'
        )
    return raised

  def __call__(self, now: dict[str, float]) -> list[str]:
    """Takes the `appearance` of an iteration's pictures; returns new alarms as sentences."""
    s = self.state
    if len(s['first']) < WARM:
      s['first'].append(now)
    s['recent'] = [*s['recent'], now][-WARM:]
    mean = lambda rows, name: float(np.mean([row[name] for row in rows]))
    raised = []
    for name, (fall, rise) in DRIFTS.items():
      before, after = mean(s['first'], name), mean(s['recent'], name)
      change = after - before if name == 'dark' else (after - before) / max(before, 1e-9)
      if name not in s['raised'] and not -fall <= change <= rise:
        s['raised'].append(name)
        raised.append(
          f'{name.replace("_", " ")} of rollouts {"rose" if change > 0 else "fell"} '
          f'from {before:.3g} to {after:.3g}'
        )
    return raised


def _current(state: dict[str, Any]) -> dict[str, Any]:
  """A state that a former version may have written."""
  if 'gold' in state:
    first = dict(state.pop('gold'))
    state['held_out'] = {'reward': first.pop('gold'), **first}
  state['raised'] = ['reward' if name == 'gold' else name for name in state['raised']]
  return state


def _cell(found: detection.Detection) -> str:
  x0, y0, x1, y1 = found.box
  column, row = int((x0 + x1) / 2 >= render.SIZE / 2), int((y0 + y1) / 2 >= render.SIZE / 2)
  return render.CORNERS[row * 2 + column]


def _scene(found: list[detection.Detection]) -> frozenset[tuple[str, str, str]]:
  return frozenset((d.label, d.color, _cell(d)) for d in found)


def _fractions(counts: collections.Counter) -> dict[str, float]:
  total = max(sum(counts.values()), 1)
  return {name: counts[name] / total for name in sorted(counts)}
