"""Tokens of a row as named columns: collecting, joining, padding and stacking them.

A row has three kinds of tokens: 'text' (text and frame tokens), 'vit' and 'latent'. Every kind has
its own columns, with one entry a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast, NamedTuple

import numpy as np

from lvrpo_jax import types

Columns = dict[str, np.ndarray]
"""Arrays by name, with one entry a token."""

NO_LABEL = -1
"""Label of a place without a loss."""

_LAYOUT = {
  'sample': (types.PADDING, np.int32),
  'order': (0, np.int32),
  'split': (-1, np.int32),
  'mode': (types.CAUSAL, np.int32),
  'position': (0, np.int32),
}
COLUMNS: dict[str, dict[str, tuple[Any, type]]] = {
  'text': {
    'ids': (0, np.int32),
    'label': (NO_LABEL, np.int32),
    'weight': (0.0, np.float32),
    **_LAYOUT,
  },
  'vit': {
    'patches': (0.0, np.float32),
    'patch_position': (0, np.int32),
    'patch_image': (-1, np.int32),
    **_LAYOUT,
  },
  'latent': {
    'latents': (0.0, np.float32),
    'latent_position': (0, np.int32),
    'target': (False, bool),
    'image': (-1, np.int32),
    **_LAYOUT,
  },
}
"""Columns of every kind of token: the value on padding, and the dtype."""


class Row(NamedTuple):
  """Tokens of a row by kind and column, and the RoPE position of what follows."""

  columns: dict[str, Columns]
  next_position: int

  def counts(self) -> dict[str, int]:
    """Count of tokens of every kind."""
    return {kind: len(columns['sample']) for kind, columns in self.columns.items()}


class RowBuilder:
  """Collects the columns of a row, segment by segment.

  Args:
    patch_values: values of a ViT patch, P.
    latent_channels: values of a latent token, C.
  """

  def __init__(self, patch_values: int, latent_channels: int):
    self._empty = {'patches': (0, patch_values), 'latents': (0, latent_channels)}
    self._parts: dict[str, dict[str, list[np.ndarray]]] = {
      kind: {name: [] for name in names} for kind, names in COLUMNS.items()
    }

  def add(self, kind: str, columns: Columns) -> None:
    """Appends tokens of a kind, given by all of its columns."""
    for name, value in columns.items():
      self._parts[kind][name].append(value)

  def build(self, next_position: int) -> Row:
    """Joins all tokens that were added."""
    columns = {
      kind: {name: self._join(kind, name).astype(dtype) for name, (_, dtype) in names.items()}
      for kind, names in COLUMNS.items()
    }
    # Latent images have indices of their own, in the order in which the autoencoder encodes them.
    seen = columns['latent']['image']
    columns['latent']['image'] = np.searchsorted(np.unique(seen), seen).astype(np.int32)
    return Row(columns=columns, next_position=next_position)

  def _join(self, kind: str, name: str) -> np.ndarray:
    parts = self._parts[kind][name]
    return np.concatenate(parts) if parts else np.zeros(self._empty.get(name, (0,)))


def stack(rows: Sequence[Row], kind: str, name: str, length: int) -> np.ndarray:
  """Pads a column of every row to `length` and stacks the rows."""
  value, dtype = COLUMNS[kind][name]
  first = rows[0].columns[kind][name]
  out = np.full((len(rows), length, *first.shape[1:]), value, dtype)
  for index, row in enumerate(rows):
    column = row.columns[kind][name]
    out[index, : len(column)] = column
  return out


def stack_sequence(rows: Sequence[Row], lengths: Mapping[str, int]) -> types.Sequence:
  """Stacks rows to the model's input (NumPy arrays), with `time_BN` zero.

  Args:
    rows: the rows.
    lengths: places of every kind, to which the rows are padded.
  """

  def field(kind: str, name: str) -> types.Array:
    return _as_field(stack(rows, kind, name, lengths[kind]))

  def layout(kind: str) -> types.Layout:
    return types.Layout(
      sample_BL=field(kind, 'sample'),
      order_BL=field(kind, 'order'),
      split_BL=field(kind, 'split'),
      mode_BL=field(kind, 'mode'),
      position_BL=field(kind, 'position'),
    )

  return types.Sequence(
    ids_BL=field('text', 'ids'),
    text=layout('text'),
    patches_BNP=field('vit', 'patches'),
    patch_position_BN=field('vit', 'patch_position'),
    patch_image_BN=field('vit', 'patch_image'),
    vit=layout('vit'),
    latents_BNC=field('latent', 'latents'),
    latent_position_BN=field('latent', 'latent_position'),
    time_BN=_as_field(np.zeros((len(rows), lengths['latent']), np.float32)),
    gen=layout('latent'),
    next_position_B=_as_field(np.array([row.next_position for row in rows], np.int32)),
  )


def _as_field(array: np.ndarray) -> types.Array:
  """Types a NumPy array as the JAX array that a compiled function will read."""
  return cast(types.Array, array)
