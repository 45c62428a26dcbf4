"""Remote judges: scores of images and answers from a server, as JSON over HTTP.

The protocol `batch` posts several samples at once to an endpoint of your own:

    {"task": "generate",
     "samples": [{"id": "0", "prompt": "a red fox", "answer": null, "image": "<base64 PNG>",
                  "source": null, "reference": null, "kind": "", "spec": null,
                  "questions": [{"question": "is there a fox ?", "answer": "yes"}]}]}
    -> {"scores": [{"id": "0", "value": 0.7}]}      or {"id": "0", "error": "out of memory"}

`image` is the generated image, `source` the image that was given, `answer` the sampled answer,
`reference` the right answer, and `questions` are those that a prompt implies about its image, with
the right answers.

The protocol `chat` asks an OpenAI-compatible `/v1/chat/completions` about one sample a request.
With a template that names {question} and {expected} it judges knowledge, by one of those questions
an iteration.

A sample without a usable score is invalid, never 0. `launch/judge_server.py` serves both protocols.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from concurrent import futures
import dataclasses
import os
import queue
import threading
import time
from typing import NamedTuple

from absl import logging
import numpy as np

from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.rewards.remote import cache as remote_cache
from lvrpo_jax.rewards.remote import call as call_lib
from lvrpo_jax.rewards.remote import endpoint as endpoint_lib
from lvrpo_jax.rewards.remote import http as remote_http
from lvrpo_jax.rewards.remote import protocols as remote_protocols

WARN_EVERY_S = 60.0
"""Seconds between two warnings about samples without a value."""

DEADLINE = 'deadline'
"""Cause of a sample without a verdict when the deadline of its call passed."""

CAUSES = (
  remote_http.UNREACHABLE,
  remote_http.TIMEOUT,
  remote_http.STATUS,
  DEADLINE,
  *remote_protocols.ANSWERED,
  remote_protocols.UNASKED,
)
"""Reasons why a sample has no value; each is counted as `failed_<cause>`."""


class JudgeUnavailable(RuntimeError):
  """Raised when no sample gets a value, so that training cannot go on."""


Endpoint = endpoint_lib.Endpoint


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores of a call.

  Attributes:
    value_BG: float32, 0 where invalid.
    valid_BG: bool.
    stats: counts: 'samples'; 'asked', those sent; 'cached', those with a value from the cache or
      equal to another sample of the call; 'retried' requests; 'failed' samples and
      'failed_<cause>' for each of `CAUSES`; and 'seconds' since `submit`.
  """

  value_BG: np.ndarray
  valid_BG: np.ndarray
  stats: dict[str, float]


class _Job(NamedTuple):
  """One request to be made: samples of a call, each with its key."""

  call: call_lib.Call
  task: str
  items: list[tuple[str, remote_protocols.Sample]]


