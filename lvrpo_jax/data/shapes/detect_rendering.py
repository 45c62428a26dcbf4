"""Detector of the shapes world by fitting a rendered shape to every blob.

It is the default detector of evaluation. A blob that no shape fits is reported as `UNKNOWN`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from scipy import ndimage

from lvrpo_jax.data import detection as detection_lib
from lvrpo_jax.data.shapes import palette
from lvrpo_jax.data.shapes import render

WINDOW = 8  # pixels each side of a candidate
PEAK_SIGMA = 2.0  # pixels of smoothing before candidates are searched
PEAK_REACH = 13  # pixels; a candidate is the maximum of a square of this side
PEAK_MIN = 0.2  # smoothed contrast of the faintest candidate, as a share of CONTRAST
CONTRAST = 250.0  # grey levels: length of a typical colour's difference to the background
MISFIT_SCALE = 4.0  # score = exp(-MISFIT_SCALE * unexplained / explained energy)
MIN_FIT = 0.3  # candidates with a lower score count as unexplained
REMAINS = 0.12  # smoothed unexplained contrast that is visible, as a share of CONTRAST
REMAINS_AREA = 8  # pixels
REMAINS_FULL = 0.3  # unexplained contrast that scores 1
MARGIN = 2.0  # pixels around a fitted object in which remains count as its own blur

_OFFSETS = np.arange(-1.5, 1.6, 0.5)
_RADII = np.arange(4.0, 6.6, 0.25)
_GRID = np.arange(-WINDOW, WINDOW + 1, dtype=np.float32)
# Candidates appear at the centre of mass. Of a triangle it lies r/3 below the centre of the box.
_MASS_OFFSET = {shape: (1 / 3 if shape == 'triangle' else 0.0) for shape in render.SHAPES}


@functools.cache
def _template_bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Builds templates_QP over a window; returns them, parameters_Q3 (x, y, radius) and shape_Q."""
  dx, dy, radius = np.meshgrid(_OFFSETS, _OFFSETS, _RADII, indexing='ij')
  templates, parameters, shapes = [], [], []
  for index, shape in enumerate(render.SHAPES):
    parameter_Q3 = np.stack(
      [dx.ravel(), (dy - _MASS_OFFSET[shape] * radius).ravel(), radius.ravel()], -1
    )
    templates.append(_render_windows(shape, parameter_Q3))
    parameters.append(parameter_Q3)
    shapes.append(np.full(len(parameter_Q3), index))
  return (
    np.concatenate(templates).astype(np.float32),
    np.concatenate(parameters),
    np.concatenate(shapes),
  )


def _render_windows(shape: str, parameter_M3: np.ndarray) -> np.ndarray:
  """Renders opacity_MP of one shape in M flattened windows; parameters are x, y, radius, pixels."""
  x, y, radius = (parameter_M3[:, i, None, None] for i in range(3))
  alpha = render.coverage(shape, _GRID[None, None, :] - x, _GRID[None, :, None] - y, radius)
  return alpha.reshape(len(parameter_M3), _GRID.size**2)


@dataclasses.dataclass(frozen=True)
class _Fits:
  """Arrays over M fitted candidates.

  Attributes:
    image_M: index of the image.
    pixel_M2: pixel (y, x) at the centre of the window.
    shape_M, color_M: indices of shape and colour.
    parameter_M3: x and y relative to the centre of that pixel, and radius, pixels.
    score_M: see `detect_by_rendering`.
  """

  image_M: np.ndarray
  pixel_M2: np.ndarray
  shape_M: np.ndarray
  color_M: np.ndarray
  parameter_M3: np.ndarray
  score_M: np.ndarray

  def centres(self) -> np.ndarray:
    """Returns centre_M2 (x, y) in pixels of the image; pixel centres lie at one half."""
    return self.pixel_M2[:, ::-1] + 0.5 + self.parameter_M3[:, :2]


