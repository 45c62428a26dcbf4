"""Losses of whole batches: applies objectives to what a policy predicts after its contexts.

A batch is a dict by task. Every loss is a `step.Loss` of sums and weights, and never of means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

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
SupervisedBatches = dict[str, types.SupervisedBatch]
TrainBatches = dict[str, types.TextTrainBatch | types.ImageTrainBatch]


def pretraining(
  policy: family.Policy,
  coefficients: Mapping[str, float],
  draws: int,
  shift: float,
  seed: int,
  repa: repa_lib.Repa | None = None,
) -> step_lib.Loss:
  """Returns the loss of next tokens of answers and of flow matching of images.

  Args:
    policy: the policy.
    coefficients: weight of every task in the batch; the batch is a dict of `types.SupervisedBatch`.
    draws: noised copies of every image, which share one encoded context.
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

  def weights(batch: SupervisedBatches) -> dict[str, Array]:
    out: dict[str, Array] = {}
    for task, rows in batch.items():
      if task != tasks.UNDERSTAND:
        out[task] = jnp.float32(rows.target_BYXC.shape[0] * draws * N)
      if task in (tasks.UNDERSTAND, tasks.THINK_GENERATE):
        out[_text_of(task)] = jnp.sum(rows.answer_mask_BL)
    if repa:
      images = [weight for task, weight in out.items() if task not in tasks.TEXT_OUTPUTS]
      out['repa'] = cast(Array, sum(images))
    return out

  def sums(
    params: types.Params,
    state: types.TrainState,
    frozen: Mapping[str, types.Params],
    batch: SupervisedBatches,
  ) -> step_lib.Sums:
    root = jax.random.fold_in(jax.random.key(seed), state.step)
    batch = _halves(batch)
    points: dict[str, replay.NoisedLatents] = {}
    queries: dict[str, types.Query] = {}
    for task, rows in batch.items():
      if task in tasks.TEXT_OUTPUTS:
        queries[task] = types.TextQuery(rows.prompts, rows.answer_BL[:, None, :-1])
      else:
        x0 = policy.encode_image(frozen['vae'], rows.target_BYXC)[:, None, None]
        key_BK1 = _noise_keys(root, rows.prompts.index_B, draws)
        points[task] = replay.noise_points(key_BK1, x0, shift)
        queries[task] = types.FlowQuery(rows.prompts, points[task].x_t, points[task].t)
    if repa:
      out, states = policy.forward_with_states(params, frozen['vae'], queries)
    else:
      out, states = policy.forward(params, frozen['vae'], queries), {}
    totals = {task: sft.flow_matching(out[task], point.target) for task, point in points.items()}
    if repa:
      found = []
      for task in points:
        target = repa.target(frozen['dual_encoder'], batch[task].target_BYXC, N)
        found.append(repa.loss(policy, params, states[task], target))
      losses, counts = zip(*found)
      totals['repa'] = cast(Array, sum(losses)), cast(Array, sum(counts))
    for task, rows in batch.items():
      if task not in points:
        labels = rows.answer_BL[:, 1:]
        totals[task] = sft.next_token(out[task][:, 0], labels, rows.answer_mask_BL)
    return (
      {task: total for task, (total, _) in totals.items()},
      {f'{task}_loss': total for task, total in totals.items()},
    )

  return step_lib.Loss(weights, sums, coefficients)


def _noise_keys(root: Array, index_B: Array, draws: int) -> Array:
  """Returns PRNG keys (B, K, 1) of the noised copies of images, by the index of their prompts."""
  key_B = jax.vmap(lambda index: jax.random.fold_in(root, index))(index_B)
  return jax.vmap(lambda key: ops.fold_rows(key, (draws, 1)))(key_B)


def _text_of(task: str) -> str:
  """Returns the name of the text among a task's outputs."""
  return tasks.PLAN if task == tasks.THINK_GENERATE else task


