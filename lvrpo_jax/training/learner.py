"""An iteration of LVRPO: rollout -> reward -> advantage -> step, and the state that it carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import kl
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import placement
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.rollouts import replay
from lvrpo_jax.rollouts import think
from lvrpo_jax.rollouts import trajectories
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import dynamic_sampling
from lvrpo_jax.training import experience
from lvrpo_jax.training import losses
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import pretrain
from lvrpo_jax.training import reward_metrics
from lvrpo_jax.training import step as step_lib

ADAM_B1 = 0.9
"""Decay of Adam's momentum."""


def alignment_loss(job: experiment_lib.Experiment) -> step_lib.Loss:
  """The loss of the update, from the config; with adapters, as a function of these alone."""
  a = job.config.align
  loss = losses.alignment(
    job.policy,
    losses.Alignment(
      weights={task: a.weights[task] for task in pretrain.sizes(a)},
      objective=a.objective,
      sampler=a.sampler,
      nft_beta=a.nft_beta,
      nft_scale=a.nft_scale,
      image_clip=a.image_clip,
      velocity_penalty=a.velocity_penalty,
      text_low=a.text_low,
      text_high=a.text_high,
      text_objective=a.text_objective,
      text_penalty=a.text_penalty,
      text_kl=a.text_kl,
      image_kl=a.image_kl,
    ),
  )
  if not a.lora.rank:
    return loss

  def sums(adapters, state, frozen, batch):
    params = lora.merge(frozen['base'], adapters, a.lora.alpha / a.lora.rank)
    return loss.sums(params, state, frozen, batch)

  return loss._replace(sums=sums)


