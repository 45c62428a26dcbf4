"""Rollouts and rewards of one iteration: from prompts to what the update reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models import lora
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards import judging
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.rewards import rules
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import image as image_rollout
from lvrpo_jax.rollouts import schedule
from lvrpo_jax.rollouts import text as text_rollout
from lvrpo_jax.rollouts import think
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import reward_metrics

Array = jax.Array


Judges = judging.FrozenParams


COMPONENTS = {
  tasks_lib.UNDERSTAND: ('rules', 'semantic', 'knowledge', 'mutual', 'remote'),
  **dict.fromkeys(
    (tasks_lib.GENERATE, tasks_lib.EDIT, tasks_lib.THINK_GENERATE),
    ('rules', 'semantic', 'dense', 'knowledge', 'mutual', 'remote'),
  ),
}
"""Names that a task may have in `config.align.rewards`."""


class Tasks(NamedTuple):
  """The prompts of an iteration by task: what the host knows, and what the device reads."""

  examples: dict[str, list[examples_lib.Example]]
  prompts: dict[str, types.Prompts]


class Collector:
  """Compiled rollouts and judges of a job."""

  def __init__(self, job: experiment_lib.Experiment):
    self.job = job
    a = job.config.align
    self.grid = flow.time_grid(a.steps_per_image + 1, job.config.sampling.shift)
    self.eta_T = schedule.noise_levels(
      a.eta, a.steps_per_image, a.noise_low, a.noise_high, self.grid
    )
    self.noisy = np.flatnonzero(np.asarray(self.eta_T))
    self.window = a.window or len(self.noisy)
    if len(self.noisy) < max(self.window, 1):
      raise ValueError(
        f'align.window is {a.window}, but only {len(self.noisy)} of '
        f'align.steps_per_image = {a.steps_per_image} steps start in '
        f'(align.noise_low, align.noise_high] = ({a.noise_low}, {a.noise_high}]'
      )
    self._answer_ids = jnp.asarray(job.answer_ids)
    self._rollout = job.sampler(self.sample)
    self._judge_images = job.compile(functools.partial(judging.images, job, self._answer_ids))
    self._judge_answers = job.compile(functools.partial(judging.answers, job, self._answer_ids))
    self._remote_tasks = [t for t in tasks_lib.TASKS if a[t] and a.rewards[t].remote]
    self._apart = bool(self._remote_tasks or a.refill)
    patches = job.judge.vision_config.side**2
    if job.pays('dense') and a.dense_top > patches:
      raise ValueError(
        f'config.align.dense_top is {a.dense_top}; allowed: at most the {patches} '
        'patches that the judge cuts an image into'
      )
    self._detector = experiment_lib.load_symbol(a.detector, 'config.align.detector')
    self._custom = {
      task: experiment_lib.load_symbol(a.custom[task], f'align.custom.{task}')
      for task in tasks_lib.TASKS
      if a.custom[task]
    }
    self.advantages = {
      task: jax.jit(
        functools.partial(
          advantage_lib.combine,
          weights=self.weights(task),
          method=a.advantage,
          floor=a.floor,
          ddof=a.ddof,
          scope=a.scope,
          form=a.floor_form,
        )
      )
      for task in tasks_lib.TASKS
    }

  @functools.cached_property
  def remote(self) -> remote_client.Judge | None:
    """The judge behind `align.remote`, where any task has a reward of it."""
    settings = self.job.config.align.remote.to_dict()
    if settings['cache'] and jax.process_count() > 1:  # One file, one writer.
      settings['cache'] += f'.{jax.process_index()}'
    return (
      remote_client.Judge(remote_client.Endpoint(**settings), 'config.align.remote')
      if self._remote_tasks
      else None
    )

  def close(self) -> None:
    """Ends the threads of a remote judge."""
    if self.remote:
      self.remote.close()

  def replayed(self, iteration: int) -> np.ndarray:
    """Numbers of the steps that the update of an iteration replays."""
    a = self.job.config.align
    first = schedule.window_start(
      a.window_schedule,
      self.job.config.seed,
      iteration,
      len(self.noisy),
      self.window,
      a.window_every,
    )
    return self.noisy[first : first + self.window]

  def kept(self, iteration: int) -> np.ndarray:
    """Numbers of the steps that are kept of a rollout, to be replayed before the update.

    Objectives on final images read no step. For them the one that ends in the images, which tells
    whether they are those that were drawn, takes the place of the last of the window.
    """
    steps = self.replayed(iteration)
    if self.job.config.align.objective not in flow_objectives.DECOUPLED:
      return steps
    return np.append(steps[:-1], len(self.eta_T) - 1)

  def noise_scales(self, iteration: int) -> Array:
    """Noise scale of every step of the rollouts of an iteration, (T,)."""
    if self.job.config.align.noise_outside:
      return self.eta_T
    inside = np.isin(np.arange(len(self.eta_T)), self.replayed(iteration))
    return jnp.where(inside, self.eta_T, 0.0)

  def weights(self, task: str) -> dict[str, float]:
    """Components of a task with a weight other than 0."""
    a = self.job.config.align
    out = {name: weight for name, weight in a.rewards[task].items() if weight}
    if task in self._custom:
      out['custom'] = a.custom[f'{task}_weight']
    return out

  def sample(self, policies, vae_params, prompts, iteration, eta_T):
    """Samples groups for all tasks: (texts, trajectories, uint8 pixels), each by task.

    Args:
      policies: parameters of the policy that writes texts, and of the one that draws images where
        that is another one.
      eta_T: noise scale of every step.
    """
    a, policy = self.job.config.align, self.job.policy
    root = jax.random.fold_in(jax.random.key(self.job.config.seed), iteration)

    def keys(p):
      key_B = jax.vmap(lambda i: jax.random.fold_in(root, i))(p.index_B)
      return jax.vmap(lambda k: ops.fold_rows(k, (a.group,)))(key_B)

    policies = tuple(map(lora.merge_adapters, policies))
    writer, drawer = policies[0], policies[-1]
    texts_first = (tasks_lib.UNDERSTAND, tasks_lib.THINK_GENERATE)
    if writer is drawer:
      caches = policy.prefill_all(writer, vae_params, prompts)
    else:
      caches = {}
      for params, wanted in ((writer, True), (drawer, False)):
        caches.update(
          policy.prefill_all(
            params, vae_params, {t: p for t, p in prompts.items() if (t in texts_first) == wanted}
          )
        )
    texts, images, pixels = {}, {}, {}
    noise, contexts = {t: keys(p) for t, p in prompts.items()}, dict(prompts)
    for task in texts_first:
      if task in prompts:
        name = tasks_lib.PLAN if task == tasks_lib.THINK_GENERATE else task
        cache = caches.pop(task)
        said = think.sample_text(
          policy, writer, cache, noise[task], self.job.config.data.answer_words + 1, a.temperature
        )
        ids = text_rollout.teacher_ids(said.tokens_BGT, policy.bos)
        texts[name] = text_rollout.rescore(said, policy.read(writer, cache, ids))
    if tasks_lib.THINK_GENERATE in prompts:
      plan = texts[tasks_lib.PLAN]
      contexts[tasks_lib.THINK_GENERATE] = policy_lib.after_plans(
        prompts[tasks_lib.THINK_GENERATE], plan.tokens_BGT, plan.mask_BGT, policy.bos
      )
      caches[tasks_lib.THINK_GENERATE] = policy.prefill(
        drawer, vae_params, contexts[tasks_lib.THINK_GENERATE]
      )
      noise[tasks_lib.THINK_GENERATE] = think.image_keys(noise[tasks_lib.THINK_GENERATE])
    rows = {t: (c.valid_BS, noise[t]) for t, c in caches.items()}
    for tasks in policy_lib.group_by_shape(rows):
      cache = policy_lib.join_caches([caches[t] for t in tasks])
      bare = (
        None
        if a.guidance == 1
        else policy_lib.without_text(cache, policy_lib.stack(contexts[t] for t in tasks))
      )
      rollout = image_rollout.sample_sde(
        guidance.policy_velocity(policy, drawer, cache, bare, a.guidance),
        jnp.concatenate([noise[t] for t in tasks]),
        policy.latent_shape,
        self.grid,
        eta_T,
        a.sampler,
      )
      if bare is not None:
        rollout = rollout.replace(guidance=jnp.float32(a.guidance))
      start = 0
      for task in tasks:
        stop = start + len(noise[task])
        images[task] = image_rollout.slice_prompts(rollout, start, stop)
        if task == tasks_lib.THINK_GENERATE:
          images[task] = think.regroup_images(images[task], a.group)
        pixels[task] = policy.decode(vae_params, images[task].latents_BGNC)
        start = stop
    return texts, images, pixels

  def rollout(
    self,
    policies: tuple[types.Params | lora.AdaptedParams, ...],
    vae_params,
    tasks: Tasks,
    iteration: int,
  ):
    """Dispatches the rollouts of an iteration; see `sample`.

    Texts and pixels come back on the job's mesh; trajectories stay where they are until
    `experiment.place_rows` takes what the update reads of them.
    """
    if self._apart:
      # One task after the other where a remote judge scores one while the next is sampled, or where
      # some are sampled again.
      parts = [{task: p} for task, p in tasks.prompts.items()]
    else:
      # What draws need not wait for what only writes.
      parts = [
        part
        for writes in (True, False)
        if (
          part := {
            task: p for task, p in tasks.prompts.items() if (task == tasks_lib.UNDERSTAND) == writes
          }
        )
      ]
    found = [
      self._rollout(
        self.needed(policies, prompts),
        vae_params,
        prompts,
        jnp.int32(iteration),
        self.noise_scales(iteration),
      )
      for prompts in parts
    ]
    texts, images, pixels = ({t: x for part in found for t, x in part[n].items()} for n in range(3))
    return self.job.place_rows(texts), images, self.job.place_rows(pixels)

  def needed(
    self, policies: tuple[types.Params | lora.AdaptedParams, ...], names: Iterable[str]
  ) -> tuple[types.Params | lora.AdaptedParams, ...]:
    """The policies that tasks read: the one that writes, the one that draws, or both."""
    writes = tasks_lib.UNDERSTAND in names or tasks_lib.THINK_GENERATE in names
    draws = any(task != tasks_lib.UNDERSTAND for task in names)
    return policies[:1] if not draws else policies if writes else policies[-1:]

  def ask(
    self,
    tasks: Tasks,
    texts: dict[str, types.TextTrajectory],
    pixels: dict[str, Array],
    iteration: int,
    check: Callable[[], None] = lambda: None,
  ) -> pending.PendingRewards:
    """Sends what was sampled to the remote judge; the scores come later, see `asking`."""
    out = {}
    for task in (t for t in self._remote_tasks if t in tasks.prompts):
      samples = texts[task].tokens_BGT if task == tasks_lib.UNDERSTAND else pixels[task]
      pending.until_ready(samples, check)
      outputs = (
        self._texts(samples) if task == tasks_lib.UNDERSTAND else multihost.local_rows(samples)
      )
      out[task] = self.remote.submit(task, tasks.examples[task], outputs, iteration)
    return pending.PendingRewards(out, check)

  def _texts(self, tokens_BGT: Array) -> list[list[str]]:
    """Answers of this process's prompts."""
    return [
      [self.job.data.tokenizer.decode(ids) for ids in row]
      for row in multihost.local_rows(tokens_BGT)
    ]

  def image_rewards(
    self,
    task: str,
    tasks: Tasks,
    pixels: Array,
    judges: Judges,
    vae_params,
    iteration: int,
    asked_remote: pending.PendingRewards,
  ) -> tuple[dict[str, types.Rewards], dict[str, np.ndarray]]:
    """Reward components of images, and facts for the log: see `reward_metrics`."""
    job, examples = self.job, tasks.examples[task]
    wanted, prompts = self.weights(task), [e.prompt for e in examples]
    inquiry = None
    if 'knowledge' in wanted or 'mutual' in wanted:
      inquiry = reference_qa.prompt_questions(job, examples, iteration, blind='mutual' in wanted)
    judged = self._judge_images(
      judges,
      vae_params,
      pixels,
      *job.place(
        (
          job.captions(prompts) if 'semantic' in wanted else None,
          experiment_lib.key_words(job, prompts) if 'dense' in wanted else None,
        )
      ),
      inquiry,
    )
    asked_remote.until_ready(pixels)
    images, facts = multihost.local_rows(pixels), {}
    everywhere = np.ones(images.shape[:2], bool)
    has_question = np.array([bool(e.questions) for e in examples])[:, None] & everywhere
    values = {
      k: (multihost.local_rows(v), has_question if k in ('knowledge', 'mutual') else everywhere)
      for k, v in judged.items()
    }
    if 'rules' in wanted:
      specs = self._targets(task, examples)
      correct, parts = (
        rules.edits(self._detector, np.stack([e.source for e in examples]), images, specs)
        if task == tasks_lib.EDIT
        else rules.images(self._detector, images, specs)
      )
      values['rules'] = parts if job.config.align.graded else correct, everywhere
      facts['correct'] = correct
    if task in self._custom:
      values['custom'] = self._own(task, examples, images)
    return self._pick(task, values, asked_remote), facts

  def text_rewards(
    self,
    tasks: Tasks,
    tokens_BGT: Array,
    judges: Judges,
    vae_params,
    asked_remote: pending.PendingRewards,
  ) -> tuple[dict[str, types.Rewards], dict[str, np.ndarray]]:
    """Reward components of answers, and facts for the log: see `reward_metrics`."""
    job, task = self.job, tasks_lib.UNDERSTAND
    examples = tasks.examples[task]
    asked_remote.until_ready(tokens_BGT)
    texts = self._texts(tokens_BGT)
    wanted = self.weights(task)
    words = [[job.data.read_answer(text) for text in row] for row in texts]
    everywhere = np.ones((len(texts), len(texts[0])), bool)
    facts = {
      f'truncated/{task}': reward_metrics.truncated(
        multihost.local_rows(tokens_BGT), job.policy.eos
      )
    }
    captions = number = None
    if 'semantic' in wanted:
      captions, cut = job.captions_and_cut(statements(examples, words, texts))
      facts['truncated/captions'] = cut.reshape(everywhere.shape).astype(np.float32)
    if 'knowledge' in wanted or 'mutual' in wanted:
      number = np.array(
        [[job.data.answers.index(w) if w else -1 for w in row] for row in words], np.int32
      )
    judged = self._judge_answers(
      judges,
      vae_params,
      tasks.prompts[task],
      *job.place((captions, number)),
      reference_qa.mask_images(job, examples) if 'mutual' in wanted else None,
    )
    values = {k: (multihost.local_rows(v), everywhere) for k, v in judged.items()}
    if 'rules' in wanted:
      correct, well_formed = rules.answers(
        texts, self._targets(task, examples), job.data.read_answer, job.data.well_formed
      )
      graded = job.config.align.graded
      values['rules'] = (rules.text_reward(correct, well_formed) if graded else correct, everywhere)
      facts.update(correct=correct, format=well_formed)
    if task in self._custom:
      values['custom'] = self._own(task, examples, texts)
    return self._pick(task, values, asked_remote), facts

  def _targets(self, task: str, examples: list[examples_lib.Example]) -> list[Any]:
    weight = self.job.config.align.rewards[task].rules
    return rules.targets(task, examples, f'config.align.rewards.{task}.rules is {weight}')

  def _own(
    self, task: str, examples: list[examples_lib.Example], outputs: Any
  ) -> tuple[np.ndarray, np.ndarray]:
    """Value and validity (B, G) by the function that `config.align.custom` names.

    Raises:
      ValueError: it gives other shapes, which NumPy would stretch over the groups without a word.
    """
    scored, shape = self._custom[task](examples, outputs), (len(outputs), len(outputs[0]))
    shapes = [np.shape(x) for x in scored]
    if shapes != [shape, shape]:
      raise ValueError(
        f'config.align.custom.{task} is {self.job.config.align.custom[task]!r}, '
        f'which gave arrays of shapes {shapes}; expected value and valid, each of '
        f'shape (B, G) = {shape}'
      )
    return np.asarray(scored[0]), np.asarray(scored[1], bool)

  def _pick(
    self, task: str, values: dict[str, Any], asked: pending.PendingRewards
  ) -> dict[str, types.Rewards]:
    """The components with a weight; waits for those of a remote judge."""
    wanted = self.weights(task)
    if task in asked:
      scored = asked.result(task)
      values['remote'] = scored.value_BG, scored.valid_BG
    unknown = wanted.keys() - values.keys()
    if unknown:
      raise ValueError(f'align.rewards.{task} names {sorted(unknown)}; allowed: {COMPONENTS[task]}')
    return multihost.agree_on_rows(
      {
        name: types.Rewards(
          np.where(np.isfinite(values[name][0]), values[name][0], 0.0).astype(np.float32),
          np.asarray(values[name][1]) & np.isfinite(values[name][0]),
        )
        for name in wanted
      },
      self.job.mesh,
    )


def statements(
  examples: list[examples_lib.Example], words_BG: list[list[str | None]], texts_BG: list[list[str]]
) -> list[str]:
  """Replies as statements about what was shown, one after the other; as they are where they state
  no answer.

  Raises:
    ValueError: an example makes no statements.
  """
  out = []
  for e, words, texts in zip(examples, words_BG, texts_BG):
    if e.statement is None:
      raise ValueError(
        f'example {e.index} of {tasks_lib.UNDERSTAND!r} has no statement, which '
        f'config.align.rewards.{tasks_lib.UNDERSTAND}.semantic needs; expected a '
        'function from an answer to a text'
      )
    # A policy may say that it does not know the word; the judge has no token for that.
    out.extend(
      e.statement(word) if word else text.replace(tokenizer_lib.UNKNOWN, '')
      for word, text in zip(words, texts)
    )
  return out
