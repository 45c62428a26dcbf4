"""Inference with released or trained models: from texts and images to an answer or an image.

A context is a list of segments in logical order (`data.packing`). Guidance has three contexts: the
whole one, the part before the last text, and the texts without the images (arXiv 2505.14683 and its
released code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import cast, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import types
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import packing
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import text as text_rollout

Array = types.Array
Segments = Sequence[packing.Segment]

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
  """How answers are sampled.

  Attributes:
    length: most tokens, the end token included.
    temperature: 0 takes the most likely token.
    top_p: probability mass of the tokens that are sampled from; 1 samples from all.
  """

  length: int
  temperature: float = 0.0
  top_p: float = 1.0


def resize_rules(policy: policy_lib.Policy) -> Rules:
  """Returns the released rules, with the largest side bounded by the model's position tables.

  A model of one image size has that size instead.
  """
  config = policy.config
  stride = policy.vae.downsample * policy.latent_patch
  if config.interpolate_pos:
    size = policy.image_size
    return Rules(
      latent=image_files.ResizeRule(size, size, stride),
      vit=image_files.ResizeRule(size, size, config.vit.patch),
    )

  def rule(side: int, low: int, step: int) -> image_files.ResizeRule:
    return image_files.ResizeRule(side, min(low, side), step)

  return Rules(
    latent=rule(config.latent_side * stride, LATENT_MIN_SIDE, stride),
    vit=rule(config.vit.side * config.vit.patch, VIT_MIN_SIDE, config.vit.patch),
  )


def bucket(width: int, height: int, side: int) -> tuple[int, int]:
  """Returns (width, height) with the longer side `side` and the nearest ratio of `RATIOS`."""

  def distance(ratio: tuple[int, int]) -> float:
    return abs(np.log(ratio[0] / ratio[1]) - np.log(width / height))

  w, h = min(RATIOS, key=distance)
  return (side, round(side * h / w)) if w >= h else (round(side * w / h), side)


def text_bucket(count: int) -> int:
  """Returns the smallest bucket length that holds `count` tokens; 0 for none."""
  if not count:
    return 0
  return SHORTEST * 2 ** max(0, int(np.ceil(np.log2(count / SHORTEST))))


def _ignore(step: int) -> None:
  """Reports no progress."""
  del step


class Model:
  """A model with its weights, which answers and generates. Compiled functions are kept.

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
    config = policy.config
    self.form = packing.Format(
      bos=policy.bos,
      eos=policy.eos,
      start_of_image=config.start_of_image,
      end_of_image=config.end_of_image,
      patch_values=config.vit.patch**2 * 3,
      latent_channels=config.latent_channels,
    )
    self._prefill = jax.jit(functools.partial(policy.apply, method='prefill'))
    self._answer = jax.jit(self._answer_fn, static_argnames=('decoding',))
    self._step = jax.jit(self._step_fn, static_argnames=('branches',))
    self._encode = jax.jit(self._encode_fn)
    self._decode = jax.jit(self._decode_fn)

  def grid(self, image_YX: tuple[int, int]) -> tuple[int, int]:
    """Returns the latent tokens (rows, columns) of an image of this many pixels."""
    stride = self.policy.vae.downsample * self.policy.latent_patch
    return image_YX[0] // stride, image_YX[1] // stride

  def text(self, text: str) -> packing.Text:
    """Makes the segment of a text."""
    return packing.Text(self.tokenizer.encode(text))

  def vit(self, pixels_YXC: np.ndarray) -> packing.Vit:
    """Makes the segment of an image for the vision tower; pixels in [-1, 1]."""
    vit = self.policy.config.vit
    rows, columns = (side // vit.patch for side in pixels_YXC.shape[:2])
    return packing.Vit(
      patches=np.asarray(vae_lib.patchify(pixels_YXC[None], vit.patch)[0]),
      position_ids=self.policy.positions(rows, columns, vit.side),
    )

  def clean(self, pixels_YXC: np.ndarray, eps_YXC: np.ndarray | Array) -> packing.Latent:
    """Makes the segment of a clean image; the autoencoder samples its latents with noise `eps`."""
    latent = self._encode(self.vae_params, pixels_YXC[None], eps_YXC[None])
    tokens = vae_lib.patchify(latent, self.policy.latent_patch)[0]
    height, width = pixels_YXC.shape[:2]
    return packing.Latent(self.latent_position((height, width)), tokens=np.asarray(tokens))

  def latent_position(self, image_YX: tuple[int, int]) -> np.ndarray:
    """Returns the rows (N,) of the latent position table."""
    return self.policy.positions(*self.grid(image_YX), self.policy.config.latent_side)

  def pixels(self, image_YXC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resizes an image; returns pixels in [-1, 1] for the autoencoder and for the vision tower.

    The pixels of the vision tower are made from the resized bytes of the autoencoder.
    """
    latent, vit = self.rules
    if self.buckets and not self.policy.config.interpolate_pos:
      size = bucket(image_YXC.shape[1], image_YXC.shape[0], latent.max_side)
      image_YXC = image_files.resize_to(image_YXC, size)
    resized = image_files.resize(image_YXC, latent)
    return image_files.transform(resized, latent), image_files.transform(resized, vit)

  def contexts(
    self, task: str, prompt: str, image_YXC: np.ndarray | None, system: str, key: Array
  ) -> tuple[Contexts, tuple[int, int] | None]:
    """Returns the branches of a task, and the size (Y, X) of an edited image.

    Args:
      task: 'generate' (prompt alone), 'understand' (image and question; an image is not required)
        or 'edit' (image and instruction).
      prompt: caption, question or instruction.
      image_YXC: uint8 image that is shown, or None.
      system: text before everything else, or ''.
      key: PRNG key of the autoencoder's noise.
    """
    first: list[packing.Segment] = [self.text(system)] if system else []
    text = self.text(prompt)
    if task == tasks.GENERATE or image_YXC is None:
      whole = [*first, text]
      return Contexts(main=whole, without_text=first, without_images=[*first, text]), None
    latent_pixels, vit_pixels = self.pixels(image_YXC)
    picture: list[packing.Segment] = [self.vit(vit_pixels)]
    height, width = latent_pixels.shape[:2]
    if task == tasks.EDIT:
      shape = [side // self.policy.vae.downsample for side in (height, width)]
      eps = jax.random.normal(key, (*shape, self.policy.vae.z_channels))
      picture = [self.clean(latent_pixels, eps), *picture]
    branches = Contexts(
      main=[*first, *picture, text],
      without_text=[*first, *picture],
      without_images=[*first, text],
    )
    return branches, (height, width)

  def prefill(self, segments: Segments) -> types.Cache:
    """Encodes a context once."""
    sequence = packing.pack([segments], self.form).sequence
    text, vit, latent = (
      x.shape[1] for x in (sequence.ids_BL, sequence.patches_BNP, sequence.latents_BNC)
    )
    # An empty context, as guidance has without a system prompt, becomes one place of padding.
    places = text if text or vit or latent else 1
    lengths = packing.Lengths(
      text=text_bucket(places) if self.buckets else places, vit=vit, latent=latent
    )
    if lengths.text != text:
      sequence = packing.pack([segments], self.form, lengths=lengths).sequence
    return self._prefill(self.params, sequence)

  def answer(self, segments: Segments, decoding: Decoding, key: Array) -> list[int]:
    """Samples an answer to a context; returns its token ids without the end token."""
    tokens, mask = self._answer(self.params, self.prefill(segments), key[None, None], decoding)
    return [t for t in np.asarray(tokens)[np.asarray(mask)].tolist() if t != self.form.eos]

  def draw(
    self,
    contexts: Contexts,
    image_YX: tuple[int, int],
    guidance: guidance_lib.Guidance,
    grid: Array,
    key: Array,
    progress: Callable[[int], None] = _ignore,
  ) -> np.ndarray:
    """Generates an image, uint8 (Y, X, 3).

    Args:
      contexts: the branches of guidance.
      image_YX: size in pixels, multiples of the stride of a latent token.
      guidance: scales of the branches.
      grid: falling times, see `flow.time_grid`.
      key: PRNG key of the first latents.
      progress: called after every step with the count of steps done.
    """
    caches, branches = _unique(contexts, guidance, self.prefill)
    position = jnp.asarray(self.latent_position(image_YX))[None]
    x = jax.random.normal(key, (1, 1, position.shape[1], self.form.latent_channels))
    for done, (t, t_next) in enumerate(zip(grid[:-1], grid[1:]), 1):
      x = self._step(self.params, caches, guidance, x, t, t_next, position, branches=branches)
      x.block_until_ready()
      progress(done)
    latent = vae_lib.unpatchify(x[0], self.grid(image_YX), self.policy.latent_patch)
    return image_files.to_bytes(self._decode(self.vae_params, latent)[0])

  def _encode_fn(self, params: types.Params, image_BYXC: Array, eps_BYXC: Array) -> Array:
    latent = self.policy.vae.apply({'params': params}, image_BYXC, eps_BYXC, method='encode')
    return cast(Array, latent)

  def _decode_fn(self, params: types.Params, latent_BYXC: Array) -> Array:
    return cast(Array, self.policy.vae.apply({'params': params}, latent_BYXC, method='decode'))

  def _answer_fn(
    self, params: types.Params, cache: types.Cache, key_BG: Array, decoding: Decoding
  ) -> tuple[Array, Array]:
    def decode(row: types.Tree, index: Array, token: Array) -> tuple[Array, types.Tree]:
      return self.policy.decode_token(params, cache, row, index, token)

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

  def _step_fn(
    self,
    params: types.Params,
    caches: Sequence[types.Cache],
    guidance: guidance_lib.Guidance,
    x: Array,
    t: Array,
    t_next: Array,
    position_BN: Array,
    branches: tuple[int, int, int],
  ) -> Array:
    def velocity_after(cache: types.Cache) -> image_rollout.Velocity:
      def velocity(x: Array, time: Array) -> Array:
        return self.policy.apply(params, cache, x, time, position_BN, method='velocity')

      return velocity

    velocities = [velocity_after(cache) for cache in caches]
    main, without_text, without_images = (velocities[i] for i in branches)
    v = guidance_lib.mix_branches(
      guidance_lib.Branches(main, without_text, without_images), guidance, x, t
    )
    return flow.ode_step(x, v, t, t_next)


def _unique(
  contexts: Contexts, guidance: guidance_lib.Guidance, prefill: Callable[[Segments], types.Cache]
) -> tuple[list[types.Cache], tuple[int, int, int]]:
  """Encodes the different contexts of the branches that guidance uses.

  Returns:
    The caches, and the index of the cache of every branch. A branch that is turned off has that of
    the main branch.
  """
  main, without_text, without_images = contexts
  if guidance.text_scale <= 1:
    without_text = main
  if guidance.text_scale <= 1 or guidance.image_scale <= 1:
    without_images = main
  different: list[Segments] = []

  def index_of(segments: Segments) -> int:
    for index, other in enumerate(different):
      if _same(segments, other):
        return index
    different.append(segments)
    return len(different) - 1

  branches = index_of(main), index_of(without_text), index_of(without_images)
  return [prefill(segments) for segments in different], branches


def _same(left: Segments, right: Segments) -> bool:
  """Whether two contexts hold the same segments, compared by identity as their arrays are large."""
  return len(left) == len(right) and all(x is y for x, y in zip(left, right))
