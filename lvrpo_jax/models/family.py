"""Protocols that a model implements for alignment: of a policy and of a model family.

Packages above `models` do not depend on a particular family. `config.model.family` names one of
`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Protocol, TypeVar

import numpy as np

from lvrpo_jax import types

Array = types.Array

POLICY, AUTOENCODER = 'policy', 'autoencoder'
"""Parts of a released model."""

TOKENS, FLOW = 'tokens', 'flow'
"""Forms of a density: a product of token probabilities, or Gaussian steps of a flow."""

FAMILIES = {'bagel': 'lvrpo_jax.models.bagel.family:BAGEL'}
"""Import paths of the families by name."""


class Tokenizer(Protocol):
  """Tokenizer of the data, as far as a policy reads it.

  Attributes:
    bos, eos: ids that frame a text.
    start_of_image, end_of_image: ids that frame an image.
    added: count of special tokens that the file of the tokenizer lacked.
  """

  bos: int
  eos: int
  start_of_image: int
  end_of_image: int
  added: int

  def __len__(self) -> int:
    """Returns the count of ids."""
    ...

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without its frame."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids up to the end token."""
    ...


PolicyT = TypeVar('PolicyT', bound='Policy')
"""The policy of a family."""


class ModelFamily(Protocol[PolicyT]):
  """Builds policies from configs, and reads and writes released folders."""

  def build(self, config: types.Config, tokenizer: Tokenizer, image_size: int) -> PolicyT:
    """Builds the policy of a config for images of `image_size` pixels a side."""
    ...

  def digest(self, policy: PolicyT, folder: str | os.PathLike, part: str) -> str:
    """Returns a fingerprint of the weights of one part of a released folder."""
    ...

  def load(
    self, policy: PolicyT, folder: str | os.PathLike, part: str, shardings: types.Tree
  ) -> types.Params:
    """Reads the parameters of one part of a released folder, each straight into its shards."""
    ...

  def save(
    self,
    policy: PolicyT,
    params: types.Params,
    vae_params: types.Params,
    source: str | os.PathLike,
    target: pathlib.Path,
    shards: int,
  ) -> None:
    """Writes a folder in the released form; copies configuration and tokenizer from `source`."""
    ...


class Policy(Protocol):
  """Static description of a policy; parameters are passed to every method."""

  @property
  def image_size(self) -> int:
    """Pixels along each side of the images of this run."""
    ...

  @property
  def bos(self) -> int:
    """Id that starts every text."""
    ...

  @property
  def eos(self) -> int:
    """Id that ends every text."""
    ...

  @property
  def densities(self) -> Mapping[str, str]:
    """Form of the density, 'tokens' or 'flow', by output modality."""
    ...

  @property
  def latent_shape(self) -> tuple[int, int]:
    """Shape (N, C) of the latent tokens of an image."""
    ...

  @property
  def vit_tokens(self) -> int:
    """Count of vision tokens of an image that is shown."""
    ...

  @property
  def width(self) -> int:
    """Width of the states after every layer."""
    ...

  @property
  def depth(self) -> int:
    """Count of layers."""
    ...

  def init(self, key: Array) -> types.Params:
    """Initialises parameters."""
    ...

  def init_autoencoder(self, key: Array) -> types.Params:
    """Initialises parameters of the autoencoder."""
    ...

  def fit_autoencoder(self, image_BYXC: np.ndarray, seed: int) -> types.Params:
    """Fits the parameters of a small autoencoder to uint8 images, in closed form."""
    ...

  def prefill(
    self, params: types.Params, vae_params: types.Params, prompts: types.Prompts
  ) -> types.Cache:
    """Encodes the context of every prompt once."""
    ...

  def prefill_all(
    self, params: types.Params, vae_params: types.Params, prompts: dict[str, types.Prompts]
  ) -> dict[str, types.Cache]:
    """Encodes the contexts of several tasks."""
    ...

  def empty_row(self, shape: tuple[int, int], length: int) -> types.Tree:
    """Creates an empty decode cache for texts of at most `length` tokens."""
    ...

  def decode_token(
    self, params: types.Params, cache: types.Cache, row: types.Tree, index: Array, token: Array
  ) -> tuple[Array, types.Tree]:
    """Runs one decoding step; returns the next logits and the updated decode cache."""
    ...

  def text_logits(self, params: types.Params, cache: types.Cache, ids_BML: Array) -> Array:
    """Computes logits (B, M, L, V) of M texts a prompt."""
    ...

  def velocity(
    self, params: types.Params, cache: types.Cache, x_BMNC: Array, time_BM: Array
  ) -> Array:
    """Computes velocities (B, M, N, C) of M noised images a prompt."""
    ...

  def forward(
    self, params: types.Params, vae_params: types.Params, queries: Mapping[str, types.Query]
  ) -> dict[str, Array]:
    """Encodes all contexts; returns velocities (B, K, G, N, C) or logits (B, M, L, V) by task."""
    ...

  def forward_with_states(
    self, params: types.Params, vae_params: types.Params, queries: Mapping[str, types.Query]
  ) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns `forward`, and states (E, B, M, N, D) of the latent tokens after every layer."""
    ...

  def encode_image(self, vae_params: types.Params, image_BYXC: Array) -> Array:
    """Encodes uint8 images to latent tokens (B, N, C)."""
    ...

  def decode_image(self, vae_params: types.Params, latents: Array) -> Array:
    """Decodes latent tokens (..., N, C) to uint8 images (..., Y, X, 3)."""
    ...
