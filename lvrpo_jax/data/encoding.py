"""Encodes examples as static arrays of NumPy.

Every task has one row template, so its batches have one shape. In memory a row is
`[text | ViT | latents]`; the layouts hold the logical order:

  generate     bos caption eos                                             -> image
  understand   [soi ViT eoi] bos question eos                              -> bos answer eos
  edit         [soi latents eoi] [soi ViT eoi] bos instruction eos         -> image
  think_generate  bos caption eos                                          -> bos plan eos -> image
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True)
class Template:
  """Static lengths of the rows.

  Attributes:
    prompt_tokens, answer_tokens: most tokens of a prompt and of an answer, without the frame.
    vit_tokens, latent_tokens: tokens of an image for the vision tower and for the autoencoder.
    uniform: gives the rows of all tasks one shape, with padding where a task has no image, so that
      one pass encodes all tasks; this is fastest where images are small and compilation is slow.
    image_size: pixels a side, for the padding of uniform rows.
  """

  prompt_tokens: int
  answer_tokens: int
  vit_tokens: int
  latent_tokens: int
  uniform: bool = False
  image_size: int = 0


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Layouts of the three segments of rows, as NumPy arrays.

  Attributes:
    text: of text and frame tokens.
    vit: of ViT tokens.
    latents: of latent tokens.
    next_position_B: RoPE position of the token after a row.
  """

  text: types.Layout
  vit: types.Layout
  latents: types.Layout
  next_position_B: np.ndarray