class Judge:
  """A client of one endpoint; its threads are daemons and do not delay the process's exit."""

  def __init__(self, endpoint: Endpoint, key: str):
    """Reads the secret and the cache; sends no request.

    Args:
      endpoint: the server.
      key: config key of the endpoint, for messages.

    Raises:
      ValueError: a setting is not allowed, the environment variable of the key is not set, or
        another judge has the cache file open.
      OSError: the cache file cannot be read or written.
    """
    remote_protocols.check(endpoint, key)
    self._endpoint, self._key = endpoint, key
    self._secret = _secret(endpoint.api_key_env, key)
    try:
      self._cache = remote_cache.Cache(endpoint.cache)
    except BlockingIOError:
      raise ValueError(
        f'{key}.cache is {endpoint.cache!r}, which another run has open; allowed: a '
        'file of its own for every run'
      ) from None
    self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._calls: set[call_lib.Call] = set()
    self._missed: collections.Counter[str] = collections.Counter()
    self._valueless: collections.Counter[str] = collections.Counter()  # Calls in a row, by task.
    self._warned = -WARN_EVERY_S
    self._last_reply_time = -np.inf  # Of any call, whether the reply was usable or not.
    self._closed = False
    for index in range(endpoint.concurrency):
      threading.Thread(target=self._work, name=f'{key}-{index}', daemon=True).start()

  def submit(
    self,
    task: str,
    examples: Sequence[examples_lib.Example],
    outputs_BG: remote_protocols.Outputs,
    iteration: int = 0,
  ) -> futures.Future[Scored]:
    """Starts to score samples and returns at once.

    Args:
      task: one of `tasks.TASKS`.
      examples: B prompts.
      outputs_BG: uint8 images (B, G, Y, X, 3); for 'understand', B lists of G answers. Images are
        copied, so a device array is fetched here and not held.
      iteration: selects the question of a prompt that is asked, see `examples.Example.asked`.

    Returns:
      A future that is done by `deadline_s`. It raises `JudgeUnavailable` if no sample got a reply,
      or if with this call the calls in a row without any value reach `garbage_limit`. It raises
      RuntimeError if the judge is closed meanwhile.

    Raises:
      ValueError: the task is unknown, or the outputs have another form.
      RuntimeError: the judge is closed.
    """
    call = call_lib.Call(self._endpoint.deadline_s)
    samples, shape = remote_protocols.samples_of(task, examples, outputs_BG, iteration)
    future: futures.Future[Scored] = futures.Future()
    future.set_running_or_notify_cancel()
    with self._lock:
      if self._closed:
        raise RuntimeError(f'{self._key}: the judge is closed')
      self._calls.add(call)
    threading.Thread(
      target=self._run,
      args=(call, task, samples, shape, future),
      name=f'{self._key}-call',
      daemon=True,
    ).start()
    return future

  def close(self) -> None:
    """Ends all calls; requests under way run until their timeouts."""
    with self._lock:
      if self._closed:
        return
      self._closed = True
      for call in self._calls:
        call.stop(RuntimeError(f'{self._key}: the judge was closed'))
    for _ in range(self._endpoint.concurrency):
      self._jobs.put(None)
    self._cache.close()

  def _run(
    self,
    call: call_lib.Call,
    task: str,
    samples: list[remote_protocols.Sample],
    shape: tuple[int, int],
    future: futures.Future[Scored],
  ) -> None:
    """Hands out the requests of a call and waits for them, in a thread of its own."""
    try:
      keys = list(remote_protocols.keys_of(self._endpoint, task, samples))
      todo: dict[str, remote_protocols.Sample] = {}
      for key, sample in zip(keys, samples, strict=True):
        value = self._cache.get(key)
        if not remote_protocols.complete(self._endpoint, task, sample):
          call.verdicts[key] = remote_protocols.UNASKED
          call.last_error = (
            f'the template names {remote_protocols.ASKED}, but a prompt has no question'
          )
        elif value is None or not self._endpoint.low <= value <= self._endpoint.high:
          todo[key] = sample
        else:
          call.verdicts[key] = value
      call.expect(list(todo))
      items = list(todo.items())
      size = self._endpoint.batch if self._endpoint.protocol == 'batch' else 1
      for start in range(0, len(items), size):
        self._jobs.put(_Job(call=call, task=task, items=items[start : start + size]))
      call.over.wait(max(0.0, call.deadline - time.monotonic()))
      call.stop()
      if call.broken:
        raise call.broken
      future.set_result(self._finish(call, task, keys, len(todo), shape))
    except Exception as error:
      call.stop()
      future.set_exception(error)
    finally:
      with self._lock:
        self._calls.discard(call)

  def _finish(
    self, call: call_lib.Call, task: str, keys: list[str], asked: int, shape: tuple[int, int]
  ) -> Scored:
    """Returns the scores of a call that is over.

    Raises:
      JudgeUnavailable: no sample has a value, and the server has not replied since the start; or
        its replies held no value too often.
    """
    verdicts = [call.verdicts.get(key, DEADLINE) for key in keys]
    failed = collections.Counter(verdict for verdict in verdicts if isinstance(verdict, str))
    scorable = len(keys) - failed[remote_protocols.UNASKED]
    seconds = time.monotonic() - call.start
    if asked and len(keys) == failed.total() and self._last_reply_time < call.start:
      remedy = 'Correct the address, the model or the key' if call.refused else 'Start it'
      raise JudgeUnavailable(
        f'{self._key}: the judge at {remote_protocols.address(self._endpoint)} answered for none '
        f'of {scorable} samples in {seconds:.1f} s '
        f'({self._key}.deadline_s = {self._endpoint.deadline_s:g}); last error: '
        f'{call.last_error}. {remedy}, then run the same command: the run resumes from its '
        'checkpoint.'
      )
    self._bound_valueless(call, task, failed, len(keys))
    self._warn(failed, len(keys), call.last_error)
    value = [0.0 if isinstance(verdict, str) else verdict for verdict in verdicts]
    valid = [not isinstance(verdict, str) for verdict in verdicts]
    stats = {
      'samples': len(keys),
      'asked': asked,
      'cached': scorable - asked,
      'retried': call.retried,
      'failed': failed.total(),
      **{f'failed_{cause}': failed[cause] for cause in CAUSES},
      'seconds': seconds,
    }
    return Scored(
      value_BG=np.array(value, np.float32).reshape(shape),
      valid_BG=np.array(valid, bool).reshape(shape),
      stats=stats,
    )

  def _bound_valueless(
    self, call: call_lib.Call, task: str, failed: collections.Counter[str], samples: int
  ) -> None:
    """Counts calls in a row that got replies but no value, as from a login page.

    Each task has its own count, because the template of one task alone may be at fault.

    Raises:
      JudgeUnavailable: there were `garbage_limit` of them.
    """
    with self._lock:
      if failed.total() < samples:
        self._valueless[task] = 0
      if failed.total() < samples or not any(failed[cause] for cause in remote_protocols.ANSWERED):
        return
      self._valueless[task] += 1
      count = self._valueless[task]
    limit = self._endpoint.garbage_limit
    if limit and count >= limit:
      raise JudgeUnavailable(
        f'{self._key}: the judge at {remote_protocols.address(self._endpoint)} has answered {count} '
        f'times in a row for {task!r} without one valid score ({self._key}.garbage_limit = {limit}); '
        f'its last reply begins: {call.last_reply or call.last_error!r}. Correct the address, the '
        'template or the server, then run the same command: the run resumes from its checkpoint.'
      )

  def _warn(self, failed: collections.Counter[str], samples: int, last_error: str) -> None:
    """Logs how many samples failed since the last warning, at most once in `WARN_EVERY_S`."""
    with self._lock:
      self._missed.update(failed, samples=samples)
      late = time.monotonic() - self._warned < WARN_EVERY_S
      if not failed or late:
        return
      missed, self._missed = self._missed, collections.Counter()
      self._warned = time.monotonic()
    samples = missed.pop('samples')
    logging.warning(
      '%s: %d of %d samples got no value: %s; last error: %s',
      self._key,
      missed.total(),
      samples,
      dict(missed),
      last_error,
    )

  def _work(self) -> None:
    """Makes one request after the other, in a thread of the pool."""
    link = remote_http.Link(
      url=self._endpoint.url,
      secret=self._secret,
      retries=self._endpoint.retries,
      timeout_s=self._endpoint.timeout_s,
    )
    while (job := self._jobs.get()) is not None:
      if not job.call.over.is_set():
        try:
          self._ask(link, job)
        except Exception as error:  # Unexpected; the thread goes on with other calls.
          job.call.stop(error)
      del job  # The next wait may be long, and a job holds images.
    link.close()

  def _ask(self, link: remote_http.Link, job: _Job) -> None:
    """Makes a request and settles its samples."""
    call = job.call
    keys, samples = zip(*job.items, strict=True)
    try:
      body = remote_protocols.encode(self._endpoint, job.task, samples)
      reply = link.post(body, call.deadline, call.over, call.note)
      self._last_reply_time = time.monotonic()
      verdicts = remote_protocols.read(self._endpoint, reply, len(samples))
      if any(isinstance(verdict, str) for verdict in verdicts):
        call.last_reply = link.clean(reply.decode(errors='replace'))
        call.last_error = f'the reply {call.last_reply!r}'
    except remote_http.Failure as failure:
      call.note(failure, again=False)
      if failure.cause == remote_http.GARBAGE:
        self._last_reply_time = time.monotonic()
      verdicts = [failure.cause] * len(samples)
    for key, verdict in zip(keys, verdicts, strict=True):
      if not isinstance(verdict, str):
        self._cache.put(key, verdict)
    call.settle(dict(zip(keys, verdicts, strict=True)))


def _secret(name: str, key: str) -> str:
  """Reads the bearer token from an environment variable; no message may hold it."""
  secret = os.environ.get(name, '').strip() if name else ''
  if name and not secret:
    raise ValueError(f'{key}.api_key_env is {name!r}, but that environment variable is not set')
  if not (secret.isascii() and secret.isprintable()) or ' ' in secret:
    raise ValueError(f'{key}.api_key_env: the value of {name} holds characters that no key has')
  return secret
