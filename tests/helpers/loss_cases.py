"""Settings and random batches for tests of whole-batch losses."""

from typing import Any

import numpy as np

from configs import base
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.objectives import flow as flow_objectives

WEIGHTS = {'generate': 1.0, 'understand': 0.5, 'edit': 2.0}
"""Weights of the tasks in most tests."""


def settings(weights=None, sampler='sde', text=None, image=None) -> Any:
  """`config.align` with numbers of its own, and changes of two of its sections.

  Args:
    weights: of the tasks that have prompts.
  """
  weights, align = WEIGHTS if weights is None else weights, base.get_config().align
  for task in align.prompts:
    align.prompts[task] = int(task in weights)
  align.task_weights.update(weights)
  align.rollout.sampler = sampler
  align.image.update(
    dict(objective='diffusion_nft', nft_beta=0.7, nft_advantage_scale=2.0, clip=1e-3, kl_weight=0.3)
  )
  align.text.update(dict(objective='dapo', clip_low=0.2, clip_high=0.28, kl_weight=0.4))
  align.text.update(text or {})
  align.image.update(image or {})
  return align


def total(loss, params, batch, vae=None):
  """The scalar that the update descends."""
  weights = loss.weights(batch)
  sums, _ = loss.sums(params, None, {'vae': vae}, batch)
  return sum(loss.coefficients[k] * ops.divide(v, weights[k]) for k, v in sums.items())


def text_case(B, G, T, V, prompts, seed=0) -> types.TextTrainBatch:
  """Answers of different lengths, one of them invalid."""
  rng = np.random.default_rng(seed)
  mask = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
  valid = np.ones((B, G), bool)
  valid[0, 1] = False
  sampled = types.SampledTexts(
    prompts=prompts,
    tokens_BGT=rng.integers(0, V, (B, G, T)).astype(np.int32),
    logp_BGT=-rng.uniform(0.5, 3, (B, G, T)),
    mask_BGT=mask,
    temperature_B=np.linspace(0.7, 1.3, B),
  )
  return types.TextTrainBatch(
    sampled=sampled,
    reference_BGT=-rng.uniform(0.5, 3, (B, G, T)),
    advantage_BG=rng.normal(size=(B, G)),
    valid_BG=valid,
  )


def image_case(B, G, K, N, C, prompts, seed=0, objective='diffusion_nft') -> types.ImageTrainBatch:
  """Points of `K` draws (or steps) of every sample, one sample invalid."""
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape)

  shape = B, K, G
  x, time = draw(*shape, N, C), rng.uniform(0.3, 0.9, shape)
  steps = None
  if flow_objectives.find(objective).coupled:
    steps = types.Transitions(
      x_BKGNC=x,
      next_BKGNC=x,
      time_BKG=time,
      next_time_BKG=time - 0.2,
      first_time_BKG=np.full(shape, 0.95),
      eta_BKG=np.full(shape, 0.7),
      noise_BKGNC=draw(*shape, N, C),
      mean_BKGNC=x + 0.1 * draw(*shape, N, C),
      std_BKG=rng.uniform(0.1, 0.4, shape),
    )
  valid = np.ones((B, G), bool)
  valid[1, 0] = False
  sampled = types.SampledImages(
    prompts=prompts,
    latents_BGNC=draw(B, G, N, C),
    steps=steps,
    scale_BKG=np.ones(shape),
  )
  return types.ImageTrainBatch(
    sampled=sampled,
    query=types.FlowQuery(prompts, x_BKGNC=x, time_BKG=time),
    old_BKGNC=draw(*shape, N, C),
    reference_BKGNC=draw(*shape, N, C),
    advantage_BG=draw(B, G),
    valid_BG=valid,
  )
