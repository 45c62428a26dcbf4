"""What alignment needs from a model: the protocols of a policy and of a model family.

Nothing above `models/` asks which family it has. `config.model.family` names one of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any, Protocol

import jax
import numpy as np

from lvrpo_jax import types

Array = jax.Array

POLICY, AUTOENCODER = 'policy', 'autoencoder'
"""Parts of a released model."""

TOKENS, FLOW = 'tokens', 'flow'
"""Forms of a density: a product of token probabilities; Gaussian steps of a flow."""

FAMILIES = {'bagel': 'lvrpo_jax.models.bagel.family:BAGEL'}
"""Import paths of the families by name."""


class Tokenizer(Protocol):
  """What a policy asks of the data's tokenizer."""

  bos: int
  eos: int
  start_of_image: int
  end_of_image: int
  added: Sequence[str]

  def __len__(self) -> int:
    """Number of ids."""
    ...

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without a frame."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids up to the end token."""
    ...


class ModelFamily(Protocol):
  """Builds policies from configs."""

  def build(self, config: types.Config, tokenizer: Tokenizer, image_size: int) -> Policy:
    """The policy of a config, for images of so many pixels a side."""
    ...

  def digest(self, policy: Any, folder: str | os.PathLike, part: str) -> str:
    """Tells the weights of one part of a released folder apart from others."""
    ...

  def load(
    self, policy: Any, folder: str | os.PathLike, part: str, shardings: types.Tree
  ) -> types.Params:
    """Parameters of one part of a released folder, read straight into their shards."""
    ...

  def save(
    self,
    policy: Any,
    params: types.Params,
    vae_params: types.Params,
    source: str | os.PathLike,
    target: pathlib.Path,
    shards: int,
  ) -> None:
    """Writes a folder of the released form, configuration and tokenizer copied from `source`."""
    ...


class Policy(Protocol):
  """Static description of a policy; parameters are passed to every method.

  Attributes:
    image_size: pixels along each side of the images of this run.
    bos, eos: ids that start and end every text.
    densities: 'tokens' or 'flow' for every output modality.
    latent_shape: (N, C) of an image.
    vit_tokens: tokens of an image that is shown.
  """

  image_size: int
  bos: int
  eos: int

  @property
  def densities(self) -> Mapping[str, str]:
    """'tokens' or 'flow' for every output modality."""
    ...

  @property
  def latent_shape(self) -> tuple[int, int]:
    """(N, C) of an image."""
    ...

  @property
  def vit_tokens(self) -> int:
    """Tokens of an image that is shown."""
    ...

  @property
  def width(self) -> int:
    """Width of the states after every layer."""
    ...

  @property
  def depth(self) -> int:
    """Number of layers."""
    ...

  def init(self, key: Array) -> types.Params:
    """Fresh parameters."""
    ...

  def init_autoencoder(self, key: Array) -> types.Params:
    """Fresh parameters of the autoencoder."""
    ...

  def fit_autoencoder(self, image_BYXC: np.ndarray, seed: int) -> types.Params:
    """Parameters of a small autoencoder that is fitted to uint8 images in closed form."""
    ...

  def prefill(
    self, params: types.Params, vae_params: types.Params, prompts: types.Prompts
  ) -> types.Cache:
    """Encodes the context of every prompt once."""
    ...

  def prefill_all(
    self, params: types.Params, vae_params: types.Params, prompts: dict[str, types.Prompts]
  ) -> dict[str, types.Cache]:
    """Contexts of several tasks."""
    ...

  def empty_row(self, shape: tuple[int, int], length: int) -> types.Tree:
    """Room for the keys and values of texts of at most `length` tokens."""
    ...

  def decode_token(
    self, params: types.Params, cache: types.Cache, row: types.Tree, index: Array, token: Array
  ) -> tuple[Array, types.Tree]:
    """Logits after one more token of every text, and the rows with its keys and values."""
    ...

  def text_logits(self, params: types.Params, cache: types.Cache, ids_BML: Array) -> Array:
    """Logits (B, M, L, V) of M texts a prompt."""
    ...

  def velocity(
    self, params: types.Params, cache: types.Cache, x_BMNC: Array, time_BM: Array
  ) -> Array:
    """Velocities (B, M, N, C) of M noised images a prompt."""
    ...

  def forward(
    self, params: types.Params, vae_params: types.Params, queries: Mapping[str, types.Query]
  ) -> dict[str, Array]:
    """Velocities (B, K, G, N, C) and logits (B, M, L, V) by task, after the contexts of all."""
    ...

  def forward_with_states(
    self, params: types.Params, vae_params: types.Params, queries: Mapping[str, types.Query]
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """`forward`, and the latent tokens' states (E, B, M, N, D) after every layer by task."""
    ...

  def encode_image(self, vae_params: types.Params, image_BYXC: Array) -> Array:
    """Latent tokens (B, N, C) of uint8 images."""
    ...

  def decode_image(self, vae_params: types.Params, latents: Array) -> Array:
    """uint8 images (..., Y, X, 3) of latent tokens (..., N, C)."""
    ...
