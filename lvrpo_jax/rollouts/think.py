"""Thinking before drawing: a text plan and the image after it as one trajectory with one reward.

Both halves are trained in one update, each with its own density and the same advantage (UniGRPO,
arXiv 2603.23500). Here are the halves as they are sampled; `losses` knows them as the tasks `PLAN`
and `THINK`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.models import contexts
from lvrpo_jax.models import family
from lvrpo_jax.rollouts import text as text_rollout

Array = jax.Array

IMAGE_SALT = 1 << 20
"""Folded into a row's key for its image; its text folds in the numbers of its tokens."""


def sample_text(
  policy: family.Policy,
  params: types.Params,
  cache: types.Cache,
  key_BG: Array,
  length: int,
  temperature: float,
) -> types.TextTrajectory:
  """Samples texts of at most `length` tokens after contexts; see `rollouts.text.rollout`."""

  def decode(row, index, token):
    return policy.decode_token(params, cache, row, index, token)

  row = policy.empty_row(key_BG.shape, length)
  return text_rollout.sample(decode, row, key_BG, policy.bos, policy.eos, length, temperature)


def image_keys(key_BG: Array) -> Array:
  """Keys (B * G, 1) of the images that follow the texts of these keys."""
  return ops.fold_each(key_BG, IMAGE_SALT).reshape(-1, 1)


def regroup_images(rollout: types.ImageTrajectory, group: int) -> types.ImageTrajectory:
  """A rollout of B * G prompts with one image each as one of B prompts with G."""

  def wide(x):
    return x.reshape(*x.shape[:-4], -1, group, *x.shape[-2:])

  return rollout.replace(
    x_TBGNC=wide(rollout.x_TBGNC),
    noise_TBGNC=wide(rollout.noise_TBGNC),
    mean_TBGNC=wide(rollout.mean_TBGNC),
    latents_BGNC=wide(rollout.latents_BGNC),
  )


class ThinkTrajectory(struct.PyTreeNode):
  """Both halves of sampled trajectories, without advantages.

  Attributes:
    plan: the texts.
    image: the images as groups; their `prompts` are those of the plans.
  """

  plan: types.TextTrainBatch
  image: types.ImageTrainBatch


def split_think(
  thought: ThinkTrajectory, bos: int, advantage_BG: Array, valid_BG: Array
) -> dict[str, Any]:
  """The halves as the update reads them: an image is a row whose context has its own plan."""
  plan, image = thought.plan, thought.image
  B, G = valid_BG.shape

  def alone(x):
    # (B, K * G, ...) with row k * G + g, to (B * G, K, ...).
    split = x.reshape(B, x.shape[1] // G, G, *x.shape[2:])
    return jnp.moveaxis(split, 2, 1).reshape(B * G, x.shape[1] // G, *x.shape[2:])

  arrays = {
    f.name: jax.tree.map(alone, getattr(image, f.name))
    for f in dataclasses.fields(image)
    if f.name != 'prompts'
  }
  return {
    tasks.PLAN: plan.replace(advantage_BG=advantage_BG, valid_BG=valid_BG),
    tasks.THINK_GENERATE: types.ImageTrainBatch(
      **{
        **arrays,
        'prompts': contexts.after_plans(plan.prompts, plan.tokens_BGT, plan.mask_BGT, bos),
        'advantage_BG': alone(advantage_BG),
        'valid_BG': alone(valid_BG),
      }
    ),
  }