def _halves(batch: SupervisedBatches) -> SupervisedBatches:
  """Splits thinking into plans after captions, and images after captions and plans."""
  if tasks.THINK_GENERATE not in batch:
    return batch
  rows = batch[tasks.THINK_GENERATE]
  mask_BL = jnp.pad(rows.answer_mask_BL, ((0, 0), (1, 0)), constant_values=True)
  prompts = contexts.with_text(rows.prompts, rows.answer_BL, mask_BL)
  return {**batch, tasks.PLAN: rows, tasks.THINK_GENERATE: rows.replace(prompts=prompts)}


FACTORS = ('answers', 'images', 'answers_penalty', 'images_penalty')
"""Names of the factors that scale the terms of an update, and may change between updates."""


def alignment(policy: family.Policy, align: types.Config) -> step_lib.Loss:
  """Returns the GRPO loss of a mixed batch of `types.TextTrainBatch` and `types.ImageTrainBatch`.

  Every task is normalised by its own weight, so the total is the weighted sum of the losses of each
  task alone. `frozen` holds 'vae', and may hold 'factors' of `FACTORS`. These are arguments and not
  constants. 'answers' and 'images' scale all terms of either modality, and the other two their
  penalties.

  Args:
    policy: the policy.
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

  def weights(batch: TrainBatches) -> dict[str, Array]:
    out: dict[str, Array] = {}
    for task, rows in batch.items():
      if isinstance(rows, types.TextTrainBatch):
        weight = text_objectives.total_weight(
          rows.sampled.mask_BGT, rows.valid_BG, text_objective.aggregation
        )
      else:
        weight = jnp.sum(_per_point(rows.valid_BG, rows))
      out[task] = out[f'{task}_penalty'] = weight
    return out

  def sums(
    params: types.Params,
    state: types.TrainState,
    frozen: Mapping[str, types.Params],
    batch: TrainBatches,
  ) -> step_lib.Sums:
    del state
    asked = {task: _asked(rows) for task, rows in batch.items()}
    out = replay.forward(policy, params, frozen, asked)
    parts = {
      task: _text_sums(text_objective, text, out[task], rows)
      if isinstance(rows, types.TextTrainBatch)
      else _image_sums(flow_objective, image, align.rollout.sampler, out[task], rows)
      for task, rows in batch.items()
    }
    terms, metrics, factors = {}, {}, frozen.get('factors')
    for task, (loss, penalty, extra) in parts.items():
      if factors:
        kind = 'answers' if task in tasks.TEXT_OUTPUTS else 'images'
        loss = loss * factors[kind]
        penalty = penalty * (factors[kind] * factors[f'{kind}_penalty'])
      terms[task], terms[f'{task}_penalty'] = loss, penalty
      metrics.update({f'{task}/{name}': value for name, value in extra.items()})
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
  rows: types.TextTrainBatch | types.ImageTrainBatch,
) -> types.SampledTexts | types.FlowQuery:
  """Returns the samples or the query that the policy is run on."""
  return rows.sampled if isinstance(rows, types.TextTrainBatch) else rows.query


def split_group(batch: TrainBatches, parts: int) -> TrainBatches:
  """Adds a leading axis of parts, each with some samples of every group and all their points.

  Raises:
    ValueError: the samples do not divide by the parts.
  """

  def cut(path: jax.tree_util.KeyPath, x: Array) -> Array:
    # The suffix of a record's field names its axes.
    axes = jax.tree_util.keystr(path[-1:], simple=True).rpartition('_')[2]
    if 'G' not in axes:
      return jnp.broadcast_to(x, (parts, *x.shape))
    axis = axes.index('G')
    shape = (*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  def split(
    rows: types.TextTrainBatch | types.ImageTrainBatch,
  ) -> types.TextTrainBatch | types.ImageTrainBatch:
    group = rows.valid_BG.shape[1]
    if group == 1:  # Every row is a sample with its own context.
      return placement.split_micro_batches(rows, parts)
    if group % parts:
      raise ValueError(
        f'groups of {group} samples do not divide into parallel.group_parts = {parts}'
      )
    return jax.tree_util.tree_map_with_path(cut, rows)

  return {task: split(rows) for task, rows in batch.items()}


def _rows(x_BKG: Array) -> Array:
  """Merges steps and samples into rows, (B, K * G, ...), over which the loss is summed.

  A sum over one axis less rounds otherwise, and results should not depend on how axes are cut.
  """
  return x_BKG.reshape(x_BKG.shape[0], -1, *x_BKG.shape[3:])


def _per_point(x_BG: Array, images: types.ImageTrainBatch) -> Array:
  """Repeats a value of every sample for its points, (B, K * G)."""
  return jnp.tile(x_BG.astype(jnp.float32), (1, images.query.time_BKG.shape[1]))


TaskSums = tuple[Array, Array, dict[str, tuple[Array, Array]]]
"""Sums of a loss and of a penalty, and metrics as (sum, weight), of one task."""


def _text_sums(
  objective: text_objectives.TextObjective,
  settings: types.Config,
  logits: Array,
  texts: types.TextTrainBatch,
) -> TaskSums:
  """Computes the text objective, and the penalty to the reference (arXiv 2402.03300)."""
  mask_BGT = texts.sampled.mask_BGT
  logp = replay.token_logp(logits, texts.sampled)
  to_sampler = jnp.where(mask_BGT, logp - texts.sampled.logp_BGT, 0.0)
  weight = text_objectives.token_weights(mask_BGT, texts.valid_BG, objective.aggregation)
  points = text_objectives.TextPoints(
    log_ratio_BGT=to_sampler,
    logp_BGT=logp,
    mask_BGT=mask_BGT,
    advantage_BG=texts.advantage_BG,
  )
  loss, log_ratio = objective.loss(points, settings)
  kl = jnp.where(mask_BGT, kl_lib.of_text(settings.kl, logp, texts.reference_BGT, to_sampler), 0.0)
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


def _step_points(
  sampler: str, v: Array, images: types.ImageTrainBatch
) -> flow_objectives.StepPoints:
  """Returns replayed steps of the rollout under the policy's velocities, as rows."""
  steps = jax.tree.map(_rows, images.sampled.steps)
  return flow_objectives.StepPoints(
    mean=replay.transition(sampler, _rows(v), steps).mean,
    old_mean=steps.mean_BKGNC,
    noise=steps.noise_BKGNC,
    std=steps.std_BKG,
    dt=steps.next_time_BKG - steps.time_BKG,
    advantage=_per_point(images.advantage_BG, images),
  )


