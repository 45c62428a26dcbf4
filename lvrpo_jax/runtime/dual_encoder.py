"""Builds the dual encoder of semantic rewards: network, tokenizer and preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import json
import pathlib
from typing import cast, NamedTuple

from absl import logging
import jax
from jax import numpy as jnp
import numpy as np
import tokenizers

from lvrpo_jax import types
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models.siglip import model as siglip

Array = jax.Array

KEY = 'config.dual_encoder.path'


class Texts(NamedTuple):
  """Encoding of texts as token ids.

  Attributes:
    encode: from a text to ids, with an end token where the encoder expects one.
    pad: id that fills a row.
    end: ids that stand at the end of a text that was cut.
  """

  encode: Callable[[str], Sequence[int]]
  pad: int
  end: tuple[int, ...]


class DualEncoder:
  """A SigLIP network with the preprocessing of its images and texts; parameters are passed in.

  Attributes:
    module: the network.
  """

  def __init__(self, module: siglip.Siglip, texts: Texts):
    """Keeps the network and the encoding of texts."""
    self.module = module
    self._texts = texts
    self._cut_is_logged = False

  @property
  def image_size(self) -> int:
    """Pixels along each side of the images that the network reads."""
    return self.module.vision_config.image_size

  def token_ids(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Encodes texts for the text tower: ids (R, L), and which texts (R,) were cut to fit.

    The text tower pools the last position, so rows are padded to its full length. The first text
    that is cut is logged.
    """
    length = self.module.text_config.max_positions
    ids_RL = np.full((len(texts), length), self._texts.pad, np.int32)
    cut_R = np.zeros(len(texts), bool)
    for row, text in enumerate(texts):
      tokens = list(self._texts.encode(text))
      if len(tokens) > length:
        cut_R[row] = True
        self._log_cut(text, len(tokens), length)
        tokens = [*tokens[: length - len(self._texts.end)], *self._texts.end]
      ids_RL[row, : len(tokens)] = tokens
    return ids_RL, cut_R

  def _log_cut(self, text: str, count: int, length: int) -> None:
    """Logs the first text that is cut."""
    if self._cut_is_logged:
      return
    self._cut_is_logged = True
    end = len(self._texts.end)
    logging.warning(
      '%r has %d tokens, of which the dual encoder reads %d (config.data.prompt_tokens); further '
      'such texts are not logged',
      text,
      count - end,
      length - end,
    )

  def _apply(self, params: types.Params, x: Array, method: str) -> tuple[Array, Array]:
    # `apply` is declared to return changed variables as well, where some are mutable.
    return cast(tuple[Array, Array], self.module.apply({'params': params}, x, method=method))

  def embed_image(self, params: types.Params, image_RYXC: Array) -> tuple[Array, Array]:
    """Embeds uint8 images: unit vectors (R, D), and those of their patches (R, N, D)."""
    pixels = image_RYXC.astype(jnp.float32) / 127.5 - 1.0
    side = self.image_size
    if pixels.shape[1:3] != (side, side):
      shape = (pixels.shape[0], side, side, pixels.shape[3])
      pixels = jnp.clip(jax.image.resize(pixels, shape, 'cubic', antialias=True), -1.0, 1.0)
    return self._apply(params, pixels, 'embed_image')

  def embed_text(self, params: types.Params, ids_RL: Array) -> tuple[Array, Array]:
    """Embeds texts: unit vectors (R, D), and those of their tokens (R, L, D)."""
    return self._apply(params, ids_RL, 'embed_text')


