"""From examples to static arrays, and grain iterators over them.

Every task has one row template, so a batch has one shape. In memory a row is
`[text | ViT | latents]`; the logical order is in the layouts:

  generate     bos caption eos                                             -> image
  understand   [soi ViT eoi] bos question eos                              -> bos answer eos
  edit         [soi latents eoi] [soi ViT eoi] bos instruction eos         -> image
  think_generate  bos caption eos                                          -> bos plan eos -> image
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib


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


class Encoder:
  """Turns examples of one task into `types.Batch` of NumPy arrays."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, template: Template):
    self.tokenizer = tokenizer
    self.template = template

  def __call__(self, task: str, examples: Sequence[examples_lib.Example]) -> types.SupervisedBatch:
    """Encodes a batch.

    Raises:
      ValueError: a text is longer than the template; nothing is truncated.
    """
    shown = {tasks.UNDERSTAND: ('vit',), tasks.EDIT: ('latents', 'vit')}.get(task, ())
    sources = [e.source for e in examples]
    if self.template.uniform and not shown:
      sources = [np.zeros((self.template.image_size,) * 2 + (3,), np.uint8)] * len(examples)
    stack = lambda pictures, used: (
      np.stack(pictures) if used else np.zeros((len(examples), 0, 0, 3), np.uint8)
    )
    answers, mask = self._answers(
      [e.answer or '' for e in examples] if task in (tasks.UNDERSTAND, tasks.THINK_GENERATE) else []
    )
    return types.SupervisedBatch(
      prompts=self._prompts(examples, shown, stack(sources, shown or self.template.uniform)),
      target_BYXC=stack([e.target for e in examples], task != tasks.UNDERSTAND),
      answer_BL=answers if len(answers) else np.zeros((len(examples), 0), np.int32),
      answer_mask_BL=mask if len(mask) else np.zeros((len(examples), 0), bool),
    )

  def _frame(self, texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """`[bos] ids [eos]` padded to words + 2, and the number of ids of every row."""
    t = self.tokenizer
    out = np.full((len(texts), words + 2), t.eos, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      ids = t.encode(text)
      if len(ids) > words:
        raise ValueError(
          f'{text!r} has {len(ids)} tokens; data.prompt_tokens or data.answer_tokens allows {words}'
        )
      out[row, 0] = t.bos
      out[row, 1 : 1 + len(ids)] = ids
      lengths[row] = len(ids)
    return out, lengths

  def _answers(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, lengths = self._frame(texts, self.template.answer_words)
    return ids, np.arange(ids.shape[1] - 1) <= lengths[:, None]

  def _prompts(
    self, examples: Sequence[examples_lib.Example], shown: tuple[str, ...], source: np.ndarray
  ) -> types.Prompts:
    t = self.tokenizer
    text_ids, lengths = self._frame([e.prompt for e in examples], self.template.prompt_words)
    B, L = text_ids.shape
    dropped = {
      'text': [e.drop_text for e in examples],
      'vit': [e.drop_vit for e in examples],
      'latents': [e.drop_latents for e in examples],
    }
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
    pieces['text'].append(
      _layout(
        B, order + place, len(images), types.CAUSAL, position + place, dropped['text'] | padding
      )
    )
    frame = np.tile([t.start_of_image, t.end_of_image], (B, len(images))).astype(np.int32)
    next_position = position + np.where(dropped['text'][:, 0], 0, lengths + 2)
    joined = {kind: _join(parts, B) for kind, parts in pieces.items()}
    return types.Prompts(
      ids_BL=np.concatenate([frame, text_ids], axis=1),
      text=joined['text'],
      vit=joined['vit'],
      gen=joined['latents'],
      next_position_B=next_position.astype(np.int32),
      source_BYXC=source,
      index_B=np.array([e.index for e in examples], np.int32),
    )


def _layout(
  rows: int, place: np.ndarray, split: int, mode: int, position: Any, drop: np.ndarray
) -> types.Layout:
  ones = np.ones((rows, len(place)), np.int32)
  return types.Layout(
    np.where(drop, types.PADDING, 0 * ones),
    place * ones,
    split * ones,
    mode * ones,
    position * ones,
  )


def _join(parts: list[types.Layout], rows: int) -> types.Layout:
  empty = np.zeros((rows, 0), np.int32)
  fields = [f.name for f in dataclasses.fields(types.Layout)]
  return types.Layout(
    *(
      np.concatenate([empty, *(part.__dict__[name] for part in parts)], axis=1).astype(np.int32)
      for name in fields
    )
  )
