"""Texts and images in, an answer or an image out: the released inference, for any of our models.

A context is a list of segments in logical order (`data.packing`). Guidance has three contexts: all
of it, what stands before the last text, and the texts without the images (arXiv 2505.14683 and its
released code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import types
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import packing
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.rollouts import text as text_rollout

Array = jax.Array
Segments = list[packing.Segment]

LATENT_MIN_SIDE, VIT_MIN_SIDE = 512, 224
"""Smallest shorter side, in pixels, to which the release enlarges images for either encoder."""

SHORTEST = 32
"""Places of the shortest text bucket; each further bucket is twice as long."""

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16), (2, 1), (1, 2))
"""Aspect ratios (width, height) of the buckets of images."""


class Rules(NamedTuple):
  """How images are resized for the autoencoder, and from there for the vision tower."""

  latent: image_files.ResizeRule
  vit: image_files.ResizeRule


class Contexts(NamedTuple):
  """Segments of the three branches of guidance; equal lists are encoded and run once."""

  main: Segments
  without_text: Segments
  without_images: Segments


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How answers are drawn.

  Attributes:
    length: most tokens, the end token included.
    temperature: 0 takes the most likely token.
    top_p: probability mass of the tokens that are drawn from; 1 draws from all.
  """

  length: int
  temperature: float = 0.0
  top_p: float = 1.0


def resize_rules(policy: policy_lib.Policy) -> Rules:
  """The released rules, their largest side bounded by the model's position tables.

  A model of one image size has that size instead.
  """
  c = policy.config
  stride = policy.vae.downsample * policy.latent_patch
  if c.interpolate_pos:
    size = policy.image_size
    return Rules(
      image_files.ResizeRule(size, size, stride), image_files.ResizeRule(size, size, c.vit.patch)
    )
  rule = lambda side, low, step: image_files.ResizeRule(side, min(low, side), step)
  return Rules(
    rule(c.latent_side * stride, LATENT_MIN_SIDE, stride),
    rule(c.vit.side * c.vit.patch, VIT_MIN_SIDE, c.vit.patch),
  )


def bucket(width: int, height: int, side: int) -> tuple[int, int]:
  """(width, height) with the longer side `side` and the nearest ratio of `RATIOS`."""
  distance = lambda ratio: abs(np.log(ratio[0] / ratio[1]) - np.log(width / height))
  w, h = min(RATIOS, key=distance)
  return (side, round(side * h / w)) if w >= h else (round(side * w / h), side)


def text_bucket(count: int) -> int:
  """Smallest room of the fixed set that holds `count` tokens; 0 for none."""
  if not count:
    return 0
  return SHORTEST * 2 ** max(0, int(np.ceil(np.log2(count / SHORTEST))))


