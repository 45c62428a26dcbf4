"""The unified model and its autoencoder as a policy: contexts from prompts, images from latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.models import layers
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.parallel import activations

Array = jax.Array

LARGE = 128
"""Pixels a side beyond which the autoencoder takes one image after the other: at 1024 pixels a
single one fills gigabytes."""


@dataclasses.dataclass(frozen=True)
class Policy:
  """Static description of a policy; parameters are passed to every method.

  Attributes:
    config: sizes of the unified model.
    vae: the autoencoder's module.
    image_size: pixels along each side of the images of this run.
    latent_patch: latent pixels along each side of a latent token.
    bos, eos: ids that start and end every text.
    joint: `follow` runs contexts and what follows them in one pass over the layers, which a mesh
      wants; apart from that, tasks of one shape share passes, which is fastest on one device.
  """

  config: bagel.ModelConfig
  vae: nn.Module
  image_size: int
  latent_patch: int
  bos: int
  eos: int
  joint: bool = False

  @functools.cached_property
  def model(self) -> bagel.Unified:
    return bagel.Unified(self.config)

  @property
  def latent_grid(self) -> int:
    """Latent tokens along each side."""
    return self.image_size // (self.vae.downsample * self.latent_patch)

  @property
  def latent_shape(self) -> tuple[int, int]:
    """(N, C) of an image."""
    return self.latent_grid**2, self.config.latent_channels

  @property
  def vit_size(self) -> int:
    """Pixels along each side for the vision tower: the nearest multiple of its patch, at most as
    many as its position table has rows for."""
    patch, side = self.config.vit.patch, self.config.vit.side
    return min(max(round(self.image_size / patch), 1), side) * patch

  @property
  def vit_tokens(self) -> int:
    return (self.vit_size // self.config.vit.patch) ** 2

  def encode(self, vae_params: types.Params, image_BYXC: Array) -> Array:
    """Latent tokens (B, N, C) of uint8 images: the posterior mean."""
    vae_params = activations.gathered(vae_params)
    encode = lambda image: self.vae.apply(
      {'params': vae_params}, to_unit(image), method='encode_mean'
    )
    latent = self._over_images(encode, image_BYXC)
    return vae_lib.patchify(latent, self.latent_patch)

  def _over_images(self, function: Callable[[Array], Array], x: Array) -> Array:
    """`function` of rows, at once where the images are small."""
    return function(x) if self.image_size <= LARGE else activations.one_by_one(function, x)

  def decode(self, vae_params: types.Params, latents: Array) -> Array:
    """uint8 images (..., Y, X, 3) of latent tokens (..., N, C), truncated as BAGEL does."""
    rows = latents.reshape(-1, *latents.shape[-2:])
    latent = vae_lib.unpatchify(rows, (self.latent_grid, self.latent_grid), self.latent_patch)
    vae_params = activations.gathered(vae_params)
    decode = lambda x: self.vae.apply({'params': vae_params}, x, method='decode')
    image = self._over_images(decode, latent)
    image = (jnp.clip(image * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
    return image.reshape(*latents.shape[:-2], *image.shape[1:])

  def patches(self, image_BYXC: Array) -> tuple[Array, Array]:
    """Patches (B, N, P) of uint8 images for the vision tower, and their table rows (N,)."""
    patch, size = self.config.vit.patch, self.vit_size
    pixels = to_unit(image_BYXC)
    if size != self.image_size:
      shape = (image_BYXC.shape[0], size, size, 3)
      pixels = jnp.clip(jax.image.resize(pixels, shape, 'cubic', antialias=True), -1.0, 1.0)
    position = self.positions(size // patch, size // patch, self.config.vit.side)
    return vae_lib.patchify(pixels, patch), jnp.asarray(position)

  def latent_position(self, rows: int) -> Array:
    """Rows (B, N) of the latent position table."""
    position = self.positions(self.latent_grid, self.latent_grid, self.config.latent_side)
    return jnp.broadcast_to(jnp.asarray(position), (rows, len(position)))

  def positions(self, rows: int, columns: int, side: int) -> np.ndarray:
    """Rows of a position table of `side` x `side` for an image of rows x columns tokens."""
    place = layers.spread_positions if self.config.interpolate_pos else layers.grid_positions
    return place(rows, columns, side)

  def sequence(self, vae_params: types.Params, prompts: types.Prompts) -> types.Sequence:
    """Runs the encoders that need no gradient and lays out the context."""
    B = prompts.ids_BL.shape[0]
    vit_size, gen_size = prompts.vit.sample_BL.shape[1], prompts.gen.sample_BL.shape[1]
    patches = jnp.zeros((B, 0, self.config.vit.patch**2 * 3))
    position = jnp.zeros((B, 0), jnp.int32)
    if vit_size:
      patches, position = self.patches(prompts.source_BYXC)
      position = jnp.broadcast_to(position, (B, vit_size))
    latents = jnp.zeros((B, 0, self.config.latent_channels))
    if gen_size:
      latents = self.encode(vae_params, prompts.source_BYXC)
    return types.Sequence(
      ids_BL=prompts.ids_BL,
      text=prompts.text,
      patches_BNP=patches,
      patch_position_BN=position,
      patch_image_BN=jnp.zeros_like(position),
      vit=prompts.vit,
      latents_BNC=latents,
      latent_position_BN=self.latent_position(B)[:, :gen_size],
      time_BN=jnp.zeros((B, gen_size)),
      gen=prompts.gen,
      next_position_B=prompts.next_position_B,
    )

  def apply(self, params: types.Params, *args, method: str) -> Any:
    """`Unified.<method>` with these parameters."""
    return self.model.apply({'params': params}, *args, method=method)

  def prefill(
    self, params: types.Params, vae_params: types.Params, prompts: types.Prompts
  ) -> types.Cache:
    """Encodes the context of every prompt once."""
    return self.apply(params, self.sequence(vae_params, prompts), method='prefill')

  def velocity(
    self, params: types.Params, cache: types.Cache, x_BMNC: Array, time_BM: Array
  ) -> Array:
    """Velocities of M noised images a prompt."""
    position = self.latent_position(x_BMNC.shape[0])
    return self.apply(params, cache, x_BMNC, time_BM, position, method='velocity')

  def prefill_all(
    self, params: types.Params, vae_params: types.Params, prompts: dict[str, types.Prompts]
  ) -> dict[str, types.Cache]:
    """Contexts of several tasks; tasks whose rows have one shape are encoded in one pass."""
    out = {}
    for tasks in group_by_shape(prompts):
      cache = self.prefill(params, vae_params, stack(prompts[t] for t in tasks))
      start = 0
      for task in tasks:
        stop = start + prompts[task].ids_BL.shape[0]
        out[task] = types.Cache(
          cache.k_EBSJK[:, start:stop],
          cache.v_EBSJK[:, start:stop],
          cache.valid_BS[start:stop],
          cache.next_position_B[start:stop],
        )
        start = stop
    return out

  def velocity_all(
    self,
    params: types.Params,
    caches: dict[str, types.Cache],
    x: dict[str, Array],
    time: dict[str, Array],
  ) -> dict[str, Array]:
    """Velocities of several tasks; tasks whose rows have one shape run in one pass."""
    out = {}
    keys = {t: (caches[t].valid_BS, x[t]) for t in x}
    for tasks in group_by_shape(keys):
      joined = join_caches([caches[t] for t in tasks])
      v = self.velocity(params, joined, stack(x[t] for t in tasks), stack(time[t] for t in tasks))
      bounds = np.cumsum([x[t].shape[0] for t in tasks])[:-1]
      out.update(zip(tasks, jnp.split(v, bounds)))
    return out

  def follow_with_states(
    self,
    params: types.Params,
    vae_params: types.Params,
    prompts: dict[str, types.Prompts],
    x: dict[str, Array],
    time: dict[str, Array],
    ids: dict[str, Array],
  ) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """`follow`, and the latent tokens' states (E, B, M, N, D) after every layer by task."""
    caches = self.prefill_all(params, vae_params, prompts)
    v, states = {}, {}
    for task in x:
      position = self.latent_position(x[task].shape[0])
      v[task], states[task] = self.apply(
        params, caches[task], x[task], time[task], position, method='velocity_and_states'
      )
    return v, {task: self.read(params, caches[task], rows) for task, rows in ids.items()}, states

  def follow(
    self,
    params: types.Params,
    vae_params: types.Params,
    prompts: dict[str, types.Prompts],
    x: dict[str, Array],
    time: dict[str, Array],
    ids: dict[str, Array],
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Velocities of noised images (B, M, N, C) at times (B, M), and logits of texts (B, M, L),
    by task, after the contexts of all tasks."""
    if self.joint:
      position = lambda task: self.latent_position(x[task].shape[0])
      return self.apply(
        params,
        {task: self.sequence(vae_params, p) for task, p in prompts.items()},
        {task: (x[task], time[task], position(task)) for task in x},
        ids,
        method='joint',
      )
    caches = self.prefill_all(params, vae_params, prompts)
    return (
      self.velocity_all(params, caches, x, time),
      {task: self.read(params, caches[task], rows) for task, rows in ids.items()},
    )

  def read(self, params: types.Params, cache: types.Cache, ids_BML: Array) -> Array:
    """Logits of M text rows a prompt."""
    return self.apply(params, cache, ids_BML, method='read')


def group_by_shape(trees: dict[str, Any]) -> list[list[str]]:
  """Groups names whose trees have the same shapes, the leading axis apart."""
  groups: dict[Any, list[str]] = {}
  for name, tree in trees.items():
    groups.setdefault(tuple(x.shape[1:] for x in jax.tree.leaves(tree)), []).append(name)
  return list(groups.values())


def stack(trees: Iterable[Any]) -> Any:
  """Concatenates the rows of trees of one structure."""
  return jax.tree.map(lambda *x: jnp.concatenate(x) if len(x) > 1 else x[0], *trees)


def join_caches(caches: list[types.Cache]) -> types.Cache:
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
  last = lambda x_BL: jnp.max(x_BL, axis=1, keepdims=True)
  place = jnp.arange(L)[None]
  # Images stand before the text, in memory or not, so the text holds the largest order and split.
  more = types.Layout(
    sample_BL=jnp.where(mask_BL, 0, types.PADDING),
    order_BL=last(text.order_BL) + 1 + place,
    split_BL=jnp.broadcast_to(last(text.split_BL) + 1, ids_BL.shape),
    mode_BL=jnp.full(ids_BL.shape, types.CAUSAL),
    position_BL=prompts.next_position_B[:, None] + place,
  )
  join = lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], axis=1)
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
  # Draws of a row depend on its number alone, so siblings need numbers of their own.
  rows = rows.replace(index_B=rows.index_B * G + jnp.tile(jnp.arange(G), B))
  front = lambda x, value: jnp.pad(x.reshape(B * G, T), ((0, 0), (1, 0)), constant_values=value)
  return with_text(rows, front(tokens_BGT, bos), front(mask_BGT, True))
