"""Rollout-training mismatch: what a rollout recorded against what a replay finds, before any update.

Ratios of an update are to recorded densities. Where these are not the densities that samples were
drawn with, be it by a temperature, a mask, a scale of guidance or a rounding that was lost on the
way, ratios mean nothing, and no loss shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.rollouts import replay

Array = jax.Array

DETERMINISTIC_STD = 0.1
"""Deviation, about that of the other steps, against which the end of a step without noise is
measured: latents that were rounded to 16 bits then show."""

PREFIX = 'mismatch'
"""What the names of all these metrics begin with."""

DECODE = f'{PREFIX}/decode'
"""Metric: largest |log-ratio| of a token between decoding and teacher forcing."""


def image_mismatch(
  sampler: str, v_BKGNC: Array, steps: types.Transitions, final_BGNC: Array | None = None
) -> Array:
  """Largest mismatch of any sample at every step, (K,), in nats per latent value.

  The largest of three, each 0 where a step is recorded as it was sampled:
  - the log-ratio of the step that the replay's velocities give to the recorded one, at the sample
    (`flow.log_ratio`), its absolute value;
  - the squared logarithm of the ratio of their deviations: the KL of two such Gaussians, to second
    order;
  - `mean(d^2) / (2 std^2)`, with d from `mean + std * noise` as recorded to the latents that the
    rollout went on from: the KL of two such Gaussians.
  A step without noise has no density: the deviation 1 stands in, and `DETERMINISTIC_STD` for the
  last of these.

  Args:
    v_BKGNC: velocities at the steps, of the policy that sampled.
    final_BGNC: the final latents, where the last of the steps ends in them.
  """
  if final_BGNC is not None:
    steps = steps.replace(next_BKGNC=steps.next_BKGNC.at[:, -1].set(final_BGNC))
  mean, std_BKG11 = replay.transition(sampler, v_BKGNC, steps)
  old, new = (jnp.where(x > 0, x, 1.0) for x in (steps.std_BKG, std_BKG11[..., 0, 0]))
  axes = flow_objectives.TOKENS
  drawn = steps.mean_BKGNC + steps.std_BKG[..., None, None] * steps.noise_BKGNC
  missed = steps.next_BKGNC - drawn
  end_std = jnp.where(steps.std_BKG > 0, old, DETERMINISTIC_STD)
  found_BKG = jnp.maximum(
    jnp.maximum(
      jnp.abs(flow.log_ratio(steps.noise_BKGNC, mean, steps.mean_BKGNC, old, axes)),
      jnp.square(jnp.log(new / old)),
    ),
    jnp.mean(jnp.square(missed), axes) / (2 * jnp.square(end_std)),
  )
  return jnp.max(found_BKG, axis=(0, 2))


def text_mismatch(logp_BGT: Array, texts: types.SampledTexts) -> tuple[Array, Array]:
  """Largest and mean absolute log-ratio of a token between rollout and teacher forcing.

  Both are 0 outside the texts, so a mask that is not the rollout's shows as well.
  """
  found_BGT = jnp.abs(logp_BGT - texts.logp_BGT)
  return jnp.max(found_BGT), ops.masked_mean(found_BGT, texts.mask_BGT)


LIMITS = {
  'float32': dict(text_max=1e-5, text_mean=1e-5, decode_max=1e-3, image_max=1e-5),
  # A logit of 16 in bfloat16 has steps of 0.125, so single tokens may be off by any ratio that is
  # clipped, and their mean by far less. Of a step of 16-bit models others measured 2e-5, and 5e-4
  # with guidance.
  'bfloat16': dict(text_max=0.0, text_mean=0.02, decode_max=0.0, image_max=1e-3),
}
"""Largest mismatch by compute dtype, where the config does not say; 0 for any."""


def limits(settings: types.Config, dtype: str) -> dict[str, float]:
  """Largest mismatch by kind: `config.align.checks.mismatch`, where -1 stands for that of a dtype."""
  return {
    name: settings[name] if settings[name] >= 0 else value for name, value in LIMITS[dtype].items()
  }


def check(iteration: int, scalars: Mapping[str, float], bounds: Mapping[str, float]) -> None:
  """Refuses to go on where what is replayed is not what was sampled.

  Args:
    bounds: see `limits`.

  Raises:
    ValueError: a mismatch is above its limit, or NaN.
  """
  for name, found in scalars.items():
    kind = _limit_of(name)
    if kind and bounds[kind] and not found <= bounds[kind]:
      raise ValueError(
        f'iteration {iteration}: {name} is {found:g}, config.align.checks.mismatch.{kind} is '
        f'{bounds[kind]:g}: before any update, the policy gives samples other densities than '
        'those they were sampled with, so ratios mean nothing. Compute in float32 in another '
        'workdir; or, where you know why, raise the limit: this run then goes on where it was '
        'saved last'
      )


def _limit_of(name: str) -> str:
  """Which limit a metric has; '' for none."""
  if name == DECODE:
    return 'decode_max'
  prefix, _, task = name.partition('/')
  if prefix != PREFIX:
    return ''
  if task in tasks.TEXT_OUTPUTS:
    return 'text_max'
  if task.removesuffix('/mean') in tasks.TEXT_OUTPUTS:
    return 'text_mean'
  return 'image_max' if task in tasks.TASKS else ''
