"""Unified model: embeds text, ViT and latent tokens, runs the trunk, and applies both heads.

Its methods are passes with the same weights, and agree where they compute the same outputs:
  * `__call__`: a whole sequence at once (the packed training forward);
  * `prefill`: a whole sequence whose keys and values become the context of later tokens;
  * `read` (text rows), `decode` (one token) and `velocity` (an image): new tokens that attend to a
    context, which all rows of a prompt share;
  * `joint`: contexts, and the images and texts after them, in one pass over the layers.
"""

from __future__ import annotations

import dataclasses
import functools

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import attention as attention_lib
from lvrpo_jax.models import layers
from lvrpo_jax.models.bagel import trunk as trunk_lib
from lvrpo_jax.models.bagel import vit as vit_lib

Array = types.Array


@dataclasses.dataclass(frozen=True)
class VitConfig:
  """Sizes of the vision tower.

  Attributes:
    patch: side of a patch in pixels.
    side: patches along each side of the position table.
    eps: epsilon of the layer norms.
  """

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
    start_of_image, end_of_image: ids of the frame tokens.
    eps: epsilon of the RMS norms.
    dtype: compute dtype; parameters are float32.
    unroll, remat, freeze_und, attention: as in `trunk.Trunk`.
    interpolate_pos: stretches every image over the whole position tables, so that the few tokens of
      a small grid get distant positions; False starts at the first row and column, as the released
      models do.
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
  """Unified model of text and images; the module docstring lists its passes."""

  config: ModelConfig

  def setup(self) -> None:
    config, dtype = self.config, jnp.dtype(self.config.dtype)

    linear = functools.partial(layers.Linear, dtype=dtype)

    def table(key: Array, side: int) -> Array:
      del key  # The table is a formula.
      return jnp.asarray(layers.sincos_table(side, config.width))

    self.embed_tokens = self.param('embed_tokens', layers.normal(0.5), (config.vocab, config.width))
    self.trunk = trunk_lib.Trunk(
      depth=config.depth,
      heads=config.heads,
      kv_heads=config.kv_heads,
      head_width=config.width // config.heads,
      ff_width=config.ff_width,
      eps=config.eps,
      rope_theta=config.rope_theta,
      dtype=dtype,
      unroll=config.unroll,
      remat=config.remat,
      freeze_und=config.freeze_und,
      attention=config.attention,
    )
    self.lm_head = linear(config.vocab, use_bias=False)
    self.time_embedder = layers.TimeEmbedder(config.width, dtype)
    self.vae2llm = linear(config.width)
    # A zero kernel makes the velocity of fresh parameters exactly 0.
    self.llm2vae = linear(config.latent_channels, kernel_init=nn.initializers.zeros_init())
    self.latent_pos_embed = self.param('latent_pos_embed', table, config.latent_side)
    self.vit_pos_embed = self.param('vit_pos_embed', table, config.vit.side)
    self.connector_fc1 = linear(config.width)
    self.connector_fc2 = linear(config.width)
    self.vit = vit_lib.Vit(
      width=config.vit.width,
      depth=config.vit.depth,
      heads=config.vit.heads,
      ff_width=config.vit.ff_width,
      side=config.vit.side,
      eps=config.vit.eps,
      dtype=dtype,
      unroll=config.unroll,
      remat=config.remat,
      attention=config.attention,
    )

  def embed_text(self, ids: Array) -> Array:
    """Embeds text and frame tokens, (..., D)."""
    x = self.embed_tokens[ids].astype(self.config.dtype)
    return jax.lax.stop_gradient(x) if self.config.freeze_und else x

  def embed_patches(self, patches_BNP: Array, position_BN: Array, image_BN: Array) -> Array:
    """Embeds patches as ViT tokens: connector(vit(x)) plus the sin-cos table at the same rows."""
    x, _ = self.vit(patches_BNP, position_BN, image_BN)
    x = self.connector_fc2(vit_lib.gelu(self.connector_fc1(x)))
    # The tables are frozen as in the release; they are parameters because checkpoints hold them.
    return x + jax.lax.stop_gradient(self.vit_pos_embed)[position_BN].astype(x.dtype)

  def embed_latents(self, latents: Array, time: Array, position: Array) -> Array:
    """Embeds latent tokens (..., N, C) at times (..., N); clean ones have time 0."""
    x = self.vae2llm(latents) + self.time_embedder(time)
    return x + jax.lax.stop_gradient(self.latent_pos_embed)[position].astype(x.dtype)

  def forward(self, seq: types.Sequence) -> tuple[Array, Array, trunk_lib.Outputs]:
    """Runs a whole sequence.

    Returns:
      Final hidden states (B, U, D) of text and ViT tokens, (B, N, D) of latent tokens, and the
      trunk's outputs of every layer, which keep an axis of length 1 (the row) after B.
    """
    stream, shared = self._context(seq)
    h_und, h_gen, out = self.trunk(*stream, shared)
    return h_und[:, 0], h_gen[:, 0], out

  def _context(self, seq: types.Sequence) -> tuple[trunk_lib.Stream, trunk_lib.Shared]:
    """Lays out a whole sequence as a stream with one row per prompt."""
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
    """Returns logits (B, U, V) at text and ViT tokens, velocities (B, N, C) at latent tokens."""
    h_und, h_gen, _ = self.forward(seq)
    return self.lm_head(h_und), self.llm2vae(h_gen)

  def prefill(self, seq: types.Sequence) -> types.Cache:
    """Encodes a context; the cache has the order in memory: text, ViT, latents."""
    k, v = self.forward(seq)[2]['kv']
    return types.Cache(
      k_EBSJK=k[:, :, 0],
      v_EBSJK=v[:, :, 0],
      valid_BS=_valid(seq),
      next_position_B=seq.next_position_B,
    )

  def read(self, cache: types.Cache, ids_BML: Array) -> Array:
    """Returns logits (B, M, L, V) of text rows after the context; padding is at their end."""
    stream, shared = self._text(cache.valid_BS, cache.next_position_B, ids_BML)
    return self.lm_head(self._extend(cache, stream, shared)[0])

  def decode(
    self, cache: types.Cache, row: tuple[Array, Array], index: Array, token_BM: Array
  ) -> tuple[Array, tuple[Array, Array]]:
    """Runs one decoding step, which feeds one token of every row.

    Args:
      row: keys and values (E, B, M, T, J, K) of the tokens decoded so far; see `empty_row`.
      index: index of the token within its row.

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
    layer_cache = trunk_lib.LayerCache(context=(cache.k_EBSJK, cache.v_EBSJK), row=row)
    x_und, _, out = self.trunk(x, x[:, :, :0], shared, layer_cache)
    assert out['row'] is not None
    return self.lm_head(x_und[:, :, 0]), out['row']

  def velocity(
    self, cache: types.Cache, x_BMNC: Array, time_BM: Array, position_BN: Array
  ) -> Array:
    """Returns velocities (B, M, N, C), float32, of noised images after the context.

    An image is `[start_of_image] latents [end_of_image]`; all its tokens have one RoPE position,
    and none is cached.
    """
    return self.velocity_and_states(cache, x_BMNC, time_BM, position_BN)[0]

  def velocity_and_states(
    self, cache: types.Cache, x_BMNC: Array, time_BM: Array, position_BN: Array
  ) -> tuple[Array, Array]:
    """Returns `velocity` and the latent tokens' states (E, B, M, N, D) after every layer."""
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
    """Runs contexts, and the images and texts after them, in one pass over the layers.

    The results are those of `prefill` followed by `velocity` and `read`. Here every weight is used
    once, so that training on a mixed batch over a mesh communicates as much as a single pass.

    Args:
      contexts: by task.
      images: by task, (x_BMNC, time_BM, position_BN) as `velocity` takes them.
      texts: by task, ids (B, M, L) as `read` takes them.

    Returns:
      Velocities of the images and logits of the texts, by task.
    """
    sources = {name: source for source, name in enumerate(contexts)}
    streams = [self._context(seq) for seq in contexts.values()]
    for name, (x_BMNC, time_BM, position_BN) in images.items():
      valid_BS, next_position_B = _valid(contexts[name]), contexts[name].next_position_B
      streams.append(
        self._image(valid_BS, next_position_B, x_BMNC, time_BM, position_BN, sources[name])
      )
    for name, ids_BML in texts.items():
      valid_BS, next_position_B = _valid(contexts[name]), contexts[name].next_position_B
      streams.append(self._text(valid_BS, next_position_B, ids_BML, sources[name]))
    out = self.trunk.joint(
      tuple(stream for stream, _ in streams), tuple(shared for _, shared in streams)
    )[len(contexts) :]
    image_out, text_out = out[: len(images)], out[len(images) :]
    return (
      {
        name: self.llm2vae(gen).astype(jnp.float32)
        for name, (_, gen) in zip(images, image_out, strict=True)
      },
      {name: self.lm_head(und) for name, (und, _) in zip(texts, text_out, strict=True)},
    )

  def _image(
    self,
    valid_BS: Array,
    next_position_B: Array,
    x_BMNC: Array,
    time_BM: Array,
    position_BN: Array,
    source: int | None = None,
  ) -> tuple[trunk_lib.Stream, trunk_lib.Shared]:
    """Lays out noised images after a context as a stream; `source` as in `trunk.Shared`."""
    B, M, N, _ = x_BMNC.shape
    frame_ids = jnp.array([self.config.start_of_image, self.config.end_of_image])
    frame = jnp.broadcast_to(frame_ids, (B, M, 2))
    gen = self.embed_latents(x_BMNC, time_BM[..., None], position_BN[:, None])
    position = jnp.broadcast_to(next_position_B[:, None, None], (B, 1, N + 2))
    return (self.embed_text(frame), gen), trunk_lib.Shared(
      rope=self.trunk.rope(position[:, :, :2], position[:, :, 2:]),
      mask=attention_lib.Mask(),
      context_mask=attention_lib.Mask(keys=valid_BS),
      source=source,
    )

  def _text(
    self, valid_BS: Array, next_position_B: Array, ids_BML: Array, source: int | None = None
  ) -> tuple[trunk_lib.Stream, trunk_lib.Shared]:
    """Lays out texts after a context as a stream; `source` as in `trunk.Shared`."""
    position = next_position_B[:, None, None] + jnp.arange(ids_BML.shape[-1])
    x = self.embed_text(ids_BML)
    return (x, x[:, :, :0]), trunk_lib.Shared(
      rope=self.trunk.rope(position, position[:, :, :0]),
      mask=attention_lib.Mask(causal=True),
      context_mask=attention_lib.Mask(keys=valid_BS),
      source=source,
    )

  def _extend(
    self, cache: types.Cache, stream: trunk_lib.Stream, shared: trunk_lib.Shared
  ) -> tuple[Array, Array, trunk_lib.Outputs]:
    """Runs new tokens that attend to a context."""
    return self.trunk(*stream, shared, trunk_lib.LayerCache(context=(cache.k_EBSJK, cache.v_EBSJK)))


