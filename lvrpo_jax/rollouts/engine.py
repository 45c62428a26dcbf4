"""The rollout engine: from prompts to groups of texts and images with what was sampled on the way."""

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
from lvrpo_jax.rollouts import schedule
from lvrpo_jax.rollouts import text as text_rollout
from lvrpo_jax.rollouts import think
from lvrpo_jax.rollouts import trajectories
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array
Policies = tuple[types.Params | lora.AdaptedParams, ...]
"""The policy of text rollouts, and that of image rollouts where it is another one."""


class PromptBatch(NamedTuple):
  """The prompts of an iteration by task: as the host knows them, and as the device reads them."""

  examples: dict[str, list[examples_lib.Example]]
  prompts: dict[str, types.Prompts]


class Rollouts(NamedTuple):
  """What an iteration has sampled, by task; plans of `THINK_GENERATE` as `PLAN`."""

  texts: dict[str, types.TextTrajectory]
  images: dict[str, types.ImageTrajectory]
  pixels: dict[str, Array]


class RolloutEngine:
  """Compiled rollouts of an experiment.

  Attributes:
    grid: T + 1 times of the denoising steps.
    levels_T: noise level of every step, where all steps in range are noisy.
    noisy: indices of the steps with noise.
    window: number of noisy steps that an update replays.
  """

  def __init__(self, experiment: experiment_lib.Experiment, apart: bool):
    """Compiles nothing yet.

    Args:
      apart: whether tasks are sampled one after the other: where a server scores one while the
        next is sampled, or where some are sampled again.

    Raises:
      ValueError: fewer steps are noisy than an update should replay.
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
    """Indices of the steps that the update of an iteration replays."""
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
    """Indices of the steps that are kept of a rollout, to be replayed before the update.

    Decoupled objectives read no step. For them the step that ends in the images, which tells
    whether they are those that were sampled, takes the place of the last of the window.
    """
    steps = self.replayed_steps(iteration)
    if self._coupled:
      return steps
    return np.append(steps[:-1], len(self.levels_T) - 1)

  def noise_levels(self, iteration: int) -> Array:
    """Noise level of every step of the rollouts of an iteration, (T,)."""
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
        texts[name] = self._write(text_params, caches.pop(task), noise[task])
    if tasks_lib.THINK_GENERATE in prompts:
      task, plan = tasks_lib.THINK_GENERATE, texts[tasks_lib.PLAN]
      contexts[task] = contexts_lib.after_plans(
        prompts[task], plan.tokens_BGT, plan.mask_BGT, policy.bos
      )
      caches[task] = policy.prefill(image_params, vae_params, contexts[task])
      noise[task] = think.image_keys(noise[task])
    images = self._draw(image_params, caches, contexts, noise, levels_T)
    pixels = {
      task: policy.decode_image(vae_params, trajectory.latents_BGNC)
      for task, trajectory in images.items()
    }
    return Rollouts(texts, images, pixels)

  def _keys(self, prompts: types.Prompts, iteration: Array) -> Array:
    """Random keys (B, G): functions of the seed, the iteration and a prompt's index."""
    group = self._settings.group_size
    root = jax.random.fold_in(jax.random.key(self.experiment.config.seed), iteration)
    key_B = jax.vmap(lambda index: jax.random.fold_in(root, index))(prompts.index_B)
    return jax.vmap(lambda key: ops.fold_rows(key, (group,)))(key_B)

  def _prefill(
    self,
    text_params: types.Params,
    image_params: types.Params,
    vae_params: types.Params,
    prompts: dict[str, types.Prompts],
  ) -> dict[str, types.Cache]:
    """The context of every task under the policy that continues it."""
    policy = self.experiment.policy
    if text_params is image_params:
      return policy.prefill_all(text_params, vae_params, prompts)
    caches = {}
    for params, of_texts in ((text_params, True), (image_params, False)):
      chosen = {t: p for t, p in prompts.items() if tasks_lib.writes_text(t) == of_texts}
      caches.update(policy.prefill_all(params, vae_params, chosen))
    return caches

  def _write(self, params: types.Params, cache: types.Cache, key_BG: Array) -> types.TextTrajectory:
    """Samples texts after contexts, scored as the update scores them."""
    policy, length = self.experiment.policy, self.experiment.config.data.answer_tokens + 1
    texts = think.sample_text(policy, params, cache, key_BG, length, self._settings.temperature)
    ids = text_rollout.teacher_ids(texts.tokens_BGT, policy.bos)
    return text_rollout.rescore(texts, policy.text_logits(params, cache, ids))

  def _draw(
    self,
    params: types.Params,
    caches: dict[str, types.Cache],
    contexts: dict[str, types.Prompts],
    noise: dict[str, Array],
    levels_T: Array,
  ) -> dict[str, types.ImageTrajectory]:
    """Samples images after contexts; tasks whose rows have one shape share a pass."""
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

    Texts and pixels come back on the experiment's mesh; trajectories stay where they are until
    `Experiment.place_rows` takes what the update reads of them.
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
      for whole, part in zip((texts, images, pixels), found):
        whole.update(part)
    place = self.experiment.place_rows
    return Rollouts(place(texts), images, place(pixels))

  def kept(
    self, task: str, prompts: types.Prompts, rollouts: Rollouts, iteration: int
  ) -> types.SampledTexts | types.SampledImages | think.SampledPlans:
    """What is kept of a task's rollout."""
    if task in rollouts.texts:
      return trajectories.sampled_texts(prompts, rollouts.texts[task])
    rollout = rollouts.images[task]
    steps = trajectories.transitions(rollout, self.kept_steps(iteration), self.grid, self.levels_T)
    image = trajectories.sampled_images(prompts, rollout, steps)
    if not tasks_lib.BY_NAME[task].plans:
      return image
    plan = trajectories.sampled_texts(prompts, rollouts.texts[tasks_lib.PLAN])
    return think.SampledPlans(plan, image)


def needed_policies(policies: Policies, names: Iterable[str]) -> Policies:
  """The policies that rollouts of tasks read: that of texts, that of images, or both."""
  names = list(names)
  if not any(map(tasks_lib.draws_image, names)):
    return policies[:1]
  return policies if any(map(tasks_lib.writes_text, names)) else policies[-1:]
