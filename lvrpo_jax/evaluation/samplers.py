"""Samplers of evaluation: the same prompts and noise before and after alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.models import contexts
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import text as text_rollout
from lvrpo_jax.runtime import experiment as experiment_lib

Array = types.Array

SEED = 1 << 20
"""Offset of the seed, so that no noise of the evaluation is noise of training."""

IMAGE_SALT, TEXT_SALT = 0, 1
"""Values folded into the keys of the images and of the texts of a prompt."""


class Samplers(NamedTuple):
  """Compiled samplers of evaluation.

  Attributes:
    draw: `(params, vae_params, prompts[, guidance])` -> uint8 images (B, G, Y, X, 3).
    answer: `(params, vae_params, prompts)` -> sampled (B, G, T) and greedy (B, 1, T) tokens.
    think: arguments of `draw` -> plans (B, G, T), and uint8 images after them.
  """

  draw: Callable[..., Array]
  answer: Callable[..., tuple[Array, Array]]
  think: Callable[..., tuple[Array, Array]]


class _Sampling:
  """Functions of a policy and its prompts that `build` compiles."""

  def __init__(self, experiment: experiment_lib.Experiment):
    settings = experiment.config.evaluate
    self._policy, self._samples = experiment.policy, settings.samples
    self._length = experiment.config.data.answer_tokens + 1
    self._grid = flow.time_grid(settings.steps + 1, settings.shift)
    self._root = jax.random.key(experiment.config.seed + SEED)

  def _keys(self, index_B: Array, salt: int, group: int) -> Array:
    """Makes random keys (B, G) that depend on a prompt's index and a salt."""
    root = jax.random.fold_in(self._root, salt)

    def prompt_key(index: Array) -> Array:
      return jax.random.fold_in(root, index)

    def sample_keys(key: Array) -> Array:
      return ops.fold_rows(key, (group,))

    return jax.vmap(sample_keys)(jax.vmap(prompt_key)(index_B))

  def _images(
    self,
    params: types.Params,
    vae_params: types.Params,
    prompts: types.Prompts,
    noise: Array,
    scale: Array | None,
  ) -> Array:
    """Samples uint8 images (B, G, Y, X, 3); `noise` are keys, and a `scale` of None is unguided."""
    policy = self._policy
    cache = policy.prefill(params, vae_params, prompts)
    bare = None if scale is None else contexts.without_text(cache, prompts)
    latents = image_rollout.sample_ode(
      guidance_lib.policy_velocity(policy, params, cache, bare, scale),
      noise,
      policy.latent_shape,
      self._grid,
    )
    return policy.decode_image(vae_params, latents.reshape(-1, self._samples, *policy.latent_shape))

  def draw(
    self,
    params: types.Params,
    vae_params: types.Params,
    prompts: types.Prompts,
    scale: Array | None,
  ) -> Array:
    """Samples images after prompts."""
    noise = self._keys(prompts.index_B, IMAGE_SALT, self._samples)
    return self._images(params, vae_params, prompts, noise, scale)

  def answer(
    self, params: types.Params, vae_params: types.Params, prompts: types.Prompts
  ) -> tuple[Array, Array]:
    """Samples answers, and decodes greedy ones."""
    cache = self._policy.prefill(params, vae_params, prompts)

    def sample(group: int, temperature: float) -> Array:
      key_BG = self._keys(prompts.index_B, TEXT_SALT, group)
      return text_rollout.sample_text(
        self._policy, params, cache, key_BG, self._length, temperature
      ).tokens_BGT

    return sample(self._samples, 1.0), sample(1, 0.0)

  def think(
    self,
    params: types.Params,
    vae_params: types.Params,
    prompts: types.Prompts,
    scale: Array | None,
  ) -> tuple[Array, Array]:
    """Samples plans, and images after them with the noise of `draw`."""
    cache = self._policy.prefill(params, vae_params, prompts)
    plan = text_rollout.sample_text(
      self._policy,
      params,
      cache,
      self._keys(prompts.index_B, TEXT_SALT, self._samples),
      self._length,
      1.0,
    )
    after = contexts.after_plans(prompts, plan.tokens_BGT, plan.mask_BGT, self._policy.bos)
    noise = self._keys(prompts.index_B, IMAGE_SALT, self._samples).reshape(-1, 1)
    return plan.tokens_BGT, self._images(params, vae_params, after, noise, scale)


def build(experiment: experiment_lib.Experiment) -> Samplers:
  """Builds the samplers; every task and guidance compiles once."""
  sampling, default = _Sampling(experiment), experiment.config.evaluate.guidance

  def scaled(function: Callable[..., types.Tree]) -> Callable[..., types.Tree]:
    sampler = experiment.sampler(function)

    def run(
      params: types.Params,
      vae_params: types.Params,
      prompts: types.Prompts,
      guidance: float = default,
    ) -> types.Tree:
      scale = None if guidance == 1 else jnp.float32(guidance)
      return sampler(params, vae_params, prompts, scale)

    return run

  return Samplers(
    draw=scaled(sampling.draw),
    answer=experiment.sampler(sampling.answer),
    think=scaled(sampling.think),
  )
