"""Makes one HTTP request at a time, with a limit on its whole duration and bounded retries."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import datetime
import email.utils
import random
import re
import socket
import threading
import time
from typing import Any

import requests
from requests import adapters
from requests import exceptions
import urllib3

BACKOFF_S = 0.5
"""Wait before the first retry, on average; doubled for every further one."""

MAX_BACKOFF_S = 30.0
"""Longest wait before a retry, on average."""

UNREACHABLE, TIMEOUT, STATUS, GARBAGE = 'unreachable', 'timeout', 'status', 'garbage'

_MESSAGE = 300
"""Characters of a server's error message that are kept."""
_BODY = 65536
"""Characters of a server's error message that are read."""


class Failure(Exception):
  """Raised when a request got no usable reply.

  Attributes:
    cause: `UNREACHABLE`, `TIMEOUT`, `STATUS` (an HTTP status other than success) or `GARBAGE`.
    retry: whether another try may succeed.
    after: seconds that the server asked to wait, 0 if it did not.
    refused: whether the server answered with a status that a retry does not change.
  """

  def __init__(self, cause: str, message: str, retry: bool, after: float = 0.0):
    """Sets the attributes; `message` is the text of the exception."""
    super().__init__(message)
    self.cause, self.retry, self.after = cause, retry, after
    self.refused = cause == STATUS and not retry


class Link:
  """The connection of one thread to one server."""

  def __init__(self, url: str, secret: str, retries: int, timeout_s: float):
    """Prepares the connection, which the first request opens.

    Args:
      url: full address that is posted to.
      secret: bearer token, '' for none. It is put into the header of requests and nowhere else.
      retries: further tries of a request that failed for a transient cause.
      timeout_s: seconds that one try may take, from connecting to the last byte of the reply.
    """
    self._url, self._secret, self._retries, self._timeout_s = url, secret, retries, timeout_s
    self._adapter = _Adapter()
    self._session = requests.Session()
    # Because it is set, `requests` does not send what a .netrc file holds for this host.
    self._session.auth = self._authorise
    for scheme in ('http://', 'https://'):
      self._session.mount(scheme, self._adapter)

  def post(
    self, data: bytes, deadline: float, over: threading.Event, on_retry: Callable[[Failure], None]
  ) -> bytes:
    """Returns the body of the reply to a JSON request.

    Connection errors, timeouts, 429 and 5xx are tried again after a wait that doubles from
    `BACKOFF_S` on, with jitter, and is never shorter than the server's Retry-After. urllib3's
    `Retry` is not used because it sleeps without regard to a deadline.

    Args:
      data: body of the request.
      deadline: value of `time.monotonic()` after which no try is under way.
      over: set when nobody waits for the reply any more; it ends a wait between tries.
      on_retry: called with every failure that another try follows.

    Raises:
      Failure: of the last try.
    """
    attempt = 0
    while True:
      try:
        return self._once(data, min(self._timeout_s, deadline - time.monotonic()))
      except Failure as failure:
        backoff = min(BACKOFF_S * 2**attempt, MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
        wait = max(backoff, failure.after)
        late = time.monotonic() + wait >= deadline
        if not failure.retry or attempt == self._retries or late:
          raise
        on_retry(failure)
        if over.wait(wait):
          raise
      attempt += 1

  def clean(self, message: object) -> str:
    """Returns the start of a message on one line, without the secret, which servers may repeat."""
    text = str(message)
    text = text.replace(self._secret, '***') if self._secret else text
    return ' '.join(text[:_BODY].split())[:_MESSAGE]

  def close(self) -> None:
    """Closes the connection."""
    self._session.close()

  def _once(self, data: bytes, limit_s: float) -> bytes:
    """Makes one try of at most `limit_s` seconds.

    `requests` limits single reads only, so a timer cuts the connection at the limit.
    """
    slow = Failure(TIMEOUT, f'no complete reply within {max(limit_s, 0.0):.3g} s', retry=True)
    if limit_s <= 0:
      raise slow
    late = threading.Event()

    def cut() -> None:
      late.set()
      self._adapter.cut()

    timer = threading.Timer(limit_s, cut)
    timer.daemon = True
    timer.start()
    try:
      # A redirected POST would become a GET, so redirects count as failures.
      response = self._session.post(
        self._url,
        data=data,
        timeout=limit_s,
        allow_redirects=False,
        headers={'Content-Type': 'application/json', 'Accept': 'application/json'},
      )
    except Exception as error:  # A cut connection raises many types, also others than requests'.
      if late.is_set() or isinstance(error, exceptions.Timeout):
        raise slow from None
      if isinstance(error, (exceptions.ConnectionError, exceptions.ChunkedEncodingError)):
        raise Failure(UNREACHABLE, self.clean(_innermost(error)), retry=True) from None
      if isinstance(error, exceptions.ContentDecodingError):
        raise Failure(GARBAGE, self.clean(error), retry=False) from None
      raise
    finally:
      timer.cancel()
    if late.is_set():  # A body of unknown length looks complete where it was cut.
      raise slow
    if 200 <= response.status_code < 300:
      return response.content
    retry = response.status_code == 429 or response.status_code >= 500
    after = _retry_after(response.headers.get('Retry-After', '')) if retry else 0.0
    body = response.content.decode(errors='replace')
    message = self.clean(f'HTTP {response.status_code} {response.reason}: {body}')
    raise Failure(STATUS, message, retry, after)

  def _authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
    if self._secret:
      request.headers['Authorization'] = f'Bearer {self._secret}'
    return request


class _Adapter(adapters.HTTPAdapter):
  """Records the socket of its newest connection, so that another thread can cut it."""

  def __init__(self):
    """Limits the adapter to one connection."""
    self._socket: socket.socket | None = None
    super().__init__(pool_connections=1, pool_maxsize=1)

  def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
    super().init_poolmanager(*args, **kwargs)
    self._track(self.poolmanager)

  def proxy_manager_for(self, proxy: str, **kwargs: Any) -> urllib3.ProxyManager:
    known = proxy in self.proxy_manager
    manager = super().proxy_manager_for(proxy, **kwargs)
    return manager if known else self._track(manager)

  def _track(self, manager: Any) -> Any:
    """Makes the connections of a pool manager report their sockets to this adapter.

    Types of urllib3's pools and connections are made here, which its stubs do not cover.
    """
    adapter = self

    def tracked(pool: Any) -> type:
      class Connection(pool.ConnectionCls):
        def connect(self) -> None:
          super().connect()
          adapter._socket = self.sock

      return type(pool.__name__, (pool,), {'ConnectionCls': Connection})

    manager.pool_classes_by_scheme = {
      scheme: tracked(pool) for scheme, pool in manager.pool_classes_by_scheme.items()
    }
    return manager

  def cut(self) -> None:
    """Ends what is being sent or received; any thread may call this."""
    connection = self._socket
    if connection is not None:
      with contextlib.suppress(OSError):  # It was closed already.
        connection.shutdown(socket.SHUT_RDWR)


def _innermost(error: exceptions.RequestException) -> object:
  """Returns the reason of a connection error, without urllib3's text about its own retries."""
  inner = error.args[0] if error.args else error
  return getattr(inner, 'reason', None) or inner


def _retry_after(value: str) -> float:
  """Returns the seconds of a Retry-After header, which holds seconds or a date; 0 for neither."""
  value = value.strip()
  if re.fullmatch(r'[0-9]{1,9}(\.[0-9]+)?', value):
    return float(value)
  try:
    date = email.utils.parsedate_to_datetime(value)
  except ValueError:
    return 0.0
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