class Model:
  """A model with its weights, ready to be asked. Compiled calls are kept.

  Args:
    policy: sizes and autoencoder.
    tokenizer: of texts.
    params, vae_params: weights, on one device or sharded.
    buckets: brings images to one of a few sizes and texts to one of a few lengths, so that
      nothing compiles after each of them has been seen; False keeps the released sizes.
  """

  def __init__(
    self,
    policy: policy_lib.Policy,
    tokenizer: tokenizer_lib.Tokenizer,
    params: types.Params,
    vae_params: types.Params,
    buckets: bool = True,
  ):
    self.policy, self.tokenizer, self.buckets = policy, tokenizer, buckets
    self.params, self.vae_params = params, vae_params
    self.rules = resize_rules(policy)
    c = policy.config
    self.form = packing.Format(
      bos=policy.bos,
      eos=policy.eos,
      start_of_image=c.start_of_image,
      end_of_image=c.end_of_image,
      patch_values=c.vit.patch**2 * 3,
      latent_channels=c.latent_channels,
    )
    self._prefill = jax.jit(functools.partial(policy.apply, method='prefill'))
    self._answer = jax.jit(self._answer_fn, static_argnames=('decoding',))
    self._step = jax.jit(self._step_fn, static_argnames=('alike',))
    self._encode = jax.jit(
      lambda params, image, eps: policy.vae.apply({'params': params}, image, eps, method='encode')
    )
    self._decode = jax.jit(
      lambda params, latent: policy.vae.apply({'params': params}, latent, method='decode')
    )

  def grid(self, image_YX: tuple[int, int]) -> tuple[int, int]:
    """Latent tokens (rows, columns) of an image of this many pixels."""
    stride = self.policy.vae.downsample * self.policy.latent_patch
    return image_YX[0] // stride, image_YX[1] // stride

  def text(self, text: str) -> packing.Text:
    return packing.Text(self.tokenizer.encode(text))

  def vit(self, pixels_YXC: np.ndarray) -> packing.Vit:
    """The segment of an image for the vision tower; pixels in [-1, 1]."""
    vit = self.policy.config.vit
    rows, columns = (side // vit.patch for side in pixels_YXC.shape[:2])
    return packing.Vit(
      np.asarray(vae_lib.patchify(pixels_YXC[None], vit.patch)[0]),
      self.policy.positions(rows, columns, vit.side),
    )

  def clean(self, pixels_YXC: np.ndarray, eps_YXC: np.ndarray) -> packing.Latent:
    """The segment of a clean image in latents, sampled by the autoencoder with the draw `eps`."""
    latent = self._encode(self.vae_params, pixels_YXC[None], eps_YXC[None])
    tokens = vae_lib.patchify(latent, self.policy.latent_patch)[0]
    return packing.Latent(self.latent_position(pixels_YXC.shape[:2]), tokens=np.asarray(tokens))

  def latent_position(self, image_YX: tuple[int, int]) -> np.ndarray:
    """Rows (N,) of the latent position table."""
    return self.policy.positions(*self.grid(image_YX), self.policy.config.latent_side)

  def pixels(self, image_YXC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in [-1, 1] for the autoencoder, and from the same resized bytes for the tower."""
    latent, vit = self.rules
    if self.buckets and not self.policy.config.interpolate_pos:
      size = bucket(image_YXC.shape[1], image_YXC.shape[0], latent.max_side)
      image_YXC = image_files.resize_to(image_YXC, size)
    resized = image_files.resize(image_YXC, latent)
    return image_files.transform(resized, latent), image_files.transform(resized, vit)

  def contexts(
    self, task: str, prompt: str, image_YXC: np.ndarray | None, system: str, key: Array
  ) -> tuple[Contexts, tuple[int, int] | None]:
    """The branches of a task, and the size (Y, X) of an edited image.

    Args:
      task: 'generate' (prompt alone), 'understand' (image and question; an image is not required)
        or 'edit' (image and instruction).
      system: text that stands before all else, or ''.
      key: of the autoencoder's draw.
    """
    first = [self.text(system)] if system else []
    text = self.text(prompt)
    if task == 'generate' or image_YXC is None:
      return Contexts([*first, text], first, [*first, text]), None
    latent_pixels, vit_pixels = self.pixels(image_YXC)
    picture: Segments = [self.vit(vit_pixels)]
    if task == 'edit':
      shape = [side // self.policy.vae.downsample for side in latent_pixels.shape[:2]]
      eps = jax.random.normal(key, (*shape, self.policy.vae.z_channels))
      picture = [self.clean(latent_pixels, eps), *picture]
    return (
      Contexts([*first, *picture, text], [*first, *picture], [*first, text]),
      latent_pixels.shape[:2],
    )

  def prefill(self, segments: Segments) -> types.Cache:
    """Encodes a context once."""
    sequence = packing.pack([segments], self.form).sequence
    sizes = [x.shape[1] for x in (sequence.ids_BL, sequence.patches_BNP, sequence.latents_BNC)]
    # A context of nothing, as guidance has without a system prompt, is one of padding.
    text = sizes[0] if any(sizes) else 1
    lengths = packing.Lengths(text_bucket(text) if self.buckets else text, *sizes[1:])
    if lengths.text != sizes[0]:
      sequence = packing.pack([segments], self.form, lengths=lengths).sequence
    return self._prefill(self.params, sequence)

  def answer(self, segments: Segments, decoding: Decoding, key: Array) -> list[int]:
    """Token ids of an answer to a context, without its end token."""
    tokens, mask = self._answer(self.params, self.prefill(segments), key[None, None], decoding)
    return [t for t in np.asarray(tokens)[np.asarray(mask)].tolist() if t != self.form.eos]

  def _answer_fn(self, params, cache, key_BG, decoding):
    decode = lambda row, index, token: self.policy.apply(
      params, cache, row, index, token, method='decode'
    )
    out = text_rollout.sample(
      decode,
      bagel.empty_row(self.policy.config, (1, 1), decoding.length),
      key_BG,
      self.form.bos,
      self.form.eos,
      decoding.length,
      decoding.temperature,
      decoding.top_p,
    )
    return out.tokens_BGT[0, 0], out.mask_BGT[0, 0]

  def draw(
    self,
    contexts: Contexts,
    image_YX: tuple[int, int],
    guidance: guidance_lib.Guidance,
    grid: Array,
    key: Array,
    progress: Callable[[int], None] = lambda step: None,
  ) -> np.ndarray:
    """An image, uint8 (Y, X, 3).

    Args:
      image_YX: its size in pixels, multiples of the stride of a latent token.
      grid: falling times, see `flow.time_grid`.
      progress: called after every step with its number.
    """
    caches, alike = _unique(contexts, guidance, self.prefill)
    position = jnp.asarray(self.latent_position(image_YX))[None]
    x = jax.random.normal(key, (1, 1, position.shape[1], self.form.latent_channels))
    for number, (t, t_next) in enumerate(zip(grid[:-1], grid[1:]), 1):
      x = self._step(self.params, caches, guidance, x, t, t_next, position, alike=alike)
      x.block_until_ready()
      progress(number)
    latent = vae_lib.unpatchify(x[0], self.grid(image_YX), self.policy.latent_patch)
    return image_files.to_bytes(self._decode(self.vae_params, latent)[0])

  def _step_fn(self, params, caches, guidance, x, t, t_next, position_BN, alike):
    branch = lambda cache: (
      lambda x, time: self.policy.apply(params, cache, x, time, position_BN, method='velocity')
    )
    branches = [branch(cache) for cache in caches]
    v = guidance_lib.mix_branches(
      guidance_lib.Branches(*(branches[i] for i in alike)), guidance, x, t
    )
    return flow.ode_step(x, v, t, t_next)


def _unique(
  contexts: Contexts, guidance: guidance_lib.Guidance, prefill: Callable[[Segments], types.Cache]
) -> tuple[list[types.Cache], tuple[int, ...]]:
  """Caches of the branches that matter, and which of them stands for each branch."""
  main, without_text, without_images = contexts
  if guidance.text_scale <= 1:
    without_text = main
  if guidance.text_scale <= 1 or guidance.image_scale <= 1:
    without_images = main
  different: list[Segments] = []
  alike = []
  for segments in (main, without_text, without_images):
    same = [i for i, other in enumerate(different) if _same(segments, other)]
    if not same:
      different.append(segments)
    alike.append(same[0] if same else len(different) - 1)
  return [prefill(segments) for segments in different], tuple(alike)


def _same(a: Sequence[packing.Segment], b: Sequence[packing.Segment]) -> bool:
  """Whether two contexts hold the same segments; by identity, for their arrays are large."""
  return len(a) == len(b) and all(x is y for x, y in zip(a, b))
