"""GenEval's rules over detections, their stricter form, and the matching rules for edits.

The rules are those of https://github.com/djghosh13/geneval (arXiv 2310.11513): score thresholds of
0.3, or 0.9 for counting; the `count` most certain boxes of a class; relations with a margin of a
tenth of the boxes' sizes; `exclude` entries. Two additions are made: `region` entries (a corner or
a half of the image that must hold an object's centre) and `parts`, a soft score in [0, 1]. A score
from a detector other than GenEval's must not be called a GenEval score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import detection as detection_lib

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16  # of a class; the most certain ones count
POSITION_MARGIN = 0.1  # of the summed sizes of both boxes
NO_RELATION = 1e-3  # pixels: smaller reduced offsets have no relation
LOOSE_COMPONENT = 0.5  # of the unit direction: a relation holds up to 60 degrees
STRICT_COMPONENT = math.cos(math.radians(30))  # up to 30 degrees: diagonals have no relation

KEEP_REACH = 3.0  # pixels that a kept object's centre may move
KEEP_TOLERANCE = 8.0  # grey levels: mean absolute change allowed outside the edited cells

Spec = dict[str, types.Json]
"""A GenEval record, or one of its entries; see `data.shapes.world` and `data.shapes.edits`."""

_SIDES = {'left': (0, -1), 'right': (0, 1), 'top': (1, -1), 'bottom': (1, 1)}
_RELATIONS = {'left of': (0, -1), 'right of': (0, 1), 'above': (1, -1), 'below': (1, 1)}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Result of the rules for one image.

  Attributes:
    correct: True if the image satisfies all parts of its spec.
    parts: mean of the parts, in [0, 1].
  """

  correct: bool
  parts: float


def relations(
  a: detection_lib.Detection, b: detection_lib.Detection, strict: bool = False
) -> frozenset[str]:
  """Returns the relations of a to b that hold: 'left of', 'right of', 'above', 'below'.

  The offset of the centres is reduced by POSITION_MARGIN of the summed box sizes on each axis,
  and divided by its unreduced length, as in GenEval. The result's components are compared with
  LOOSE_COMPONENT. Strict asks in addition that the unreduced direction lies within 30 degrees of
  the axis.
  """
  offset = np.subtract(a.centre, b.centre)
  size = sum(np.subtract(d.box[2:], d.box[:2]) for d in (a, b))
  reduced = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_MARGIN * size, 0.0)
  if np.all(np.abs(reduced) < NO_RELATION):
    return frozenset()
  length = np.linalg.norm(offset)
  holds = set()
  for name, (axis, sign) in _RELATIONS.items():
    loose = sign * reduced[axis] / length > LOOSE_COMPONENT
    if loose and (not strict or sign * offset[axis] / length > STRICT_COMPONENT):
      holds.add(name)
  return frozenset(holds)


def in_region(centre: tuple[float, float], region: str, size: tuple[float, float]) -> bool:
  """Whether a centre (x, y) lies in a region such as 'top' or 'top left' of an image.

  Args:
    centre: (x, y) in pixels.
    region: one or two of left, right, top, bottom.
    size: (width, height) of the image in pixels.

  Raises:
    KeyError: on an unknown region.
  """
  for word in region.split():
    axis, sign = _SIDES[word]
    if sign * (centre[axis] - size[axis] / 2) <= 0:
      return False
  return True


def _uncertainty(detection: detection_lib.Detection) -> float:
  """Returns a sort key that puts the most certain detection first."""
  return -detection.score


def _by_class(
  detections: Sequence[detection_lib.Detection], threshold: float
) -> dict[str, list[detection_lib.Detection]]:
  """Groups the detections above the threshold by class, the most certain first."""
  found: dict[str, list[detection_lib.Detection]] = {}
  for detection in sorted(detections, key=_uncertainty):
    if detection.score > threshold:
      found.setdefault(detection.label, []).append(detection)
  return {label: items[:MAX_OBJECTS] for label, items in found.items()}


