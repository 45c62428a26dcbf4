"""From examples to static arrays, and grain iterators over them.

Every task has one row template, so a batch has one shape. In memory a row is
`[text | ViT | latents]`; the logical order is in the layouts:

  generate     bos caption eos                                             -> image
  understand   [soi ViT eoi] bos question eos                              -> bos answer eos
  edit         [soi latents eoi] [soi ViT eoi] bos instruction eos         -> image
  think_generate  bos caption eos                                          -> bos plan eos -> image
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import grain
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tokenizer as tokenizer_lib

GENERATE, UNDERSTAND, EDIT, THINK = 'generate', 'understand', 'edit', 'think_generate'
TASKS = (GENERATE, UNDERSTAND, EDIT, THINK)
PLAN = 'plan'
"""The text half of `THINK` where both halves of a trajectory stand side by side."""
TEXTS = (UNDERSTAND, PLAN)
"""Outputs that are texts; all others are images."""


@dataclasses.dataclass(frozen=True)
class Template:
  """Static lengths of the rows.

  Attributes:
    prompt_words, answer_words: most tokens of a text, without its frame.
    vit_tokens, latent_tokens: tokens of an image for either encoder.
    uniform: gives the rows of all tasks one shape, with padding where a task has no image, so that
      one pass encodes them all. It pays where images are small and compilation is dear.
    image_size: pixels a side, for the padding of uniform rows.
  """
  prompt_words: int
  answer_words: int
  vit_tokens: int
  latent_tokens: int
  uniform: bool = False
  image_size: int = 0


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt and all that is known about it.

  Attributes:
    index: its number; random draws for the row depend on it alone.
    prompt: caption, question or instruction.
    source: uint8 (Y, X, 3), the image shown, or None.
    target: uint8 (Y, X, 3), an image to draw, or None.
    answer: an answer, in pretraining as found, elsewhere the right one; of `THINK`, in pretraining,
      a plan of the image.
    kind: category for scores.
    meaning: canonical text of what is meant; prompts of one meaning count as one cluster.
    spec: record for rule rewards, JSON-able (GenEval's format for images).
    questions: (question, answer) pairs a judge may be asked about an image drawn for the prompt.
    statement: turns an answer into a statement about the source image.
    drop_text, drop_vit, drop_latents: conditions left out, to train guidance.
  """
  index: int
  prompt: str
  source: np.ndarray | None = None
  target: np.ndarray | None = None
  answer: str | None = None
  kind: str = ''
  meaning: str = ''
  spec: dict[str, Any] | None = None
  questions: tuple[tuple[str, str], ...] = ()
  statement: Callable[[str], str] | None = None
  drop_text: bool = False
  drop_vit: bool = False
  drop_latents: bool = False

  def asked(self, iteration: int) -> tuple[str, str]:
    """The (question, answer) of an iteration, one after the other; ('', '') if there is none."""
    return (self.inquiry(iteration, 1) or [('', '')])[0]

  def inquiry(self, iteration: int, most: int) -> list[tuple[str, str]]:
    """The (question, answer) pairs of an iteration: all, or `most` after those of the last one."""
    number = len(self.questions)
    return [self.questions[(iteration * most + i) % number] for i in range(min(most, number))]


