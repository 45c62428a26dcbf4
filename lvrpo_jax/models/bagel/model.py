"""The unified model: embeds text, ViT and latent tokens, runs the trunk, reads both heads.

Ways through one set of weights, which give the same numbers:
  * `__call__`: a whole sequence at once (the packed training forward);
  * `prefill`: the same, keeping keys and values, as the context of what follows;
  * `read` (text rows), `decode` (one token) and `velocity` (an image): new tokens that attend to a
    context which all rows of a prompt share;
  * `joint`: contexts, images and texts after them in one pass over the layers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import attention as attention_lib
from lvrpo_jax.models import layers
from lvrpo_jax.models.bagel import trunk as trunk_lib
from lvrpo_jax.models.bagel import vit as vit_lib

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VitConfig:
  """Sizes of the vision tower; `side` is the number of patches along its position table."""

  width: int
  depth: int
  heads: int
  ff_width: int
  patch: int
  side: int
  eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and numerics of the model.

  Attributes:
    latent_channels: values of a latent token (patch * patch * channels of the autoencoder).
    latent_side: latent tokens along a side of the position table.
    interpolate_pos: stretches every image over the whole position tables, so that the few tokens of
      a small grid differ; False starts at the first row and column, as the released models do.
    start_of_image, end_of_image: ids of the frame tokens.
  """

  vocab: int
  width: int
  depth: int
  heads: int
  kv_heads: int
  ff_width: int
  latent_channels: int
  latent_side: int
  vit: VitConfig
  start_of_image: int
  end_of_image: int
  eps: float = 1e-6
  rope_theta: float = 1e6
  dtype: str = 'float32'
  unroll: int = 1
  remat: str = 'none'
  interpolate_pos: bool = False
  freeze_und: bool = False
  attention: str = 'xla'


