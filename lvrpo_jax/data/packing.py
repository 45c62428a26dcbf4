"""Segments of text and images to token layouts: packed in one sequence, or in padded rows.

The rules are those of BAGEL's released packer (arXiv 2505.14683): every text is framed
`[bos] ids [eos]` and every image `[start_of_image] tokens [end_of_image]`; text takes one RoPE
position a token, an image one position in all, and a noised target does not advance the position
at all. Both layouts come from the same walk over the segments, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from lvrpo_jax import types

NO_LABEL = -1
"""`Packed.label_BL` of a place without a loss."""


@dataclasses.dataclass(frozen=True)
class Format:
  """What the packer must know of a model.

  Attributes:
    bos, eos: frame of a text.
    start_of_image, end_of_image: frame of an image.
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
    end_label: what the `eos` must predict, or None.
    droppable: a condition that guidance training may drop.
  """

  ids: Sequence[int]
  loss: bool = False
  end_label: int | None = None
  droppable: bool = False


@dataclasses.dataclass(frozen=True)
class Vit:
  """An image for the vision tower: patches (N, P) and their rows of the position tables (N,)."""

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
    frame_delta: step of the RoPE position to the next frame. The frames of a video follow each
      other directly; all but the last have it, and together they form one split.
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
"""For every segment of every sample: is it left out?"""


class Lengths(NamedTuple):
  """Places of a row for text and frame tokens, ViT tokens and latent tokens."""

  text: int
  vit: int
  latent: int


@dataclasses.dataclass(frozen=True)
class Packed:
  """Rows of tokens (NumPy arrays), and where the losses are.

  Attributes:
    sequence: the model's input. `latents_BNC` holds the clean tokens and `time_BN` is zero;
      noising replaces both.
    label_BL: what a text place must predict, or `NO_LABEL`.
    weight_BL: `1 / sqrt(labels of the text)` there, 1 for the label of an end token, else 0.
    target_BN: latent tokens that are noised and have a loss. Those of one split
      (`sequence.gen.split_BL`) share one draw of the time.
    image_BN: number of the latent image in its row; -1 on padding.
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
  """All samples behind each other in one row (B = 1); no sample sees another.

  Args:
    samples: lists of segments in logical order.
    form: frame tokens and sizes.
    drops: from `draw_drops`; None keeps every segment.
    lengths: places of every kind; None gives exactly as many as there are tokens.

  Raises:
    ValueError: the row does not fit into `lengths`, or segments are malformed.
  """
  return _assemble([_row(samples, form, drops)], lengths)


def rows(
  samples: Sequence[Sample], form: Format, lengths: Lengths, drops: Drops | None = None
) -> Packed:
  """One sample a row (B = number of samples), padded to `lengths`; see `pack`."""
  drops = [None] * len(samples) if drops is None else [[drop] for drop in drops]
  return _assemble([_row([sample], form, drop) for sample, drop in zip(samples, drops)], lengths)


def draw_drops(
  samples: Sequence[Sample], rng: np.random.Generator, text: float, vit: float, latent: float
) -> list[list[bool]]:
  """Draws, independently for every droppable segment, which conditions are left out.

  Args:
    text, vit, latent: probability for each kind.
  """
  probability = {Text: text, Vit: vit, Latent: latent}
  # One draw for every segment, so that a segment's fate depends on its place alone.
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
  """Mode of the split that a segment opens."""
  if isinstance(segment, Text):
    return types.CAUSAL
  noised = isinstance(segment, Latent) and segment.target and segment.frame_delta is None
  return types.NOISE if noised else types.FULL


def _advance(segment: Segment) -> int:
  """How far a segment moves the RoPE position."""
  if isinstance(segment, Text):
    return len(segment.ids) + 2
  if isinstance(segment, Vit):
    return 1
  if segment.frame_delta is not None:
    return segment.frame_delta
  return 0 if segment.target else 1


def _place(sample: Sample, drop: Sequence[bool]) -> tuple[list[_Placed], int]:
  """Walks over a sample; returns what is kept, and the position of what comes next."""
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
    placed.append(_Placed(segment, split, mode, position))
    position += _advance(segment)
    open_group = frame and segment.frame_delta is not None
  if open_group:
    raise ValueError('the last frame of a group carries a frame_delta')
  return placed, position


