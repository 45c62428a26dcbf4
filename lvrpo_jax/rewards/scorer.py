"""Runs the rewards of every task on what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards.remote import pending as pending_lib
from lvrpo_jax.runtime import experiment as experiment_lib

Array = jax.Array


class Scored(NamedTuple):
  """Rewards of one task.

  Attributes:
    rewards: value and validity (B, G) by name.
    facts: further values (B, G), see `reward_metrics`.
  """

  rewards: dict[str, types.Rewards]
  facts: dict[str, np.ndarray]


class Scorer:
  """The rewards of an experiment with a weight other than 0."""

  def __init__(self, experiment: experiment_lib.Experiment):
    """Builds the rewards; none is loaded, and no server is asked yet.

    Raises:
      ValueError: a reward cannot be built; the message names its config key.
    """
    self.experiment = experiment
    align = experiment.config.align
    self.weights: dict[str, dict[str, float]] = {}
    self._rewards: dict[str, dict[str, base.Reward]] = {}
    for task in tasks_lib.active(align.prompts):
      settings = {name: s for name, s in align.rewards[task].items() if s.weight}
      self.weights[task] = {name: float(s.weight) for name, s in settings.items()}
      self._rewards[task] = {
        name: base.build(task, name, s, experiment) for name, s in settings.items()
      }
    self._params: dict[str, types.Params] = {}
    self._judge = {
      task: experiment.compile(self._device_rewards(task))
      for task in self._rewards
      if self._of(task, base.DEVICE)
    }

  def _of(self, task: str, runs_on: str) -> dict[str, base.Reward]:
    rewards = self._rewards.get(task, {})
    return {name: reward for name, reward in rewards.items() if reward.runs_on == runs_on}

  @property
  def asks_server(self) -> bool:
    """Whether any task has a remote reward."""
    return any(self._of(task, base.REMOTE) for task in self._rewards)

  def load(self, frozen: base.RewardParams) -> None:
    """Loads the parameters of the device rewards."""
    self._params = {
      task: {name: reward.load(frozen) for name, reward in self._of(task, base.DEVICE).items()}
      for task in self._judge
    }

  def close(self) -> None:
    """Ends the threads of remote rewards."""
    for task in self._rewards:
      for reward in self._of(task, base.REMOTE).values():
        reward.close()

  def _device_rewards(self, task: str) -> Callable[..., dict[str, Array]]:
    """One function for all device rewards of a task, so that they share what they compute."""
    rewards = self._of(task, base.DEVICE)

    def judge(params, frozen, samples, inputs):
      return {
        name: reward(params[name], frozen, samples, inputs[name])
        for name, reward in rewards.items()
      }

    return judge

  def samples(
    self,
    task: str,
    examples: list[examples_lib.Example],
    outputs: Array,
    iteration: int,
  ) -> base.Samples:
    """What rewards on the host see of a task."""
    decode = self.experiment.data.tokenizer.decode
    return base.Samples(task, examples, outputs, iteration, decode)

  def submit(
    self, sampled: Mapping[str, base.Samples], check: Callable[[], None]
  ) -> pending_lib.PendingRewards:
    """Sends samples to the servers of remote rewards; the scores come later.

    Args:
      check: called while samples are waited for; may raise.
    """
    futures = {}
    for task, samples in sampled.items():
      remote = self._of(task, base.REMOTE)
      if remote:
        pending_lib.until_ready(samples.outputs, check)
      for name, reward in remote.items():
        futures[task, name] = reward.submit(samples)
    return pending_lib.PendingRewards(futures, check)

  def score(
    self,
    samples: base.Samples,
    prompts: types.Prompts,
    frozen: base.RewardParams,
    pending: pending_lib.PendingRewards,
  ) -> Scored:
    """All rewards of one task.

    Device rewards of images are dispatched before anything waits for the images.
    """
    task, facts, values = samples.task, {}, {}
    if samples.are_texts:
      pending.until_ready(samples.outputs)
    judged, valid = {}, {}
    if task in self._judge:
      inputs = {}
      for name, reward in self._of(task, base.DEVICE).items():
        prepared = reward.prepare(samples)
        inputs[name], valid[name] = self.experiment.place(prepared.inputs), prepared.valid_B
        facts.update(prepared.facts)
      judged = self._judge[task](
        self._params[task], frozen, base.DeviceSamples(prompts, samples.outputs), inputs
      )
    pending.until_ready(samples.outputs)
    everywhere = np.ones(samples.shape, bool)
    for name, value in judged.items():
      mask = everywhere if valid[name] is None else valid[name][:, None] & everywhere
      values[name] = multihost.local_rows(value), mask
    for name, reward in self._of(task, base.HOST).items():
      key = f'config.align.rewards.{task}.{name}.kind'
      scores = base.checked(key, reward(samples), samples.shape)
      values[name] = scores.value_BG, scores.valid_BG
      facts.update(scores.facts)
    for name in self._of(task, base.REMOTE):
      scored = pending.result(task, name)
      values[name] = scored.value_BG, scored.valid_BG
    return Scored(self._finish({name: values[name] for name in self.weights[task]}), facts)

  def _finish(self, values: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, types.Rewards]:
    """Values as records; one that is not finite is invalid, and 0 stands in its place."""
    rewards = {}
    for name, (value_BG, valid_BG) in values.items():
      finite_BG = np.isfinite(value_BG)
      rewards[name] = types.Rewards(
        np.where(finite_BG, value_BG, 0.0).astype(np.float32),
        np.asarray(valid_BG) & finite_BG,
      )
    return multihost.agree_on_rows(rewards, self.experiment.mesh)