class Encoder:
  """Turns examples of one task into a `types.SupervisedBatch` of NumPy arrays."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, template: Template):
    self.tokenizer = tokenizer
    self.template = template

  def __call__(self, task: str, examples: Sequence[examples_lib.Example]) -> types.SupervisedBatch:
    """Encodes a batch.

    Raises:
      ValueError: a text is longer than the template, or an example lacks an image of its task.
        Nothing is truncated.
    """
    shown = {tasks.UNDERSTAND: ('vit',), tasks.EDIT: ('latents', 'vit')}.get(task, ())
    rows = len(examples)
    source_BYXC = target_BYXC = np.zeros((rows, 0, 0, 3), np.uint8)
    if shown:
      source_BYXC = _stack(task, 'source', examples, [example.source for example in examples])
    elif self.template.uniform:
      side = self.template.image_size
      source_BYXC = np.zeros((rows, side, side, 3), np.uint8)
    targets = [example.target for example in examples]
    # Prompts of alignment need no target.
    if task != tasks.UNDERSTAND and any(target is not None for target in targets):
      target_BYXC = _stack(task, 'target', examples, targets)
    answer_BL, mask_BL = np.zeros((rows, 0), np.int32), np.zeros((rows, 0), bool)
    if task in (tasks.UNDERSTAND, tasks.THINK_GENERATE):
      answer_BL, mask_BL = self._answers([example.answer or '' for example in examples])
    return types.SupervisedBatch(
      prompts=self._prompts(examples, shown, source_BYXC),
      target_BYXC=types.on_host(target_BYXC),
      answer_BL=types.on_host(answer_BL),
      answer_mask_BL=types.on_host(mask_BL),
    )

  def _frame(self, texts: Sequence[str], key: str, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `[bos] ids [eos]`, padded to `most` + 2, and the count of ids of every row.

    Args:
      texts: without their frame.
      key: config key of the limit, for the message.
      most: largest count of ids of a text.

    Raises:
      ValueError: a text is longer.
    """
    framed_BL = np.full((len(texts), most + 2), self.tokenizer.eos, np.int32)
    lengths_B = np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
      ids = self.tokenizer.encode(text)
      if len(ids) > most:
        raise ValueError(f'{text!r} has {len(ids)} tokens; config.{key} allows {most}')
      framed_BL[row, 0] = self.tokenizer.bos
      framed_BL[row, 1 : 1 + len(ids)] = ids
      lengths_B[row] = len(ids)
    return framed_BL, lengths_B

  def _answers(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns framed ids of answers, and the mask of their labels."""
    ids_BL, lengths_B = self._frame(texts, 'data.answer_tokens', self.template.answer_tokens)
    return ids_BL, np.arange(ids_BL.shape[1] - 1) <= lengths_B[:, None]

  def _prompts(
    self, examples: Sequence[examples_lib.Example], shown: tuple[str, ...], source_BYXC: np.ndarray
  ) -> types.Prompts:
    """Encodes prompts.

    Args:
      examples: the prompts.
      shown: encoders that see an image, in logical order.
      source_BYXC: images shown, or padding.
    """
    texts = [example.prompt for example in examples]
    text_BL, lengths_B = self._frame(texts, 'data.prompt_tokens', self.template.prompt_tokens)
    images = ('latents', 'vit') if self.template.uniform else shown
    rows = self._rows(examples, shown, images, text_BL.shape[1], lengths_B)
    frame = [self.tokenizer.start_of_image, self.tokenizer.end_of_image]
    frame_BL = np.tile(frame, (len(examples), len(images))).astype(np.int32)
    return types.Prompts(
      ids_BL=types.on_host(np.concatenate([frame_BL, text_BL], axis=1)),
      text=rows.text,
      vit=rows.vit,
      gen=rows.latents,
      next_position_B=types.on_host(rows.next_position_B.astype(np.int32)),
      source_BYXC=types.on_host(source_BYXC),
      index_B=types.on_host(np.array([example.index for example in examples], np.int32)),
    )

  def _rows(
    self,
    examples: Sequence[examples_lib.Example],
    shown: tuple[str, ...],
    images: tuple[str, ...],
    text_length: int,
    lengths_B: np.ndarray,
  ) -> _Rows:
    """Lays out the rows of prompts.

    Args:
      examples: the prompts.
      shown: encoders that see an image.
      images: encoders with places in the rows, in logical order; those not shown are padding.
      text_length: places of the framed text.
      lengths_B: count of ids of every text.
    """
    B = len(examples)
    dropped = {
      'text': _column([example.drop_text for example in examples]),
      'vit': _column([example.drop_vit for example in examples]),
      'latents': _column([example.drop_latents for example in examples]),
    }
    sizes = {'vit': self.template.vit_tokens, 'latents': self.template.latent_tokens}
    pieces: dict[str, list[types.Layout]] = {'text': [], 'vit': [], 'latents': []}
    order = position = 0
    for split, kind in enumerate(images):
      absent_B1 = dropped[kind] | (kind not in shown)
      # The two frame tokens stand before and after the tokens of the image.
      frame_L = np.array([order, order + sizes[kind] + 1])
      inside_L = order + 1 + np.arange(sizes[kind])
      pieces['text'].append(_layout(B, frame_L, split, types.FULL, position, absent_B1))
      pieces[kind].append(_layout(B, inside_L, split, types.FULL, position, absent_B1))
      order += sizes[kind] + 2
      position += kind in shown
    place_L = np.arange(text_length)
    absent_BL = dropped['text'] | (place_L > lengths_B[:, None] + 1)
    pieces['text'].append(
      _layout(B, order + place_L, len(images), types.CAUSAL, position + place_L, absent_BL)
    )
    return _Rows(
      text=_join(pieces['text'], B),
      vit=_join(pieces['vit'], B),
      latents=_join(pieces['latents'], B),
      next_position_B=position + np.where(dropped['text'][:, 0], 0, lengths_B + 2),
    )


def _stack(
  task: str,
  field: str,
  examples: Sequence[examples_lib.Example],
  images: Sequence[np.ndarray | None],
) -> np.ndarray:
  """Stacks images of examples.

  Raises:
    ValueError: an example has none.
  """
  found = [image_YXC for image_YXC in images if image_YXC is not None]
  if len(found) < len(images):
    lacking = next(e.index for e, image in zip(examples, images) if image is None)
    raise ValueError(f'example {lacking} of {task!r} has no {field} image')
  return np.stack(found)


def _column(values: Sequence[bool]) -> np.ndarray:
  """Returns one value a row, (B, 1)."""
  return np.array(values, bool)[:, None]


def _layout(
  rows: int,
  order_L: np.ndarray,
  split: int,
  mode: int,
  position: int | np.ndarray,
  absent: np.ndarray,
) -> types.Layout:
  """Lays out the tokens of one split.

  Args:
    rows: B.
    order_L: places in the logical sequence.
    split: index of the split.
    mode: attention mode of the split.
    position: RoPE positions, or the one position of all tokens.
    absent: (B, 1) or (B, L), True where a place holds no token.
  """
  ones_BL = np.ones((rows, len(order_L)), np.int32)
  return types.Layout(
    sample_BL=types.on_host(np.where(absent, types.PADDING, 0 * ones_BL)),
    order_BL=types.on_host(order_L * ones_BL),
    split_BL=types.on_host(split * ones_BL),
    mode_BL=types.on_host(mode * ones_BL),
    position_BL=types.on_host(position * ones_BL),
  )


def _join(parts: Sequence[types.Layout], rows: int) -> types.Layout:
  """Concatenates layouts along the places of a row."""
  empty = np.zeros((rows, 0), np.int32)

  def join(name: str) -> types.Array:
    columns = [empty, *(getattr(part, name) for part in parts)]
    return types.on_host(np.concatenate(columns, axis=1).astype(np.int32))

  return types.Layout(
    sample_BL=join('sample_BL'),
    order_BL=join('order_BL'),
    split_BL=join('split_BL'),
    mode_BL=join('mode_BL'),
    position_BL=join('position_BL'),
  )
