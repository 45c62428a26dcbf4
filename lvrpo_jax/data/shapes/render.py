"""Scenes of coloured shapes on a 2x2 grid, and their exact rendering.

A scene holds one to four objects, at most one in each cell. Every object lies wholly inside its
cell, antialiasing included. Objects therefore never overlap, the drawing order does not matter, and
changing one object leaves the pixels of all other cells unchanged.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

SIZE = 32  # pixels a side of an image
GRID = 2  # cells a side
CELL = SIZE // GRID  # pixels a side of a cell
JITTER = 1.5  # pixels: a centre lies within this of its cell's centre, along each axis
MIN_RADIUS = 4.5  # pixels
MAX_RADIUS = 6.0  # pixels: MAX_RADIUS + JITTER + 1/2 (antialiasing) fits into half a cell
MAX_OBJECTS = GRID * GRID

SQUARE_HALF_SIDE = 0.9  # of the radius; keeps a square's area near that of the other shapes
CROSS_HALF_WIDTH = 0.32  # of the radius: half the width of an arm

SHAPES = ('circle', 'square', 'triangle', 'diamond', 'cross')
BACKGROUND = (232, 232, 232)
COLORS = {
  'red': (230, 30, 30),
  'green': (30, 170, 50),
  'blue': (40, 60, 230),
  'yellow': (240, 200, 20),
  'purple': (180, 40, 200),
  'cyan': (30, 200, 220),
}
CORNERS = ('top left', 'top right', 'bottom left', 'bottom right')


@dataclasses.dataclass(frozen=True)
class Object:
  """One drawn shape; x grows to the right and y downwards.

  Attributes:
    shape, color: names in `SHAPES` and `COLORS`.
    row, col: place of the cell on the grid.
    x, y: centre, pixels.
    radius: pixels.
  """

  shape: str
  color: str
  row: int
  col: int
  x: float
  y: float
  radius: float

  @property
  def cell(self) -> int:
    """Index of the cell, row-major."""
    return self.row * GRID + self.col

  @property
  def corner(self) -> str:
    """Name of the cell, for example 'top left'."""
    return CORNERS[self.cell]

  @property
  def box(self) -> tuple[float, float, float, float]:
    """Bounding box (x0, y0, x1, y1) in pixels; its centre is (x, y) for every shape."""
    half = self.radius * (SQUARE_HALF_SIDE if self.shape == 'square' else 1.0)
    return (self.x - half, self.y - half, self.x + half, self.y + half)


@dataclasses.dataclass(frozen=True)
class Scene:
  """One to four objects, at most one in each cell.

  Raises:
    ValueError: the number of objects is out of range, or two objects share a cell.
  """

  objects: tuple[Object, ...]

  def __post_init__(self) -> None:
    if not 1 <= len(self.objects) <= MAX_OBJECTS:
      raise ValueError(f'a scene holds 1 to {MAX_OBJECTS} objects, not {len(self.objects)}')
    cells = {(item.row, item.col) for item in self.objects}
    if len(cells) != len(self.objects):
      raise ValueError('two objects share a cell')

  def content(self) -> frozenset[tuple[str, str, int]]:
    """Set of (shape, colour, cell index), which leaves out jitter and size."""
    return frozenset((item.shape, item.color, item.cell) for item in self.objects)


def draw_object(rng: np.random.Generator, shape: str, color: str, cell: int) -> Object:
  """Places a shape in a cell (0..3, row-major) with random jitter and radius."""
  u, v, w = rng.random(3).tolist()
  row, col = divmod(cell, GRID)
  return Object(
    shape=shape,
    color=color,
    row=row,
    col=col,
    x=(col + 0.5) * CELL + JITTER * (2 * u - 1),
    y=(row + 0.5) * CELL + JITTER * (2 * v - 1),
    radius=MIN_RADIUS + (MAX_RADIUS - MIN_RADIUS) * w,
  )


def coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray | float) -> np.ndarray:
  """Antialiased opacity in [0, 1] of a shape at offsets (dx, dy) from its centre, in pixels.

  Opacity is clip(1/2 - signed distance, 0, 1). The signed distance is exact near edges and a bound
  near corners. All arguments broadcast.

  Raises:
    ValueError: the shape is unknown.
  """
  if shape == 'circle':
    distance = np.sqrt(dx * dx + dy * dy) - radius
  elif shape == 'square':
    distance = np.maximum(abs(dx), abs(dy)) - SQUARE_HALF_SIDE * radius
  elif shape == 'diamond':
    distance = (abs(dx) + abs(dy) - radius) * np.sqrt(0.5)
  elif shape == 'triangle':
    # Apex (0, -r), base from (-r, r) to (r, r): the slanted sides are 2|x| - y = r.
    distance = np.maximum((2 * abs(dx) - dy - radius) * np.sqrt(0.2), dy - radius)
  elif shape == 'cross':
    width = CROSS_HALF_WIDTH * radius
    across, along = abs(dx), abs(dy)
    distance = np.minimum(
      np.maximum(across - radius, along - width), np.maximum(across - width, along - radius)
    )
  else:
    raise ValueError(f'unknown shape {shape!r}')
  return np.clip(0.5 - distance, 0.0, 1.0)


@functools.cache
def _cell_pixels() -> tuple[np.ndarray, np.ndarray]:
  """Returns the pixel centres of one cell, as a column of y and a row of x."""
  centre = np.arange(CELL) + 0.5
  return centre[:, None], centre[None, :]


def render(scene: Scene) -> np.ndarray:
  """Draws a scene as a uint8 image_YXC of SIZE x SIZE x 3; the result is exactly reproducible."""
  image_YXC = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
  y, x = _cell_pixels()
  background_C = np.asarray(BACKGROUND, np.float64)
  for item in scene.objects:
    top, left = item.row * CELL, item.col * CELL
    alpha_YX = coverage(item.shape, x - (item.x - left), y - (item.y - top), item.radius)
    shade_C = np.asarray(COLORS[item.color], np.float64) - background_C
    cell_YXC = background_C + alpha_YX[..., None] * shade_C
    image_YXC[top : top + CELL, left : left + CELL] = np.rint(cell_YXC)
  return image_YXC