def _valid(seq: types.Sequence) -> Array:
  """Returns True (B, S) where a context holds a token and False on padding."""
  return (
    jnp.concatenate([seq.text.sample_BL, seq.vit.sample_BL, seq.gen.sample_BL], axis=1)
    != types.PADDING
  )


def empty_row(config: ModelConfig, rows: tuple[int, int], length: int) -> tuple[Array, Array]:
  """Creates an empty decode cache for (B, M) rows of at most `length` tokens."""
  shape = (config.depth, *rows, length, config.kv_heads, config.width // config.heads)
  return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def dummy_sequence(config: ModelConfig) -> types.Sequence:
  """Creates the smallest sequence with all kinds of tokens, to initialise and to infer shapes."""

  def zeros(*shape: int) -> Array:
    return jnp.zeros(shape, jnp.int32)

  layout = types.Layout(
    sample_BL=zeros(1, 1),
    order_BL=zeros(1, 1),
    split_BL=zeros(1, 1),
    mode_BL=zeros(1, 1),
    position_BL=zeros(1, 1),
  )
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
  """Creates parameters; the generation expert starts as a copy of the understanding expert."""
  params = Unified(config).init(key, dummy_sequence(config))['params']
  trunk = params['trunk']
  trunk['layers']['gen'] = jax.tree.map(jnp.copy, trunk['layers']['und'])
  trunk['norm_gen'] = jax.tree.map(jnp.copy, trunk['norm_und'])
  return params
