"""Runs the rewards of every task on samples."""

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
Values = tuple[np.ndarray, np.ndarray]
"""Value and validity (B, G) of this process's prompts."""


class Scored(NamedTuple):
  """Rewards of one task.

  Attributes:
    rewards: value and validity (B, G) by name.
    facts: further values (B, G), see `reward_metrics`.
  """

  rewards: dict[str, types.Rewards]
  facts: dict[str, np.ndarray]


class TaskRewards(NamedTuple):
  """Rewards of one task by name, separated by where they score."""

  host: dict[str, base.HostReward]
  device: dict[str, base.DeviceReward]
  remote: dict[str, base.RemoteReward]


def by_place(rewards: Mapping[str, base.Reward]) -> TaskRewards:
  """Separates rewards by where they score."""
  return TaskRewards(
    host={name: reward for name, reward in rewards.items() if base.is_host(reward)},
    device={name: reward for name, reward in rewards.items() if base.is_device(reward)},
    remote={name: reward for name, reward in rewards.items() if base.is_remote(reward)},
  )


class Scorer:
  """The rewards of an experiment with a weight other than 0.

  Attributes:
    weights: weight of every reward, by task and name.
  """

  def __init__(self, experiment: experiment_lib.Experiment):
    """Builds the rewards; loads no parameters and asks no server yet.

    Raises:
      ValueError: a reward cannot be built; the message names its config key.
    """
    self.experiment = experiment
    align = experiment.config.align
    self.weights: dict[str, dict[str, float]] = {}
    self._rewards: dict[str, TaskRewards] = {}
    for task in tasks_lib.active(align.prompts):
      weighted = {name: section for name, section in align.rewards[task].items() if section.weight}
      self.weights[task] = {name: float(section.weight) for name, section in weighted.items()}
      self._rewards[task] = by_place(
        {name: base.build(task, name, section, experiment) for name, section in weighted.items()}
      )
    self._params: dict[str, dict[str, types.Params]] = {}
    self._judge = {
      task: experiment.compile(_device_function(rewards.device))
      for task, rewards in self._rewards.items()
      if rewards.device
    }

  @property
  def asks_server(self) -> bool:
    """Whether any task has a remote reward."""
    return any(rewards.remote for rewards in self._rewards.values())

  def load(self, frozen: base.RewardParams) -> None:
    """Loads the parameters of the device rewards."""
    self._params = {
      task: {name: reward.load(frozen) for name, reward in self._rewards[task].device.items()}
      for task in self._judge
    }

  def close(self) -> None:
    """Ends the threads of remote rewards."""
    for rewards in self._rewards.values():
      for reward in rewards.remote.values():
        reward.close()

  def samples(
    self,
    task: str,
    examples: list[examples_lib.Example],
    outputs: Array,
    iteration: int,
  ) -> base.Samples:
    """Builds the samples of a task as rewards on the host see them."""
    decode = self.experiment.data.tokenizer.decode
    return base.Samples(
      task=task, examples=examples, outputs=outputs, iteration=iteration, decode=decode
    )

  def submit(
    self, sampled: Mapping[str, base.Samples], check: Callable[[], None]
  ) -> pending_lib.PendingRewards:
    """Sends samples to the servers of remote rewards, and returns before they are scored.

    Args:
      sampled: samples by task.
      check: called while samples are waited for; may raise.
    """
    futures = {}
    for task, samples in sampled.items():
      remote = self._rewards[task].remote
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
    """Computes all rewards of one task.

    Device rewards of images are dispatched before anything waits for the images.
    """
    task, rewards = samples.task, self._rewards[samples.task]
    facts: dict[str, np.ndarray] = {}
    values: dict[str, Values] = {}
    if samples.are_texts:
      pending.until_ready(samples.outputs)
    judged: dict[str, Array] = {}
    valid: dict[str, np.ndarray | None] = {}
    if rewards.device:
      inputs = {}
      for name, reward in rewards.device.items():
        prepared = reward.prepare(samples)
        inputs[name], valid[name] = self.experiment.place(prepared.inputs), prepared.valid_B
        facts.update(prepared.facts)
      judged = self._judge[task](
        self._params[task], frozen, base.DeviceSamples(prompts, samples.outputs), inputs
      )
    pending.until_ready(samples.outputs)
    everywhere_BG = np.ones(samples.shape, bool)
    for name, value_BG in judged.items():
      valid_B = valid[name]
      mask_BG = everywhere_BG if valid_B is None else valid_B[:, None] & everywhere_BG
      local = multihost.local_rows(value_BG), mask_BG
      scores = base.checked(_key(task, name), local, samples.shape)
      values[name] = scores.value_BG, scores.valid_BG
    for name, reward in rewards.host.items():
      scores = base.checked(_key(task, name), reward(samples), samples.shape)
      values[name] = scores.value_BG, scores.valid_BG
      facts.update(scores.facts)
    for name in rewards.remote:
      scored = pending.result(task, name)
      values[name] = scored.value_BG, scored.valid_BG
    return Scored(self._finish({name: values[name] for name in self.weights[task]}), facts)

  def _finish(self, values: dict[str, Values]) -> dict[str, types.Rewards]:
    """Makes records of values; a value that is not finite becomes 0 and invalid."""
    rewards = {}
    for name, (value_BG, valid_BG) in values.items():
      finite_BG = np.isfinite(value_BG)
      rewards[name] = types.Rewards(
        value_BG=types.on_host(np.where(finite_BG, value_BG, 0.0).astype(np.float32)),
        valid_BG=types.on_host(np.asarray(valid_BG) & finite_BG),
      )
    return multihost.agree_on_rows(rewards, self.experiment.mesh)


def _key(task: str, name: str) -> str:
  return f'config.align.rewards.{task}.{name}.kind'


def _device_function(
  rewards: Mapping[str, base.DeviceReward],
) -> Callable[..., dict[str, Array]]:
  """Makes one function of the device rewards of a task, so that they share what they compute."""

  def judge(
    params: Mapping[str, types.Params],
    frozen: base.RewardParams,
    samples: base.DeviceSamples,
    inputs: Mapping[str, types.Tree],
  ) -> dict[str, Array]:
    return {
      name: reward(params[name], frozen, samples, inputs[name]) for name, reward in rewards.items()
    }

  return judge
