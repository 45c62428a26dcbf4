"""Contexts of any model family: prompts that are extended by texts, and caches of keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import jax
from jax import numpy as jnp

from lvrpo_jax import types

Array = jax.Array


def group_by_shape(trees: Mapping[str, types.Tree]) -> list[list[str]]:
  """Groups names whose trees have the same shapes, the leading axis apart."""
  groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
  for name, tree in trees.items():
    groups.setdefault(tuple(x.shape[1:] for x in jax.tree.leaves(tree)), []).append(name)
  return list(groups.values())


def stack(trees: Iterable[types.Tree]) -> types.Tree:
  """Concatenates the rows of trees of one structure."""
  return jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *trees)


def join_caches(caches: Sequence[types.Cache]) -> types.Cache:
  """Concatenates the rows of contexts of one shape."""
  if len(caches) == 1:
    return caches[0]
  return types.Cache(
    *(
      jnp.concatenate([cache.__dict__[name] for cache in caches], axis=axis)
      for name, axis in (('k_EBSJK', 1), ('v_EBSJK', 1), ('valid_BS', 0), ('next_position_B', 0))
    )
  )


def to_unit(image: Array) -> Array:
  """uint8 pixels to float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1.0


def _text_tokens(prompts: types.Prompts) -> Array:
  """Where a prompt's own text tokens (B, L) are."""
  return (prompts.text.mode_BL == types.CAUSAL) & (prompts.text.sample_BL != types.PADDING)


def without_text(cache: types.Cache, prompts: types.Prompts) -> types.Cache:
  """The context as it was before its texts: the unconditional branch of guidance.

  Texts come last and images do not see them, so hiding their keys equals never encoding them.
  """
  text_BS = _text_tokens(prompts)
  hidden_BS = jnp.pad(text_BS, ((0, 0), (0, cache.valid_BS.shape[1] - text_BS.shape[1])))
  return cache.replace(
    valid_BS=cache.valid_BS & ~hidden_BS,
    next_position_B=cache.next_position_B - jnp.sum(text_BS, axis=1),
  )


def without_prompt(prompts: types.Prompts) -> types.Prompts:
  """Prompts whose contexts are those of `without_text`, where nothing has been encoded yet."""
  text_BL, text = _text_tokens(prompts), prompts.text
  return prompts.replace(
    text=text.replace(sample_BL=jnp.where(text_BL, types.PADDING, text.sample_BL)),
    next_position_B=prompts.next_position_B - jnp.sum(text_BL, axis=1),
  )


def with_text(prompts: types.Prompts, ids_BL: Array, mask_BL: Array) -> types.Prompts:
  """Prompts that go on with one more text, such as a thought (a causal split of its own).

  Args:
    ids_BL: `bos` first.
    mask_BL: False on padding, which stands at the end.
  """
  text, L = prompts.text, ids_BL.shape[1]

  def last(x_BL):
    return jnp.max(x_BL, axis=1, keepdims=True)

  place = jnp.arange(L)[None]
  # Images stand before the text, in memory or not, so the text holds the largest order and split.
  more = types.Layout(
    sample_BL=jnp.where(mask_BL, 0, types.PADDING),
    order_BL=last(text.order_BL) + 1 + place,
    split_BL=jnp.broadcast_to(last(text.split_BL) + 1, ids_BL.shape),
    mode_BL=jnp.full(ids_BL.shape, types.CAUSAL),
    position_BL=prompts.next_position_B[:, None] + place,
  )

  def join(old_BL, new_BL):
    return jnp.concatenate([old_BL, new_BL.astype(old_BL.dtype)], axis=1)

  return prompts.replace(
    ids_BL=join(prompts.ids_BL, ids_BL),
    text=jax.tree.map(join, text, more),
    next_position_B=prompts.next_position_B + jnp.sum(mask_BL, axis=1),
  )


def after_plans(
  prompts: types.Prompts, tokens_BGT: Array, mask_BGT: Array, bos: int
) -> types.Prompts:
  """The contexts (B * G rows) of images that follow sampled plans; row b * G + g has plan (b, g).

  A plan that was cut off before its end token stands there as it was sampled.
  """
  B, G, T = tokens_BGT.shape
  rows = jax.tree.map(lambda x: jnp.repeat(x, G, axis=0), prompts)
  # Random numbers of a row depend on its index alone, so siblings need indices of their own.
  rows = rows.replace(index_B=rows.index_B * G + jnp.tile(jnp.arange(G), B))

  def front(x_BGT, value):
    return jnp.pad(x_BGT.reshape(B * G, T), ((0, 0), (1, 0)), constant_values=value)

  return with_text(rows, front(tokens_BGT, bos), front(mask_BGT, True))
