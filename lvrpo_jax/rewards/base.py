"""What a reward is, and the rewards that have a name.

A reward is one of

  a class that scores on the host:    `__init__(task, settings, experiment)`,
                                      `__call__(samples) -> Scores`
  a class that scores on devices:     the same constructor, `load(frozen) -> parameters`,
                                      `prepare(samples) -> Prepared`,
                                      `__call__(params, frozen, samples, inputs) -> value_BG`
  a function that scores on the host: `samples -> (value_BG, valid_BG)`

`config.align.rewards.<task>.<name>.kind` names it: a key of `TABLE`, or an import path. A class
says by its attribute `runs_on` where it scores. `settings` is the section of the config with
`kind`, `weight` and whatever else stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
import inspect
from typing import Any, ClassVar, NamedTuple, Protocol

from flax import struct
import numpy as np

from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.parallel import multihost
from lvrpo_jax.runtime import experiment as experiment_lib

HOST, DEVICE, REMOTE = 'host', 'device', 'remote'
"""Values of `runs_on`: NumPy in this process; a compiled function; a server, asked in advance."""

TABLE = {
  'rules': 'lvrpo_jax.rewards.rules:Rules',
  'semantic': 'lvrpo_jax.rewards.semantic:Semantic',
  'dense': 'lvrpo_jax.rewards.semantic:Dense',
  'knowledge': 'lvrpo_jax.rewards.knowledge:Knowledge',
  'mutual': 'lvrpo_jax.rewards.mutual:Mutual',
  'remote': 'lvrpo_jax.rewards.remote.reward:Remote',
}
"""Import paths of the rewards by `kind`."""


@dataclasses.dataclass(frozen=True)
class Samples:
  """Groups of samples of one task, as a reward on the host sees them.

  Attributes:
    task: one of `tasks.TASKS`.
    examples: the B prompts of this process.
    outputs: uint8 images (B, G, Y, X, 3), or tokens (B, G, T) of texts, of all processes.
    iteration: index of the iteration, from 1.
    decode: from token ids to text.
  """

  task: str
  examples: Sequence[examples_lib.Example]
  outputs: types.Array
  iteration: int
  decode: Callable[[Sequence[int]], str]

  @property
  def are_texts(self) -> bool:
    """Whether the outputs are texts, not images."""
    return tasks.BY_NAME[self.task].output == tasks.TEXT

  @functools.cached_property
  def rows(self) -> np.ndarray:
    """The outputs of this process's prompts."""
    return multihost.local_rows(self.outputs)

  @functools.cached_property
  def texts_BG(self) -> list[list[str]]:
    """The texts of this process's prompts.

    Raises:
      ValueError: the outputs are images.
    """
    if not self.are_texts:
      raise ValueError(f'outputs of the task {self.task!r} are images, not texts')
    return [[self.decode(ids) for ids in row] for row in self.rows]

  @property
  def images_BGYXC(self) -> np.ndarray:
    """The uint8 images of this process's prompts.

    Raises:
      ValueError: the outputs are texts.
    """
    if self.are_texts:
      raise ValueError(f'outputs of the task {self.task!r} are texts, not images')
    return self.rows

  @property
  def shape(self) -> tuple[int, int]:
    """(B, G)."""
    return self.rows.shape[0], self.rows.shape[1]


class DeviceSamples(NamedTuple):
  """Groups of samples of one task inside a compiled function.

  Attributes:
    prompts: the B prompts, with the images that they show.
    outputs: uint8 images (B, G, Y, X, 3), or tokens (B, G, T) of texts.
  """

  prompts: types.Prompts
  outputs: types.Array


class RewardParams(struct.PyTreeNode):
  """Frozen parameters that all rewards share; valid until the next step donates the state.

  Attributes:
    reference: the pretrained policy.
    vae: the autoencoder.
    dual_encoder: the dual encoder of `config.dual_encoder`.
  """

  reference: types.Params
  vae: types.Params
  dual_encoder: types.Params


