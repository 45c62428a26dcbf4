"""Checkpoints in safetensors files: indices, checked and sharded reads, a writer, and digests.

The parameter tables of the model families name the tensors; everything here is independent of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
import hashlib
import json
import os
import pathlib
from typing import BinaryIO, NamedTuple, Protocol

import jax
from jax import numpy as jnp
import numpy as np
import safetensors

from lvrpo_jax import types

FLOATS = frozenset({'F32', 'BF16', 'F16'})
"""Dtypes of tensors that become float32 parameters."""

DIGEST_VERSION = 'v2'
"""Prefix of digests; digests of another version cannot be compared with them."""
DIGEST_BLOCK = 1 << 16
"""Bytes of a block that a digest reads."""
DIGEST_BLOCKS = 16
"""Blocks of a tensor that a digest reads; tensors of at most 1 MiB are thus read whole."""

_MAX_HEADER = 100_000_000
"""Largest header in bytes that the format allows."""

Index = tuple[slice, ...]
"""One slice for every axis of an array."""


class _Slice(Protocol):
  """A tensor in an open file, whose parts are read when they are asked for."""

  def get_shape(self) -> list[int]: ...
  def get_dtype(self) -> str: ...
  def __getitem__(self, index: Index) -> np.ndarray: ...


class _Handle(Protocol):
  """An open safetensors file."""

  def keys(self) -> Iterable[str]: ...
  def get_slice(self, name: str) -> _Slice: ...
  def get_tensor(self, name: str) -> np.ndarray: ...


class StoredTensor(NamedTuple):
  """A tensor in an open file; nothing of it has been read."""

  name: str
  file: pathlib.Path
  handle: _Handle

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.handle.get_slice(self.name).get_shape())

  @property
  def dtype(self) -> str:
    """Dtype as the file names it, such as 'BF16'."""
    return self.handle.get_slice(self.name).get_dtype()

  def read(self, index: Index | None = None) -> np.ndarray:
    """Reads the tensor, or the part at `index`, as float32."""
    if index is None:
      return self.handle.get_tensor(self.name).astype(np.float32)
    return self.handle.get_slice(self.name)[index].astype(np.float32)


def indexed(index: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that an index (`*.index.json`) names.

  Raises:
    ValueError: it cannot be read, or is no index.
  """
  try:
    names = json.loads(index.read_text())['weight_map'].values()
    return [index.with_name(name) for name in sorted(set(names))]
  except OSError as error:
    raise ValueError(f'{index} cannot be read: {error}') from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{index} is no index of safetensors: expected JSON with 'weight_map'"
    ) from error


def open_tensors(files: Iterable[pathlib.Path]) -> dict[str, StoredTensor]:
  """Opens files and returns all of their tensors by name; files close with the last tensor.

  Raises:
    ValueError: a file cannot be read, or two files hold a tensor of one name.
  """
  found: dict[str, StoredTensor] = {}
  for file in files:
    try:
      handle: _Handle = safetensors.safe_open(file, 'np')
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(f'{file} cannot be read (is it truncated?): {error}') from error
    for name in handle.keys():  # noqa: SIM118 (a handle is no mapping)
      if name in found:
        raise ValueError(f'tensor {name} is in {found[name].file} and in {file}')
      found[name] = StoredTensor(name=name, file=file, handle=handle)
  return found


def _either(shapes: Iterable[tuple[int, ...]]) -> str:
  return ' or '.join(str(list(shape)) for shape in shapes)


def check_names(
  stored: Mapping[str, StoredTensor],
  expected: Mapping[str, Sequence[tuple[int, ...]]],
  path: str | os.PathLike,
) -> None:
  """Checks that a checkpoint holds the expected tensors and no others.

  Args:
    expected: allowed shapes by name.
    path: of the checkpoint, for messages.

  Raises:
    ValueError: a tensor is missing or unknown.
  """
  if extra := stored.keys() - expected.keys():
    name = min(extra)
    raise ValueError(f'tensor {name} in {stored[name].file} is not of this configuration')
  if missing := expected.keys() - stored.keys():
    name = min(missing)
    raise ValueError(f'tensor {name} of shape {_either(expected[name])} is missing from {path}')


