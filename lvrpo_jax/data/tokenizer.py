"""Text tokenizers, read from Hugging Face `tokenizers` files or made from a list of words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import json
import os

import tokenizers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

from lvrpo_jax import types

SPECIAL = {
  'bos': '<|im_start|>',
  'eos': '<|im_end|>',
  'start_of_image': '<|vision_start|>',
  'end_of_image': '<|vision_end|>',
}
"""Special tokens by role, with the names of Qwen2.5."""

UNKNOWN = '[UNK]'
"""Token by which a word-level tokenizer replaces a word outside its vocabulary."""

QWEN_SPLIT = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
"""Qwen2's word split, needed where only the vocabulary and the merges are given."""


class Tokenizer:
  """Encodes and decodes text; special tokens are looked up by name and appended if absent.

  Attributes:
    backend: the Hugging Face tokenizer.
    bos, eos, start_of_image, end_of_image: ids of the special tokens.
    added: count of special tokens that the file lacked; the embedding table must grow by it.
  """

  def __init__(self, backend: tokenizers.Tokenizer):
    self.backend = backend
    missing = [token for token in SPECIAL.values() if backend.token_to_id(token) is None]
    self.added = backend.add_special_tokens(missing)
    self.bos, self.eos, self.start_of_image, self.end_of_image = (
      self._special_id(role) for role in SPECIAL
    )

  def _special_id(self, role: str) -> int:
    token_id = self.backend.token_to_id(SPECIAL[role])
    assert token_id is not None, role  # Absent ones have just been added.
    return token_id

  def __len__(self) -> int:
    return self.backend.get_vocab_size(with_added_tokens=True)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without frame tokens.

    Raises:
      ValueError: the text has a word that the vocabulary cannot express; the message names it.
    """
    encoding = self.backend.encode(text, add_special_tokens=False)
    unknown = self.backend.token_to_id(UNKNOWN)
    if unknown is not None and unknown in encoding.ids:
      word = text[slice(*encoding.offsets[encoding.ids.index(unknown)])]
      raise ValueError(f'the tokenizer has no token for {word!r} in {text!r}')
    return encoding.ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text up to the first end token, without special tokens."""
    ids = [int(token_id) for token_id in ids]
    if self.eos in ids:
      ids = ids[: ids.index(self.eos)]
    return self.backend.decode(ids, skip_special_tokens=True)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes a `tokenizer.json` that `from_file` and Hugging Face read."""
    self.backend.save(os.fspath(path))


def from_words(words: Sequence[str]) -> Tokenizer:
  """Makes a word-level tokenizer: one token a word, split at white space."""
  vocabulary = {word: index for index, word in enumerate((UNKNOWN, *words))}
  backend = tokenizers.Tokenizer(token_models.WordLevel(vocabulary, unk_token=UNKNOWN))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  return Tokenizer(backend)


def from_path(path: str | os.PathLike[str]) -> Tokenizer:
  """Loads `tokenizer.json`, or a folder that holds it or `vocab.json` and `merges.txt`.

  Raises:
    FileNotFoundError: none of these files exists.
    ValueError: a file is not of a tokenizer.
  """
  path = os.fspath(path)
  single = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
  vocab, merges = (os.path.join(path, name) for name in ('vocab.json', 'merges.txt'))
  if os.path.isfile(single):
    try:
      return Tokenizer(tokenizers.Tokenizer.from_file(single))
    except Exception as error:  # The Rust binding raises bare Exception for any bad file.
      raise ValueError(f'{single} is no tokenizer file: {error}') from error
  if os.path.isfile(vocab) and os.path.isfile(merges):
    backend = _byte_level_backend(vocab, merges)
    _add_tokens(backend, path)
    return Tokenizer(backend)
  raise FileNotFoundError(
    f'no tokenizer at {path}: expected tokenizer.json, or vocab.json and merges.txt'
  )


def _byte_level_backend(vocab: str, merges: str) -> tokenizers.Tokenizer:
  """Makes a byte-level BPE tokenizer with Qwen2's normalisation and word split.

  Raises:
    ValueError: the files are not of a tokenizer.
  """
  try:
    backend = tokenizers.Tokenizer(token_models.BPE.from_file(vocab, merges))
  except Exception as error:  # The Rust binding raises bare Exception for any bad file.
    raise ValueError(f'{vocab} and {merges} are no tokenizer: {error}') from error
  backend.normalizer = tokenizers.normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(QWEN_SPLIT), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  backend.decoder = tokenizers.decoders.ByteLevel()
  return backend


def _read_added_tokens(content: types.Json) -> dict[str, int]:
  """Ids by token of `added_tokens.json`."""
  return content


def _read_tokenizer_config(content: types.Json) -> dict[str, int]:
  """Ids by token of `tokenizer_config.json`."""
  entries = content.get('added_tokens_decoder', {})
  return {entry['content']: int(token_id) for token_id, entry in entries.items()}


def _add_tokens(backend: tokenizers.Tokenizer, folder: str) -> None:
  """Adds the tokens listed in files beside the vocabulary, at the ids given there.

  Raises:
    ValueError: a file cannot be read, or its ids do not continue those of the vocabulary.
  """
  wanted: dict[str, int] = {}
  readers = {
    'added_tokens.json': _read_added_tokens,
    'tokenizer_config.json': _read_tokenizer_config,
  }
  for name, read in readers.items():
    path = os.path.join(folder, name)
    if os.path.isfile(path):
      try:
        with open(path, encoding='utf-8') as file:
          wanted.update(read(json.load(file)))
      except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'cannot read {path}: {error!r}') from error
  for token, token_id in sorted(wanted.items(), key=lambda item: item[1]):
    if backend.token_to_id(token) is None:
      backend.add_special_tokens([token])
    if backend.token_to_id(token) != token_id:
      raise ValueError(
        f'{folder}: token {token!r} should have id {token_id}, but would have '
        f'{backend.token_to_id(token)}'
      )
