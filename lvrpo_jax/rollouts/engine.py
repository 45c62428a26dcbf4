"""Rollout engine: samples groups of texts and images, and records their trajectories."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import contexts as contexts_lib
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import replay
from lvrpo_jax.rollouts import schedule
from lvrpo_jax.rollouts import text as text_rollout
from lvrpo_jax.rollouts import think
from lvrpo_jax.runtime import experiment as experiment_lib

Array = types.Array
Policies = tuple[types.Params | lora.AdaptedParams, ...]
"""The policy of text rollouts, followed by that of image rollouts where the two differ."""


class PromptBatch(NamedTuple):
  """The prompts of an iteration, by task.

  Attributes:
    examples: prompts on the host, with their images, answers and records.
    prompts: the same prompts encoded, on devices.
  """

  examples: dict[str, list[examples_lib.Example]]
  prompts: dict[str, types.Prompts]


class Rollouts(NamedTuple):
  """Samples of an iteration, by task.

  Attributes:
    texts: sampled texts; the plans of `THINK_GENERATE` have the key `PLAN`.
    images: sampled trajectories of images.
    pixels: uint8 images (B, G, Y, X, 3) of `images`.
  """

  texts: dict[str, types.TextTrajectory]
  images: dict[str, types.ImageTrajectory]
  pixels: dict[str, Array]


class RolloutEngine:
  """Compiled rollouts of an experiment.

  Attributes:
    grid: T + 1 times of the denoising steps.
    levels_T: noise level of every step, with noise on all permitted steps.
    noisy: indices of the steps with noise.
    window: count of noisy steps that an update replays.
  """

  def __init__(self, experiment: experiment_lib.Experiment, apart: bool):
    """Reads the settings; compiles nothing yet.

    Args:
      experiment: the fixed parts of the run.
      apart: True samples tasks one after the other, as is needed where a server scores one task
        while the next is sampled, or where some tasks are sampled again.

    Raises:
      ValueError: an update should replay more steps than have noise.
    """
    self.experiment, self._apart = experiment, apart
    settings = experiment.config.align.rollout
    self._settings = settings
    objective = experiment.config.align.image.objective
    self._coupled = flow_objectives.find(objective).coupled
    self.grid = flow.time_grid(settings.steps + 1, settings.shift)
    self.levels_T = schedule.noise_levels(
      settings.noise_level, settings.steps, settings.noise_low, settings.noise_high, self.grid
    )
    self.noisy = np.flatnonzero(np.asarray(self.levels_T))
    self.window = settings.window or len(self.noisy)
    if len(self.noisy) < max(self.window, 1):
      raise ValueError(
        f'align.rollout.window is {settings.window}, but only {len(self.noisy)} of '
        f'align.rollout.steps = {settings.steps} steps start in (align.rollout.noise_low, '
        f'align.rollout.noise_high] = ({settings.noise_low}, {settings.noise_high}]'
      )
    self._sample = experiment.sampler(self.sample)

  def replayed_steps(self, iteration: int) -> np.ndarray:
    """Returns the indices of the steps that the update of an iteration replays."""
    settings = self._settings
    first = schedule.window_start(
      settings.window_schedule,
      self.experiment.config.seed,
      iteration,
      len(self.noisy),
      self.window,
      settings.window_every,
    )
    return self.noisy[first : first + self.window]

  def kept_steps(self, iteration: int) -> np.ndarray:
    """Returns the indices of the steps of a rollout that are stored and replayed before the update.

    Decoupled objectives read no step. For them the last step of the rollout replaces the last step
    of the window: its replay checks that the final latents are those that were sampled.
    """
    steps = self.replayed_steps(iteration)
    if self._coupled:
      return steps
    return np.append(steps[:-1], len(self.levels_T) - 1)

  def noise_levels(self, iteration: int) -> Array:
    """Returns the noise level (T,) of every step of the rollouts of an iteration."""
    if self._settings.noise_outside_window:
      return self.levels_T
    inside = np.isin(np.arange(len(self.levels_T)), self.replayed_steps(iteration))
    return jnp.where(inside, self.levels_T, 0.0)

  def sample(
    self,
    policies: Policies,
    vae_params: types.Params,
    prompts: dict[str, types.Prompts],
    iteration: Array,
    levels_T: Array,
  ) -> Rollouts:
    """Samples groups for all tasks.

    Args:
      policies: see `Policies`.
      vae_params: parameters of the autoencoder.
      prompts: by task.
      iteration: index of the iteration; random draws depend on it.
      levels_T: noise level of every step.
    """
    policy = self.experiment.policy
    policies = tuple(map(lora.merge_adapters, policies))
    text_params, image_params = policies[0], policies[-1]
    caches = self._prefill(text_params, image_params, vae_params, prompts)
    noise = {task: self._keys(p, iteration) for task, p in prompts.items()}
    contexts, texts = dict(prompts), {}
    for task in tasks_lib.TEXT_FIRST:
      if task in prompts:
        name = tasks_lib.PLAN if tasks_lib.BY_NAME[task].plans else task
        texts[name] = self._sample_texts(text_params, caches.pop(task), noise[task])
    if tasks_lib.THINK_GENERATE in prompts:
      task, plan = tasks_lib.THINK_GENERATE, texts[tasks_lib.PLAN]
      contexts[task] = contexts_lib.after_plans(
        prompts[task], plan.tokens_BGT, plan.mask_BGT, policy.bos
      )
      caches[task] = policy.prefill(image_params, vae_params, contexts[task])
      noise[task] = think.image_keys(noise[task])
    images = self._sample_images(image_params, caches, contexts, noise, levels_T)
    pixels = {
      task: policy.decode_image(vae_params, trajectory.latents_BGNC)
      for task, trajectory in images.items()
    }
    return Rollouts(texts=texts, images=images, pixels=pixels)

  def _keys(self, prompts: types.Prompts, iteration: Array) -> Array:
    """Makes random keys (B, G) that depend on the seed, the iteration and a prompt's index."""
    group = self._settings.group_size
    root = jax.random.fold_in(jax.random.key(self.experiment.config.seed), iteration)

    def prompt_key(index: Array) -> Array:
      return jax.random.fold_in(root, index)

    def sample_keys(key: Array) -> Array:
      return ops.fold_rows(key, (group,))

    return jax.vmap(sample_keys)(jax.vmap(prompt_key)(prompts.index_B))

  def _prefill(
    self,
    text_params: types.Params,
    image_params: types.Params,
    vae_params: types.Params,
    prompts: dict[str, types.Prompts],
  ) -> dict[str, types.Cache]:
    """Encodes the context of every task with the policy that continues it."""
    policy = self.experiment.policy
    if text_params is image_params:
      return policy.prefill_all(text_params, vae_params, prompts)
    caches = {}
    for params, for_texts in ((text_params, True), (image_params, False)):
      chosen = {t: p for t, p in prompts.items() if tasks_lib.writes_text(t) == for_texts}
      caches.update(policy.prefill_all(params, vae_params, chosen))
    return caches

  def _sample_texts(
    self, params: types.Params, cache: types.Cache, key_BG: Array
  ) -> types.TextTrajectory:
    """Samples texts after contexts and scores them by the pass that the update replays."""
    policy, length = self.experiment.policy, self.experiment.config.data.answer_tokens + 1
    texts = text_rollout.sample_text(
      policy, params, cache, key_BG, length, self._settings.temperature
    )
    ids = text_rollout.teacher_ids(texts.tokens_BGT, policy.bos)
    return text_rollout.rescore(texts, policy.text_logits(params, cache, ids))

  def _sample_images(
    self,
    params: types.Params,
    caches: dict[str, types.Cache],
    contexts: dict[str, types.Prompts],
    noise: dict[str, Array],
    levels_T: Array,
  ) -> dict[str, types.ImageTrajectory]:
    """Samples images after contexts; tasks whose rows have the same shape share a pass."""
    settings, policy, out = self._settings, self.experiment.policy, {}
    rows = {task: (cache.valid_BS, noise[task]) for task, cache in caches.items()}
    for names in contexts_lib.group_by_shape(rows):
      cache = contexts_lib.join_caches([caches[task] for task in names])
      bare = None
      if settings.guidance != 1:
        bare = contexts_lib.without_text(
          cache, contexts_lib.stack([contexts[task] for task in names])
        )
      trajectory = image_rollout.sample_sde(
        guidance.policy_velocity(policy, params, cache, bare, settings.guidance),
        jnp.concatenate([noise[task] for task in names]),
        policy.latent_shape,
        self.grid,
        levels_T,
        settings.sampler,
      )
      if bare is not None:
        trajectory = trajectory.replace(guidance=jnp.float32(settings.guidance))
      start = 0
      for task in names:
        stop = start + len(noise[task])
        out[task] = image_rollout.slice_prompts(trajectory, start, stop)
        if tasks_lib.BY_NAME[task].plans:
          out[task] = think.regroup_images(out[task], settings.group_size)
        start = stop
    return out

  def rollout(
    self, policies: Policies, vae_params: types.Params, batch: PromptBatch, iteration: int
  ) -> Rollouts:
    """Dispatches the rollouts of an iteration.

    Texts and pixels are returned on the experiment's mesh. Trajectories stay on the rollout mesh
    until `Experiment.place_rows` moves the part that the update reads.
    """
    prompts = batch.prompts
    if self._apart:
      parts = [[task] for task in prompts]
    else:
      # Image rollouts need not wait for text-only rollouts.
      parts = [[t for t in prompts if tasks_lib.draws_image(t) != texts] for texts in (True, False)]
    texts, images, pixels = {}, {}, {}
    for names in filter(None, parts):
      found = self._sample(
        needed_policies(policies, names),
        vae_params,
        {task: prompts[task] for task in names},
        jnp.int32(iteration),
        self.noise_levels(iteration),
      )
      texts.update(found.texts)
      images.update(found.images)
      pixels.update(found.pixels)
    place = self.experiment.place_rows
    return Rollouts(texts=place(texts), images=images, pixels=place(pixels))

  def kept(
    self, task: str, prompts: types.Prompts, rollouts: Rollouts, iteration: int
  ) -> types.SampledTexts | types.SampledImages | think.SampledPlans:
    """Returns the part of a task's rollout that later stages read."""
    if task in rollouts.texts:
      return replay.sampled_texts(prompts, rollouts.texts[task])
    rollout = rollouts.images[task]
    steps = replay.transitions(rollout, self.kept_steps(iteration), self.grid, self.levels_T)
    image = replay.sampled_images(prompts, rollout, steps)
    if not tasks_lib.BY_NAME[task].plans:
      return image
    plan = replay.sampled_texts(prompts, rollouts.texts[tasks_lib.PLAN])
    return think.SampledPlans(plan=plan, image=image)


def needed_policies(policies: Policies, names: Iterable[str]) -> Policies:
  """Returns the policies that rollouts of tasks read: that of texts, that of images, or both."""
  names = list(names)
  if not any(map(tasks_lib.draws_image, names)):
    return policies[:1]
  return policies if any(map(tasks_lib.writes_text, names)) else policies[-1:]