def check_tensor(
  stored: StoredTensor,
  shapes: Sequence[tuple[int, ...]],
  dtypes: Collection[str] = FLOATS,
) -> None:
  """Checks dtype and shape of a tensor from the header of its file.

  Raises:
    ValueError: its dtype is not in `dtypes`, or its shape not in `shapes`.
  """
  where = f'tensor {stored.name} in {stored.file}'
  if stored.dtype not in dtypes:
    raise ValueError(
      f'{where} has dtype {stored.dtype}; expected one of {sorted(dtypes)}, shape {_either(shapes)}'
    )
  if stored.shape not in shapes:
    raise ValueError(f'{where} has shape {list(stored.shape)}; expected {_either(shapes)}')


def make_array(
  read: Callable[[Index], np.ndarray],
  shape: tuple[int, ...],
  sharding: jax.sharding.Sharding | None,
) -> types.Array:
  """Builds an array from `read(index)`, shard by shard, or whole on the default device if None."""
  if sharding is None:
    return jnp.asarray(read((slice(None),) * len(shape)))

  def callback(index: Index | None) -> np.ndarray:
    assert index is not None
    return read(index)

  return jax.make_array_from_callback(shape, sharding, callback)


def write_float32(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  values: Iterator[tuple[str, np.ndarray]],
) -> None:
  """Writes one float32 file and flushes it to disk.

  Args:
    shapes: of the tensors of this file, in the order of the file.
    values: names and values in the same order; exactly those of `shapes` are taken.
  """
  header, start = {}, 0
  for name, shape in shapes.items():
    end = start + 4 * int(np.prod(shape))
    header[name] = {'dtype': 'F32', 'shape': list(shape), 'data_offsets': [start, end]}
    start = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for _ in shapes:
      file.write(next(values)[1].astype('<f4', copy=False).tobytes())
    file.flush()
    os.fsync(file.fileno())


def digest(files: Iterable[pathlib.Path]) -> str:
  """Computes a digest that tells checkpoints apart without reading all of their bytes.

  It covers the name, the size and the header of every file, and `DIGEST_BLOCKS` blocks of every
  tensor at fixed offsets, evenly spread from its first to its last byte. A 7B model takes about
  0.5 GB of reads. The digest misses a change only if all changed bytes lie between two blocks of a
  tensor, that is, within less than 1/15 of it.

  Modification times are not covered: a workdir records the digest of the checkpoint that it was
  imported from, and a copy or a second download of that checkpoint must have the same digest.

  Raises:
    ValueError: a file cannot be read, is truncated, or is no safetensors file.
  """
  out = hashlib.sha256()
  for file in files:
    try:
      with file.open('rb') as handle:
        size = handle.seek(0, os.SEEK_END)
        header, ranges = _header(handle, size)
        out.update(f'{file.name} {size} {len(header)} '.encode() + header)
        for start, stop in ranges:
          handle.seek(8 + len(header) + start)
          out.update(handle.read(stop - start))
    except (OSError, ValueError) as error:
      raise ValueError(f'{file} cannot be read (is it truncated?): {error}') from error
  return f'{DIGEST_VERSION}:{out.hexdigest()}'


def _header(handle: BinaryIO, size: int) -> tuple[bytes, list[tuple[int, int]]]:
  """Reads the header of a file.

  Returns:
    Its bytes, and the ranges of data bytes that a digest reads, in the order of the file.

  Raises:
    ValueError: it is no header, or names data beyond the end of the file.
  """
  handle.seek(0)
  length = int.from_bytes(handle.read(8), 'little')
  if not 2 <= length <= min(size - 8, _MAX_HEADER):
    raise ValueError(f'a header of {length} bytes in a file of {size} bytes')
  header = handle.read(length)
  try:
    entries = json.loads(header)
    entries.pop('__metadata__', None)
    offsets = sorted(tuple(map(int, entry['data_offsets'])) for entry in entries.values())
    ranges = [part for start, stop in offsets for part in _sampled(start, stop)]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError('its header is no JSON object of tensors') from error
  end = max((stop for _, stop in offsets), default=0)
  if end > size - 8 - length:
    raise ValueError(f'its tensors end at byte {8 + length + end} of {size}')
  return header, ranges


def _sampled(start: int, stop: int) -> list[tuple[int, int]]:
  """Returns the byte ranges of a tensor in [start, stop) that a digest reads."""
  size = stop - start
  if size <= DIGEST_BLOCKS * DIGEST_BLOCK:
    return [(start, stop)]
  last = size - DIGEST_BLOCK
  begins = [start + i * last // (DIGEST_BLOCKS - 1) for i in range(DIGEST_BLOCKS)]
  return [(begin, begin + DIGEST_BLOCK) for begin in begins]