class Scores(NamedTuple):
  """What a reward on the host returns.

  Attributes:
    value_BG: the rewards.
    valid_BG: False where a sample has no reward: it gets no advantage, and its siblings' statistics
      are those of the valid ones.
    facts: further values (B, G) whose means are logged, see `reward_metrics`.
  """

  value_BG: np.ndarray
  valid_BG: np.ndarray
  facts: Mapping[str, np.ndarray] = {}


class Prepared(NamedTuple):
  """What a reward on devices needs of the host.

  Attributes:
    inputs: a tree of arrays, each with an axis of this process's prompts first.
    valid_B: prompts that the reward can judge; None for all.
    facts: as in `Scores`.
  """

  inputs: types.Tree
  valid_B: np.ndarray | None = None
  facts: Mapping[str, np.ndarray] = {}


class Reward(Protocol):
  """What all rewards that are classes have; see the head of this file for `__call__`.

  Attributes:
    outputs: modalities that it scores, of `tasks.TEXT` and `tasks.IMAGE`.
    runs_on: `HOST`, `DEVICE` or `REMOTE`.
  """

  outputs: ClassVar[frozenset[str]]
  runs_on: ClassVar[str]


class DeviceReward(Reward, Protocol):
  """A reward inside a compiled function."""

  def load(self, frozen: RewardParams) -> types.Params:
    """Its own frozen parameters, on the mesh; () without any."""
    ...

  def prepare(self, samples: Samples) -> Prepared:
    """What the compiled function needs of the host. Of images it reads the examples alone."""
    ...

  def __call__(
    self, params: types.Params, frozen: RewardParams, samples: DeviceSamples, inputs: types.Tree
  ) -> types.Array:
    """Values (B, G)."""
    ...


class HostReward(Reward, Protocol):
  """A reward in NumPy."""

  def __call__(self, samples: Samples) -> Scores | tuple[np.ndarray, np.ndarray]:
    """Values and validity (B, G) of this process's prompts."""
    ...


class RemoteReward(Reward, Protocol):
  """A reward that is asked for early and awaited late."""

  def submit(self, samples: Samples) -> futures.Future:
    """Starts scoring; a future of `client.Scored`."""
    ...

  def close(self) -> None:
    """Ends its threads."""
    ...


class FunctionReward:
  """A function of samples as a reward."""

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = HOST

  def __init__(self, function: Callable[[Samples], Any]):
    self._function = function

  def __call__(self, samples: Samples) -> Any:
    """Calls the function."""
    return self._function(samples)


def build(
  task: str, name: str, settings: types.Config, experiment: experiment_lib.Experiment
) -> Reward:
  """The reward that an entry of `config.align.rewards.<task>` describes.

  Raises:
    ValueError: the kind is unknown, cannot be built, or does not score what the task samples.
  """
  key = f'config.align.rewards.{task}.{name}.kind'
  made = symbols.find(settings.kind, key, TABLE)
  if not inspect.isclass(made):
    return FunctionReward(made)
  reward = made(task, settings, experiment)
  output = tasks.BY_NAME[task].output
  if output not in reward.outputs:
    raise ValueError(
      f'{key} is {settings.kind!r}, which scores {sorted(reward.outputs)}; the task {task!r} '
      f'samples {output!r}'
    )
  return reward


def checked(key: str, scored: Any, shape: tuple[int, int]) -> Scores:
  """What a host reward returned, with its shapes compared.

  Args:
    key: config key of the reward, for the message.
    shape: (B, G).

  Raises:
    ValueError: other shapes, which NumPy would stretch over the groups without a word, or a value
      that is no number.
  """
  scores = scored if isinstance(scored, Scores) else Scores(*scored)
  shapes = [np.shape(scores.value_BG), np.shape(scores.valid_BG)]
  if shapes != [shape, shape]:
    raise ValueError(
      f'{key} names a reward that gave arrays of shapes {shapes}; expected value and valid, each '
      f'of shape (B, G) = {shape}'
    )
  try:
    # None stands for a sample without a value, as in TRL.
    value_BG = np.asarray(scores.value_BG, np.float32)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{key} names a reward that gave values that are no numbers ({error}); expected floats, or '
      'None where a sample has no value'
    ) from error
  return scores._replace(value_BG=value_BG, valid_BG=np.asarray(scores.valid_BG, bool))