def _text_columns(text: Text, form: Format) -> dict[str, np.ndarray]:
  """Ids, labels and weights of a framed text."""
  ids = np.array([form.bos, *text.ids, form.eos])
  label, weight = np.full(len(ids), NO_LABEL), np.zeros(len(ids))
  if text.loss:
    label[:-1] = ids[1:]
    weight[:-1] = len(label[:-1]) ** -0.5
  if text.end_label is not None:
    label[-1], weight[-1] = text.end_label, 1.0
  return dict(ids=ids, label=label, weight=weight)


def _latent_columns(latent: Latent, image: int, form: Format) -> dict[str, np.ndarray]:
  """Columns of a latent image's tokens."""
  count = len(latent.position_ids)
  tokens = np.zeros((count, form.latent_channels)) if latent.tokens is None else latent.tokens
  if tokens.shape != (count, form.latent_channels):
    raise ValueError(
      f'latent tokens have shape {tokens.shape}; expected {(count, form.latent_channels)}'
    )
  return dict(
    latents=tokens,
    latent_position=latent.position_ids,
    target=np.full(count, latent.target),
    image=np.full(count, image),
  )


def _vit_columns(vit: Vit, image: int, form: Format) -> dict[str, np.ndarray]:
  """Columns of a ViT image's tokens."""
  expected = (len(vit.position_ids), form.patch_values)
  if vit.patches.shape != expected:
    raise ValueError(f'ViT patches have shape {vit.patches.shape}; expected {expected}')
  return dict(
    patches=vit.patches, patch_position=vit.position_ids, patch_image=np.full(expected[0], image)
  )


_LAYOUT = dict(
  sample=(types.PADDING, np.int32),
  order=(0, np.int32),
  split=(-1, np.int32),
  mode=(types.CAUSAL, np.int32),
  position=(0, np.int32),
)
_COLUMNS = dict(
  text=dict(ids=(0, np.int32), label=(NO_LABEL, np.int32), weight=(0.0, np.float32), **_LAYOUT),
  vit=dict(
    patches=(0.0, np.float32), patch_position=(0, np.int32), patch_image=(-1, np.int32), **_LAYOUT
  ),
  latent=dict(
    latents=(0.0, np.float32),
    latent_position=(0, np.int32),
    target=(False, bool),
    image=(-1, np.int32),
    **_LAYOUT,
  ),
)
"""Columns of every kind of token: the value on padding, and the dtype."""


class _Row(NamedTuple):
  """Tokens of a row by kind and column, and the RoPE position of what follows."""

  columns: dict[str, dict[str, np.ndarray]]
  next_position: int


def _row(samples: Sequence[Sample], form: Format, drops: Drops | None) -> _Row:
  """Lays out the samples of one row."""
  parts = {kind: {name: [] for name in names} for kind, names in _COLUMNS.items()}
  widths = dict(patches=(0, form.patch_values), latents=(0, form.latent_channels))

  def add(kind, columns, layout):
    for name, value in {**columns, **layout}.items():
      parts[kind][name].append(value)

  order = split = position = images = 0
  drops = [[False] * len(sample) for sample in samples] if drops is None else drops
  for number, (sample, drop) in enumerate(zip(samples, drops, strict=True)):
    placed, position = _place(sample, drop)
    for segment, own_split, mode, start in placed:
      text = isinstance(segment, Text)
      count = len(segment.ids if text else segment.position_ids) + 2
      full = lambda value, count=count: np.full(count, value)
      layout = dict(
        sample=full(number),
        order=order + np.arange(count),
        split=full(split + own_split),
        mode=full(mode),
        position=start + (np.arange(count) if text else full(0)),
      )
      order += count
      if text:
        add('text', _text_columns(segment, form), layout)
        continue
      frame = dict(
        ids=np.array([form.start_of_image, form.end_of_image]),
        label=np.full(2, NO_LABEL),
        weight=np.zeros(2),
      )
      add('text', frame, {name: value[[0, -1]] for name, value in layout.items()})
      kind, columns = (
        ('vit', _vit_columns) if isinstance(segment, Vit) else ('latent', _latent_columns)
      )
      add(
        kind, columns(segment, images, form), {name: value[1:-1] for name, value in layout.items()}
      )
      images += 1
    split += placed[-1].split + 1 if placed else 0
  columns = {
    kind: {
      name: (
        np.concatenate(parts[kind][name]) if parts[kind][name] else np.zeros(widths.get(name, (0,)))
      ).astype(dtype)
      for name, (_, dtype) in names.items()
    }
    for kind, names in _COLUMNS.items()
  }
  # Latent images are counted apart, in the order in which the autoencoder meets them.
  seen = columns['latent']['image']
  columns['latent']['image'] = np.searchsorted(np.unique(seen), seen).astype(np.int32)
  return _Row(columns, position)


