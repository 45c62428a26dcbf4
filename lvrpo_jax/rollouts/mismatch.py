"""Rollout-training mismatch: recorded densities against those of a replay before any update.

An update divides by the recorded densities. If they are not the densities of the distribution that
sampled, because a temperature, a mask, a guidance scale or a rounding differs, then the ratios are
meaningless, and no loss shows it.
"""

from __future__ import annotations

from collections.abc import Mapping

from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.rollouts import replay

Array = types.Array

DETERMINISTIC_STD = 0.1
"""Deviation that stands in for that of a step without noise when its end is compared.

It is about that of the other steps, so that a rounding of latents to 16 bits is noticed.
"""

PREFIX = 'mismatch'
"""Prefix of the names of all these metrics."""

DECODE = f'{PREFIX}/decode'
"""Metric: largest |log-ratio| of a token between decoding and teacher forcing."""


def image_mismatch(
  sampler: str, v_BKGNC: Array, steps: types.Transitions, final_BGNC: Array | None = None
) -> Array:
  """Computes the largest mismatch of any sample at every step, (K,), in nats per latent value.

  It is the largest of three values, each of which is 0 if a step is recorded as it was sampled:
  - the absolute log-ratio, at the sample, of the transition that the replay's velocities give to
    the recorded one (`flow.log_ratio`);
  - the squared logarithm of the ratio of their deviations: the KL of two such Gaussians, to second
    order;
  - `mean(d^2) / (2 std^2)`, where d is the difference of the latents from which the rollout
    continued to the recorded `mean + std * noise`: the KL of two such Gaussians.
  A step without noise has no density. Its deviation is replaced by 1, and in the last of the three
  by `DETERMINISTIC_STD`.

  Args:
    sampler: name of the sampler in `flow.STEPS`.
    v_BKGNC: velocities of the policy that sampled, at the steps.
    steps: the recorded steps.
    final_BGNC: the final latents, if the last of the steps ends in them.
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
  """Computes the largest and the mean absolute log-ratio of a token of rollout and teacher forcing.

  Both log-probabilities are 0 outside the texts, so a mask other than the rollout's shows as well.
  """
  found_BGT = jnp.abs(logp_BGT - texts.logp_BGT)
  return jnp.max(found_BGT), ops.masked_mean(found_BGT, texts.mask_BGT)


LIMITS = {
  'float32': dict(text_max=1e-5, text_mean=1e-5, decode_max=1e-3, image_max=1e-5),
  # A logit of 16 in bfloat16 has steps of 0.125: the ratio of a single token may differ by more
  # than the clip range, the mean over tokens by far less. For a denoising step of 16-bit models,
  # others measured 2e-5, and 5e-4 with guidance.
  'bfloat16': dict(text_max=0.0, text_mean=0.02, decode_max=0.0, image_max=1e-3),
}
"""Default limits of the mismatch, by compute dtype; 0 permits any."""


def limits(settings: types.Config, dtype: str) -> dict[str, float]:
  """Returns the largest permitted mismatch by kind.

  Args:
    settings: `config.align.checks.mismatch`; -1 takes the default of `LIMITS`.
    dtype: compute dtype, a key of `LIMITS`.
  """
  return {
    name: settings[name] if settings[name] >= 0 else value for name, value in LIMITS[dtype].items()
  }


def check(iteration: int, scalars: Mapping[str, float], bounds: Mapping[str, float]) -> None:
  """Stops a run whose replays disagree with its rollouts.

  Args:
    iteration: for the message.
    scalars: metrics of the iteration by name; those of no mismatch are skipped.
    bounds: from `limits`.

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
  """Returns the kind of limit that a metric has; '' for none."""
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
