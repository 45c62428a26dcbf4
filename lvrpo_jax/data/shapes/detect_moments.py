"""Detector of the shapes world by connected components of one colour and shape moments.

It is the default detector of the rules reward.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from lvrpo_jax.data import detection
from lvrpo_jax.data.shapes import palette
from lvrpo_jax.data.shapes import render

FOREGROUND = 0.35  # opacity (after smoothing) above which a pixel belongs to an object
MIN_AREA = 12  # pixels; the smallest object has about 40
NOISE_SCALE = 0.25  # off-colour deviation that halves a score, as a share of the colour's contrast
FEATURE_NOISE = 0.02  # deviation allowed to every feature beyond that of clean renders
SHAPE_SLACK = 20.0  # squared deviations from the nearest shape that cost nothing
REFERENCE_RADII = (4.75, 5.25, 5.75)  # pixels
REFERENCE_BLURS = (0.0, 0.5, 1.0)  # pixels; at 1.5 a small cross has the moments of a diamond
SHAPE_SCALE = 80.0  # further squared deviations that cost a factor e


@dataclasses.dataclass(frozen=True)
class _Components:
  """Arrays over M components.

  Attributes:
    image_M: index of the image.
    color_M: index of the colour in the palette.
    box_M4: (x0, y0, x1, y1) in pixels.
    definition_M: opacity-weighted mean opacity; blur and faintness lower it.
    noise_M: deviation of the pixels from the colour, as a share of the colour's contrast.
    feature_MF: shape features.
  """

  image_M: np.ndarray
  color_M: np.ndarray
  box_M4: np.ndarray
  definition_M: np.ndarray
  noise_M: np.ndarray
  feature_MF: np.ndarray


def _label_components(difference_RYXC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Groups pixels of one colour; returns id_RYX (0 is background) and the colour of each id."""
  height, width = difference_RYXC.shape[1:3]
  smooth_RYXC = palette.smooth(difference_RYXC, (0.25, 0.5, 0.25))
  along_RYXK = smooth_RYXC @ palette.UNIT_KC.T
  color_RYX = along_RYXK.argmax(-1)
  strength_RYX = along_RYXK.max(-1) / palette.NORM_K[color_RYX]
  mask_RYX = strength_RYX > FOREGROUND
  each_KYX = np.arange(len(palette.NORM_K))[:, None, None]
  planes_RKYX = mask_RYX[:, None] & (color_RYX[:, None] == each_KYX)
  planes = planes_RKYX.reshape(-1, height, width)
  ids, total = palette.label_regions(planes)
  area_M = np.bincount(ids.ravel(), minlength=total + 1)
  keep_M = area_M >= MIN_AREA
  keep_M[0] = False
  renumber_M = np.where(keep_M, np.cumsum(keep_M), 0)
  ids_RKYX = renumber_M[ids].reshape(planes_RKYX.shape)
  id_RYX = ids_RKYX.max(1)
  color_M = np.zeros(int(keep_M.sum()) + 1, np.int64)
  color_M[id_RYX] = color_RYX
  # The rim of a blurred or antialiased object lies below the threshold, so regions grow by 1 pixel.
  grown_RYX = ndimage.maximum_filter(id_RYX, size=(1, 3, 3))
  return np.where(id_RYX > 0, id_RYX, grown_RYX), color_M


def _measure_components(difference_RYXC: np.ndarray) -> _Components:
  """Measures every component by opacity-weighted moments up to order four."""
  id_RYX, color_M = _label_components(difference_RYXC)
  total = len(color_M)
  image, y, x = (axis.astype(np.float64) for axis in np.nonzero(id_RYX))
  ids = id_RYX[id_RYX > 0]
  pixels_PC = difference_RYXC[id_RYX > 0].astype(np.float64)
  color_P = color_M[ids]
  alpha = np.einsum('pc,pc->p', pixels_PC, palette.UNIT_KC[color_P]) / palette.NORM_K[color_P]
  off_PC = pixels_PC / palette.NORM_K[color_P, None] - alpha[:, None] * palette.UNIT_KC[color_P]
  weight = np.clip(alpha, 0.0, 1.0)

  def add(values: np.ndarray) -> np.ndarray:
    """Sums values over the pixels of every component."""
    return np.bincount(ids, weights=values, minlength=total)[1:]

  count_M = np.maximum(add(np.ones_like(alpha)), 1.0)
  mass_M = np.maximum(add(weight), 1e-6)
  mean_x_M, mean_y_M = add(weight * x) / mass_M, add(weight * y) / mass_M
  dx, dy = x - mean_x_M[ids - 1], y - mean_y_M[ids - 1]
  square = dx * dx + dy * dy

  def moment(values: np.ndarray) -> np.ndarray:
    """Opacity-weighted mean over the pixels of every component."""
    return add(weight * values) / mass_M

  spread_M = np.maximum(moment(square), 1e-3)
  definition_M = add(weight * weight) / mass_M
  features = (
    2 * np.pi * spread_M * definition_M / mass_M,
    moment(np.sqrt(square)) / spread_M**0.5,
    moment(abs(dx * dy)) / spread_M,
    moment(weight) * moment(weight) / np.maximum(moment(weight * weight), 1e-6),
    moment(square * square) / spread_M**2,
    moment(dx**4 - 6 * dx * dx * dy * dy + dy**4) / spread_M**2,
    moment(dy**3) / spread_M**1.5,
    moment(dx**3) / spread_M**1.5,
    moment(dx * dy * (dx * dx - dy * dy)) / spread_M**2,
    moment(dx * dy) / spread_M,
    moment(dx * dx - dy * dy) / spread_M,
  )
  box_M4 = np.zeros((total - 1, 4))
  box_M4[:, :2] = np.inf
  inside = alpha > 0.5 * definition_M[ids - 1]
  at = ids[inside] - 1
  np.minimum.at(box_M4[:, 0], at, x[inside])
  np.minimum.at(box_M4[:, 1], at, y[inside])
  np.maximum.at(box_M4[:, 2], at, x[inside] + 1)
  np.maximum.at(box_M4[:, 3], at, y[inside] + 1)
  image_M = (add(image) / count_M).astype(np.int64)
  noise_M = np.sqrt(add((off_PC * off_PC).sum(-1)) / count_M)
  return _Components(
    image_M=image_M,
    color_M=color_M[1:],
    box_M4=box_M4,
    definition_M=definition_M,
    noise_M=noise_M,
    feature_MF=np.stack(features, -1),
  )