class Encoder:
  """Turns examples of one task into `types.Batch` of NumPy arrays."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, template: Template):
    self.tokenizer = tokenizer
    self.template = template

  def __call__(self, task: str, examples: Sequence[Example]) -> types.Batch:
    """Encodes a batch.

    Raises:
      ValueError: a text is longer than the template; nothing is truncated.
    """
    shown = {UNDERSTAND: ('vit',), EDIT: ('latents', 'vit')}.get(task, ())
    sources = [e.source for e in examples]
    if self.template.uniform and not shown:
      sources = [np.zeros((self.template.image_size,) * 2 + (3,), np.uint8)] * len(examples)
    stack = lambda pictures, used: (
        np.stack(pictures) if used else np.zeros((len(examples), 0, 0, 3), np.uint8))
    answers, mask = self._answers([e.answer or '' for e in examples]
                                  if task in (UNDERSTAND, THINK) else [])
    return types.Batch(
        prompts=self._prompts(examples, shown, stack(sources, shown or self.template.uniform)),
        target_BYXC=stack([e.target for e in examples], task != UNDERSTAND),
        answer_BL=answers if len(answers) else np.zeros((len(examples), 0), np.int32),
        answer_mask_BL=mask if len(mask) else np.zeros((len(examples), 0), bool))

  def _frame(self, texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """`[bos] ids [eos]` padded to words + 2, and the number of ids of every row."""
    t = self.tokenizer
    out = np.full((len(texts), words + 2), t.eos, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      ids = t.encode(text)
      if len(ids) > words:
        raise ValueError(f'{text!r} has {len(ids)} tokens; data.prompt_words or '
                         f'data.answer_words allows {words}')
      out[row, 0] = t.bos
      out[row, 1:1 + len(ids)] = ids
      lengths[row] = len(ids)
    return out, lengths

  def _answers(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, lengths = self._frame(texts, self.template.answer_words)
    return ids, np.arange(ids.shape[1] - 1) <= lengths[:, None]

  def _prompts(self, examples: Sequence[Example], shown: tuple[str, ...], source: np.ndarray
               ) -> types.Prompts:
    t = self.tokenizer
    text_ids, lengths = self._frame([e.prompt for e in examples], self.template.prompt_words)
    B, L = text_ids.shape
    dropped = {'text': [e.drop_text for e in examples], 'vit': [e.drop_vit for e in examples],
               'latents': [e.drop_latents for e in examples]}
    dropped = {kind: np.array(rows, bool)[:, None] for kind, rows in dropped.items()}
    sizes = {'vit': self.template.vit_tokens, 'latents': self.template.latent_tokens}
    images = ('latents', 'vit') if self.template.uniform else shown
    pieces = {'text': [], 'vit': [], 'latents': []}
    order = position = 0
    for split, kind in enumerate(images):
      args = (split, types.FULL, position, dropped[kind] | (kind not in shown))
      pieces['text'].append(_layout(B, np.array([order, order + sizes[kind] + 1]), *args))
      pieces[kind].append(_layout(B, order + 1 + np.arange(sizes[kind]), *args))
      order += sizes[kind] + 2
      position += kind in shown
    place = np.arange(L)
    padding = place > lengths[:, None] + 1
    pieces['text'].append(_layout(B, order + place, len(images), types.CAUSAL, position + place,
                                  dropped['text'] | padding))
    frame = np.tile([t.start_of_image, t.end_of_image], (B, len(images))).astype(np.int32)
    next_position = position + np.where(dropped['text'][:, 0], 0, lengths + 2)
    joined = {kind: _join(parts, B) for kind, parts in pieces.items()}
    return types.Prompts(
        ids_BL=np.concatenate([frame, text_ids], axis=1), text=joined['text'], vit=joined['vit'],
        gen=joined['latents'], next_position_B=next_position.astype(np.int32), source_BYXC=source,
        index_B=np.array([e.index for e in examples], np.int32))


def _layout(rows: int, place: np.ndarray, split: int, mode: int, position: Any, drop: np.ndarray
            ) -> types.Layout:
  ones = np.ones((rows, len(place)), np.int32)
  return types.Layout(np.where(drop, types.PADDING, 0 * ones), place * ones, split * ones,
                      mode * ones, position * ones)


def _join(parts: list[types.Layout], rows: int) -> types.Layout:
  empty = np.zeros((rows, 0), np.int32)
  fields = [f.name for f in dataclasses.fields(types.Layout)]
  return types.Layout(*(
      np.concatenate([empty, *(part.__dict__[name] for part in parts)], axis=1).astype(np.int32)
      for name in fields))


class Source(grain.sources.RandomAccessDataSource):
  """A procedural task as a random-access source: element i is `make(i)`.

  `length` bounds the epoch; indices beyond it are never asked for by grain.
  """

  def __init__(self, make: Callable[[int], Any], length: int):
    self._make, self._length = make, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> Any:
    return self._make(int(index))


def batches(source: Source, batch_size: int, collate: Callable[[Sequence[Any]], Any],
            shard: tuple[int, int] = (0, 1), prefetch: int = 4) -> grain.DatasetIterator:
  """Endless batches in source order, with a state of one integer.

  Args:
    batch_size: rows of this shard's part.
    shard: (index of this process, number of processes); rows are dealt out in turn.
    prefetch: batches made ahead by background threads.
  """
  index, count = shard
  data = grain.MapDataset.source(source).repeat(None)[index::count]
  data = data.batch(batch_size, batch_fn=collate)
  return iter(data.to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)))