def small(
  settings: types.Config, tokenizer: tokenizer_lib.Tokenizer, image_size: int, prompt_tokens: int
) -> DualEncoder:
  """Builds the dual encoder that the run trains, with the tokenizer of the data.

  Args:
    settings: `config.dual_encoder`.
    tokenizer: of the data.
    image_size: pixels along each side of the data's images.
    prompt_tokens: `config.data.prompt_tokens`.
  """
  tower = dict(
    hidden=settings.width, mlp=settings.ff_width, layers=settings.depth, heads=settings.heads
  )
  module = siglip.Siglip(
    siglip.SiglipVisionConfig(image_size=image_size, patch=settings.patch, **tower),
    siglip.SiglipTextConfig(
      vocab=len(tokenizer), projection=settings.width, max_positions=prompt_tokens + 1, **tower
    ),
  )

  def encode(text: str) -> list[int]:
    return [*tokenizer.encode(text), tokenizer.eos]

  return DualEncoder(module, Texts(encode, pad=tokenizer.eos, end=(tokenizer.eos,)))


def released(folder: pathlib.Path) -> DualEncoder:
  """Builds the dual encoder of a folder in Hugging Face's form: SigLIP, or fixed-size SigLIP-2.

  Raises:
    ValueError: the folder holds no such model.
  """
  try:
    config = json.loads((folder / 'config.json').read_text())
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  except (OSError, ValueError) as error:
    raise ValueError(f'{KEY} is {str(folder)!r}, which cannot be read: {error}') from error
  except Exception as error:  # The library raises a bare Exception.
    if type(error) is not Exception:
      raise
    raise ValueError(f'{KEY} is {str(folder)!r}: tokenizer.json: {error}') from error
  if config.get('model_type') not in ('siglip', 'siglip2'):
    raise ValueError(
      f'{KEY} is {str(folder)!r}, whose config.json has model_type '
      f"{config.get('model_type')!r}; allowed: 'siglip', 'siglip2'"
    )
  return DualEncoder(_released_module(folder, config), _released_texts(folder, config, tokenizer))


def _released_module(folder: pathlib.Path, config: types.Json) -> siglip.Siglip:
  """Builds the network of a `config.json`."""
  vision, text = config.get('vision_config', {}), config.get('text_config', {})
  # A config.json may leave out sizes that equal those of the base model.
  patch = vision.get('patch_size', 16)
  if 'image_size' not in vision and 'num_patches' in vision:
    raise ValueError(
      f'{KEY} is {str(folder)!r}, a SigLIP-2 model of flexible size (NaFlex); expected one of a '
      'fixed image_size'
    )
  image = siglip.SiglipVisionConfig(
    hidden=vision.get('hidden_size', 768),
    mlp=vision.get('intermediate_size', 3072),
    layers=vision.get('num_hidden_layers', 12),
    heads=vision.get('num_attention_heads', 12),
    image_size=vision.get('image_size', 224),
    patch=patch,
    eps=vision.get('layer_norm_eps', 1e-6),
  )
  return siglip.Siglip(
    image,
    siglip.SiglipTextConfig(
      hidden=text.get('hidden_size', 768),
      mlp=text.get('intermediate_size', 3072),
      layers=text.get('num_hidden_layers', 12),
      heads=text.get('num_attention_heads', 12),
      vocab=text.get('vocab_size', 32000),
      max_positions=text.get('max_position_embeddings', 64),
      projection=text.get('projection_size', text.get('hidden_size', 768)),
      eps=text.get('layer_norm_eps', 1e-6),
    ),
  )


def _released_texts(
  folder: pathlib.Path, config: types.Json, tokenizer: tokenizers.Tokenizer
) -> Texts:
  """Builds the encoding of texts of a folder."""
  # A stored length would cut or pad before this module does.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text()) if path.is_file() else {}
  pad = settings.get('pad_token') or '</s>'
  name = pad['content'] if isinstance(pad, dict) else pad
  pad_id = tokenizer.token_to_id(name)
  if pad_id is None:
    raise ValueError(f'{KEY} is {str(folder)!r}, whose tokenizer has no token {name!r} to pad with')
  lower = settings.get('do_lower_case', False)

  def encode(text: str) -> list[int]:
    return tokenizer.encode(text.lower() if lower else text).ids

  # The ids that the tokenizer appends to every text are kept at the end of a text that is cut.
  end = tuple(encode(''))
  return Texts(encode, pad=pad_id, end=end)
