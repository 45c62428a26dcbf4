"""Policy of the unified model and its autoencoder: encodes prompts, samples and decodes images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import cast

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.models import contexts
from lvrpo_jax.models import layers
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.parallel import activations

Array = types.Array
Autoencoder = vae_lib.Autoencoder | vae_lib.PatchAutoencoder

LARGE = 128
"""Pixels a side beyond which the autoencoder processes one image after the other.

At 1024 pixels the activations of a single image take gigabytes.
"""


@dataclasses.dataclass(frozen=True)
class Policy:
  """Static description of a policy; parameters are passed to every method.

  Attributes:
    config: sizes of the unified model.
    vae: the autoencoder's module.
    image_size: pixels along each side of the images of this run.
    latent_patch: latent pixels along each side of a latent token.
    bos, eos: ids that start and end every text.
    joint: True runs contexts and the tokens after them in one pass over the layers in `forward`,
      which is fastest on a mesh; False shares passes among tasks of one shape, which is fastest on
      one device.
  """

  config: bagel.ModelConfig
  vae: Autoencoder
  image_size: int
  latent_patch: int
  bos: int
  eos: int
  joint: bool = False

  @functools.cached_property
  def model(self) -> bagel.Unified:
    """The network."""
    return bagel.Unified(self.config)

  @property
  def densities(self) -> dict[str, str]:
    """Form of the density by output modality."""
    return {'text': 'tokens', 'image': 'flow'}

  @property
  def latent_grid(self) -> int:
    """Latent tokens along each side."""
    return self.image_size // (self.vae.downsample * self.latent_patch)

  @property
  def latent_shape(self) -> tuple[int, int]:
    """Shape (N, C) of the latent tokens of an image."""
    return self.latent_grid**2, self.config.latent_channels

  @property
  def vit_size(self) -> int:
    """Pixels along each side for the vision tower.

    It is the multiple of the tower's patch that is nearest to `image_size`, bounded by the position
    table.
    """
    patch, side = self.config.vit.patch, self.config.vit.side
    return min(max(round(self.image_size / patch), 1), side) * patch

  @property
  def vit_tokens(self) -> int:
    """Count of vision tokens of an image that is shown."""
    return (self.vit_size // self.config.vit.patch) ** 2

  def encode_image(self, vae_params: types.Params, image_BYXC: Array) -> Array:
    """Encodes uint8 images to latent tokens (B, N, C), the means of the posterior."""
    vae_params = activations.gathered(vae_params)

    def encode(image: Array) -> Array:
      pixels = contexts.to_unit(image)
      return cast(Array, self.vae.apply({'params': vae_params}, pixels, method='encode_mean'))

    latent = self._over_images(encode, image_BYXC)
    return vae_lib.patchify(latent, self.latent_patch)

  def _over_images(self, function: Callable[[Array], Array], x: Array) -> Array:
    """Applies `function` to rows: at once if the images are small, else one by one."""
    return function(x) if self.image_size <= LARGE else activations.one_by_one(function, x)

  def decode_image(self, vae_params: types.Params, latents: Array) -> Array:
    """Decodes latent tokens (..., N, C) to uint8 images (..., Y, X, 3), truncated as in BAGEL."""
    rows = latents.reshape(-1, *latents.shape[-2:])
    latent = vae_lib.unpatchify(rows, (self.latent_grid, self.latent_grid), self.latent_patch)
    vae_params = activations.gathered(vae_params)

    def decode(x: Array) -> Array:
      return cast(Array, self.vae.apply({'params': vae_params}, x, method='decode'))

    image = self._over_images(decode, latent)
    image = (jnp.clip(image * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
    return image.reshape(*latents.shape[:-2], *image.shape[1:])

  def patches(self, image_BYXC: Array) -> tuple[Array, Array]:
    """Returns patches (B, N, P) of uint8 images for the vision tower, and their table rows (N,)."""
    patch, size = self.config.vit.patch, self.vit_size
    pixels = contexts.to_unit(image_BYXC)
    if size != self.image_size:
      shape = (image_BYXC.shape[0], size, size, 3)
      pixels = jnp.clip(jax.image.resize(pixels, shape, 'cubic', antialias=True), -1.0, 1.0)
    position = self.positions(size // patch, size // patch, self.config.vit.side)
    return vae_lib.patchify(pixels, patch), jnp.asarray(position)

  def latent_position(self, rows: int) -> Array:
    """Returns rows (B, N) of the latent position table."""
    position = self.positions(self.latent_grid, self.latent_grid, self.config.latent_side)
    return jnp.broadcast_to(jnp.asarray(position), (rows, len(position)))

  def positions(self, rows: int, columns: int, side: int) -> np.ndarray:
    """Returns rows of a `side` x `side` position table for an image of rows x columns tokens."""
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
      latents = self.encode_image(vae_params, prompts.source_BYXC)
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

  @property
  def width(self) -> int:
    """Width of the states after every layer."""
    return self.config.width

  @property
  def depth(self) -> int:
    """Count of layers."""
    return self.config.depth

  def init(self, key: Array) -> types.Params:
    """Initialises parameters."""
    return bagel.init(self.config, key)

  def init_autoencoder(self, key: Array) -> types.Params:
    """Initialises parameters of the autoencoder."""
    side = self.image_size
    return self.vae.init(key, jnp.zeros((1, side, side, 3)))['params']

  def fit_autoencoder(self, image_BYXC: np.ndarray, seed: int) -> types.Params:
    """Fits the parameters of the small autoencoder to uint8 images, in closed form.

    Raises:
      ValueError: the autoencoder is a released one.
    """
    if not isinstance(self.vae, vae_lib.PatchAutoencoder):
      raise ValueError('a released autoencoder is loaded, not fitted')
    return vae_lib.fit_patch_autoencoder(self.vae, contexts.to_unit(image_BYXC), seed)

  def apply(self, params: types.Params, *args: types.Tree, method: str) -> types.Tree:
    """Calls a method of `Unified` with these parameters."""
    return self.model.apply({'params': params}, *args, method=method)

  def prefill(
    self, params: types.Params, vae_params: types.Params, prompts: types.Prompts
  ) -> types.Cache:
    """Encodes the context of every prompt once."""
    return self.apply(params, self.sequence(vae_params, prompts), method='prefill')

  def velocity(
    self, params: types.Params, cache: types.Cache, x_BMNC: Array, time_BM: Array
  ) -> Array:
    """Computes velocities (B, M, N, C) of M noised images a prompt."""
    position = self.latent_position(x_BMNC.shape[0])
    return self.apply(params, cache, x_BMNC, time_BM, position, method='velocity')

  def prefill_all(
    self, params: types.Params, vae_params: types.Params, prompts: dict[str, types.Prompts]
  ) -> dict[str, types.Cache]:
    """Encodes contexts of several tasks; tasks whose rows have one shape share a pass."""
    out = {}
    for tasks in contexts.group_by_shape(prompts):
      cache = self.prefill(params, vae_params, contexts.stack([prompts[t] for t in tasks]))
      start = 0
      for task in tasks:
        stop = start + prompts[task].ids_BL.shape[0]
        out[task] = types.Cache(
          k_EBSJK=cache.k_EBSJK[:, start:stop],
          v_EBSJK=cache.v_EBSJK[:, start:stop],
          valid_BS=cache.valid_BS[start:stop],
          next_position_B=cache.next_position_B[start:stop],
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
    """Computes velocities of several tasks; tasks whose rows have one shape share a pass."""
    out = {}
    keys = {t: (caches[t].valid_BS, x[t]) for t in x}
    for tasks in contexts.group_by_shape(keys):
      joined = contexts.join_caches([caches[t] for t in tasks])
      v = self.velocity(
        params, joined, contexts.stack(x[t] for t in tasks), contexts.stack(time[t] for t in tasks)
      )
      bounds = np.cumsum([x[t].shape[0] for t in tasks])[:-1]
      out.update(zip(tasks, jnp.split(v, bounds)))
    return out

  def forward_with_states(
    self, params: types.Params, vae_params: types.Params, queries: Mapping[str, types.Query]
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns `forward`, and states (E, B, M, N, D) of the latent tokens after every layer."""
    caches = self.prefill_all(params, vae_params, _prompts(queries))
    out, states = {}, {}
    for task, query in queries.items():
      if isinstance(query, types.TextQuery):
        out[task] = self.text_logits(params, caches[task], query.ids_BML)
        continue
      x_BMNC, time_BM = _flat(query)
      position = self.latent_position(x_BMNC.shape[0])
      v_BMNC, states[task] = self.apply(
        params, caches[task], x_BMNC, time_BM, position, method='velocity_and_states'
      )
      out[task] = v_BMNC.reshape(query.x_BKGNC.shape)
    return out, states

  def forward(
    self, params: types.Params, vae_params: types.Params, queries: Mapping[str, types.Query]
  ) -> dict[str, Array]:
    """Encodes all contexts; returns velocities (B, K, G, N, C) or logits (B, M, L, V) by task."""
    prompts = _prompts(queries)
    ids = {t: q.ids_BML for t, q in queries.items() if isinstance(q, types.TextQuery)}
    points = {t: _flat(q) for t, q in queries.items() if isinstance(q, types.FlowQuery)}
    x = {t: x_BMNC for t, (x_BMNC, _) in points.items()}
    time = {t: time_BM for t, (_, time_BM) in points.items()}
    if self.joint:
      v, logits = self.apply(
        params,
        {task: self.sequence(vae_params, p) for task, p in prompts.items()},
        {task: (x[task], time[task], self.latent_position(x[task].shape[0])) for task in x},
        ids,
        method='joint',
      )
    else:
      caches = self.prefill_all(params, vae_params, prompts)
      v = self.velocity_all(params, caches, x, time)
      logits = {task: self.text_logits(params, caches[task], rows) for task, rows in ids.items()}
    out = {}
    for task, query in queries.items():
      if isinstance(query, types.FlowQuery):
        out[task] = v[task].reshape(query.x_BKGNC.shape)
      else:
        out[task] = logits[task]
    return out

  def empty_row(self, shape: tuple[int, int], length: int) -> types.Tree:
    """Creates an empty decode cache for rows (B, M) of texts of at most `length` tokens."""
    return bagel.empty_row(self.config, shape, length)

  def decode_token(
    self, params: types.Params, cache: types.Cache, row: types.Tree, index: Array, token: Array
  ) -> tuple[Array, types.Tree]:
    """Runs one decoding step; returns the next logits and the updated decode cache."""
    return self.apply(params, cache, row, index, token, method='decode')

  def text_logits(self, params: types.Params, cache: types.Cache, ids_BML: Array) -> Array:
    """Computes logits (B, M, L, V) of M texts a prompt."""
    return self.apply(params, cache, ids_BML, method='read')


def _prompts(queries: Mapping[str, types.Query]) -> dict[str, types.Prompts]:
  """Returns the contexts of queries by task."""
  return {task: query.prompts for task, query in queries.items()}


def _flat(query: types.FlowQuery) -> tuple[Array, Array]:
  """Returns points (B, M, N, C) and times (B, M) of a query, where row m is k * G + g."""
  B = query.x_BKGNC.shape[0]
  N, C = query.x_BKGNC.shape[-2:]
  return query.x_BKGNC.reshape(B, -1, N, C), query.time_BKG.reshape(B, -1)