class Unified(nn.Module):
  """See the module's docstring. `config.dtype` is the compute dtype; parameters are float32."""

  config: ModelConfig

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    linear = lambda width, **kw: layers.Linear(width, dtype=dtype, **kw)
    table = lambda side: lambda *_: jnp.asarray(layers.sincos_table(side, c.width))
    self.embed_tokens = self.param('embed_tokens', layers.normal(0.5), (c.vocab, c.width))
    self.trunk = trunk_lib.Trunk(
      depth=c.depth,
      heads=c.heads,
      kv_heads=c.kv_heads,
      head_width=c.width // c.heads,
      ff_width=c.ff_width,
      eps=c.eps,
      rope_theta=c.rope_theta,
      dtype=dtype,
      unroll=c.unroll,
      remat=c.remat,
      freeze_und=c.freeze_und,
      attention=c.attention,
    )
    self.lm_head = linear(c.vocab, use_bias=False)
    self.time_embedder = layers.TimeEmbedder(c.width, dtype)
    self.vae2llm = linear(c.width)
    # Zero, so that the first velocity is exactly 0.
    self.llm2vae = linear(c.latent_channels, kernel_init=nn.initializers.zeros_init())
    self.latent_pos_embed = self.param('latent_pos_embed', table(c.latent_side))
    self.vit_pos_embed = self.param('vit_pos_embed', table(c.vit.side))
    self.connector_fc1 = linear(c.width)
    self.connector_fc2 = linear(c.width)
    self.vit = vit_lib.Vit(
      width=c.vit.width,
      depth=c.vit.depth,
      heads=c.vit.heads,
      ff_width=c.vit.ff_width,
      side=c.vit.side,
      eps=c.vit.eps,
      dtype=dtype,
      unroll=c.unroll,
      remat=c.remat,
      attention=c.attention,
    )

  def embed_text(self, ids: Array) -> Array:
    """Embeddings of text and frame tokens, (..., D)."""
    x = self.embed_tokens[ids].astype(self.config.dtype)
    return jax.lax.stop_gradient(x) if self.config.freeze_und else x

  def embed_patches(self, patches_BNP: Array, position_BN: Array, image_BN: Array) -> Array:
    """ViT tokens: connector(vit(x)) plus the sin-cos table at the same rows."""
    x, _ = self.vit(patches_BNP, position_BN, image_BN)
    x = self.connector_fc2(vit_lib.gelu(self.connector_fc1(x)))
    # The released tables are frozen; they are parameters because checkpoints hold them.
    return x + jax.lax.stop_gradient(self.vit_pos_embed)[position_BN].astype(x.dtype)

  def embed_latents(self, latents: Array, time: Array, position: Array) -> Array:
    """Latent tokens (..., N, C) at times (..., N); clean ones are embedded with time 0."""
    x = self.vae2llm(latents) + self.time_embedder(time)
    return x + jax.lax.stop_gradient(self.latent_pos_embed)[position].astype(x.dtype)

  def forward(self, seq: types.Sequence) -> tuple[Array, Array, dict[str, Any]]:
    """Runs a whole sequence.

    Returns:
      Final hidden states (B, U, D) of text and ViT tokens, (B, N, D) of latent tokens, and the
      trunk's per-layer outputs, whose arrays keep an axis of length 1 after B.
    """
    stream, shared = self._context(seq)
    h_und, h_gen, out = self.trunk(*stream, shared)
    return h_und[:, 0], h_gen[:, 0], out

  def _context(self, seq: types.Sequence) -> tuple[trunk_lib.Stream, trunk_lib.Shared]:
    """A whole sequence as a stream of one row a prompt."""
    und = attention_lib.join(seq.text, seq.vit)
    everything = attention_lib.join(und, seq.gen)
    x_und = self.embed_text(seq.ids_BL)
    if seq.patches_BNP.shape[1] or self.is_initializing():
      vit = self.embed_patches(seq.patches_BNP, seq.patch_position_BN, seq.patch_image_BN)
      x_und = jnp.concatenate([x_und, vit], axis=1)
    x_gen = self.embed_latents(seq.latents_BNC, seq.time_BN, seq.latent_position_BN)
    return (x_und[:, None], x_gen[:, None]), trunk_lib.Shared(
      rope=self.trunk.rope(und.position_BL[:, None], seq.gen.position_BL[:, None]),
      mask=attention_lib.Mask(attention_lib.keep_mask(everything, everything)[:, None]),
    )

  def __call__(self, seq: types.Sequence) -> tuple[Array, Array]:
    """Logits (B, U, V) at text and ViT tokens and velocities (B, N, C) at latent tokens."""
    h_und, h_gen, _ = self.forward(seq)
    return self.lm_head(h_und), self.llm2vae(h_gen)

  def prefill(self, seq: types.Sequence) -> types.Cache:
    """Encodes a context once. The cached order is the memory order: text, ViT, latents."""
    k, v = self.forward(seq)[2]['kv']
    return types.Cache(k[:, :, 0], v[:, :, 0], _valid(seq), seq.next_position_B)

  def read(self, cache: types.Cache, ids_BML: Array) -> Array:
    """Logits (B, M, L, V) of text rows that follow the context; padding stands at the end."""
    stream, shared = self._text(cache.valid_BS, cache.next_position_B, ids_BML)
    return self.lm_head(self._extend(cache, stream, shared)[0])

  def decode(
    self, cache: types.Cache, row: tuple[Array, Array], index: Array, token_BM: Array
  ) -> tuple[Array, tuple[Array, Array]]:
    """One decoding step: feeds token number `index` of every row.

    Args:
      row: keys and values (E, B, M, T, J, K) of the tokens decoded so far; see `empty_row`.

    Returns:
      Logits (B, M, V) of the next token, and the updated `row`.
    """
    position = cache.next_position_B[:, None, None] + index
    shared = trunk_lib.Shared(
      rope=self.trunk.rope(position, position[:, :, :0]),
      mask=attention_lib.Mask(),
      context_mask=attention_lib.Mask(keys=cache.valid_BS),
      row_mask=attention_lib.Mask((jnp.arange(row[0].shape[3]) <= index)[None, None, None]),
      row_index=index,
    )
    x = self.embed_text(token_BM[..., None])
    x_und, _, out = self.trunk(
      x, x[:, :, :0], shared, trunk_lib.LayerCache((cache.k_EBSJK, cache.v_EBSJK), row)
    )
    return self.lm_head(x_und[:, :, 0]), out['row']

  def velocity(
    self, cache: types.Cache, x_BMNC: Array, time_BM: Array, position_BN: Array
  ) -> Array:
    """Velocities (B, M, N, C), float32, of noised images that follow the context.

    An image is `[start_of_image] latents [end_of_image]`, all at one position and never cached.
    """
    return self.velocity_and_states(cache, x_BMNC, time_BM, position_BN)[0]

  def velocity_and_states(
    self, cache: types.Cache, x_BMNC: Array, time_BM: Array, position_BN: Array
  ) -> tuple[Array, Array]:
    """`velocity`, and the latent tokens' states (E, B, M, N, D) after every layer."""
    stream, shared = self._image(
      cache.valid_BS, cache.next_position_B, x_BMNC, time_BM, position_BN
    )
    _, h_gen, out = self._extend(cache, stream, shared)
    return self.llm2vae(h_gen).astype(jnp.float32), out['hidden'][1]

  def joint(
    self,
    contexts: dict[str, types.Sequence],
    images: dict[str, tuple[Array, Array, Array]],
    texts: dict[str, Array],
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Contexts and all that follows them in one pass over the layers.

    The numbers are those of `prefill`, then `velocity` and `read`, but every layer's weights are
    used once: what a mesh moves to train a mixed batch is then what one pass moves.

    Args:
      contexts: by task.
      images: by task, (x_BMNC, time_BM, position_BN) as `velocity` takes them.
      texts: by task, ids (B, M, L) as `read` takes them.

    Returns:
      Velocities of the images and logits of the texts, by task.
    """
    names = list(contexts)
    streams = [self._context(contexts[name]) for name in names]
    follow = lambda name: dict(source=names.index(name))
    state = lambda name: (_valid(contexts[name]), contexts[name].next_position_B)
    streams += [self._image(*state(name), *x, **follow(name)) for name, x in images.items()]
    streams += [self._text(*state(name), ids, **follow(name)) for name, ids in texts.items()]
    out = self.trunk.joint(*(tuple(x) for x in zip(*streams)))[len(names) :]
    drawn, read = out[: len(images)], out[len(images) :]
    return (
      {name: self.llm2vae(x[1]).astype(jnp.float32) for name, x in zip(images, drawn)},
      {name: self.lm_head(x[0]) for name, x in zip(texts, read)},
    )

  def _image(
    self,
    valid_BS: Array,
    next_position_B: Array,
    x_BMNC: Array,
    time_BM: Array,
    position_BN: Array,
    **shared: Any,
  ) -> tuple[trunk_lib.Stream, trunk_lib.Shared]:
    """Noised images after a context, as a stream."""
    B, M, N, _ = x_BMNC.shape
    c = self.config
    frame = jnp.broadcast_to(jnp.array([c.start_of_image, c.end_of_image]), (B, M, 2))
    gen = self.embed_latents(x_BMNC, time_BM[..., None], position_BN[:, None])
    position = jnp.broadcast_to(next_position_B[:, None, None], (B, 1, N + 2))
    return (self.embed_text(frame), gen), trunk_lib.Shared(
      rope=self.trunk.rope(position[:, :, :2], position[:, :, 2:]),
      mask=attention_lib.Mask(),
      context_mask=attention_lib.Mask(keys=valid_BS),
      **shared,
    )

  def _text(
    self, valid_BS: Array, next_position_B: Array, ids_BML: Array, **shared: Any
  ) -> tuple[trunk_lib.Stream, trunk_lib.Shared]:
    """Texts after a context, as a stream."""
    position = next_position_B[:, None, None] + jnp.arange(ids_BML.shape[-1])
    x = self.embed_text(ids_BML)
    return (x, x[:, :, :0]), trunk_lib.Shared(
      rope=self.trunk.rope(position, position[:, :, :0]),
      mask=attention_lib.Mask(causal=True),
      context_mask=attention_lib.Mask(keys=valid_BS),
      **shared,
    )

  def _extend(
    self, cache: types.Cache, stream: trunk_lib.Stream, shared: trunk_lib.Shared
  ) -> tuple[Array, Array, dict[str, Any]]:
    """Runs new tokens against a context."""
    return self.trunk(*stream, shared, trunk_lib.LayerCache((cache.k_EBSJK, cache.v_EBSJK)))


def _valid(seq: types.Sequence) -> Array:
  """Which places (B, S) of a context hold a token."""
  return (
    jnp.concatenate([seq.text.sample_BL, seq.vit.sample_BL, seq.gen.sample_BL], axis=1)
    != types.PADDING
  )


def empty_row(config: ModelConfig, rows: tuple[int, int], length: int) -> tuple[Array, Array]:
  """An empty decode cache for (B, M) rows of at most `length` tokens."""
  shape = (config.depth, *rows, length, config.kv_heads, config.width // config.heads)
  return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def dummy_sequence(config: ModelConfig) -> types.Sequence:
  """The smallest sequence with all kinds of tokens, for initialisation and abstract shapes."""
  layout = types.Layout(*(jnp.zeros((1, 1), jnp.int32) for _ in range(5)))
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  return types.Sequence(
    ids_BL=zeros(1, 1),
    text=layout,
    patches_BNP=jnp.zeros((1, 1, config.vit.patch**2 * 3)),
    patch_position_BN=zeros(1, 1),
    patch_image_BN=zeros(1, 1),
    vit=layout,
    latents_BNC=jnp.zeros((1, 1, config.latent_channels)),
    latent_position_BN=zeros(1, 1),
    time_BN=jnp.zeros((1, 1)),
    gen=layout,
    next_position_B=zeros(1),
  )


@functools.partial(jax.jit, static_argnums=0)
def init(config: ModelConfig, key: Array) -> types.Params:
  """Fresh parameters; the generation expert starts as a copy of the understanding expert."""
  params = Unified(config).init(key, dummy_sequence(config))['params']
  trunk = params['trunk']
  trunk['layers']['gen'] = jax.tree.map(jnp.copy, trunk['layers']['und'])
  trunk['norm_gen'] = jax.tree.map(jnp.copy, trunk['norm_und'])
  return params
