"""The unified model: embeds text, ViT and latent tokens, runs the trunk, reads both heads.

Three ways through one set of weights, which give the same numbers:
  * `__call__`: a whole sequence at once (the packed training forward);
  * `prefill`: the same, keeping keys and values, as the context of what follows;
  * `read` (text rows), `decode` (one token) and `velocity` (an image): new tokens that attend to a
    context which all rows of a prompt share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import attention
from lvrpo_jax.models import layers
from lvrpo_jax.models import mot
from lvrpo_jax.models import vit as vit_lib

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


class Unified(nn.Module):
  """See the module's docstring. `config.dtype` is the compute dtype; parameters are float32."""
  config: ModelConfig

  def setup(self):
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    linear = lambda width, **kw: layers.Linear(width, dtype=dtype, **kw)
    table = lambda side: lambda *_: jnp.asarray(layers.sincos_table(side, c.width))
    self.embed_tokens = self.param('embed_tokens', nn.initializers.normal(0.5),
                                   (c.vocab, c.width))
    self.trunk = mot.Trunk(
        depth=c.depth, heads=c.heads, kv_heads=c.kv_heads, head_width=c.width // c.heads,
        ff_width=c.ff_width, eps=c.eps, rope_theta=c.rope_theta, dtype=dtype, unroll=c.unroll,
        remat=c.remat, freeze_und=c.freeze_und)
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
        width=c.vit.width, depth=c.vit.depth, heads=c.vit.heads, ff_width=c.vit.ff_width,
        side=c.vit.side, eps=c.vit.eps, dtype=dtype, unroll=c.unroll)

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
    und = attention.join(seq.text, seq.vit)
    everything = attention.join(und, seq.gen)
    x_und = self.embed_text(seq.ids_BL)
    if seq.patches_BNP.shape[1] or self.is_initializing():
      vit = self.embed_patches(seq.patches_BNP, seq.patch_position_BN, seq.patch_image_BN)
      x_und = jnp.concatenate([x_und, vit], axis=1)
    x_gen = self.embed_latents(seq.latents_BNC, seq.time_BN, seq.latent_position_BN)
    shared = mot.Shared(
        rope=self.trunk.rope(und.position_BL[:, None], seq.gen.position_BL[:, None]),
        mask=attention.keep_mask(everything, everything)[:, None])
    h_und, h_gen, out = self.trunk(x_und[:, None], x_gen[:, None], shared)
    return h_und[:, 0], h_gen[:, 0], out

  def __call__(self, seq: types.Sequence) -> tuple[Array, Array]:
    """Logits (B, U, V) at text and ViT tokens and velocities (B, N, C) at latent tokens."""
    h_und, h_gen, _ = self.forward(seq)
    return self.lm_head(h_und), self.llm2vae(h_gen)

  def prefill(self, seq: types.Sequence) -> types.Cache:
    """Encodes a context once. The cached order is the memory order: text, ViT, latents."""
    k, v = self.forward(seq)[2]['kv']
    valid = jnp.concatenate(
        [seq.text.sample_BL, seq.vit.sample_BL, seq.gen.sample_BL], axis=1) != types.PADDING
    return types.Cache(k[:, :, 0], v[:, :, 0], valid, seq.next_position_B)

  def read(self, cache: types.Cache, ids_BML: Array) -> Array:
    """Logits (B, M, L, V) of text rows that follow the context; padding stands at the end."""
    length = ids_BML.shape[-1]
    position = cache.next_position_B[:, None, None] + jnp.arange(length)
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    x_und, _ = self._extend(cache, self.embed_text(ids_BML), None, position, mask)
    return self.lm_head(x_und)

  def decode(self, cache: types.Cache, row: tuple[Array, Array], index: Array, token_BM: Array
             ) -> tuple[Array, tuple[Array, Array]]:
    """One decoding step: feeds token number `index` of every row.

    Args:
      row: keys and values (E, B, M, T, J, K) of the tokens decoded so far; see `empty_row`.

    Returns:
      Logits (B, M, V) of the next token, and the updated `row`.
    """
    position = (cache.next_position_B[:, None, None] + index)
    shared = mot.Shared(
        rope=self.trunk.rope(position, position[:, :, :0]),
        mask=jnp.ones((1, 1, 1, 1), bool),
        context_mask=cache.valid_BS[:, None, None],
        row_mask=(jnp.arange(row[0].shape[3]) <= index)[None, None, None],
        row_index=index)
    x = self.embed_text(token_BM[..., None])
    x_und, _, out = self.trunk(x, x[:, :, :0], shared, mot.LayerCache(
        (cache.k_EBSJK, cache.v_EBSJK), row))
    return self.lm_head(x_und[:, :, 0]), out['row']

  def velocity(self, cache: types.Cache, x_BMNC: Array, time_BM: Array, position_BN: Array
               ) -> Array:
    """Velocities (B, M, N, C), float32, of noised images that follow the context.

    An image is `[start_of_image] latents [end_of_image]`, all at one position and never cached.
    """
    B, M, N, _ = x_BMNC.shape
    c = self.config
    frame = jnp.broadcast_to(jnp.array([c.start_of_image, c.end_of_image]), (B, M, 2))
    gen = self.embed_latents(x_BMNC, time_BM[..., None], position_BN[:, None])
    position = jnp.broadcast_to(cache.next_position_B[:, None, None], (B, 1, N + 2))
    mask = jnp.ones((1, 1, N + 2, N + 2), bool)
    _, x_gen = self._extend(cache, self.embed_text(frame), gen, position, mask)
    return self.llm2vae(x_gen).astype(jnp.float32)

  def _extend(self, cache: types.Cache, x_und: Array, x_gen: Array | None, position: Array,
              mask: Array) -> tuple[Array, Array]:
    """Runs new tokens against a context; `position` covers both slices."""
    x_gen = x_und[:, :, :0] if x_gen is None else x_gen
    split = x_und.shape[2]
    shared = mot.Shared(
        rope=self.trunk.rope(position[:, :, :split], position[:, :, split:]),
        mask=mask, context_mask=cache.valid_BS[:, None, None])
    out_und, out_gen, _ = self.trunk(
        x_und, x_gen, shared, mot.LayerCache((cache.k_EBSJK, cache.v_EBSJK)))
    return out_und, out_gen


