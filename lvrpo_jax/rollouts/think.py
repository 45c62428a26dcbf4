"""Rollouts with a plan: a text and the image after it form one trajectory with one reward.

Both halves are trained in one update, each with its own density and the same advantage (UniGRPO,
arXiv 2603.23500). This module holds the halves as they are sampled; `training.losses` reads them
as the tasks `PLAN` and `THINK_GENERATE`.
"""

from __future__ import annotations

from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.models import contexts

Array = types.Array

IMAGE_SALT = 1 << 20
"""Value folded into a row's key for its image; its text folds in the indices of its tokens."""


def image_keys(key_BG: Array) -> Array:
  """Makes the keys (B * G, 1) of the images that follow the texts of `key_BG`."""
  return ops.fold_each(key_BG, IMAGE_SALT).reshape(-1, 1)


def regroup_images(rollout: types.ImageTrajectory, group: int) -> types.ImageTrajectory:
  """Reshapes a rollout of B * G prompts with one image each into B prompts with G images."""

  def wide(x: Array) -> Array:
    return x.reshape(*x.shape[:-4], -1, group, *x.shape[-2:])

  return rollout.replace(
    x_TBGNC=wide(rollout.x_TBGNC),
    noise_TBGNC=wide(rollout.noise_TBGNC),
    mean_TBGNC=wide(rollout.mean_TBGNC),
    latents_BGNC=wide(rollout.latents_BGNC),
  )


class SampledPlans(struct.PyTreeNode):
  """Both halves of sampled trajectories.

  Attributes:
    plan: the texts.
    image: the images as groups; their `prompts` are those of the plans.
  """

  plan: types.SampledTexts
  image: types.SampledImages


def split_halves(
  sampled: SampledPlans, bos: int, advantage_BG: Array, valid_BG: Array
) -> dict[str, tuple[types.SampledTexts | types.SampledImages, Array, Array]]:
  """Splits trajectories into the halves that the update reads.

  Every image becomes a group of one, whose context includes the image's own plan.

  Args:
    sampled: the trajectories.
    bos: id that starts a plan.
    advantage_BG: advantages of the trajectories.
    valid_BG: True for trajectories that have an advantage.

  Returns:
    (samples, advantages, validity) by task.
  """
  plan, image = sampled.plan, sampled.image

  def alone_BG(x: Array) -> Array:
    return x.reshape(-1, 1, *x.shape[2:])

  def alone_BKG(x: Array) -> Array:
    # (B, K, G, ...) to (B * G, K, 1, ...).
    return jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], 1, *x.shape[3:])

  images = types.SampledImages(
    prompts=contexts.after_plans(plan.prompts, plan.tokens_BGT, plan.mask_BGT, bos),
    latents_BGNC=alone_BG(image.latents_BGNC),
    steps=jax.tree.map(alone_BKG, image.steps),
    scale_BKG=alone_BKG(image.scale_BKG),
  )
  return {
    tasks.PLAN: (plan, advantage_BG, valid_BG),
    tasks.THINK_GENERATE: (images, alone_BG(advantage_BG), alone_BG(valid_BG)),
  }
