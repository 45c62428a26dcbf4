"""Losses of whole batches: the objectives applied to a policy and its contexts.

A batch is a dict by task. Every loss is a `step.Loss`: sums and weights, never means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax import numpy as jnp

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.models import contexts
from lvrpo_jax.models import family
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import kl as kl_lib
from lvrpo_jax.objectives import repa as repa_lib
from lvrpo_jax.objectives import sft
from lvrpo_jax.objectives import text as text_objectives
from lvrpo_jax.parallel import placement
from lvrpo_jax.rollouts import replay
from lvrpo_jax.training import step as step_lib

Array = jax.Array


def pretraining(
  policy: family.Policy,
  coefficients: Mapping[str, float],
  draws: int,
  shift: float,
  seed: int,
  repa: repa_lib.Repa | None = None,
) -> step_lib.Loss:
  """Next token on answers and flow matching on images.

  Args:
    coefficients: weight of every task in the batch; the batch is a dict of `types.SupervisedBatch`.
    draws: noised copies of every image, sharing one encoded context.
    shift: time shift of the logit-normal training times.
    seed: with the step and a prompt's index it fixes all draws of a row.
    repa: aligns states with an encoder's features as well; `frozen` then holds its 'dual_encoder'.
  """
  N = policy.latent_shape[0]
  coefficients = dict(coefficients)
  if tasks.THINK_GENERATE in coefficients:
    coefficients[tasks.PLAN] = coefficients[tasks.THINK_GENERATE]
  if repa:
    coefficients['repa'] = repa.weight

  def weights(batch):
    out = {}
    for task, b in batch.items():
      if task != tasks.UNDERSTAND:
        out[task] = jnp.float32(b.target_BYXC.shape[0] * draws * N)
      if task in (tasks.UNDERSTAND, tasks.THINK_GENERATE):
        out[_text_of(task)] = jnp.sum(b.answer_mask_BL)
    if repa:
      out['repa'] = sum(w for task, w in out.items() if task not in tasks.TEXT_OUTPUTS)
    return out

  def noised(frozen, b, root):
    key_B = jax.vmap(lambda i: jax.random.fold_in(root, i))(b.prompts.index_B)
    key_BK1 = jax.vmap(lambda k: ops.fold_rows(k, (draws, 1)))(key_B)
    x0 = policy.encode_image(frozen['vae'], b.target_BYXC)[:, None, None]
    return replay.noise_points(key_BK1, x0, shift)

  def sums(params, state, frozen, batch):
    root = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = _halves(batch)
    points, queries = {}, {}
    for task, b in batch.items():
      if task in tasks.TEXT_OUTPUTS:
        queries[task] = types.TextQuery(b.prompts, b.answer_BL[:, None, :-1])
      else:
        points[task] = noised(frozen, b, root)
        queries[task] = types.FlowQuery(b.prompts, points[task].x_t, points[task].t)
    if repa:
      out, states = policy.forward_with_states(params, frozen['vae'], queries)
    else:
      out, states = policy.forward(params, frozen['vae'], queries), {}
    totals = {t: sft.flow_matching(out[t], p.target) for t, p in points.items()}
    if repa:
      found = [
        repa.loss(
          policy, params, states[t], repa.target(frozen['dual_encoder'], batch[t].target_BYXC, N)
        )
        for t in points
      ]
      totals['repa'] = tuple(map(sum, zip(*found)))
    for task, b in batch.items():
      if task not in points:
        labels = b.answer_BL[:, 1:]
        totals[task] = sft.next_token(out[task][:, 0], labels, b.answer_mask_BL)
    return (
      {t: total for t, (total, _) in totals.items()},
      {f'{t}_loss': total for t, total in totals.items()},
    )

  return step_lib.Loss(weights, sums, coefficients)


def _text_of(task: str) -> str:
  """Name of the text among a task's outputs."""
  return tasks.PLAN if task == tasks.THINK_GENERATE else task


def _halves(batch: dict[str, types.SupervisedBatch]) -> dict[str, types.SupervisedBatch]:
  """Plans as texts after captions, and their images after captions and plans."""
  if tasks.THINK_GENERATE not in batch:
    return batch
  b = batch[tasks.THINK_GENERATE]
  said = jnp.pad(b.answer_mask_BL, ((0, 0), (1, 0)), constant_values=True)
  return {
    **batch,
    tasks.PLAN: b,
    tasks.THINK_GENERATE: b.replace(prompts=contexts.with_text(b.prompts, b.answer_BL, said)),
  }


