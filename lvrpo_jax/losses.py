"""Losses of whole batches: the objectives applied to a policy and its contexts.

A batch is a dict by task. Every loss is a `step.Loss`: sums and weights, never means.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

import jax
from jax import numpy as jnp

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import policy as policy_lib
from lvrpo_jax import step
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import sft
from lvrpo_jax.objectives import text
from lvrpo_jax.rollouts import text as text_rollout

Array = jax.Array
UNDERSTAND = 'understand'


def pretraining(policy: policy_lib.Policy, coefficients: Mapping[str, float], draws: int,
                shift: float, seed: int) -> step.Loss:
  """Next token on answers and flow matching on images.

  Args:
    coefficients: weight of every task in the batch; the batch is a dict of `types.Batch`.
    draws: noised copies of every image, sharing one encoded context.
    shift: time shift of the logit-normal training times.
    seed: with the step and a prompt's number it fixes all draws of a row.
  """
  N = policy.latent_shape[0]

  def weights(batch):
    return {task: (jnp.sum(b.answer_mask_BL) if task == UNDERSTAND else
                   jnp.float32(b.target_BYXC.shape[0] * draws * N)) for task, b in batch.items()}

  def image_sum(params, frozen, batch, cache, key_B):
    x0 = policy.encode(frozen['vae'], batch.target_BYXC)[:, None]
    key_BM = jax.vmap(lambda k: ops.fold_rows(k, (draws,)))(key_B)
    noise = ops.normal_rows(ops.fold_each(key_BM, 0), x0.shape[2:])
    t = flow.logit_normal_time(ops.normal_rows(ops.fold_each(key_BM, 1), ()), shift)
    x_t = flow.interpolate(x0, noise, t[..., None, None])
    v = policy.velocity(params, cache, x_t, t)
    return sft.flow_matching(v, flow.velocity_target(x0, noise))

  def sums(params, state, frozen, batch):
    terms, metrics = {}, {}
    root = jax.random.fold_in(jax.random.key(seed), state.step)
    for task, b in batch.items():
      key_B = jax.vmap(lambda i: jax.random.fold_in(root, i))(b.prompts.index_B)
      cache = policy.prefill(params, frozen['vae'], b.prompts)
      if task == UNDERSTAND:
        logits = policy.read(params, cache, b.answer_BL[:, None, :-1])[:, 0]
        total = sft.next_token(logits, b.answer_BL[:, 1:], b.answer_mask_BL)
      else:
        total = image_sum(params, frozen, b, cache, key_B)
      terms[task], metrics[f'{task}_loss'] = total[0], total
    return terms, metrics

  return step.Loss(weights, sums, coefficients)


@dataclasses.dataclass(frozen=True)
class Alignment:
  """Numbers of the alignment loss; see `configs/base.py` for units and meaning."""
  weights: Mapping[str, float]
  objective: str
  sampler: str
  seed: int
  draws: int
  shift: float
  nft_beta: float
  nft_scale: float
  image_clip: float
  velocity_penalty: float
  text_low: float
  text_high: float
  text_aggregation: str
  text_penalty: float


def alignment(policy: policy_lib.Policy, a: Alignment) -> step.Loss:
  """The GRPO loss of a mixed batch of `types.TextExperience` and `types.ImageExperience`.

  Every task is normalised by its own weight, so the total is the weighted sum of what each task
  alone would give. `frozen` holds 'vae'; the reference and the old policy come with the state.

  Raises:
    ValueError: unknown objective.
  """
  image_sums = {'nft': _nft_sums, 'sde': _sde_sums}
  if a.objective not in image_sums:
    raise ValueError(f'align.objective is {a.objective!r}; allowed: {sorted(image_sums)}')

  def weights(batch):
    out = {}
    for task, b in batch.items():
      if task == UNDERSTAND:
        w = jnp.sum(text.token_weights(b.mask_BGT, b.valid_BG, a.text_aggregation))
      else:
        w = jnp.sum(b.valid_BG) * (a.draws if a.objective == 'nft' else b.time_BK.shape[1])
      out[task] = out[f'{task}_penalty'] = w
      if task != UNDERSTAND and a.objective == 'nft':
        out[f'{task}_penalty'] = jnp.sum(b.valid_BG)
    return out

  def sums(params, state, frozen, batch):
    terms, metrics = {}, {}
    for task, b in batch.items():
      run = _text_sums if task == UNDERSTAND else image_sums[a.objective]
      loss, penalty, extra = run(policy, a, params, state, frozen, b)
      terms[task], terms[f'{task}_penalty'] = loss, penalty
      metrics.update({f'{task}/{k}': v for k, v in extra.items()})
    return terms, metrics

  penalty = lambda task: a.text_penalty if task == UNDERSTAND else a.velocity_penalty
  coefficients = dict(a.weights)
  coefficients.update({f'{t}_penalty': w * penalty(t) for t, w in a.weights.items()})
  return step.Loss(weights, sums, coefficients)


def _text_sums(policy, a, params, state, frozen, b):
  """Clipped GRPO on tokens, k3 to the reference (arXiv 2402.03300)."""
  ids = text_rollout.teacher_ids(b.tokens_BGT, policy.bos)
  temperature = b.temperature_B[:, None, None, None]

  def read(p):
    return policy.read(p, policy.prefill(p, frozen['vae'], b.prompts), ids)
  logits = read(params)
  logp = ops.token_logp(logits / temperature, b.tokens_BGT)
  log_ratio = jnp.where(b.mask_BGT, logp - b.logp_BGT, 0.)
  weight = text.token_weights(b.mask_BGT, b.valid_BG, a.text_aggregation)
  loss = text.clipped(log_ratio, b.advantage_BG[..., None], a.text_low, a.text_high)
  reference = jax.lax.stop_gradient(ops.token_logp(read(state.reference) / temperature,
                                                   b.tokens_BGT))
  kl = jnp.where(b.mask_BGT, text.k3(logp, reference), 0.)
  ratio = jnp.exp(log_ratio)
  clipped = (ratio < 1 - a.text_low) | (ratio > 1 + a.text_high)
  return jnp.sum(loss * weight), jnp.sum(kl * weight), {
      'kl_k3': (jnp.sum(kl * weight), jnp.sum(weight)),
      'entropy': ops.masked_sum(ops.token_entropy(logits / temperature), weight),
      'clip_fraction': ops.masked_sum(clipped, weight)}


def _nft_sums(policy, a, params, state, frozen, b):
  """DiffusionNFT on fresh noise, velocity MSE to the reference on the first draw."""
  rows, group = b.advantage_BG.shape
  root = jax.random.fold_in(jax.random.key(a.seed), state.step)
  key_B = jax.vmap(lambda i: jax.random.fold_in(root, i))(b.prompts.index_B)
  key_BM = jax.vmap(lambda k: ops.fold_rows(k, (group * a.draws,)))(key_B)
  repeat = lambda x: jnp.tile(x, (1, a.draws, *[1] * (x.ndim - 2)))
  x0 = repeat(b.latents_BGNC)
  noise = ops.normal_rows(ops.fold_each(key_BM, 0), x0.shape[2:])
  t = flow.logit_normal_time(ops.normal_rows(ops.fold_each(key_BM, 1), ()), a.shift)
  x_t = flow.interpolate(x0, noise, t[..., None, None])

  def velocity(p, count=group * a.draws):
    cache = policy.prefill(p, frozen['vae'], b.prompts)
    return policy.velocity(p, cache, x_t[:, :count], t[:, :count])
  v = velocity(params)
  old = jax.lax.stop_gradient(velocity(state.old))
  advantage = repeat(b.advantage_BG)
  loss = flow_objectives.nft(v, old, x0, x_t, t, advantage, a.nft_beta, a.nft_scale)
  drift = flow_objectives.velocity_mse(v[:, :group], velocity(state.reference, group))
  valid = b.valid_BG.astype(jnp.float32)
  return jnp.sum(loss * repeat(valid)), jnp.sum(drift * valid), {
      'velocity_mse': (jnp.sum(drift * valid), jnp.sum(valid)),
      'old_mse': (jnp.sum(flow_objectives.velocity_mse(v, old) * repeat(valid)),
                  jnp.sum(valid) * a.draws)}


def replay(policy, sampler: str, params, frozen, b) -> tuple[Array, Array]:
  """Velocities and transition means (B, K * G, N, C) of stored steps under `params`.

  Uses the step function that sampled them.
  """
  rows, steps, group = b.x_BKGNC.shape[:3]
  fold = lambda x: x.reshape(rows, steps * group, *x.shape[3:])
  spread = lambda x_BK: jnp.repeat(x_BK, group, axis=1)
  cache = policy.prefill(params, frozen['vae'], b.prompts)
  x, t = fold(b.x_BKGNC), spread(b.time_BK)
  v = policy.velocity(params, cache, x, t)
  wide = lambda y: y[..., None, None]
  mean = flow.STEPS[sampler](x, v, wide(t), wide(spread(b.next_time_BK)),
                             b.first_time_B[:, None, None, None], wide(spread(b.eta_BK))).mean
  return v, mean


def _sde_sums(policy, a, params, state, frozen, b):
  """Flow-GRPO on the trained steps, velocity MSE to the reference on the same latents."""
  rows, steps, group = b.x_BKGNC.shape[:3]
  fold = lambda x: x.reshape(rows, steps * group, *x.shape[3:])
  spread = lambda x_BK: jnp.repeat(x_BK, group, axis=1)
  v, mean = replay(policy, a.sampler, params, frozen, b)
  repeat = lambda x_BG: jnp.tile(x_BG, (1, steps))
  loss, log_ratio = flow_objectives.sde(mean, fold(b.mean_BKGNC), fold(b.noise_BKGNC),
                                        spread(b.std_BK), repeat(b.advantage_BG), a.image_clip)
  reference, _ = replay(policy, a.sampler, state.reference, frozen, b)
  drift = flow_objectives.velocity_mse(v, reference)
  valid = repeat(b.valid_BG.astype(jnp.float32))
  total = jnp.sum(valid)
  return jnp.sum(loss * valid), jnp.sum(drift * valid), {
      'velocity_mse': (jnp.sum(drift * valid), total),
      'clip_fraction': (jnp.sum((jnp.abs(jnp.expm1(log_ratio)) > a.image_clip) * valid), total)}


def gaps(policy, sampler: str, params, frozen, batch) -> dict[str, Array]:
  """Largest absolute log-ratio between rollout and replay of every task, before any update."""
  out = {}
  for task, b in batch.items():
    if task == UNDERSTAND:
      ids = text_rollout.teacher_ids(b.tokens_BGT, policy.bos)
      logits = policy.read(params, policy.prefill(params, frozen['vae'], b.prompts), ids)
      logp = ops.token_logp(logits / b.temperature_B[:, None, None, None], b.tokens_BGT)
      gap = jnp.where(b.mask_BGT, logp - b.logp_BGT, 0.)
    else:
      rows, steps, group = b.x_BKGNC.shape[:3]
      fold = lambda x: x.reshape(rows, steps * group, *x.shape[3:])
      _, mean = replay(policy, sampler, params, frozen, b)
      gap = flow.log_ratio(fold(b.noise_BKGNC), mean, fold(b.mean_BKGNC),
                           jnp.repeat(b.std_BK, group, axis=1), flow_objectives.TOKENS)
    out[f'gap/{task}'] = jnp.max(jnp.abs(gap))
  return out