def _take(
  found: dict[str, list[detection_lib.Detection]], entry: Spec, size: tuple[float, float]
) -> tuple[list[detection_lib.Detection], list[float]]:
  """Returns the boxes that represent an include entry, and the entry's parts, each in [0, 1].

  As in GenEval, the `count` most certain boxes of the class represent the entry, and its colour and
  its region are compared with these. The part of a relation is not among the parts.
  """
  count = entry['count']
  boxes = found.get(entry['class'], [])
  taken = boxes[:count]
  parts = [min(len(boxes), count) / count]
  if 'color' in entry:
    parts.append(sum(d.color == entry['color'] for d in taken) / count)
  if 'region' in entry:
    parts.append(sum(in_region(d.centre, entry['region'], size) for d in taken) / count)
  return taken, parts


def evaluate(
  detections: Sequence[detection_lib.Detection],
  spec: Spec,
  strict: bool = False,
  size: tuple[float, float] = (32.0, 32.0),
  threshold: float = THRESHOLD,
  counting_threshold: float = COUNTING_THRESHOLD,
) -> Verdict:
  """Compares the detections of one image with a GenEval record.

  Args:
    detections: objects found in the image.
    spec: {"tag", "include": [...], "exclude": [...]}, see `data.shapes.world`.
    strict: relations must lie within 30 degrees of their axis, and no UNKNOWN object may score
      above `threshold`.
    size: (width, height) of the image in pixels, for regions.
    threshold: objects of a score at or below it do not count.
    counting_threshold: the same where the tag is 'counting'.

  Returns:
    A verdict; `parts` is the mean over counts, colours, regions, relations and exclusions. A
    relation that fails for any pair scores 0, and surplus objects lower the part of an exclusion to
    0 at the least.
  """
  counting = spec['tag'] == 'counting'
  found = _by_class(detections, counting_threshold if counting else threshold)
  groups, parts = [], []
  for entry in spec['include']:
    taken, scores = _take(found, entry, size)
    if 'position' in entry:
      relation, other = entry['position']
      pairs = [(a, b) for a in taken for b in groups[other]]
      holds = bool(pairs) and all(relation in relations(a, b, strict) for a, b in pairs)
      complete = scores[0] == 1.0 and len(groups[other]) == spec['include'][other]['count']
      scores.append(float(holds and complete))
    groups.append(taken)
    parts.extend(scores)
  for entry in spec.get('exclude', ()):
    boxes = found.get(entry['class'], [])
    surplus = len(boxes) - (entry['count'] - 1)
    parts.append(min(1.0, max(0.0, 1.0 - surplus / max(entry['count'] - 1, 1))))
  if strict:
    unknown = any(d.label == detection_lib.UNKNOWN and d.score > threshold for d in detections)
    parts.append(float(not unknown))
  return Verdict(all(part == 1.0 for part in parts), float(np.mean(parts)))


def surplus(
  detections: Sequence[detection_lib.Detection],
  spec: Spec,
  threshold: float = THRESHOLD,
  counting_threshold: float = COUNTING_THRESHOLD,
) -> int:
  """Counts the known objects above the threshold of `evaluate` beyond those of the record.

  It is at least 0.
  """
  threshold = counting_threshold if spec['tag'] == 'counting' else threshold
  known = sum(d.label != detection_lib.UNKNOWN and d.score > threshold for d in detections)
  return max(known - sum(entry['count'] for entry in spec['include']), 0)


def _touched(spec: Spec, shape: tuple[int, int]) -> np.ndarray:
  """Returns the mask (Y, X) of the quarters that an edit may change.

  They are the quarters of its gone boxes and of its new regions.
  """
  height, width = shape
  y = (np.arange(height)[:, None] + 0.5) * 2 > height
  x = (np.arange(width)[None, :] + 0.5) * 2 > width
  mask_YX = np.zeros(shape, bool)
  for x0, y0, x1, y1 in spec['gone']:
    mask_YX |= (y == (y0 + y1 > height)) & (x == (x0 + x1 > width))
  for entry in spec['new']:
    words = entry['region'].split()
    rows = [y == (word == 'bottom') for word in words if word in ('top', 'bottom')]
    cols = [x == (word == 'right') for word in words if word in ('left', 'right')]
    region_YX = np.ones(shape, bool)
    for side in rows + cols:
      region_YX &= side
    mask_YX |= region_YX
  return mask_YX