FACTORS = ('answers', 'images', 'answers_penalty', 'images_penalty')
"""What may scale the terms of an update while it runs."""


def alignment(policy: family.Policy, align: types.Config) -> step_lib.Loss:
  """The GRPO loss of a mixed batch of `types.TextTrainBatch` and `types.ImageTrainBatch`.

  Every task is normalised by its own weight, so the total is the weighted sum of what each task
  alone would give. `frozen` holds 'vae', and may hold 'factors' of `FACTORS`, which are arguments
  and not constants: of all terms of 'answers' and 'images', and of their penalties.

  Args:
    align: `config.align`, of which `text`, `image`, `rollout.sampler`, `task_weights` and `prompts`
      are read.

  Raises:
    ValueError: unknown objective, or a penalty that does not go with it.
  """
  text, image = align.text, align.image
  text_objective = text_objectives.find(text.objective)
  flow_objective = flow_objectives.find(image.objective)
  if image.kl != 'velocity' and not flow_objective.coupled:
    raise ValueError(
      f'align.image.kl is {image.kl!r}, which is of steps of the rollout; allowed '
      f"with align.image.objective {image.objective!r}: 'velocity'"
    )

  def weights(batch):
    out = {}
    for task, b in batch.items():
      if task in tasks.TEXT_OUTPUTS:
        w = text_objectives.total_weight(b.sampled.mask_BGT, b.valid_BG, text_objective.aggregation)
      else:
        w = jnp.sum(_per_point(b.valid_BG, b))
      out[task] = out[f'{task}_penalty'] = w
    return out

  def sums(params, state, frozen, batch):
    del state
    out = replay.forward(policy, params, frozen, {t: _asked(b) for t, b in batch.items()})
    parts = {
      task: _text_sums(text_objective, text, out[task], b)
      if isinstance(b, types.TextTrainBatch)
      else _image_sums(flow_objective, image, align.rollout.sampler, out[task], b)
      for task, b in batch.items()
    }
    terms, metrics = {}, {}
    for task, (loss, penalty, extra) in parts.items():
      factors = frozen.get('factors')
      if factors:
        kind = 'answers' if task in tasks.TEXT_OUTPUTS else 'images'
        loss = loss * factors[kind]
        penalty = penalty * (factors[kind] * factors[f'{kind}_penalty'])
      terms[task], terms[f'{task}_penalty'] = loss, penalty
      metrics.update({f'{task}/{k}': value for k, value in extra.items()})
    return terms, metrics

  coefficients = {task: align.task_weights[task] for task in tasks.active(align.prompts)}
  if tasks.THINK_GENERATE in coefficients:
    # Both halves of a trajectory weigh the same (UniGRPO).
    coefficients[tasks.PLAN] = coefficients[tasks.THINK_GENERATE]
  for task, weight in tuple(coefficients.items()):
    kl_weight = (text if task in tasks.TEXT_OUTPUTS else image).kl_weight
    coefficients[f'{task}_penalty'] = weight * kl_weight
  return step_lib.Loss(weights, sums, coefficients, split_group)


def _asked(
  b: types.TextTrainBatch | types.ImageTrainBatch,
) -> types.SampledTexts | types.FlowQuery:
  """What the policy is asked about a batch."""
  return b.sampled if isinstance(b, types.TextTrainBatch) else b.query


def split_group(batch: dict[str, Any], parts: int) -> dict[str, Any]:
  """A leading axis of parts, each with some samples of every group; their points stay with them.

  Raises:
    ValueError: the samples do not divide by the parts.
  """

  def cut(path, x):
    # The suffix of a record's field names its axes.
    axes = path[-1].name.rpartition('_')[2]
    if 'G' not in axes:
      return jnp.broadcast_to(x, (parts, *x.shape))
    axis = axes.index('G')
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def split(b):
    group = b.valid_BG.shape[1]
    if group == 1:  # Every row is a sample with a context of its own.
      return placement.split_micro_batches(b, parts)
    if group % parts:
      raise ValueError(
        f'groups of {group} samples do not divide into parallel.group_parts = {parts}'
      )
    return jax.tree_util.tree_map_with_path(cut, b)

  return {task: split(b) for task, b in batch.items()}


