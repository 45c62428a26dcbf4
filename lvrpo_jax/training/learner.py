"""Runs one iteration of LVRPO: rollout, reward, advantage, updates; holds the training state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import placement
from lvrpo_jax.rewards import base as rewards_base
from lvrpo_jax.rewards import scorer as scorer_lib
from lvrpo_jax.rollouts import engine as engine_lib
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.rollouts import replay
from lvrpo_jax.rollouts import think
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import dynamic_sampling
from lvrpo_jax.training import losses
from lvrpo_jax.training import reward_metrics
from lvrpo_jax.training import update as update_lib

Metrics = dict[str, types.Array | np.ndarray | np.number | float]
"""Numbers by name, as arrays on devices or on the host."""
NextPrompts = Callable[[Iterable[str]], engine_lib.PromptBatch]
"""Gives fresh prompts of the named tasks."""
Policy = types.Params | lora.AdaptedParams
"""Parameters of a policy, or adapters with their base."""
Scored = dict[str, dynamic_sampling.ScoredTrajectory]
"""Samples of every task with their rewards."""


def _continue() -> None:
  """Never raises; the default check."""


class Learner:
  """Runs iterations of alignment and holds the state that they change.

  Attributes:
    experiment: what the run is made of.
    scorer: the rewards.
    engine: the rollouts.
    step: the compiled update.
    state: policy, optimizer state and the copies of the policy.
    frozen: parameters that no update changes: 'vae', and 'base' under adapters.
    factors: see `losses.FACTORS`.
  """

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    params: types.Params,
    vae_params: types.Params,
    dual_encoder_params: types.Params,
  ):
    """Places all parameters; functions compile when they are first called."""
    self.experiment = experiment
    self._align = align = experiment.config.align
    self._objective = flow_objectives.find(align.image.objective)
    self.scorer = scorer_lib.Scorer(experiment)
    apart = self.scorer.asks_server or align.dynamic_sampling.rounds > 0
    self.engine = engine_lib.RolloutEngine(experiment, apart)
    optimizer, self.step = update_lib.build_update(experiment)
    self._log_probabilities = experiment.compile(
      functools.partial(replay.log_probabilities, experiment.policy)
    )
    self._velocities = experiment.compile(functools.partial(replay.velocities, experiment.policy))
    self._image_mismatch = jax.jit(
      functools.partial(mismatch.image_mismatch, align.rollout.sampler)
    )
    self._split_halves = jax.jit(functools.partial(think.split_halves, bos=experiment.policy.bos))
    self._text_mismatch = jax.jit(mismatch.text_mismatch)
    self._noise_latents = jax.jit(functools.partial(update_lib.noise_latents, experiment.config))
    self._mean = jax.jit(update_lib.mean_metrics)
    self._advantages = {
      task: jax.jit(
        functools.partial(
          advantage_lib.combine,
          weights=self.scorer.weights[task],
          **update_lib.advantage_settings(align),
        )
      )
      for task in tasks_lib.active(align.prompts)
    }
    self.frozen = {'vae': placement.shard_state(vae_params, experiment.mesh)}
    self.factors: dict[str, float] = dict.fromkeys(losses.FACTORS, 1.0)
    trained = params
    if align.lora.rank:
      self.frozen['base'] = placement.shard_state(params, experiment.mesh)
      trained = lora.init(
        params, align.lora.rank, align.lora.target, jax.random.key(experiment.config.seed + 2)
      )
    self.state = placement.shard_state(
      update_lib.initial_state(
        experiment, placement.shard_state(trained, experiment.mesh), optimizer
      ),
      experiment.mesh,
    )
    self._mix = jax.jit(
      update_lib.mix, out_shardings=jax.tree.map(lambda x: x.sharding, self.state.old)
    )
    self._merge = jax.jit(lora.merge_adapters)
    self._dual_encoder = placement.shard_state(dual_encoder_params, experiment.mesh)
    self.scorer.load(self.reward_params)

  def _policy(self, trained: types.Params) -> Policy:
    """Returns the policy of trained parameters: these themselves, or adapters with the base."""
    settings = self._align.lora
    if not settings.rank:
      return trained
    return lora.AdaptedParams(self.frozen['base'], trained, settings.alpha / settings.rank)

  @property
  def reference(self) -> types.Params:
    """The pretrained policy: the state's copy, or the base of the adapters."""
    return self.frozen['base'] if self.state.reference is None else self.state.reference

  @property
  def reward_params(self) -> rewards_base.RewardParams:
    """Frozen reward parameters; valid until the next step donates the state."""
    return rewards_base.RewardParams(
      reference=self.reference, vae=self.frozen['vae'], dual_encoder=self._dual_encoder
    )

  @property
  def params(self) -> types.Params:
    """The current policy.

    It is a new tree with merged adapters, or the state's own parameters, which the next step
    donates.
    """
    policy = self._policy(self.state.params)
    return self._merge(policy) if self._align.lora.rank else policy

  @property
  def sampler_policies(self) -> engine_lib.Policies:
    """The policy of all rollouts, or the policies of text and of image rollouts if they differ.

    Texts are sampled with the current policy; see `FlowObjective.sampler_policy` for images.
    """
    if self._objective.sampler_policy != 'old':
      return (self._policy(self.state.params),)
    return self._policy(self.state.params), self._policy(self.state.old)

  def collect(
    self,
    prompts: engine_lib.PromptBatch,
    iteration: int,
    next_prompts: NextPrompts | None = None,
    check: Callable[[], None] = _continue,
  ) -> tuple[update_lib.Credited, Metrics, dict[str, np.ndarray]]:
    """Samples, scores and computes advantages.

    Args:
      prompts: of this iteration.
      iteration: index, from 1.
      next_prompts: gives fresh prompts, for dynamic sampling.
      check: called while a remote judge is waited for; may raise.

    Returns:
      Samples with advantages by task, metrics, and this process's images by task.

    Raises:
      ValueError: dynamic sampling is on, and `next_prompts` is None.
    """
    sampled, metrics = self._sample(prompts, iteration, check)
    if self._align.dynamic_sampling.rounds:
      sampled, metrics = self._resample(sampled, metrics, iteration, next_prompts, check)
    batch: update_lib.Credited = {}
    for task, found in sampled.items():
      advantage = self._advantages[task](found.rewards)
      credit = dict(advantage_BG=advantage.value_BG, valid_BG=advantage.valid_BG)
      if isinstance(found.trajectory, think.SampledPlans):
        halves = self._split_halves(found.trajectory, **credit)
        for half, (part, advantage_BG, valid_BG) in halves.items():
          batch[half] = update_lib.CreditedSamples(
            sampled=part, advantage_BG=advantage_BG, valid_BG=valid_BG
          )
      else:
        batch[task] = update_lib.CreditedSamples(sampled=found.trajectory, **credit)
      metrics.update(reward_metrics.reward_metrics(task, found.rewards, found.facts, advantage))
    images = {
      task: multihost.local_rows(found.pixels)
      for task, found in sampled.items()
      if found.pixels is not None
    }
    return self.experiment.place_rows(batch), metrics, images

  def _resample(
    self,
    sampled: Scored,
    metrics: Metrics,
    iteration: int,
    next_prompts: NextPrompts | None,
    check: Callable[[], None],
  ) -> tuple[Scored, Metrics]:
    """Replaces prompts whose groups are constant by fresh ones (dynamic sampling)."""
    if next_prompts is None:
      raise ValueError('align.dynamic_sampling.rounds is not 0, and no fresh prompts are given')
    settings, rounds = self._align.dynamic_sampling, [metrics]

    def sample_again(names: list[str]) -> Scored:
      fresh, metrics_of_round = self._sample(next_prompts(names), iteration, check)
      rounds.append(metrics_of_round)
      return fresh

    sampled, replaced = dynamic_sampling.replace_constant_groups(
      sampled,
      settings.rounds,
      settings.reward,
      sample_again,
      functools.partial(jax.device_put, device=placement.rows_sharding(self.experiment.mesh)),
    )
    drifts = [found[mismatch.DECODE] for found in rounds if mismatch.DECODE in found]
    if drifts:
      metrics[mismatch.DECODE] = functools.reduce(jnp.maximum, drifts)
    return sampled, {**metrics, **replaced}

  def _sample(
    self, prompts: engine_lib.PromptBatch, iteration: int, check: Callable[[], None]
  ) -> tuple[Scored, Metrics]:
    """Runs one round: samples of every task with their rewards, and metrics."""
    engine, place, eos = self.engine, self.experiment.place, self.experiment.policy.eos
    rollouts = engine.rollout(self.sampler_policies, self.frozen['vae'], prompts, iteration)
    samples = self._samples(prompts, rollouts, iteration)
    pending = self.scorer.submit(samples, check)
    out: Scored = {}
    metrics: Metrics = {'window': engine.replayed_steps(iteration)[0]}
    # Rewards of images are dispatched first, because rewards of texts wait for the texts.
    for task in sorted(samples, key=tasks_lib.draws_image, reverse=True):
      scored = self.scorer.score(samples[task], prompts.prompts[task], self.reward_params, pending)
      out[task] = dynamic_sampling.ScoredTrajectory(
        trajectory=engine.kept(task, prompts.prompts[task], rollouts, iteration),
        rewards=place(scored.rewards),
        facts=place({**reward_metrics.truncated_texts(task, rollouts.texts, eos), **scored.facts}),
        pixels=rollouts.pixels.get(task),
      )
    if rollouts.texts:
      metrics[mismatch.DECODE] = functools.reduce(
        jnp.maximum, [text.drift for text in rollouts.texts.values()]
      )
    return out, {**metrics, **pending.metrics()}

  def _samples(
    self, prompts: engine_lib.PromptBatch, rollouts: engine_lib.Rollouts, iteration: int
  ) -> dict[str, rewards_base.Samples]:
    """Builds the samples that rewards see, by task, in the order of the prompts."""
    outputs = {
      task: rollouts.pixels[task] if task in rollouts.pixels else rollouts.texts[task].tokens_BGT
      for task in prompts.prompts
    }
    return {
      task: self.scorer.samples(task, prompts.examples[task], found, iteration)
      for task, found in outputs.items()
    }

  @property
  def _guided(self) -> bool:
    """Whether rollouts are guided."""
    return self._align.rollout.guidance != 1

  def mismatch(self, credited: update_lib.Credited) -> Metrics:
    """Returns the largest |log-ratio| between rollout and replay of every task.

    It is called before any update of the iteration.
    """
    texts, images = update_lib.by_modality(credited)
    text_policy, image_policy = self.sampler_policies[0], self.sampler_policies[-1]
    out: Metrics = {}
    queries = {task: replay.step_query(x, self._guided) for task, x in images.items()}
    for task, v_BKGNC in self._velocities_at(image_policy, queries).items():
      name, found = f'{mismatch.PREFIX}/{task}', images[task]
      final = () if self._objective.coupled else (found.latents_BGNC,)
      steps_K = self._image_mismatch(v_BKGNC, found.steps, *final)
      out[name] = jnp.max(steps_K)
      out.update({f'{name}/step{k}': steps_K[k] for k in range(len(steps_K))})
    for task, logp_BGT in self._logp_of(text_policy, texts).items():
      name = f'{mismatch.PREFIX}/{task}'
      out[name], out[f'{name}/mean'] = self._text_mismatch(logp_BGT, texts[task])
    return out

  def _velocities_at(
    self, policy: Policy, queries: dict[str, types.FlowQuery]
  ) -> dict[str, jax.Array]:
    """Computes velocities of any policy at queries."""
    return self._velocities(policy, self.frozen, queries) if queries else {}

  def _logp_of(self, policy: Policy, texts: dict[str, types.SampledTexts]) -> dict[str, jax.Array]:
    """Computes log-probabilities of texts under any policy."""
    return self._log_probabilities(policy, self.frozen, texts) if texts else {}

  def text_batches(self, credited: update_lib.Credited) -> dict[str, types.TextTrainBatch]:
    """Builds the batches of texts, which all updates of the iteration read."""
    texts, _ = update_lib.by_modality(credited)
    reference = self._logp_of(self.reference, texts)
    return {
      task: types.TextTrainBatch(
        sampled=sampled,
        advantage_BG=credited[task].advantage_BG,
        valid_BG=credited[task].valid_BG,
        reference_BGT=reference[task],
      )
      for task, sampled in texts.items()
    }

  def image_batches(self, credited: update_lib.Credited) -> dict[str, types.ImageTrainBatch]:
    """Builds the batches of images for the next update; decoupled objectives draw fresh noise."""
    _, images = update_lib.by_modality(credited)
    queries = {task: self._query(sampled) for task, sampled in images.items()}
    reference = self._velocities_at(self.reference, queries)
    old = reference
    if not self._objective.coupled:
      old = self._velocities_at(self._policy(self.state.old), queries)
    return {
      task: types.ImageTrainBatch(
        sampled=sampled,
        query=queries[task],
        advantage_BG=credited[task].advantage_BG,
        valid_BG=credited[task].valid_BG,
        old_BKGNC=old[task],
        reference_BKGNC=reference[task],
      )
      for task, sampled in images.items()
    }

  def _query(self, images: types.SampledImages) -> types.FlowQuery:
    """Returns the query for velocities of the next update."""
    if self._objective.coupled:
      return replay.step_query(images, self._guided)
    x_BKGNC, time_BKG = self._noise_latents(
      self.state.step, images.prompts.index_B, images.latents_BGNC
    )
    return types.FlowQuery(prompts=images.prompts, x_BKGNC=x_BKGNC, time_BKG=time_BKG)

  def _step_frozen(self) -> types.Tree:
    """Returns what the step reads besides the state."""
    factors = {name: np.float32(value) for name, value in self.factors.items()}
    return {**self.frozen, 'factors': factors}

  def iterate(
    self,
    prompts: engine_lib.PromptBatch,
    iteration: int,
    next_prompts: NextPrompts | None = None,
    check: Callable[[], None] = _continue,
  ) -> tuple[Metrics, dict[str, np.ndarray]]:
    """Runs one iteration; returns its metrics and this process's images by task.

    Args:
      prompts: of this iteration.
      iteration: index, from 1.
      next_prompts: gives fresh prompts of some tasks, for dynamic sampling.
      check: may raise. It is called while rewards are awaited and when they are there, and so only
        before the state changes.
    """
    align = self._align
    credited, metrics, images = self.collect(prompts, iteration, next_prompts, check)
    check()
    metrics.update(self.mismatch(credited))
    texts = self.text_batches(credited)

    def next_batch() -> update_lib.Batch:
      return {**texts, **self.image_batches(credited)}

    every = align.checks.gradients_every
    if every and (iteration - 1) % every == 0:  # The first iteration compiles it.
      metrics.update(
        diagnostics.probe(self.step, self.state, self._step_frozen(), next_batch(), align.optimizer)
      )
    updates = []
    for _ in range(align.updates_per_rollout):
      self.state, update = self.step(self.state, self._step_frozen(), next_batch())
      updates.append(update)
    update = self._mean(updates)
    metrics.update(update, **update_lib.adapt_kl_factors(align, self.factors, update))
    if not self._objective.coupled:
      decay = self._objective.old_decay(align.image, iteration)
      self.state = self.state.replace(
        old=self._mix(self.state.old, self.state.params, jnp.float32(decay))
      )
      metrics['old_decay'] = decay
    return metrics, images
