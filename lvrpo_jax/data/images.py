"""Conversions between image files, byte images and the pixel images that the model reads.

A byte image is `image_YXC`, uint8, RGB. A pixel image has the same layout, float32 in [-1, 1].
"""

from __future__ import annotations

import io
import os
from typing import NamedTuple

import numpy as np
from PIL import Image

MAX_PIXELS = 14 * 14 * 9 * 1024
"""Default largest area of all images of a sample together, pixels."""


class ResizeRule(NamedTuple):
  """Arguments of `resize_rule` after the size, in its order."""

  max_side: int
  min_side: int
  stride: int
  max_pixels: int = MAX_PIXELS
  img_num: int = 1


def resize_rule(
  w: int,
  h: int,
  max_side: int,
  min_side: int,
  stride: int,
  max_pixels: int = MAX_PIXELS,
  img_num: int = 1,
) -> tuple[int, int]:
  """Computes the size to which the BAGEL release resizes an image.

  Both sides are brought between `min_side` and `max_side`, and each is rounded on its own to a
  multiple of `stride`. Two points are the behaviour of the release: an area above
  `max_pixels / img_num` shrinks the sides by the ratio of the areas, which is more than needed, and
  `max_side` takes precedence over `min_side`.

  Args:
    w: width in pixels.
    h: height in pixels.
    max_side: largest length of the longer side, pixels.
    min_side: smallest length of the shorter side, pixels.
    stride: both sides become multiples of it, pixels.
    max_pixels: largest area of all images of a sample together, pixels.
    img_num: number of images of the sample.

  Returns:
    (width, height) in pixels.

  Raises:
    ValueError: a side is not positive.
  """
  if w < 1 or h < 1:
    raise ValueError(f'an image of {w} x {h} pixels cannot be resized')

  def scaled(w: int, h: int, scale: float) -> tuple[int, int]:
    w, h = (max(stride, round(round(side * scale) / stride) * stride) for side in (w, h))
    return w, h

  w, h = scaled(w, h, max(min(max_side / max(w, h), 1.0), min_side / min(w, h)))
  if w * h > max_pixels / img_num:
    w, h = scaled(w, h, max_pixels / img_num / (w * h))
  if max(w, h) > max_side:
    w, h = scaled(w, h, max_side / max(w, h))
  return w, h


def load_image(source: str | os.PathLike | bytes) -> np.ndarray:
  """Reads an image file, or the bytes of one, as RGB; transparent parts become white.

  Returns:
    Byte image, shape (Y, X, 3).

  Raises:
    ValueError: the file is missing, truncated or not an image; the message names it.
  """
  if isinstance(source, bytes):
    file, name = io.BytesIO(source), f'{len(source)} bytes in memory'
  else:
    file, name = source, os.fspath(source)
  try:
    with Image.open(file) as image:
      return np.array(_to_rgb(image))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise ValueError(f'cannot read image {name}: {error}') from error


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts to RGB on white.

  As in the released code, transparency counts in RGBA images and in files that mark one colour as
  transparent, but not in LA images.
  """
  if image.mode != 'RGBA' and 'transparency' not in image.info:
    return image.convert('RGB')
  rgba = image.convert('RGBA')
  white = Image.new('RGB', image.size, (255, 255, 255))
  white.paste(rgba, mask=rgba.getchannel('A'))
  return white


def resize(image_YXC: np.ndarray, rule: ResizeRule) -> np.ndarray:
  """Resizes a byte image to the size given by `rule`."""
  return resize_to(image_YXC, resize_rule(image_YXC.shape[1], image_YXC.shape[0], *rule))


def resize_to(image_YXC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a byte image to (width, height): bicubic, antialiased, rounded to bytes."""
  return np.array(Image.fromarray(image_YXC).resize(size, Image.Resampling.BICUBIC))


def transform(image_YXC: np.ndarray, rule: ResizeRule) -> np.ndarray:
  """Resizes a byte image and maps its values to [-1, 1].

  Args:
    image_YXC: byte image, shape (Y, X, 3).
    rule: the target size, see `resize_rule`.

  Returns:
    Pixel image of the new size, float32.
  """
  unit_YXC = resize(image_YXC, rule).astype(np.float32) / np.float32(255)
  return (unit_YXC - np.float32(0.5)) / np.float32(0.5)


def to_bytes(image_YXC: np.ndarray) -> np.ndarray:
  """Maps [-1, 1] to 0..255, clipped; fractions are truncated, as in the BAGEL release."""
  unit_YXC = (np.asarray(image_YXC, np.float32) * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
  return (unit_YXC * np.float32(255)).astype(np.uint8)


def save_png(path: str | os.PathLike, image_YXC: np.ndarray) -> None:
  """Writes a byte image (Y, X, 3) as a PNG file.

  Raises:
    ValueError: the image is not uint8; `to_bytes` converts it.
  """
  if image_YXC.dtype != np.uint8:
    raise ValueError(f'a PNG takes uint8 values, not {image_YXC.dtype}')
  Image.fromarray(image_YXC).save(path, format='PNG')