def _find_candidates(difference_RYXC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Finds peaks of smoothed contrast; returns image_M and pixel_M2 (y, x)."""
  smooth = ndimage.gaussian_filter(
    difference_RYXC, (0, PEAK_SIGMA, PEAK_SIGMA, 0), truncate=3.0, mode='nearest'
  )
  energy_RYX = np.sqrt(np.einsum('ryxc,ryxc->ryx', smooth, smooth)) / CONTRAST
  # Symmetric objects have several equal maxima; the ramp keeps one of them.
  energy_RYX += np.linspace(0.0, 1e-3, energy_RYX[0].size).reshape(energy_RYX.shape[1:])
  peak = ndimage.maximum_filter(energy_RYX, (1, PEAK_REACH, PEAK_REACH))
  image_M, y_M, x_M = np.nonzero((energy_RYX == peak) & (energy_RYX > PEAK_MIN))
  return image_M, np.stack([y_M, x_M], -1)


def _cut_windows(
  difference_RYXC: np.ndarray, image_M: np.ndarray, pixel_M2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Cuts windows_MPC around candidates, and weight_MP: 1 where no other candidate is nearer."""
  _, height, width, channels = difference_RYXC.shape
  y_MY = pixel_M2[:, :1] + _GRID.astype(np.int64)
  x_MX = pixel_M2[:, 1:] + _GRID.astype(np.int64)
  inside = ((y_MY >= 0) & (y_MY < height))[:, :, None] & ((x_MX >= 0) & (x_MX < width))[:, None]
  rows, cols = np.clip(y_MY, 0, height - 1), np.clip(x_MX, 0, width - 1)
  windows = difference_RYXC[image_M[:, None, None], rows[:, :, None], cols[:, None, :]]
  own = (y_MY - pixel_M2[:, :1])[:, :, None] ** 2 + (x_MX - pixel_M2[:, 1:])[:, None] ** 2
  first_R = np.searchsorted(image_M, np.arange(len(difference_RYXC)))
  last_R = np.searchsorted(image_M, np.arange(len(difference_RYXC)), side='right')
  mine = inside
  # Candidates of one image follow each other in the list, so they are compared by their rank.
  for rank in range(int((last_R - first_R).max(initial=0))):
    other_M = np.minimum(first_R[image_M] + rank, last_R[image_M] - 1)
    far = (y_MY - pixel_M2[other_M, :1])[:, :, None] ** 2 + (x_MX - pixel_M2[other_M, 1:])[
      :, None
    ] ** 2
    mine = mine & (own <= far)
  flat = (len(image_M), _GRID.size**2)
  return windows.reshape(*flat, channels), mine.reshape(flat).astype(np.float32)


def _refine(
  shape_M: np.ndarray,
  parameter_M3: np.ndarray,
  alpha_MP: np.ndarray,
  weight_MP: np.ndarray,
  steps: int = 2,
  delta: float = 0.1,
) -> np.ndarray:
  """Refines x, y and radius by Gauss-Newton, with derivatives by finite differences of renders."""
  parameter_M3 = parameter_M3.copy()
  for index, shape in enumerate(render.SHAPES):
    at = np.nonzero(shape_M == index)[0]
    for _ in range(steps if len(at) else 0):
      here_MP = _render_windows(shape, parameter_M3[at])
      slope_M3P = (
        np.stack(
          [
            _render_windows(shape, parameter_M3[at] + delta * np.eye(3)[i]) - here_MP
            for i in range(3)
          ],
          1,
        )
        / delta
      )
      heavy_M3P = slope_M3P * weight_MP[at, None]
      normal_M33 = np.einsum('mip,mjp->mij', heavy_M3P, slope_M3P) + 1e-3 * np.eye(3)
      gradient_M3 = np.einsum('mip,mp->mi', heavy_M3P, alpha_MP[at] - here_MP)
      step_M3 = np.linalg.solve(normal_M33, gradient_M3[..., None])[..., 0]
      parameter_M3[at] += np.clip(step_M3, -0.4, 0.4)
      parameter_M3[at, 2] = np.clip(parameter_M3[at, 2], 3.5, 7.0)
  return parameter_M3


def _fit(difference_RYXC: np.ndarray) -> _Fits:
  """Fits one rendered shape to every candidate."""
  image_M, pixel_M2 = _find_candidates(difference_RYXC)
  windows_MPC, weight_MP = _cut_windows(difference_RYXC, image_M, pixel_M2)
  total_MC = np.einsum('mpc,mp->mc', windows_MPC, weight_MP)
  color_M = (total_MC @ palette.UNIT_KC.T).argmax(-1)
  unit_MC, norm_M = palette.UNIT_KC[color_M], palette.NORM_K[color_M]
  alpha_MP = np.einsum('mpc,mc->mp', windows_MPC, unit_MC) / norm_M[:, None]
  bank_QP, parameter_Q3, shape_Q = _template_bank()
  # Sum of w (a - t)^2 without the term that is the same for every template.
  misfit_MQ = weight_MP @ (bank_QP * bank_QP).T - 2 * ((weight_MP * alpha_MP) @ bank_QP.T)
  best_M = misfit_MQ.argmin(-1)
  shape_M = shape_Q[best_M]
  parameter_M3 = _refine(shape_M, parameter_Q3[best_M], alpha_MP, weight_MP)
  model_MP = np.zeros_like(alpha_MP)
  for index, shape in enumerate(render.SHAPES):
    at = shape_M == index
    model_MP[at] = _render_windows(shape, parameter_M3[at])
  rest_MPC = windows_MPC / norm_M[:, None, None] - model_MP[..., None] * unit_MC[:, None]
  unexplained_M = np.einsum('mpc,mpc,mp->m', rest_MPC, rest_MPC, weight_MP)
  explained_M = np.maximum((model_MP * model_MP).sum(-1), 1.0)
  score_M = np.exp(-MISFIT_SCALE * unexplained_M / explained_M)
  return _Fits(
    image_M=image_M,
    pixel_M2=pixel_M2,
    shape_M=shape_M,
    color_M=color_M,
    parameter_M3=parameter_M3,
    score_M=score_M,
  )


def _find_remains(
  difference_RYXC: np.ndarray, fits: _Fits
) -> list[tuple[int, detection_lib.Detection]]:
  """Finds coloured blobs outside all fitted objects, as (image index, detection) pairs."""
  height, width = difference_RYXC.shape[1:3]
  y, x = np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5
  rest_RYXC = difference_RYXC.copy()
  centre_M2 = fits.centres()
  for m in np.nonzero(fits.score_M >= MIN_FIT)[0]:
    covered = render.coverage(
      render.SHAPES[fits.shape_M[m]],
      x - centre_M2[m, 0],
      y - centre_M2[m, 1],
      fits.parameter_M3[m, 2] + MARGIN,
    )
    rest_RYXC[fits.image_M[m]][covered > 0] = 0.0
  smooth_RYXC = palette.smooth(rest_RYXC, np.full(5, 0.2))
  rest_RYX = np.sqrt(np.einsum('ryxc,ryxc->ryx', smooth_RYXC, smooth_RYXC)) / CONTRAST
  ids_RYX, _ = palette.label_regions(rest_RYX > REMAINS)
  result = []
  for region, place in enumerate(ndimage.find_objects(ids_RYX), start=1):
    inside = ids_RYX[place] == region
    if inside.sum() < REMAINS_AREA:
      continue
    image, rows, cols = place
    mean_C = smooth_RYXC[place][inside].mean(0)
    score = min(1.0, float(rest_RYX[place][inside].mean()) / REMAINS_FULL)
    result.append(
      (
        image.start,
        detection_lib.Detection(
          label=detection_lib.UNKNOWN,
          color=palette.COLOR_NAMES[int((palette.UNIT_KC @ mean_C).argmax())],
          box=(float(cols.start), float(rows.start), float(cols.stop), float(rows.stop)),
          score=score,
        ),
      )
    )
  return result


def detect_by_rendering(images_RYXC: np.ndarray) -> list[list[detection_lib.Detection]]:
  """Finds objects by fitting a rendered shape to each peak of contrast (analysis by synthesis).

  The score is exp(-MISFIT_SCALE * unexplained / explained energy) at the palette's full colour.
  Candidates below MIN_FIT, and visible blobs that no fit covers, are reported as UNKNOWN.

  Args:
    images_RYXC: uint8 or float in [0, 255].

  Returns:
    One list of detections for each image, the highest score first, UNKNOWN ones last.

  Raises:
    ValueError: the array does not have axes (R, Y, X, 3).
  """
  difference_RYXC = palette.difference_to_background(images_RYXC)
  fits = _fit(difference_RYXC)
  centre_M2 = fits.centres()
  result = [[] for _ in range(len(images_RYXC))]
  for m in np.argsort(-fits.score_M, kind='stable'):
    if fits.score_M[m] < MIN_FIT:
      break
    x, y, radius = *centre_M2[m].tolist(), float(fits.parameter_M3[m, 2])
    item = render.Object(
      shape=render.SHAPES[fits.shape_M[m]],
      color=palette.COLOR_NAMES[fits.color_M[m]],
      row=0,
      col=0,
      x=x,
      y=y,
      radius=radius,
    )
    result[fits.image_M[m]].append(
      detection_lib.Detection(
        label=item.shape, color=item.color, box=item.box, score=float(fits.score_M[m])
      )
    )
  for image, detection in _find_remains(difference_RYXC, fits):
    result[image].append(detection)
  return result


def leftovers(images_RYXC: np.ndarray) -> float:
  """Mean count per image of coloured blobs that `detect_by_rendering` cannot explain."""
  found = detect_by_rendering(images_RYXC)
  unknown = sum(item.label == detection_lib.UNKNOWN for image in found for item in image)
  return unknown / max(len(found), 1)
