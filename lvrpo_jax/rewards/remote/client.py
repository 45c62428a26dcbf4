"""Remote judges: scores of images and answers from a server, as JSON over HTTP.

The protocol `batch` posts some samples at once to an endpoint of your own:

    {"task": "generate",
     "samples": [{"id": "0", "prompt": "a red fox", "answer": null, "image": "<base64 PNG>",
                  "source": null, "reference": null, "kind": "", "spec": null,
                  "questions": [{"question": "is there a fox ?", "answer": "yes"}]}]}
    -> {"scores": [{"id": "0", "value": 0.7}]}      or {"id": "0", "error": "out of memory"}

`image` is what was drawn, `source` what was shown, `answer` what was answered, `reference` the
right answer, `questions` what may be asked about an image of the prompt, with the right answers.
`chat` asks an OpenAI-compatible `/v1/chat/completions` about one sample a request; with a template
that names {question} and {expected} it judges knowledge, by one of those questions an iteration.
A sample without a usable score is invalid, never 0. `launch/judge_server.py` speaks both.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import os
import queue
import threading
import time
from typing import Any

from absl import logging
import numpy as np

from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.rewards.remote import cache as remote_cache
from lvrpo_jax.rewards.remote import http as remote_http
from lvrpo_jax.rewards.remote import protocols as remote_protocols

WARN_EVERY_S = 60.0

DEADLINE = 'deadline'
"""Cause of a sample that nothing was known of when the deadline of its call passed."""

CAUSES = (
  remote_http.UNREACHABLE,
  remote_http.TIMEOUT,
  remote_http.STATUS,
  DEADLINE,
  *remote_protocols.ANSWERED,
  remote_protocols.UNASKED,
)
"""Why a sample has no value; each is counted as `failed_<cause>`."""


class JudgeUnavailable(RuntimeError):
  """No sample gets a value, so that training on would mean training on nothing."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where a judge answers, and what is taken for an answer.

  Attributes:
    url: full address, such as http://localhost:8000/v1/chat/completions.
    protocol: 'batch' or 'chat'.
    model: sent with chat requests; in either protocol a new name leaves the cached values behind.
    template: text of a chat request, see FIELDS in `judge_protocols`; '' takes its TEMPLATES.
    templates: the same for single tasks, before `template`; '' leaves the task to that.
    batch: samples a request; 'chat' always sends one.
    concurrency: requests under way at once, over all calls.
    retries: further tries after a connection error, a timeout, 429 or 5xx.
    timeout_s: seconds one try may take, from connecting to the last byte of the reply.
    deadline_s: seconds from `submit` until the result is there, whatever the server does.
    low, high: smallest and largest value that is valid; a chat's 'no' is low, its 'yes' high.
    garbage_limit: calls in a row for one task that may get replies but no value; 0 for any number.
    cache: local file that values are kept in over restarts, '' for memory alone; of one judge.
    api_key_env: name of the environment variable that holds the key, '' for no key.
    body: members added to every chat request; None takes one of ours away.
  """

  url: str
  protocol: str = 'batch'
  model: str = ''
  template: str = ''
  templates: Mapping[str, str] = dataclasses.field(default_factory=dict)
  batch: int = 8
  concurrency: int = 8
  retries: int = 3
  timeout_s: float = 60.0
  deadline_s: float = 300.0
  low: float = 0.0
  high: float = 1.0
  garbage_limit: int = 3
  cache: str = ''
  api_key_env: str = ''
  body: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Scored:
  """Scores of a call.

  Attributes:
    value_BG: float32, 0 where invalid.
    valid_BG: bool.
    stats: counts as numbers: 'samples'; 'asked', those sent; 'cached', those with a value from the
      cache or equal to another sample of the call; 'retried' requests; 'failed' samples and
      'failed_<cause>' for each of `CAUSES`; 'seconds' since `submit`.
  """

  value_BG: np.ndarray
  valid_BG: np.ndarray
  stats: dict[str, float]


class _Call:
  """What one `submit` waits for. Verdicts are a float or a cause, by content."""

  def __init__(self, deadline_s: float):
    self.start = time.monotonic()
    self.deadline = self.start + deadline_s
    self.over = threading.Event()
    self.refused = False  # whether the last failure was a status that no retry changes
    self.retried = 0
    self.last_error = 'no complete reply within the deadline'
    self.said = ''  # start of the last reply that lacked a value
    self.broken: Exception | None = None  # a fault of ours
    self.verdicts: dict[str, float | str] = {}
    self._lock = threading.Lock()
    self._waiting: set[str] = set()

  def expect(self, keys: Sequence[str]) -> None:
    """Names what verdicts are missing; with none, the call is over."""
    self._waiting = set(keys)
    if not keys:
      self.over.set()

  def settle(self, verdicts: Mapping[str, float | str]) -> None:
    """Takes verdicts; what comes after the deadline is dropped."""
    with self._lock:
      if not self.over.is_set():
        self.verdicts.update(verdicts)
        self._waiting -= verdicts.keys()
        if not self._waiting:
          self.over.set()

  def note(self, failure: remote_http.Failure, again: bool = True) -> None:
    """Remembers a failed try, `again` if another one is to follow."""
    with self._lock:
      self.last_error, self.refused = str(failure), failure.refused
      self.retried += again

  def stop(self, error: Exception | None = None) -> None:
    """Ends the call, with a fault of ours or none."""
    with self._lock:
      self.broken = self.broken or error
      self.over.set()


class Judge:
  """A client of one endpoint. Its threads are daemons and never hold up the process's exit."""

  def __init__(self, endpoint: Endpoint, key: str):
    """Reads the secret and the cache; the server is first asked by `submit`.

    Args:
      endpoint: the server.
      key: config key of the endpoint, for messages.

    Raises:
      ValueError: a setting is not allowed, the named environment variable is not set, or another
        judge has the cache file open.
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
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    self._lock = threading.Lock()
    self._calls: set[_Call] = set()
    self._missed: collections.Counter = collections.Counter()
    self._valueless: collections.Counter = collections.Counter()  # calls in a row, by task
    self._warned = -WARN_EVERY_S
    self._heard = -np.inf  # when the last reply came, to whichever call, good or not
    self._closed = False
    for number in range(endpoint.concurrency):
      threading.Thread(target=self._work, name=f'{key}-{number}', daemon=True).start()

  def submit(
    self, task: str, examples: Sequence[examples_lib.Example], outputs_BG: Any, iteration: int = 0
  ) -> futures.Future:
    """Starts to score samples and returns at once.

    Args:
      task: one of `tasks.TASKS`.
      examples: B prompts.
      outputs_BG: uint8 images (B, G, Y, X, 3); for 'understand', B lists of G answers. Images are
        copied, so a device array is fetched here and not held.
      iteration: decides which of its questions a prompt is asked, see `examples.Example.asked`.

    Returns:
      A future of `Scored`, done by `deadline_s`. It raises `JudgeUnavailable` if no sample got an
      answer, or if this is the call at which answers without any value reach `garbage_limit`; and
      RuntimeError if the judge is closed meanwhile.

    Raises:
      ValueError: the outputs have another form.
      RuntimeError: the judge is closed.
    """
    call = _Call(self._endpoint.deadline_s)
    samples, shape = remote_protocols.samples_of(task, examples, outputs_BG, iteration)
    future = futures.Future()
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
    """Ends all calls. Requests under way are left to their timeouts."""
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
    call: _Call,
    task: str,
    samples: list[remote_protocols.Sample],
    shape: tuple[int, int],
    future: futures.Future,
  ) -> None:
    """The life of a call, in a thread of its own: hands out requests and waits for them."""
    try:
      keys = list(remote_protocols.keys_of(self._endpoint, task, samples))
      todo = {}
      for key, sample in zip(keys, samples):
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
        self._jobs.put((call, task, items[start : start + size]))
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
    self, call: _Call, task: str, keys: list[str], asked: int, shape: tuple[int, int]
  ) -> Scored:
    """The scores of a call that is over.

    Raises:
      JudgeUnavailable: no sample has a value, and the server has not replied since the start; or
        its replies held no value too often.
    """
    verdicts = [call.verdicts.get(key, DEADLINE) for key in keys]
    failed = collections.Counter(v for v in verdicts if isinstance(v, str))
    scorable = len(keys) - failed[remote_protocols.UNASKED]
    seconds = time.monotonic() - call.start
    e = self._endpoint
    if asked and len(keys) == failed.total() and self._heard < call.start:
      what = 'Correct the address, the model or the key' if call.refused else 'Start it'
      raise JudgeUnavailable(
        f'{self._key}: the judge at {remote_protocols.address(e)} answered for none of '
        f'{scorable} samples in {seconds:.1f} s ({self._key}.deadline_s = {e.deadline_s:g}); '
        f'last error: {call.last_error}. {what}, then run the same command: the run resumes from '
        'its checkpoint.'
      )
    self._bound_valueless(call, task, failed, len(keys))
    self._warn(failed, len(keys), call.last_error)
    value = [0.0 if isinstance(v, str) else v for v in verdicts]
    valid = [not isinstance(v, str) for v in verdicts]
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
      np.array(value, np.float32).reshape(shape), np.array(valid, bool).reshape(shape), stats
    )

  def _bound_valueless(
    self, call: _Call, task: str, failed: collections.Counter, samples: int
  ) -> None:
    """Counts calls in a row that got replies but no value, as from a login page.

    Tasks are counted apart: a text that no model answers with a number may be that of one task.

    Raises:
      JudgeUnavailable: there were `garbage_limit` of them.
    """
    e = self._endpoint
    with self._lock:
      if failed.total() < samples:
        self._valueless[task] = 0
      if failed.total() < samples or not any(failed[cause] for cause in remote_protocols.ANSWERED):
        return
      self._valueless[task] += 1
      count = self._valueless[task]
    if e.garbage_limit and count >= e.garbage_limit:
      raise JudgeUnavailable(
        f'{self._key}: the judge at {remote_protocols.address(e)} has answered {count} times in a row '
        f'for {task!r} without one valid score ({self._key}.garbage_limit = {e.garbage_limit}); '
        f'its last reply begins: {call.said or call.last_error!r}. Correct the address, the '
        'template or the server, then run the same command: the run resumes from its checkpoint.'
      )

  def _warn(self, failed: collections.Counter, samples: int, last_error: str) -> None:
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
    """A thread of the pool: asks for one part of a call after the other."""
    e = self._endpoint
    link = remote_http.Link(e.url, self._secret, e.retries, e.timeout_s)
    while (job := self._jobs.get()) is not None:
      call, task, items = job
      if not call.over.is_set():
        try:
          self._ask(link, call, task, items)
        except Exception as error:  # A fault of ours; the thread must live on for other calls.
          call.stop(error)
      del job, call, task, items  # The next wait may be long, and these hold images.
    link.close()

  def _ask(
    self,
    link: remote_http.Link,
    call: _Call,
    task: str,
    items: list[tuple[str, remote_protocols.Sample]],
  ) -> None:
    keys, samples = zip(*items)
    try:
      body = remote_protocols.encode(self._endpoint, task, samples)
      reply = link.post(body, call.deadline, call.over, call.note)
      self._heard = time.monotonic()
      verdicts = remote_protocols.read(self._endpoint, reply, len(samples))
      if any(isinstance(verdict, str) for verdict in verdicts):
        call.said = link.clean(reply.decode(errors='replace'))
        call.last_error = f'the reply {call.said!r}'
    except remote_http.Failure as failure:
      call.note(failure, again=False)
      if failure.cause == remote_http.GARBAGE:
        self._heard = time.monotonic()
      verdicts = [failure.cause] * len(samples)
    for key, verdict in zip(keys, verdicts):
      if not isinstance(verdict, str):
        self._cache.put(key, verdict)
    call.settle(dict(zip(keys, verdicts)))


def _secret(name: str, key: str) -> str:
  """The bearer token in an environment variable; no message may hold it."""
  secret = os.environ.get(name, '').strip() if name else ''
  if name and not secret:
    raise ValueError(f'{key}.api_key_env is {name!r}, but that environment variable is not set')
  if not (secret.isascii() and secret.isprintable()) or ' ' in secret:
    raise ValueError(f'{key}.api_key_env: the value of {name} holds characters that no key has')
  return secret
