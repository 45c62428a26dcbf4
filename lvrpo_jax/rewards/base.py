"""Protocols and records of rewards, the table of named rewards, and their construction.

A reward is one of

  a class that scores on the host:    `__init__(task, settings, experiment)`,
                                      `__call__(samples) -> Scores`
  a class that scores on devices:     the same constructor, `load(frozen) -> parameters`,
                                      `prepare(samples) -> Prepared`,
                                      `__call__(params, frozen, samples, inputs) -> value_BG`
  a function that scores on the host: `samples -> (value_BG, valid_BG)`

`config.align.rewards.<task>.<name>.kind` names it: a key of `TABLE`, or an import path. The
attribute `runs_on` of a class says where it scores. `settings` is the config section of the reward:
`kind`, `weight` and any further keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import functools
from typing import NamedTuple, Protocol, TypeGuard

from flax import struct
import numpy as np

from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.runtime import experiment as experiment_lib

HOST, DEVICE, REMOTE = 'host', 'device', 'remote'
"""Values of `runs_on`: NumPy in this process; a compiled function; a server that is asked early."""

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
  """Result of a reward on the host.

  Attributes:
    value_BG: the rewards.
    valid_BG: False where a sample has no reward. Such a sample gets no advantage, and the
      statistics of its group are those of the valid samples.
    facts: further values (B, G) whose means are logged, see `reward_metrics`.
  """

  value_BG: np.ndarray
  valid_BG: np.ndarray
  facts: Mapping[str, np.ndarray] = {}


HostScores = Scores | tuple[np.ndarray, np.ndarray]
"""Result of a reward on the host before its shapes are checked: `Scores`, or (value, valid)."""


class Prepared(NamedTuple):
  """Inputs that the host makes for a reward on devices.

  Attributes:
    inputs: a tree of arrays, each with an axis of this process's prompts first.
    valid_B: prompts that the reward can judge; None for all.
    facts: as in `Scores`.
  """

  inputs: types.Tree
  valid_B: np.ndarray | None = None
  facts: Mapping[str, np.ndarray] = {}


class Reward(Protocol):
  """Attributes of every reward; the protocols below add how it is called."""

  @property
  def outputs(self) -> frozenset[str]:
    """Modalities that it scores, of `tasks.TEXT` and `tasks.IMAGE`."""
    ...

  @property
  def runs_on(self) -> str:
    """`HOST`, `DEVICE` or `REMOTE`."""
    ...


class DeviceReward(Reward, Protocol):
  """A reward inside a compiled function."""

  def load(self, frozen: RewardParams) -> types.Params:
    """Returns its own frozen parameters, on the mesh; () without any."""
    ...

  def prepare(self, samples: Samples) -> Prepared:
    """Makes the inputs of the compiled function on the host.

    For a task that samples images it reads the examples and not the images.
    """
    ...

  def __call__(
    self, params: types.Params, frozen: RewardParams, samples: DeviceSamples, inputs: types.Tree
  ) -> types.Array:
    """Returns values (B, G)."""
    ...


class HostReward(Reward, Protocol):
  """A reward in NumPy."""

  def __call__(self, samples: Samples) -> HostScores:
    """Returns values and validity (B, G) of this process's prompts."""
    ...


class RemoteReward(Reward, Protocol):
  """A reward whose scoring starts early and is awaited late."""

  def submit(self, samples: Samples) -> futures.Future[remote_client.Scored]:
    """Starts scoring and returns at once."""
    ...

  def close(self) -> None:
    """Ends its threads."""
    ...


def is_host(reward: Reward) -> TypeGuard[HostReward]:
  """Whether a reward scores in NumPy."""
  return reward.runs_on == HOST


def is_device(reward: Reward) -> TypeGuard[DeviceReward]:
  """Whether a reward scores inside a compiled function."""
  return reward.runs_on == DEVICE


def is_remote(reward: Reward) -> TypeGuard[RemoteReward]:
  """Whether a server scores."""
  return reward.runs_on == REMOTE


class FunctionReward:
  """Makes a reward of a function of samples."""

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = HOST

  def __init__(self, function: Callable[[Samples], HostScores]):
    self._function = function

  def __call__(self, samples: Samples) -> HostScores:
    """Calls the function."""
    return self._function(samples)


def build(
  task: str, name: str, settings: types.Config, experiment: experiment_lib.Experiment
) -> Reward:
  """Builds the reward that an entry of `config.align.rewards.<task>` describes.

  Raises:
    ValueError: the kind is unknown, cannot be built, or does not score what the task samples.
  """
  key = f'config.align.rewards.{task}.{name}.kind'
  found = symbols.find(settings.kind, key, TABLE)
  if not isinstance(found, type):
    return FunctionReward(found)
  output = tasks.BY_NAME[task].output
  if output not in found.outputs:
    raise ValueError(
      f'{key} is {settings.kind!r}, which scores {sorted(found.outputs)}; the task {task!r} '
      f'samples {output!r}'
    )
  return found(task, settings, experiment)


def key_of(task: str, settings: types.Config, experiment: experiment_lib.Experiment) -> str:
  """Returns the config key of a reward from its section, for messages."""
  rewards = experiment.config.align.rewards[task]
  name = next((name for name, found in rewards.items() if found is settings), settings.kind)
  return f'config.align.rewards.{task}.{name}'


def _shape(values: types.Tree) -> tuple[int, ...] | str:
  """Returns the shape of nested sequences, or words for the message where they have none."""
  try:
    return np.shape(values)
  except ValueError:
    return 'rows of different lengths'


def checked(key: str, scored: HostScores, shape: tuple[int, int]) -> Scores:
  """Checks the shapes of a reward's result, and converts its values to float32.

  Args:
    key: config key of the reward, for the message.
    scored: the result.
    shape: (B, G).

  Raises:
    ValueError: there are not two arrays; their shapes differ from (B, G), so that NumPy would
      silently broadcast them over the groups; or a value cannot be converted to a float.
  """
  if not isinstance(scored, tuple) or len(scored) < 2:
    raise ValueError(
      f'{key} names a reward that gave {type(scored).__name__}; expected value and valid, each '
      f'of shape (B, G) = {shape}'
    )
  scores = scored if isinstance(scored, Scores) else Scores(*scored)
  shapes = [_shape(scores.value_BG), _shape(scores.valid_BG)]
  if shapes != [shape, shape]:
    raise ValueError(
      f'{key} names a reward that gave arrays of shapes {shapes}; expected value and valid, each '
      f'of shape (B, G) = {shape}'
    )
  try:
    # None stands for a sample without a value, as in TRL; it becomes NaN.
    value_BG = np.asarray(scores.value_BG, np.float32)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'{key} names a reward that gave values that are not numbers ({error}); expected floats, or '
      'None where a sample has no value'
    ) from error
  return scores._replace(value_BG=value_BG, valid_BG=np.asarray(scores.valid_BG, bool))
