"""What both detectors share: the record they return, the palette and smoothing."""

from collections.abc import Sequence
import dataclasses

import numpy as np
from scipy import ndimage

from lvrpo_jax.data.shapes import render

UNKNOWN = 'unknown'


@dataclasses.dataclass(frozen=True)
class Detection:
  """A found object: `box` (x0, y0, x1, y1) in pixels, `score` in [0, 1]; UNKNOWN is a label."""

  label: str
  color: str
  box: tuple[float, float, float, float]
  score: float

  @property
  def centre(self) -> tuple[float, float]:
    """(x, y) of the box's centre."""
    x0, y0, x1, y1 = self.box
    return (x0 + x1) / 2, (y0 + y1) / 2


COLOR_NAMES = tuple(render.COLORS)
_SHADE_KC = np.asarray(tuple(render.COLORS.values()), np.float32) - np.asarray(
  render.BACKGROUND, np.float32
)
NORM_K = np.linalg.norm(_SHADE_KC, axis=-1)
UNIT_KC = _SHADE_KC / NORM_K[:, None]


def difference_to_background(images_RYXC: np.ndarray) -> np.ndarray:
  """Float32 difference to the background.

  Raises:
    ValueError: if the array is not R, Y, X, 3.
  """
  if images_RYXC.ndim != 4 or images_RYXC.shape[-1] != 3:
    raise ValueError(f'images must have axes RYXC with three channels, not {images_RYXC.shape}')
  return images_RYXC.astype(np.float32) - np.asarray(render.BACKGROUND, np.float32)


def smooth(array_RYXC: np.ndarray, kernel: Sequence[float]) -> np.ndarray:
  """Separable smoothing along Y and X with edge pixels repeated."""
  for axis in (1, 2):
    array_RYXC = ndimage.convolve1d(array_RYXC, kernel, axis=axis, mode='nearest')
  return array_RYXC


PLANAR = np.zeros((3, 3, 3), bool)  # connects the four neighbours within a plane
PLANAR[1] = ((0, 1, 0), (1, 1, 1), (0, 1, 0))