def _per_point(x_BG: Array, b: types.ImageTrainBatch) -> Array:
  """Repeats a value of every sample for its points, (B, K, G)."""
  return jnp.broadcast_to(x_BG.astype(jnp.float32)[:, None], b.query.time_BKG.shape)


Sums = tuple[Array, Array, dict[str, tuple[Array, Array]]]
"""Sums of a loss and of a penalty, and metrics as (sum, weight)."""


def _text_sums(
  objective: text_objectives.TextObjective,
  settings: types.Config,
  logits: Array,
  b: types.TextTrainBatch,
) -> Sums:
  """The text objective, and the penalty to the reference (arXiv 2402.03300)."""
  mask_BGT = b.sampled.mask_BGT
  logp = replay.token_logp(logits, b.sampled)
  to_sampler = jnp.where(mask_BGT, logp - b.sampled.logp_BGT, 0.0)
  weight = text_objectives.token_weights(mask_BGT, b.valid_BG, objective.aggregation)
  loss, log_ratio = objective.loss(
    text_objectives.TextPoints(to_sampler, logp, mask_BGT, b.advantage_BG), settings
  )
  kl = jnp.where(mask_BGT, kl_lib.of_text(settings.kl, logp, b.reference_BGT, to_sampler), 0.0)
  ratio = jnp.exp(log_ratio)
  below = (ratio < 1 - settings.clip_low) & objective.clips_low
  clipped = below | (ratio > 1 + settings.clip_high)
  return (
    jnp.sum(loss * weight),
    jnp.sum(kl * weight),
    {
      f'kl_{settings.kl}': (jnp.sum(kl * weight), jnp.sum(weight)),
      'entropy': ops.masked_sum(ops.token_entropy(logits), weight),
      'clip_fraction': ops.masked_sum(clipped, weight),
    },
  )


def _step_points(sampler: str, v: Array, b: types.ImageTrainBatch) -> flow_objectives.StepPoints:
  """Replayed steps of the rollout under the policy's velocities."""
  steps = b.sampled.steps
  return flow_objectives.StepPoints(
    mean=replay.transition(sampler, v, steps).mean,
    old_mean=steps.mean_BKGNC,
    noise=steps.noise_BKGNC,
    std=steps.std_BKG,
    dt=steps.next_time_BKG - steps.time_BKG,
    advantage=_per_point(b.advantage_BG, b),
  )


def _noised_points(v: Array, b: types.ImageTrainBatch) -> flow_objectives.NoisedPoints:
  """Freshly noised final latents with the policy's velocities."""
  return flow_objectives.NoisedPoints(
    v=v,
    v_old=b.old_BKGNC,
    x0=jnp.broadcast_to(b.sampled.latents_BGNC[:, None], v.shape),
    x_t=b.query.x_BKGNC,
    t=b.query.time_BKG,
    advantage=_per_point(b.advantage_BG, b),
  )


def _image_sums(
  objective: flow_objectives.FlowObjective,
  settings: types.Config,
  sampler: str,
  v: Array,
  b: types.ImageTrainBatch,
) -> Sums:
  """The image objective, and the penalty to the reference."""
  points = _step_points(sampler, v, b) if objective.coupled else _noised_points(v, b)
  loss, extra = objective.loss(points, settings)
  valid = _per_point(b.valid_BG, b)
  drift = flow_objectives.velocity_mse(v, b.reference_BKGNC)
  metrics, penalty = {'velocity_mse': drift, **extra}, drift
  if settings.kl != 'velocity':
    steps = b.sampled.steps
    means = (replay.transition(sampler, x, steps).mean for x in (v, b.reference_BKGNC))
    dt_BKG = steps.next_time_BKG - steps.time_BKG
    penalty = kl_lib.of_steps(settings.kl, *means, steps.std_BKG, dt_BKG)
    metrics['kl'] = penalty
  return (
    jnp.sum(loss * valid),
    jnp.sum(penalty * valid),
    {name: (jnp.sum(value * valid), jnp.sum(valid)) for name, value in metrics.items()},
  )