@functools.cache
def _shape_statistics() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Computes statistics of renders of S shapes, at U pairs of radius and blur.

  Returns:
    mean_SUF and inverse covariance_SUFF of features, and the mean definition_S of sharp renders.
  """
  rng = np.random.default_rng(0)
  means, inverses, definitions = [], [], []
  for shape in render.SHAPES:
    for radius in REFERENCE_RADII:
      sharp_RYXC = _render_references(rng, shape, radius)
      for blur in REFERENCE_BLURS:
        blurred_RYXC = ndimage.gaussian_filter(sharp_RYXC, (0, blur, blur, 0))
        found = _measure_components(palette.difference_to_background(blurred_RYXC))
        means.append(found.feature_MF.mean(0))
        spread_FF = np.cov(found.feature_MF.T)
        inverses.append(np.linalg.inv(spread_FF + FEATURE_NOISE**2 * np.eye(len(spread_FF))))
        if not blur:
          definitions.append(found.definition_M.mean())
  width = means[0].size
  return (
    np.reshape(means, (len(render.SHAPES), -1, width)),
    np.reshape(inverses, (len(render.SHAPES), -1, width, width)),
    np.reshape(definitions, (len(render.SHAPES), -1)).mean(-1),
  )


def _render_references(rng: np.random.Generator, shape: str, radius: float) -> np.ndarray:
  """Renders float images_RYXC full of one shape at about one radius, pixels."""
  images = []
  for _ in range(12):
    objects = (
      render.draw_object(rng, shape, color, cell)
      for cell, color in enumerate(('red', 'green', 'blue', 'yellow'))
    )
    size = radius + rng.uniform(-0.25, 0.25)
    scene = render.Scene(tuple(dataclasses.replace(item, radius=size) for item in objects))
    images.append(render.render(scene))
  return np.stack(images).astype(np.float32)


def detect_components(images_RYXC: np.ndarray) -> list[list[detection.Detection]]:
  """Finds objects as connected components of one colour, and their shape by moments.

  The score is the product of three factors in [0, 1]: how full and sharp the colour is, how
  little the pixels deviate from the colour, and how well the moments fit the nearest shape.

  Args:
    images_RYXC: uint8 or float in [0, 255].

  Returns:
    One list of detections for each image, the highest score first.

  Raises:
    ValueError: the array does not have axes (R, Y, X, 3).
  """
  found = _measure_components(palette.difference_to_background(images_RYXC))
  result = [[] for _ in range(len(images_RYXC))]
  if not len(found.image_M):
    return result
  mean_SUF, inverse_SUFE, definition_S = _shape_statistics()
  off_MSUF = found.feature_MF[:, None, None] - mean_SUF
  distance_MS = np.einsum(
    'msuf,sufe,msue->msu', off_MSUF, inverse_SUFE, off_MSUF, optimize=True
  ).min(-1)
  shape_M = distance_MS.argmin(-1)
  excess_M = np.maximum(distance_MS.min(-1) - SHAPE_SLACK, 0.0)
  sharp_M = np.minimum(found.definition_M / definition_S[shape_M], 1.0)
  clean_M = 1.0 / (1.0 + (found.noise_M / NOISE_SCALE) ** 2)
  score_M = sharp_M * clean_M * np.exp(-excess_M / SHAPE_SCALE)
  for m in np.argsort(-score_M, kind='stable'):
    result[found.image_M[m]].append(
      detection.Detection(
        label=render.SHAPES[shape_M[m]],
        color=palette.COLOR_NAMES[found.color_M[m]],
        box=tuple(found.box_M4[m].tolist()),
        score=float(score_M[m]),
      )
    )
  return result
