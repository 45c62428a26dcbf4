"""Token layouts of text and image segments: packed in one sequence, or in padded rows.

The rules are those of BAGEL's released packer (arXiv 2505.14683). Every text is framed
`[bos] ids [eos]`, and every image `[start_of_image] tokens [end_of_image]`. Text takes one RoPE
position a token, an image takes one position in all, and a noised target does not advance the
position. Both forms come from the same pass over the segments, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import token_rows


@dataclasses.dataclass(frozen=True)
class Format:
  """Properties of a model that the packer reads.

  Attributes:
    bos, eos: ids that frame a text.
    start_of_image, end_of_image: ids that frame an image.
    patch_values: values of a ViT patch, P.
    latent_channels: values of a latent token, C.
  """

  bos: int
  eos: int
  start_of_image: int
  end_of_image: int
  patch_values: int
  latent_channels: int


@dataclasses.dataclass(frozen=True)
class Text:
  """A text without its frame.

  Attributes:
    ids: token ids.
    loss: predict the ids and the `eos`, from the `bos` and the ids.
    end_label: label of the `eos`, or None.
    droppable: a condition that guidance training may drop.
  """

  ids: Sequence[int]
  loss: bool = False
  end_label: int | None = None
  droppable: bool = False


@dataclasses.dataclass(frozen=True)
class Vit:
  """An image for the vision tower.

  Attributes:
    patches: pixel patches (N, P).
    position_ids: rows of both ViT position tables (N,).
    droppable: a condition that guidance training may drop.
  """

  patches: np.ndarray
  position_ids: np.ndarray
  droppable: bool = False


@dataclasses.dataclass(frozen=True)
class Latent:
  """An image in latent tokens.

  Attributes:
    position_ids: rows of the latent position table (N,).
    target: True for an image to generate, False for a clean condition.
    droppable: a condition that guidance training may drop.
    frame_delta: step of the RoPE position to the next frame of a video, or None. The frames of a
      video follow each other directly and form one split; all but the last have a `frame_delta`.
    tokens: clean tokens (N, C); None where the autoencoder makes them later.
  """

  position_ids: np.ndarray
  target: bool = False
  droppable: bool = False
  frame_delta: int | None = None
  tokens: np.ndarray | None = None


Segment = Text | Vit | Latent
Sample = Sequence[Segment]
Drops = Sequence[Sequence[bool]]
"""Whether each segment of each sample is left out."""


class Lengths(NamedTuple):
  """Count of places of a row for text and frame tokens, ViT tokens and latent tokens."""

  text: int
  vit: int
  latent: int


@dataclasses.dataclass(frozen=True)
class Packed:
  """Rows of tokens (NumPy arrays), and the places that have a loss.

  Attributes:
    sequence: the model's input. `latents_BNC` holds the clean tokens and `time_BN` is zero;
      noising replaces both.
    label_BL: id to predict at a text place, or `token_rows.NO_LABEL`.
    weight_BL: loss weight: `1 / sqrt(labels of the text)` at its labels, 1 at the label of an end
      token, else 0.
    target_BN: latent tokens that are noised and have a loss. Those of one split
      (`sequence.gen.split_BL`) share one draw of the time.
    image_BN: index of the latent image in its row; -1 on padding.
  """

  sequence: types.Sequence
  label_BL: np.ndarray
  weight_BL: np.ndarray
  target_BN: np.ndarray
  image_BN: np.ndarray


def pack(
  samples: Sequence[Sample],
  form: Format,
  drops: Drops | None = None,
  lengths: Lengths | None = None,
) -> Packed:
  """Packs all samples one after the other in one row (B = 1); no sample attends to another.

  Args:
    samples: lists of segments in logical order.
    form: frame tokens and sizes.
    drops: from `draw_drops`; None keeps every segment.
    lengths: places of every kind; None gives as many as there are tokens.

  Raises:
    ValueError: the row does not fit into `lengths`, or segments are malformed.
  """
  return _assemble([_row(samples, form, drops)], lengths)


def rows(
  samples: Sequence[Sample], form: Format, lengths: Lengths, drops: Drops | None = None
) -> Packed:
  """Lays out one sample a row (B = number of samples), padded to `lengths`; see `pack`."""
  if drops is None:
    return _assemble([_row([sample], form, None) for sample in samples], lengths)
  laid = [_row([sample], form, [drop]) for sample, drop in zip(samples, drops, strict=True)]
  return _assemble(laid, lengths)


def draw_drops(
  samples: Sequence[Sample], rng: np.random.Generator, text: float, vit: float, latent: float
) -> list[list[bool]]:
  """Draws, independently for every droppable segment, which conditions are left out.

  Args:
    samples: lists of segments in logical order.
    rng: source of randomness.
    text, vit, latent: probability for each kind.
  """
  probability = {Text: text, Vit: vit, Latent: latent}
  # One draw for every segment, so that the outcome for a segment depends on its place alone.
  return [
    [bool(rng.random() < probability[type(segment)]) and segment.droppable for segment in sample]
    for sample in samples
  ]


class _Placed(NamedTuple):
  """A segment with its split, attention mode and first RoPE position in a sample."""

  segment: Segment
  split: int
  mode: int
  position: int


def _mode(segment: Segment) -> int:
  """Attention mode of the split that a segment opens."""
  if isinstance(segment, Text):
    return types.CAUSAL
  noised = isinstance(segment, Latent) and segment.target and segment.frame_delta is None
  return types.NOISE if noised else types.FULL


def _advance(segment: Segment) -> int:
  """Distance by which a segment advances the RoPE position."""
  if isinstance(segment, Text):
    return len(segment.ids) + 2
  if isinstance(segment, Vit):
    return 1
  if segment.frame_delta is not None:
    return segment.frame_delta
  return 0 if segment.target else 1


def _place(sample: Sample, drop: Sequence[bool]) -> tuple[list[_Placed], int]:
  """Places the segments of a sample; returns those kept, and the RoPE position of what follows.

  Raises:
    ValueError: a group of frames is malformed, or a segment that is not droppable was dropped.
  """
  placed, position, split, mode, open_group = [], 0, -1, types.CAUSAL, False
  for segment, dropped in zip(sample, drop, strict=True):
    frame = isinstance(segment, Latent)
    if open_group and (dropped or not frame):
      raise ValueError('a frame with frame_delta must be followed by a kept latent frame')
    if dropped:
      if not segment.droppable:
        raise ValueError(f'a {type(segment).__name__} that is not droppable was dropped')
      if frame and segment.frame_delta is not None:
        raise ValueError('the first frame of a group cannot be dropped')
      position += 0 if isinstance(segment, Text) else 1
      continue
    if not open_group:
      split, mode = split + 1, _mode(segment)
    placed.append(_Placed(segment=segment, split=split, mode=mode, position=position))
    position += _advance(segment)
    open_group = frame and segment.frame_delta is not None
  if open_group:
    raise ValueError('the last frame of a group carries a frame_delta')
  return placed, position


def _text_columns(text: Text, form: Format) -> token_rows.Columns:
  """Ids, labels and weights of a framed text."""
  ids = np.array([form.bos, *text.ids, form.eos])
  label, weight = np.full(len(ids), token_rows.NO_LABEL), np.zeros(len(ids))
  if text.loss:
    label[:-1] = ids[1:]
    weight[:-1] = len(label[:-1]) ** -0.5
  if text.end_label is not None:
    label[-1], weight[-1] = text.end_label, 1.0
  return {'ids': ids, 'label': label, 'weight': weight}


def _frame_columns(form: Format) -> token_rows.Columns:
  """Ids, labels and weights of the two frame tokens of an image."""
  return {
    'ids': np.array([form.start_of_image, form.end_of_image]),
    'label': np.full(2, token_rows.NO_LABEL),
    'weight': np.zeros(2),
  }


def _latent_columns(latent: Latent, image: int, form: Format) -> token_rows.Columns:
  """Columns of a latent image's tokens.

  Raises:
    ValueError: the tokens do not have the shape (N, C).
  """
  count = len(latent.position_ids)
  tokens = np.zeros((count, form.latent_channels)) if latent.tokens is None else latent.tokens
  if tokens.shape != (count, form.latent_channels):
    raise ValueError(
      f'latent tokens have shape {tokens.shape}; expected {(count, form.latent_channels)}'
    )
  return {
    'latents': tokens,
    'latent_position': latent.position_ids,
    'target': np.full(count, latent.target),
    'image': np.full(count, image),
  }


def _vit_columns(vit: Vit, image: int, form: Format) -> token_rows.Columns:
  """Columns of a ViT image's tokens.

  Raises:
    ValueError: the patches do not have the shape (N, P).
  """
  expected = (len(vit.position_ids), form.patch_values)
  if vit.patches.shape != expected:
    raise ValueError(f'ViT patches have shape {vit.patches.shape}; expected {expected}')
  return {
    'patches': vit.patches,
    'patch_position': vit.position_ids,
    'patch_image': np.full(expected[0], image),
  }


def _layout_columns(
  placed: _Placed, sample: int, first_order: int, first_split: int
) -> token_rows.Columns:
  """Layout columns of a segment with its frame.

  Args:
    placed: the segment.
    sample: index of the sample in its row.
    first_order: place of the segment's first token in the logical sequence.
    first_split: split of the sample's first segment.
  """
  if isinstance(placed.segment, Text):
    count = len(placed.segment.ids) + 2
    advance = np.arange(count)
  else:
    count = len(placed.segment.position_ids) + 2
    advance = np.full(count, 0)
  return {
    'sample': np.full(count, sample),
    'order': first_order + np.arange(count),
    'split': np.full(count, first_split + placed.split),
    'mode': np.full(count, placed.mode),
    'position': placed.position + advance,
  }


def _row(samples: Sequence[Sample], form: Format, drops: Drops | None) -> token_rows.Row:
  """Lays out the samples of one row."""
  row = token_rows.RowBuilder(form.patch_values, form.latent_channels)
  order = split = position = images = 0
  drops = [[False] * len(sample) for sample in samples] if drops is None else drops
  for index, (sample, drop) in enumerate(zip(samples, drops, strict=True)):
    placed, position = _place(sample, drop)
    for item in placed:
      segment, layout = item.segment, _layout_columns(item, index, order, split)
      order += len(layout['order'])
      if isinstance(segment, Text):
        row.add('text', {**_text_columns(segment, form), **layout})
        continue
      ends = {name: value[[0, -1]] for name, value in layout.items()}
      inside = {name: value[1:-1] for name, value in layout.items()}
      row.add('text', {**_frame_columns(form), **ends})
      if isinstance(segment, Vit):
        row.add('vit', {**_vit_columns(segment, images, form), **inside})
      else:
        row.add('latent', {**_latent_columns(segment, images, form), **inside})
      images += 1
    split += placed[-1].split + 1 if placed else 0
  return row.build(position)


def _assemble(laid: Sequence[token_rows.Row], lengths: Lengths | None) -> Packed:
  """Pads every kind of every row to its length and stacks the rows.

  Raises:
    ValueError: a row does not fit into `lengths`.
  """
  needed = [Lengths(**row.counts()) for row in laid]
  room = Lengths(*map(max, zip(*needed, strict=True))) if lengths is None else lengths
  for index, need in enumerate(needed):
    if any(count > places for count, places in zip(need, room, strict=True)):
      raise ValueError(f'row {index} needs {need}, which does not fit into {room}')
  return Packed(
    sequence=token_rows.stack_sequence(laid, room._asdict()),
    label_BL=token_rows.stack(laid, 'text', 'label', room.text),
    weight_BL=token_rows.stack(laid, 'text', 'weight', room.text),
    target_BN=token_rows.stack(laid, 'latent', 'target', room.latent),
    image_BN=token_rows.stack(laid, 'latent', 'image', room.latent),
  )
