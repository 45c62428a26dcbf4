"""The palette of the shapes world, and the smoothing used by both of its detectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from scipy import ndimage

from lvrpo_jax.data.shapes import render

COLOR_NAMES = tuple(render.COLORS)
"""Names of the K colours, in the order of `NORM_K` and `UNIT_KC`."""

_SHADE_KC = np.asarray(tuple(render.COLORS.values()), np.float32) - np.asarray(
  render.BACKGROUND, np.float32
)
NORM_K = np.linalg.norm(_SHADE_KC, axis=-1)
"""Length of every colour's difference to the background, grey levels."""

UNIT_KC = _SHADE_KC / NORM_K[:, None]
"""Direction of every colour's difference to the background."""

PLANAR = np.zeros((3, 3, 3), bool)
PLANAR[1] = ((0, 1, 0), (1, 1, 1), (0, 1, 0))
"""Structuring element that connects a pixel with its four neighbours within a plane."""


def difference_to_background(images_RYXC: np.ndarray) -> np.ndarray:
  """Subtracts the background colour, in float32.

  Raises:
    ValueError: the array does not have axes (R, Y, X, 3).
  """
  if images_RYXC.ndim != 4 or images_RYXC.shape[-1] != 3:
    raise ValueError(f'images must have axes RYXC with three channels, not {images_RYXC.shape}')
  return images_RYXC.astype(np.float32) - np.asarray(render.BACKGROUND, np.float32)


def smooth(array_RYXC: np.ndarray, kernel: Sequence[float] | np.ndarray) -> np.ndarray:
  """Smooths along Y and X with a separable kernel; edge pixels are repeated."""
  for axis in (1, 2):
    array_RYXC = ndimage.convolve1d(array_RYXC, kernel, axis=axis, mode='nearest')
  return array_RYXC


def label_regions(mask_RYX: np.ndarray) -> tuple[np.ndarray, int]:
  """Returns ids (0 outside the mask) and the count of regions that `PLANAR` connects."""
  # SciPy returns a bare count only where `output` is given.
  return cast(tuple[np.ndarray, int], ndimage.label(mask_RYX, PLANAR))
