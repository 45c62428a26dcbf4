"""Settings of a remote judge's endpoint."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Address of a remote judge, and which of its replies are valid.

  Attributes:
    url: full address, such as http://localhost:8000/v1/chat/completions.
    protocol: 'batch' or 'chat'.
    model: sent with chat requests. In either protocol, cached values belong to one model.
    template: text of a chat request, see `protocols.FIELDS`; '' takes `protocols.TEMPLATES`.
    templates: the same for single tasks, before `template`; '' leaves the task to that.
    batch: samples a request; 'chat' always sends one.
    concurrency: requests under way at once, over all calls.
    retries: further tries after a connection error, a timeout, 429 or 5xx.
    timeout_s: seconds that one try may take, from connecting to the last byte of the reply.
    deadline_s: seconds from `Judge.submit` to its result, whatever the server does.
    low, high: smallest and largest value that is valid; a chat's 'no' is low, its 'yes' high.
    garbage_limit: calls in a row for one task that may get replies but no value; 0 for any number.
    cache: local file that keeps values over restarts, '' for memory alone; one judge a file.
    api_key_env: name of the environment variable that holds the key, '' for no key.
    body: members added to every chat request; None removes a default member.
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
