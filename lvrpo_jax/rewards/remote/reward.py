"""The reward 'remote': scores of the server that `config.align.remote_judge` describes."""

from __future__ import annotations

from concurrent import futures
import functools

import jax

from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards.remote import client
from lvrpo_jax.runtime import experiment as experiment_lib

KEY = 'config.align.remote_judge'


class Remote:
  """Asks a server for scores.

  All tasks of an experiment share one client, which the first call makes.
  """

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.REMOTE

  def __init__(self, task: str, settings: types.Config, experiment: experiment_lib.Experiment):
    """Reads the settings of the endpoint; starts no thread and opens no cache."""
    del task, settings
    self._clients = experiment.shared
    self._endpoint = experiment.config.align.remote_judge.to_dict()
    # Each process writes a cache of its own, as a file has one writer.
    if self._endpoint['cache'] and jax.process_count() > 1:
      self._endpoint['cache'] += f'.{jax.process_index()}'

  @functools.cached_property
  def _client(self) -> client.Judge:
    if KEY not in self._clients:
      self._clients[KEY] = client.Judge(client.Endpoint(**self._endpoint), KEY)
    return self._clients[KEY]

  def submit(self, samples: base.Samples) -> futures.Future[client.Scored]:
    """Sends this process's samples."""
    outputs = samples.texts_BG if samples.are_texts else samples.images_BGYXC
    return self._client.submit(samples.task, samples.examples, outputs, samples.iteration)

  def close(self) -> None:
    """Ends the client's threads, if there are any."""
    opened = self._clients.pop(KEY, None)
    self.__dict__.pop('_client', None)
    if opened:
      opened.close()