def _inside(centre: tuple[float, float], box: Sequence[float]) -> bool:
  """Whether a centre (x, y) lies in a box."""
  x0, y0, x1, y1 = box
  return x0 <= centre[0] <= x1 and y0 <= centre[1] <= y1


def evaluate_edit(
  source_image_YXC: np.ndarray,
  image_YXC: np.ndarray,
  detections: Sequence[detection_lib.Detection],
  spec: Spec,
  strict: bool = False,
  threshold: float = THRESHOLD,
  tolerance: float = KEEP_TOLERANCE,
) -> Verdict:
  """Compares an edited image with its source, and its detections with the edit's record.

  Every kept object must be found (class, colour, centre within KEEP_REACH), every new object must
  stand in its region, a gone box may hold no object but a new one, no further objects may appear,
  and pixels outside the touched quarters must not change.

  Args:
    source_image_YXC: the image before the edit, uint8 or float in [0, 255].
    image_YXC: the image after it, of the same shape.
    detections: objects found in the edited image.
    spec: {"tag", "keep", "gone", "new"}, see `data.shapes.edits`.
    strict: no UNKNOWN object may score above `threshold`.
    threshold: objects of a score at or below it do not count.
    tolerance: mean absolute difference in grey levels allowed outside the touched quarters.

  Raises:
    ValueError: if the images differ in shape.
  """
  if source_image_YXC.shape != image_YXC.shape:
    raise ValueError(f'images of shapes {source_image_YXC.shape} and {image_YXC.shape}')
  height, width = image_YXC.shape[:2]
  left = sorted(
    (d for d in detections if d.label != detection_lib.UNKNOWN and d.score > threshold),
    key=_uncertainty,
  )
  parts = [_claim(left, entry, _near(entry['box'])) for entry in spec['keep']]
  new = [_claim(left, entry, _within(entry['region'], (width, height))) for entry in spec['new']]
  gone = [float(not any(_inside(d.centre, box) for d in left)) for box in spec['gone']]
  parts.extend(new + gone)
  parts.append(float(not left))
  untouched_YX = ~_touched(spec, (height, width))
  change_YX = np.abs(image_YXC.astype(np.float64) - source_image_YXC.astype(np.float64)).mean(-1)
  if untouched_YX.any():
    parts.append(float(change_YX[untouched_YX].mean() <= tolerance))
  if strict:
    unknown = any(d.label == detection_lib.UNKNOWN and d.score > threshold for d in detections)
    parts.append(float(not unknown))
  return Verdict(all(part == 1.0 for part in parts), float(np.mean(parts)))


def _near(box: Sequence[float]) -> Callable[[detection_lib.Detection], bool]:
  """Makes a test of whether an object's centre is within KEEP_REACH of a box's centre."""
  centre = np.add(box[:2], box[2:]) / 2

  def fits(detection: detection_lib.Detection) -> bool:
    return math.dist(detection.centre, centre) <= KEEP_REACH

  return fits


def _within(region: str, size: tuple[float, float]) -> Callable[[detection_lib.Detection], bool]:
  """Makes a test of whether an object's centre lies in a region; see `in_region`."""

  def fits(detection: detection_lib.Detection) -> bool:
    return in_region(detection.centre, region, size)

  return fits


def _claim(
  left: list[detection_lib.Detection], entry: Spec, fits: Callable[[detection_lib.Detection], bool]
) -> float:
  """Removes the first object that fits an entry from `left`; returns 1.0, or 0.0 if none fits.

  An object fits if it has the entry's class and colour and passes the test `fits`.
  """
  for detection in left:
    if (detection.label, detection.color) == (entry['class'], entry['color']) and fits(detection):
      left.remove(detection)
      return 1.0
  return 0.0