def _assemble(laid: list[_Row], lengths: Lengths | None) -> Packed:
  """Pads every kind of every row to its length and stacks the rows."""
  if lengths is None:
    lengths = Lengths(*(max(len(row.columns[kind]['sample']) for row in laid) for kind in _COLUMNS))
  for number, row in enumerate(laid):
    needed = Lengths(*(len(row.columns[kind]['sample']) for kind in _COLUMNS))
    if any(need > room for need, room in zip(needed, lengths)):
      raise ValueError(f'row {number} needs {needed}, which does not fit into {lengths}')

  def stack(kind: str, name: str) -> np.ndarray:
    value, dtype = _COLUMNS[kind][name]
    first = laid[0].columns[kind][name]
    out = np.full((len(laid), lengths[list(_COLUMNS).index(kind)], *first.shape[1:]), value, dtype)
    for number, row in enumerate(laid):
      column = row.columns[kind][name]
      out[number, : len(column)] = column
    return out

  layout = lambda kind: types.Layout(*(stack(kind, name) for name in _LAYOUT))
  latents = stack('latent', 'latents')
  sequence = types.Sequence(
    ids_BL=stack('text', 'ids'),
    text=layout('text'),
    patches_BNP=stack('vit', 'patches'),
    patch_position_BN=stack('vit', 'patch_position'),
    patch_image_BN=stack('vit', 'patch_image'),
    vit=layout('vit'),
    latents_BNC=latents,
    latent_position_BN=stack('latent', 'latent_position'),
    time_BN=np.zeros(latents.shape[:2], np.float32),
    gen=layout('latent'),
    next_position_B=np.array([row.next_position for row in laid], np.int32),
  )
  return Packed(
    sequence,
    stack('text', 'label'),
    stack('text', 'weight'),
    stack('latent', 'target'),
    stack('latent', 'image'),
  )


def reference_arrays(packed: Packed) -> dict[str, np.ndarray]:
  """The arrays of the released packer, under its names, from a single row.

  `*_indexes` are places in the logical sequence; `split_lens` and `attn_modes` list the splits.

  Raises:
    ValueError: there is more than one row.
  """
  sequence = packed.sequence
  if len(sequence.ids_BL) != 1:
    raise ValueError(f'{len(sequence.ids_BL)} rows; the released packer makes one')
  segments = dict(text=sequence.text, vit=sequence.vit, gen=sequence.gen)
  used = {kind: layout.sample_BL[0] != types.PADDING for kind, layout in segments.items()}
  pick = lambda kind, x_BL: x_BL[0][used[kind]]
  order = {kind: pick(kind, layout.order_BL) for kind, layout in segments.items()}
  places = np.concatenate(list(order.values()))

  def logical(name: str) -> np.ndarray:
    values = [pick(kind, segments[kind].__dict__[name]) for kind in segments]
    return np.concatenate(values)[np.argsort(places)]

  split_L, labels = logical('split_BL'), pick('text', packed.label_BL)
  _, first, split_lens = np.unique(split_L, return_index=True, return_counts=True)
  has_label = labels != NO_LABEL
  return {
    'sequence_length': np.int32(len(places)),
    'sample_lens': np.bincount(logical('sample_BL')).astype(np.int32),
    'packed_text_ids': pick('text', sequence.ids_BL),
    'packed_text_indexes': order['text'],
    'packed_position_ids': logical('position_BL'),
    'packed_vit_tokens': pick('vit', sequence.patches_BNP),
    'packed_vit_position_ids': pick('vit', sequence.patch_position_BN),
    'packed_vit_token_indexes': order['vit'],
    'vit_token_seqlens': np.unique(pick('vit', sequence.patch_image_BN), return_counts=True)[
      1
    ].astype(np.int32),
    'packed_latent_position_ids': pick('gen', sequence.latent_position_BN),
    'packed_vae_token_indexes': order['gen'],
    'mse_loss_indexes': order['gen'][pick('gen', packed.target_BN)],
    'ce_loss_indexes': order['text'][has_label],
    'packed_label_ids': labels[has_label],
    'ce_loss_weights': pick('text', packed.weight_BL)[has_label],
    'split_lens': split_lens.astype(np.int32),
    'attn_modes': logical('mode_BL')[first],
  }