def build_update(
  job: experiment_lib.Experiment,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
  """The optimizer, and the compiled step."""
  a, parallel = job.config.align, job.config.parallel
  optimizer = optimizer_lib.build(
    'adamw',
    optimizer_lib.schedule('constant', a.learning_rate, a.steps * a.updates, 10),
    ADAM_B1,
    0.98,
    1e-8,
    0.0,
    a.clip_norm,
    rules=((diagnostics.EXPERTS['understanding'], a.understand_rate),),
  )
  return optimizer, step_lib.compile_step(
    alignment_loss(job),
    optimizer,
    job.mesh,
    micro_batches=parallel.micro_batches,
    group_parts=job.group_parts,
    runner=parallel.runner,
  )


def initial_state(
  job: experiment_lib.Experiment, trained: types.Params, optimizer: optax.GradientTransformation
) -> types.TrainState:
  """The state before the first update. The reference, which nothing changes, is kept as passes read
  it; with adapters it is the weights below them."""
  a = job.config.align
  state = step_lib.init(trained, optimizer, old=a.objective in flow_objectives.DECOUPLED)
  return state if a.lora.rank else state.replace(reference=job.rounded(trained))


Draw = Callable[[Iterable[str]], experience.Tasks]


class Learner:
  """One iteration of alignment, and the state it carries."""

  def __init__(
    self,
    job: experiment_lib.Experiment,
    params: types.Params,
    vae_params: types.Params,
    siglip_params: types.Params,
  ):
    self.job, a = job, job.config.align
    self.collector = experience.Collector(job)
    optimizer, self.step = build_update(job)
    self._replay = job.compile(functools.partial(replay.replay, job.policy))
    self._velocities = job.compile(functools.partial(replay.velocities, job.policy))
    self._image_gap = jax.jit(
      functools.partial(mismatch.image_mismatch, a.sampler), static_argnames='group'
    )
    self._halves = jax.jit(functools.partial(think.split_think, bos=job.policy.bos))
    self._text_gap = jax.jit(mismatch.text_mismatch)
    self._points = jax.jit(self._points_fn)
    self._mean = jax.jit(lambda found: jax.tree.map(lambda *x: sum(x) / len(x), *found))
    self.frozen = {'vae': placement.shard_state(vae_params, job.mesh)}
    self.factors = dict.fromkeys(losses.FACTORS, 1.0)
    self._policy = lambda trained: trained
    trained = params
    if a.lora.rank:
      self.frozen['base'] = placement.shard_state(params, job.mesh)
      trained = lora.init(params, a.lora.rank, a.lora.target, jax.random.key(job.config.seed + 2))
      self._policy = lambda adapters: lora.AdaptedParams(
        self.frozen['base'], adapters, a.lora.alpha / a.lora.rank
      )
    self.state = placement.shard_state(
      initial_state(job, placement.shard_state(trained, job.mesh), optimizer), job.mesh
    )
    self._mix = jax.jit(
      lambda old, new, d: jax.tree.map(lambda o, n: d * o + (1 - d) * n, old, new),
      out_shardings=jax.tree.map(lambda x: x.sharding, self.state.old),
    )
    self._whole = jax.jit(lora.merge_adapters) if a.lora.rank else lambda params: params
    self._siglip = placement.shard_state(siglip_params, job.mesh)
    self._words = experiment_lib.word_table(job, siglip_params)

  @property
  def reference(self) -> types.Params:
    """The frozen policy: the state's copy, or the weights under the adapters."""
    return self.frozen['base'] if self.state.reference is None else self.state.reference

  @property
  def judges(self) -> experience.Judges:
    """What scores, as long as no step has taken the state away."""
    return experience.Judges(self.reference, self._siglip, self._words)

  @property
  def params(self) -> types.Params:
    """The policy as it is now: adapters merged into a new tree, or the state's own parameters,
    which the next step takes."""
    return self._whole(self._policy(self.state.params))

  @property
  def sampling(self) -> tuple[types.Params | lora.AdaptedParams, ...]:
    """The policy that samples, or those of texts and of images where they differ.

    DiffusionNFT (arXiv 2509.16117, alg. 1) draws with the old policy, around which its positive and
    negative velocities lie. Ratios of texts are to the policy as it is.
    """
    if self.job.config.align.objective != 'nft':
      return (self._policy(self.state.params),)
    return self._policy(self.state.params), self._policy(self.state.old)

  def _points_fn(self, step, index_B, latents_BGNC):
    """Fresh noise on final latents: where a forward-process objective asks for velocities."""
    a, group = self.job.config.align, latents_BGNC.shape[1]
    root = jax.random.fold_in(jax.random.key(self.job.config.seed + 1), step)
    key_B = jax.vmap(lambda i: jax.random.fold_in(root, i))(index_B)
    key_BM = jax.vmap(lambda k: ops.fold_rows(k, (group * a.draws,)))(key_B)
    points = replay.noise_points(
      key_BM, jnp.tile(latents_BGNC, (1, a.draws, 1, 1)), self.job.config.pretrain.shift
    )
    return points.x_t, points.t

  def collect(
    self,
    tasks: experience.Tasks,
    iteration: int,
    draw: Draw | None = None,
    check: Callable[[], None] = lambda: None,
  ) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """Rollouts, rewards and advantages: (experience by task, metrics, pictures). `check` is called
    while a remote judge is waited for."""
    c, rounds = self.collector, self.job.config.align.refill
    found, metrics = self._sample(tasks, iteration, check)
    if rounds:
      seen = [metrics]

      def again(names):
        fresh, of_round = self._sample(draw(names), iteration, check)
        seen.append(of_round)
        return fresh

      where = placement.rows_sharding(self.job.mesh)
      found, filled = dynamic_sampling.replace_constant_groups(
        found,
        rounds,
        self.job.config.align.refill_by,
        again,
        lambda rows: jax.device_put(rows, where),
      )
      drifts = [m[mismatch.DECODE] for m in seen if mismatch.DECODE in m]
      if drifts:
        metrics[mismatch.DECODE] = functools.reduce(jnp.maximum, drifts)
      metrics.update(filled)
    batch = {}
    for task, s in found.items():
      advantage = c.advantages[task](s.rewards)
      credit = dict(advantage_BG=advantage.value_BG, valid_BG=advantage.valid_BG)
      batch.update(
        self._halves(s.experience, **credit)
        if task == tasks_lib.THINK_GENERATE
        else {task: s.experience.replace(**credit)}
      )
      metrics.update(reward_metrics.reward_metrics(task, s.rewards, s.facts, advantage))
    return (
      self.job.place_rows(batch),
      metrics,
      {task: multihost.local_rows(s.pixels) for task, s in found.items() if s.pixels is not None},
    )

  def _sample(
    self, tasks: experience.Tasks, iteration: int, check: Callable[[], None]
  ) -> tuple[dict[str, dynamic_sampling.Sampled], dict[str, Any]]:
    """One round: what was sampled for every task, with its rewards, and metrics."""
    c, vae_params, place = self.collector, self.frozen['vae'], self.job.place
    texts, images, pixels = c.rollout(self.sampling, vae_params, tasks, iteration)
    asked = c.ask(tasks, texts, pixels, iteration, check)
    out, metrics = {}, {'window': c.replayed(iteration)[0]}
    for task, rollout in images.items():
      rewards, facts = c.image_rewards(
        task, tasks, pixels[task], self.judges, vae_params, iteration, asked
      )
      steps = trajectories.transitions(rollout, c.kept(iteration), c.grid, c.eta_T)
      image = trajectories.image_train_batch(tasks.prompts[task], rollout, steps)
      if task == tasks_lib.THINK_GENERATE:
        plans = texts[tasks_lib.PLAN]
        facts[f'truncated/{tasks_lib.PLAN}'] = reward_metrics.truncated(
          multihost.local_rows(plans.tokens_BGT), self.job.policy.eos
        )
        image = think.ThinkTrajectory(
          trajectories.text_train_batch(tasks.prompts[task], plans), image
        )
      out[task] = dynamic_sampling.Sampled(image, place(rewards), place(facts), pixels[task])
    if tasks_lib.UNDERSTAND in texts:
      answers = texts[tasks_lib.UNDERSTAND]
      rewards, facts = c.text_rewards(tasks, answers.tokens_BGT, self.judges, vae_params, asked)
      out[tasks_lib.UNDERSTAND] = dynamic_sampling.Sampled(
        trajectories.text_train_batch(tasks.prompts[tasks_lib.UNDERSTAND], answers),
        place(rewards),
        place(facts),
        None,
      )
    if texts:
      metrics[mismatch.DECODE] = functools.reduce(jnp.maximum, [t.drift for t in texts.values()])
    return out, {**metrics, **asked.metrics()}

  def velocities(
    self, params: types.Params | lora.AdaptedParams, batch: dict[str, Any]
  ) -> dict[str, jax.Array]:
    """Velocities of any policy at the points of a batch."""
    images = {t: b for t, b in batch.items() if t not in tasks_lib.TEXT_OUTPUTS}
    if not images:
      return {}
    return self._velocities(
      params,
      self.frozen,
      {t: b.prompts for t, b in images.items()},
      {t: b.x_BMNC for t, b in images.items()},
      {t: b.time_BM for t, b in images.items()},
      {t: b.guidance_BM for t, b in images.items()},
    )

  def gaps(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
    """Largest |log-ratio| between rollout and replay of every task, before any update."""
    texts = {task: b for task, b in batch.items() if task in tasks_lib.TEXT_OUTPUTS}
    policies = self.sampling
    writer, drawer = policies[0], policies[-1]
    logp = self._replay(writer, self.frozen, texts)[1] if texts else {}
    out = {}
    forward = self.job.config.align.objective in flow_objectives.DECOUPLED
    for task, v in self.velocities(drawer, batch).items():
      b = batch[task]
      steps = self._image_gap(
        v,
        b.transitions,
        group=b.valid_BG.shape[1],
        latents_BGNC=b.latents_BGNC if forward else None,
      )
      out[f'gap/{task}'] = jnp.max(steps)
      out.update({f'gap/{task}/step{k}': steps[k] for k in range(len(steps))})
    for task, x in logp.items():
      out[f'gap/{task}'], out[f'gap/{task}/mean'] = self._text_gap(x, batch[task])
    return out

  def with_reference(self, batch: dict[str, Any]) -> dict[str, Any]:
    """Adds what the reference and the old policy say at the points of the next update."""
    batch = dict(batch)
    forward = self.job.config.align.objective in flow_objectives.DECOUPLED
    for task, b in batch.items():
      if task not in tasks_lib.TEXT_OUTPUTS and forward:
        x, t = self._points(self.state.step, b.prompts.index_B, b.latents_BGNC)
        batch[task] = b.replace(x_BMNC=x, time_BM=t, guidance_BM=None)
    reference = self.velocities(self.reference, batch)
    old = self.velocities(self._policy(self.state.old), batch) if forward else reference
    return {
      task: b
      if task in tasks_lib.TEXT_OUTPUTS
      else b.replace(reference_BMNC=reference[task], old_BMNC=old[task])
      for task, b in batch.items()
    }

  def _frozen(self) -> dict[str, Any]:
    """What the step reads besides the state."""
    return {**self.frozen, 'factors': {k: np.float32(v) for k, v in self.factors.items()}}

  def _adapt(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Moves the factors of the penalties towards their targets; returns the new ones."""
    a = self.job.config.align
    drift = 'velocity_mse' if a.image_kl == 'velocity' else 'kl'
    out = {}
    for kind, target, names in (
      ('answers', a.text_target, [f'{task}/kl_{a.text_kl}' for task in tasks_lib.TEXT_OUTPUTS]),
      ('images', a.image_target, [f'{task}/{drift}' for task in tasks_lib.TASKS]),
    ):
      found = [metrics[name] for name in names if name in metrics]
      if target and found:
        factor = kl.adapted(
          self.factors[f'{kind}_penalty'], sum(map(float, found)) / len(found), target, a.adapt
        )
        self.factors[f'{kind}_penalty'] = out[f'factor/{kind}_penalty'] = factor
    return out

  def iterate(
    self,
    tasks: experience.Tasks,
    iteration: int,
    draw: Draw | None = None,
    check: Callable[[], None] = lambda: None,
  ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One whole iteration; returns its metrics and pictures. `draw` gives fresh prompts of some
    tasks, where `align.refill` asks for them. `check` may raise: it is called as long as nothing
    has changed, while rewards are waited for and when they are at hand."""
    a = self.job.config.align
    batch, metrics, pictures = self.collect(tasks, iteration, draw, check)
    check()
    metrics.update(self.gaps(batch))
    texts = {task: b for task, b in batch.items() if task in tasks_lib.TEXT_OUTPUTS}
    if texts:
      _, logp = self._replay(self.reference, self.frozen, texts)
      batch.update({task: b.replace(reference_BGT=logp[task]) for task, b in texts.items()})
    if a.diagnose_every and (iteration - 1) % a.diagnose_every == 0:  # The first compiles it.
      metrics.update(
        diagnostics.probe(
          self.step, self.state, self._frozen(), self.with_reference(batch), ADAM_B1, a.clip_norm
        )
      )
    updates = []
    for _ in range(a.updates):
      self.state, update = self.step(self.state, self._frozen(), self.with_reference(batch))
      updates.append(update)
    update = self._mean(updates)
    metrics.update(update, **self._adapt(update))
    if a.objective in flow_objectives.DECOUPLED:
      # Importance ratios are to the policy that sampled: a plain copy.
      decay = (
        flow_objectives.old_policy_decay(iteration, a.old_flat, a.old_rise, a.old_hold)
        if a.objective == 'nft'
        else 0.0
      )
      self.state = self.state.replace(
        old=self._mix(self.state.old, self.state.params, jnp.float32(decay))
      )
      metrics['old_decay'] = decay
    return metrics, pictures