def empty_row(config: ModelConfig, rows: tuple[int, int], length: int) -> tuple[Array, Array]:
  """An empty decode cache for (B, M) rows of at most `length` tokens."""
  shape = (config.depth, *rows, length, config.kv_heads, config.width // config.heads)
  return jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)


def dummy_sequence(config: ModelConfig) -> types.Sequence:
  """The smallest sequence with all kinds of tokens, for initialisation and abstract shapes."""
  layout = types.Layout(*(jnp.zeros((1, 1), jnp.int32) for _ in range(5)))
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  return types.Sequence(
      ids_BL=zeros(1, 1), text=layout,
      patches_BNP=jnp.zeros((1, 1, config.vit.patch ** 2 * 3)), patch_position_BN=zeros(1, 1),
      patch_image_BN=zeros(1, 1), vit=layout,
      latents_BNC=jnp.zeros((1, 1, config.latent_channels)), latent_position_BN=zeros(1, 1),
      time_BN=jnp.zeros((1, 1)), gen=layout, next_position_B=zeros(1))


def init(config: ModelConfig, key: Array) -> types.Params:
  """Fresh parameters; the generation expert starts as a copy of the understanding expert."""
  params = Unified(config).init(key, dummy_sequence(config))['params']
  trunk = params['trunk']
  trunk['layers']['gen'] = jax.tree.map(jnp.copy, trunk['layers']['und'])
  trunk['norm_gen'] = jax.tree.map(jnp.copy, trunk['norm_und'])
  return params
