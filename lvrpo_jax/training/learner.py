"""One iteration of LVRPO (rollout, reward, advantage, updates) and the state that it carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import ops
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
from lvrpo_jax.rollouts import trajectories
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import dynamic_sampling
from lvrpo_jax.training import losses
from lvrpo_jax.training import reward_metrics
from lvrpo_jax.training import update as update_lib

Metrics = dict[str, Any]
"""Numbers by name, as arrays on devices or on the host."""
NextPrompts = Callable[[Iterable[str]], engine_lib.PromptBatch]
"""Fresh prompts of the named tasks."""


def _continue() -> None:
  """A check that never raises."""


class Learner:
  """One iteration of alignment, and the state it carries."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    params: types.Params,
    vae_params: types.Params,
    dual_encoder_params: types.Params,
  ):
    """Places all parameters and compiles nothing yet."""
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
    self._noise_latents = jax.jit(self._noised_latents)
    self._mean = jax.jit(lambda found: jax.tree.map(lambda *x: sum(x) / len(x), *found))
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
    self.factors = dict.fromkeys(losses.FACTORS, 1.0)
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

  def _policy(self, trained: types.Params) -> types.Params | lora.AdaptedParams:
    """The policy that trained parameters stand for: themselves, or adapters on the base."""
    settings = self._align.lora
    if not settings.rank:
      return trained
    return lora.AdaptedParams(self.frozen['base'], trained, settings.alpha / settings.rank)

  @property
  def reference(self) -> types.Params:
    """The frozen policy: the state's copy, or the weights under the adapters."""
    return self.frozen['base'] if self.state.reference is None else self.state.reference

  @property
  def reward_params(self) -> rewards_base.RewardParams:
    """Frozen reward parameters; valid until the next step donates the state."""
    return rewards_base.RewardParams(self.reference, self.frozen['vae'], self._dual_encoder)

  @property
  def params(self) -> types.Params:
    """The policy as it is now: adapters merged into a new tree, or the state's own parameters,
    which the next step donates."""
    policy = self._policy(self.state.params)
    return self._merge(policy) if self._align.lora.rank else policy

  @property
  def sampler_policies(self) -> engine_lib.Policies:
    """The policy that samples, or those of texts and of images where they differ.

    Ratios of texts are to the current policy; see `FlowObjective.sampler_policy` for images.
    """
    if self._objective.sampler_policy != 'old':
      return (self._policy(self.state.params),)
    return self._policy(self.state.params), self._policy(self.state.old)

  def _noised_latents(
    self, step: jax.Array, index_B: jax.Array, latents_BGNC: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Fresh noise on final latents: the points of a decoupled objective."""
    config, group = self.experiment.config, latents_BGNC.shape[1]
    draws = self._align.image.draws
    root = jax.random.fold_in(jax.random.key(config.seed + 1), step)
    key_B = jax.vmap(lambda i: jax.random.fold_in(root, i))(index_B)
    key_BKG = jax.vmap(lambda k: ops.fold_rows(k, (draws, group)))(key_B)
    points = replay.noise_points(key_BKG, latents_BGNC[:, None], config.pretrain.shift)
    return points.x_t, points.t

  def collect(
    self,
    prompts: engine_lib.PromptBatch,
    iteration: int,
    next_prompts: NextPrompts | None = None,
    check: Callable[[], None] = _continue,
  ) -> tuple[update_lib.Credited, Metrics, dict[str, np.ndarray]]:
    """Rollouts, rewards and advantages: (samples with advantages, metrics, images by task).

    `check` is called while a remote judge is waited for.
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
        batch.update({half: update_lib.CreditedSamples(*parts) for half, parts in halves.items()})
      else:
        batch[task] = update_lib.CreditedSamples(found.trajectory, **credit)
      metrics.update(reward_metrics.reward_metrics(task, found.rewards, found.facts, advantage))
    images = {
      task: multihost.local_rows(found.pixels)
      for task, found in sampled.items()
      if found.pixels is not None
    }
    return self.experiment.place_rows(batch), metrics, images

  def _resample(
    self,
    sampled: dict[str, dynamic_sampling.ScoredTrajectory],
    metrics: Metrics,
    iteration: int,
    next_prompts: NextPrompts | None,
    check: Callable[[], None],
  ) -> tuple[dict[str, dynamic_sampling.ScoredTrajectory], Metrics]:
    """Dynamic sampling: fresh prompts in the place of those whose groups are constant."""
    if next_prompts is None:
      raise ValueError('align.dynamic_sampling.rounds is not 0, and no fresh prompts are given')
    settings, rounds = self._align.dynamic_sampling, [metrics]

    def again(names):
      fresh, of_round = self._sample(next_prompts(names), iteration, check)
      rounds.append(of_round)
      return fresh

    where = placement.rows_sharding(self.experiment.mesh)
    sampled, replaced = dynamic_sampling.replace_constant_groups(
      sampled,
      settings.rounds,
      settings.reward,
      again,
      lambda rows: jax.device_put(rows, where),
    )
    drifts = [found[mismatch.DECODE] for found in rounds if mismatch.DECODE in found]
    if drifts:
      metrics[mismatch.DECODE] = functools.reduce(jnp.maximum, drifts)
    return sampled, {**metrics, **replaced}

  def _sample(
    self, prompts: engine_lib.PromptBatch, iteration: int, check: Callable[[], None]
  ) -> tuple[dict[str, dynamic_sampling.ScoredTrajectory], Metrics]:
    """One round: what was sampled for every task, with its rewards, and metrics."""
    engine, place = self.engine, self.experiment.place
    rollouts = engine.rollout(self.sampler_policies, self.frozen['vae'], prompts, iteration)
    samples = self._samples(prompts, rollouts, iteration)
    pending = self.scorer.submit(samples, check)
    out, metrics = {}, {'window': engine.replayed_steps(iteration)[0]}
    # Rewards of images are dispatched first, as texts have to be fetched for theirs.
    for task in sorted(samples, key=tasks_lib.draws_image, reverse=True):
      scored = self.scorer.score(samples[task], prompts.prompts[task], self.reward_params, pending)
      facts = {**self._truncated(task, rollouts), **scored.facts}
      out[task] = dynamic_sampling.ScoredTrajectory(
        engine.kept(task, prompts.prompts[task], rollouts, iteration),
        place(scored.rewards),
        place(facts),
        rollouts.pixels.get(task),
      )
    if rollouts.texts:
      metrics[mismatch.DECODE] = functools.reduce(
        jnp.maximum, [text.drift for text in rollouts.texts.values()]
      )
    return out, {**metrics, **pending.metrics()}

  def _samples(
    self, prompts: engine_lib.PromptBatch, rollouts: engine_lib.Rollouts, iteration: int
  ) -> dict[str, rewards_base.Samples]:
    """What rewards see, by task, in the order in which tasks were dispatched."""
    outputs = {
      task: rollouts.pixels[task] if task in rollouts.pixels else rollouts.texts[task].tokens_BGT
      for task in prompts.prompts
    }
    return {
      task: self.scorer.samples(task, prompts.examples[task], found, iteration)
      for task, found in outputs.items()
    }

  def _truncated(self, task: str, rollouts: engine_lib.Rollouts) -> dict[str, np.ndarray]:
    """Which texts (B, G) of a task were cut before their end token, as a fact by metric name."""
    name = tasks_lib.PLAN if tasks_lib.BY_NAME[task].plans else task
    if name not in rollouts.texts:
      return {}
    tokens_BGT = multihost.local_rows(rollouts.texts[name].tokens_BGT)
    return {f'truncated/{name}': reward_metrics.truncated(tokens_BGT, self.experiment.policy.eos)}

  @property
  def _guided(self) -> bool:
    """Whether rollouts are guided."""
    return self._align.rollout.guidance != 1

  def mismatch(self, credited: update_lib.Credited) -> Metrics:
    """Largest |log-ratio| between rollout and replay of every task, before any update."""
    texts, images = update_lib.by_modality(credited)
    text_policy, image_policy = self.sampler_policies[0], self.sampler_policies[-1]
    out: Metrics = {}
    queries = {t: trajectories.step_query(x, self._guided) for t, x in images.items()}
    for task, v in self._velocities_at(image_policy, queries).items():
      name, found = f'{mismatch.PREFIX}/{task}', images[task]
      final = () if self._objective.coupled else (found.latents_BGNC,)
      steps = self._image_mismatch(v, found.steps, *final)
      out[name] = jnp.max(steps)
      out.update({f'{name}/step{k}': steps[k] for k in range(len(steps))})
    for task, logp in self._logp_of(text_policy, texts).items():
      name = f'{mismatch.PREFIX}/{task}'
      out[name], out[f'{name}/mean'] = self._text_mismatch(logp, texts[task])
    return out

  def _velocities_at(
    self, policy: types.Params | lora.AdaptedParams, queries: dict[str, types.FlowQuery]
  ) -> dict[str, jax.Array]:
    """Velocities of any policy at queries."""
    return self._velocities(policy, self.frozen, queries) if queries else {}

  def _logp_of(
    self, policy: types.Params | lora.AdaptedParams, texts: dict[str, types.SampledTexts]
  ) -> dict[str, jax.Array]:
    """Log-probabilities of texts under any policy."""
    return self._log_probabilities(policy, self.frozen, texts) if texts else {}

  def text_batches(self, credited: update_lib.Credited) -> dict[str, types.TextTrainBatch]:
    """Texts as all updates of the iteration read them."""
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
    """Images as the next update reads them: decoupled objectives ask at fresh noise each time."""
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
    """Where the next update asks for velocities."""
    if self._objective.coupled:
      return trajectories.step_query(images, self._guided)
    x_BKGNC, time_BKG = self._noise_latents(
      self.state.step, images.prompts.index_B, images.latents_BGNC
    )
    return types.FlowQuery(images.prompts, x_BKGNC, time_BKG)

  def _step_frozen(self) -> dict[str, Any]:
    """What the step reads besides the state."""
    return {**self.frozen, 'factors': {k: np.float32(v) for k, v in self.factors.items()}}

  def iterate(
    self,
    prompts: engine_lib.PromptBatch,
    iteration: int,
    next_prompts: NextPrompts | None = None,
    check: Callable[[], None] = _continue,
  ) -> tuple[Metrics, dict[str, np.ndarray]]:
    """One whole iteration; returns its metrics and images.

    Args:
      next_prompts: gives fresh prompts of some tasks, for dynamic sampling.
      check: may raise; called as long as nothing has changed, while rewards are waited for and when
        they are at hand.
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
        diagnostics.probe(
          self.step,
          self.state,
          self._step_frozen(),
          next_batch(),
          align.optimizer,
        )
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
