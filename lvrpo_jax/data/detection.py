"""Detections, the protocol of detectors, and the table of named detectors."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Protocol

import numpy as np

UNKNOWN = 'unknown'
"""Label of an object that belongs to no known class."""

TABLE = {
  'components': 'lvrpo_jax.data.shapes.detect_moments:detect_components',
  'rendering': 'lvrpo_jax.data.shapes.detect_rendering:detect_by_rendering',
}
"""Import paths of detectors by name.

Both detectors are of the shapes world, and they are built differently.
"""


@dataclasses.dataclass(frozen=True)
class Detection:
  """A found object.

  Attributes:
    label: class of the object, or `UNKNOWN`.
    color: name of its colour.
    box: (x0, y0, x1, y1) in pixels.
    score: confidence in [0, 1].
  """

  label: str
  color: str
  box: tuple[float, float, float, float]
  score: float

  @property
  def centre(self) -> tuple[float, float]:
    """Centre (x, y) of the box."""
    x0, y0, x1, y1 = self.box
    return (x0 + x1) / 2, (y0 + y1) / 2


class Detector(Protocol):
  """Finds objects from pixels alone; it never reads the prompt of an image."""

  def __call__(self, images_RYXC: np.ndarray) -> Sequence[Sequence[Detection]]:
    """Returns the detections of every uint8 image, as one sequence an image."""
    ...
