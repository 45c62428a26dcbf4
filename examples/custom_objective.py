"""Objectives of your own, for images and for texts.

    python -m lvrpo_jax.main --config=configs/tiny.py --workdir=runs/own \
        --config.align.image.objective=examples.custom_objective:UNCLIPPED \
        --config.align.text.objective=examples.custom_objective:REINFORCE
"""

from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import policy_gradient
from lvrpo_jax.objectives import text as text_objectives


def unclipped(points, settings):
  """The ratio of a denoising step without a clip, per step, and metrics per step."""
  log_ratio = flow.log_ratio(
    points.noise, points.mean, points.old_mean, points.std, flow_objectives.TOKENS
  )
  loss = -policy_gradient.ratio_of(log_ratio) * points.advantage
  return loss, {'beyond_clip': jnp.abs(log_ratio) > settings.clip}


UNCLIPPED = flow_objectives.FlowObjective(unclipped, coupled=True)
"""Trains on steps of the trajectory."""


def reinforce(points, settings):
  """`-A log p` of every token; no ratio is clipped."""
  del settings
  return -points.advantage_BG[..., None] * points.logp_BGT, points.log_ratio_BGT


REINFORCE = text_objectives.TextObjective(reinforce, 'token', clips_low=False)
"""Every token of the batch has the same weight."""