def _noised_points(v: Array, images: types.ImageTrainBatch) -> flow_objectives.NoisedPoints:
  """Returns freshly noised final latents with the policy's velocities, as rows."""
  latents_BGNC, draws = images.sampled.latents_BGNC, v.shape[1]
  return flow_objectives.NoisedPoints(
    v=_rows(v),
    v_old=_rows(images.old_BKGNC),
    x0=jnp.tile(latents_BGNC, (1, draws, 1, 1)),
    x_t=_rows(images.query.x_BKGNC),
    t=_rows(images.query.time_BKG),
    advantage=_per_point(images.advantage_BG, images),
  )


def _image_sums(
  objective: flow_objectives.FlowObjective,
  settings: types.Config,
  sampler: str,
  v: Array,
  images: types.ImageTrainBatch,
) -> TaskSums:
  """Computes the image objective, and the penalty to the reference."""
  points = _step_points(sampler, v, images) if objective.coupled else _noised_points(v, images)
  loss, extra = objective.loss(points, settings)
  valid = _per_point(images.valid_BG, images)
  v, reference = _rows(v), _rows(images.reference_BKGNC)
  drift = flow_objectives.velocity_mse(v, reference)
  metrics, penalty = {'velocity_mse': drift, **extra}, drift
  if settings.kl != 'velocity':
    steps = jax.tree.map(_rows, images.sampled.steps)
    mean = replay.transition(sampler, v, steps).mean
    reference_mean = replay.transition(sampler, reference, steps).mean
    dt = steps.next_time_BKG - steps.time_BKG
    penalty = kl_lib.of_steps(settings.kl, mean, reference_mean, steps.std_BKG, dt)
    metrics['kl'] = penalty
  return (
    jnp.sum(loss * valid),
    jnp.sum(penalty * valid),
    {name: (jnp.sum(value * valid), jnp.sum(valid)) for name, value in metrics.items()},
  )
