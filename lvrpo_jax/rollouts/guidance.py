"""Classifier-free guidance of rollouts and of the updates that replay their steps.

Guided steps follow other velocities than unguided ones. Replays of a guided rollout, and the
reference, therefore use the scale of the rollout (arXiv 2505.05470 samples and trains with
guidance). Decoupled objectives read final images alone: they train the unguided policy and permit
any sampler.
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

Array = types.Array


def policy_velocity(
  policy: family.Policy,
  params: types.Params,
  cache: types.Cache,
  bare: types.Cache | None,
  scale: float | Array | None,
) -> image_rollout.Velocity:
  """Returns the velocity of the policy that samples, guided if `bare` is given.

  Args:
    policy: the model.
    params: its parameters.
    cache: the contexts.
    bare: the contexts without their texts, or None for no guidance.
    scale: scale of the guidance; None where `bare` is None.
  """

  def plain(x_BGNC: Array, time_BG: Array) -> Array:
    return policy.velocity(params, cache, x_BGNC, time_BG)

  if bare is None or scale is None:
    return plain

  def guided(x_BGNC: Array, time_BG: Array) -> Array:
    bare_v = policy.velocity(params, bare, x_BGNC, time_BG)
    return flow.classifier_free(plain(x_BGNC, time_BG), bare_v, scale)

  return guided


def forward(
  policy: family.Policy,
  params: types.Params,
  vae_params: types.Params,
  queries: Mapping[str, types.Query],
) -> dict[str, Array]:
  """Runs `Policy.forward`; the velocities of a `GuidedFlowQuery` are guided."""
  guided = {
    task: query for task, query in queries.items() if isinstance(query, types.GuidedFlowQuery)
  }
  bare = {
    f'{task}/bare': types.FlowQuery(
      prompts=contexts.without_prompt(query.prompts),
      x_BKGNC=query.x_BKGNC,
      time_BKG=query.time_BKG,
    )
    for task, query in guided.items()
  }
  out = policy.forward(params, vae_params, {**queries, **bare})
  for task, query in guided.items():
    scale = query.scale_BKG[..., None, None]
    out[task] = flow.classifier_free(out[task], out.pop(f'{task}/bare'), scale)
  return out


class Branches(NamedTuple):
  """Velocities under the three contexts of guidance; see `image.Velocity`.

  Attributes:
    main: under the whole context.
    without_text: under the context without the last text.
    without_images: under the context without its images.
  """

  main: image_rollout.Velocity
  without_text: image_rollout.Velocity
  without_images: image_rollout.Velocity


class Guidance(struct.PyTreeNode):
  """Settings of guidance with two branches.

  Attributes:
    text_scale, image_scale: scales of the branches; 1 turns a branch off, see `flow.guide`.
    low, high: interval of times, low < t <= high, in which guidance is on.
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
  """Returns the text scale and the image scale at time t; both are 1 outside the interval."""
  inside = (t > guidance.low) & (t <= guidance.high)
  return (jnp.where(inside, guidance.text_scale, 1.0), jnp.where(inside, guidance.image_scale, 1.0))


def mix_branches(branches: Branches, guidance: Guidance, x_BGNC: Array, t: Array) -> Array:
  """Computes the guided velocity (B, G, N, C) at the scalar time t.

  Every image is renormalised by itself.
  """
  time = jnp.broadcast_to(t, x_BGNC.shape[:2])
  text_scale, image_scale = scales_at(guidance, t)

  def guide(v: Array, v_text: Array, v_image: Array) -> Array:
    return flow.guide(
      v, v_text, v_image, text_scale, image_scale, guidance.renorm, guidance.renorm_min
    )

  # Branches with the same context are one function, which runs once.
  computed = {branch: branch(x_BGNC, time) for branch in branches}
  return jax.vmap(jax.vmap(guide))(*(computed[branch] for branch in branches))
