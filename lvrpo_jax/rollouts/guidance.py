"""Classifier-free guidance of rollouts, and of what is trained on their steps.

A guided policy draws by other velocities than the plain one, so its steps have to be replayed, and
its reference asked, with the same scale (arXiv 2505.05470 samples and trains guided; objectives on
final images alone train the plain policy and may draw in any way).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flax import struct
import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import types
from lvrpo_jax.models import contexts
from lvrpo_jax.models import family
from lvrpo_jax.rollouts import image as image_rollout

Array = jax.Array


def policy_velocity(
  policy: family.Policy,
  params: types.Params,
  cache: types.Cache,
  bare: types.Cache | None,
  scale: float | Array | None,
) -> image_rollout.Velocity:
  """The policy that samples: guided where `bare`, the contexts without their texts, is given."""

  def plain(x_BGNC, time_BG):
    return policy.velocity(params, cache, x_BGNC, time_BG)

  if bare is None:
    return plain

  def guided(x_BGNC, time_BG):
    bare_v = policy.velocity(params, bare, x_BGNC, time_BG)
    return flow.classifier_free(plain(x_BGNC, time_BG), bare_v, scale)

  return guided


def forward(
  policy: family.Policy,
  params: types.Params,
  vae_params: types.Params,
  queries: Mapping[str, types.Query],
) -> dict[str, Array]:
  """`Policy.forward`, with guided velocities of the queries that ask for them."""
  guided = {
    task: query for task, query in queries.items() if isinstance(query, types.GuidedFlowQuery)
  }
  bare = {
    f'{task}/bare': types.FlowQuery(
      contexts.without_prompt(query.prompts), query.x_BKGNC, query.time_BKG
    )
    for task, query in guided.items()
  }
  out = policy.forward(params, vae_params, {**queries, **bare})
  for task, query in guided.items():
    scale = query.scale_BKG[..., None, None]
    out[task] = flow.classifier_free(out[task], out.pop(f'{task}/bare'), scale)
  return out


class Branches(NamedTuple):
  """Velocities of the same latents under three contexts; see `image.Velocity`."""

  main: image_rollout.Velocity
  without_text: image_rollout.Velocity
  without_images: image_rollout.Velocity


class Guidance(struct.PyTreeNode):
  """Strength of guidance.

  Attributes:
    text_scale, image_scale: 1 turns a branch off; see `flow.guide`.
    low, high: guidance is on for low < t <= high.
    renorm: 'global' (norm over one image), 'channel' or 'text_channel'.
    renorm_min: floor of the renormalisation; 1 turns it off.
  """

  text_scale: float
  image_scale: float
  low: float
  high: float
  renorm: str = struct.field(pytree_node=False)
  renorm_min: float = 0.0


def scales_at(guidance: Guidance, t: Array) -> tuple[Array, Array]:
  """Text and image scale in force at time t: 1 outside the interval."""
  inside = (t > guidance.low) & (t <= guidance.high)
  return (jnp.where(inside, guidance.text_scale, 1.0), jnp.where(inside, guidance.image_scale, 1.0))


def mix_branches(branches: Branches, guidance: Guidance, x_BGNC: Array, t: Array) -> Array:
  """Guided velocity (B, G, N, C) at the scalar time t; images are renormalised one by one."""
  time = jnp.broadcast_to(t, x_BGNC.shape[:2])
  text_scale, image_scale = scales_at(guidance, t)
  guide = lambda *v: flow.guide(*v, text_scale, image_scale, guidance.renorm, guidance.renorm_min)
  # A branch that stands for another one runs once.
  computed = {branch: branch(x_BGNC, time) for branch in branches}
  return jax.vmap(jax.vmap(guide))(*(computed[branch] for branch in branches))
