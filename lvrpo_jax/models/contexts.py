"""Operations on contexts of any model family: encoded prompts, and caches of keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types

Array = types.Array
_ArrayT = TypeVar('_ArrayT', jax.Array, np.ndarray)


def group_by_shape(trees: Mapping[str, types.Tree]) -> list[list[str]]:
  """Groups names whose trees have the same shapes apart from the leading axis."""
  groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
  for name, tree in trees.items():
    groups.setdefault(tuple(x.shape[1:] for x in jax.tree.leaves(tree)), []).append(name)
  return list(groups.values())


def stack(trees: Iterable[types.Tree]) -> types.Tree:
  """Concatenates the rows of trees of one structure."""

  def join(*leaves: Array) -> Array:
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves)

  return jax.tree.map(join, *trees)


def join_caches(caches: Sequence[types.Cache]) -> types.Cache:
  """Concatenates the rows of caches of one shape."""
  if len(caches) == 1:
    return caches[0]
  return types.Cache(
    k_EBSJK=jnp.concatenate([cache.k_EBSJK for cache in caches], axis=1),
    v_EBSJK=jnp.concatenate([cache.v_EBSJK for cache in caches], axis=1),
    valid_BS=jnp.concatenate([cache.valid_BS for cache in caches], axis=0),
    next_position_B=jnp.concatenate([cache.next_position_B for cache in caches], axis=0),
  )


def to_unit(image: _ArrayT) -> _ArrayT:
  """Maps uint8 pixels to float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def _text_tokens(prompts: types.Prompts) -> Array:
  """Returns True (B, L) at the tokens of a prompt's text, and False at image frames and padding."""
  return (prompts.text.mode_BL == types.CAUSAL) & (prompts.text.sample_BL != types.PADDING)


def without_text(cache: types.Cache, prompts: types.Prompts) -> types.Cache:
  """Returns the context without its texts, for the unconditional branch of guidance.

  Texts come last and images do not attend to them, so masking their keys gives the same result as
  encoding the context without them.
  """
  text_BS = _text_tokens(prompts)
  hidden_BS = jnp.pad(text_BS, ((0, 0), (0, cache.valid_BS.shape[1] - text_BS.shape[1])))
  return cache.replace(
    valid_BS=cache.valid_BS & ~hidden_BS,
    next_position_B=cache.next_position_B - jnp.sum(text_BS, axis=1),
  )


def without_prompt(prompts: types.Prompts) -> types.Prompts:
  """Returns prompts whose encoded contexts are those of `without_text`."""
  text_BL, text = _text_tokens(prompts), prompts.text
  return prompts.replace(
    text=text.replace(sample_BL=jnp.where(text_BL, types.PADDING, text.sample_BL)),
    next_position_B=prompts.next_position_B - jnp.sum(text_BL, axis=1),
  )


def with_text(prompts: types.Prompts, ids_BL: Array, mask_BL: Array) -> types.Prompts:
  """Appends a text, such as a plan, to prompts; it forms a causal split of its own.

  Args:
    prompts: the contexts.
    ids_BL: ids of the text, `bos` first.
    mask_BL: False on padding, which stands at the end.
  """
  text, L = prompts.text, ids_BL.shape[1]

  def last(x_BL: Array) -> Array:
    return jnp.max(x_BL, axis=1, keepdims=True)

  place = jnp.arange(L)[None]
  # Images precede the text in the logical order, so the text has the largest order and split.
  more = types.Layout(
    sample_BL=jnp.where(mask_BL, 0, types.PADDING),
    order_BL=last(text.order_BL) + 1 + place,
    split_BL=jnp.broadcast_to(last(text.split_BL) + 1, ids_BL.shape),
    mode_BL=jnp.full(ids_BL.shape, types.CAUSAL),
    position_BL=prompts.next_position_B[:, None] + place,
  )

  def join(old_BL: Array, new_BL: Array) -> Array:
    return jnp.concatenate([old_BL, new_BL.astype(old_BL.dtype)], axis=1)

  return prompts.replace(
    ids_BL=join(prompts.ids_BL, ids_BL),
    text=jax.tree.map(join, text, more),
    next_position_B=prompts.next_position_B + jnp.sum(mask_BL, axis=1),
  )


def after_plans(
  prompts: types.Prompts, tokens_BGT: Array, mask_BGT: Array, bos: int
) -> types.Prompts:
  """Returns the contexts (B * G rows) of images that follow sampled plans.

  Row b * G + g has plan (b, g). A plan that was cut before its end token is kept as it was sampled.
  """
  B, G, T = tokens_BGT.shape

  def repeat(x: Array) -> Array:
    return jnp.repeat(x, G, axis=0)

  rows = jax.tree.map(repeat, prompts)
  # Random draws of a row depend on its index alone, so the rows of a prompt need different indices.
  rows = rows.replace(index_B=rows.index_B * G + jnp.tile(jnp.arange(G), B))

  def front(x_BGT: Array, value: int | bool) -> Array:
    return jnp.pad(x_BGT.reshape(B * G, T), ((0, 0), (1, 0)), constant_values=value)

  return with_text(rows, front(tokens_BGT, bos), front(mask_BGT, True))
