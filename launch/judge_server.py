"""Serves scores over HTTP: a small remote judge, as a template for your own and for tests.

    python launch/judge_server.py --port=8000                                  # the example below
    python launch/judge_server.py --port=8000 --score=my_package.scores:score  # yours

`--score` names a function `(sample: dict) -> float`. The members of a sample are those of the
protocol `batch` (see `lvrpo_jax/rewards/remote/client.py`): task, id, prompt, answer, reference,
kind, spec, questions (a list of {'question': ..., 'answer': ...} about an image of the prompt, for
a judge of knowledge), and image and source as uint8 arrays (Y, X, 3) or None. For a chat request
they are prompt (the whole text), image (the last one) and source (the one before); questions is
empty and the others are None. An exception that the function raises becomes the sample's error.
Requests are answered in threads of their own, so the function must allow several calls at once; put
a lock around a model.

Posts to a path that ends in /chat/completions are OpenAI-compatible chats, all others are batches.
GET /stats returns counts of requests and samples. Keys are not checked: listen on a network that
you trust, or put a proxy in front. The faults are for tests. They depend on a sample's content, so
that the same samples get the same faults. The file needs NumPy and Pillow, nothing of this project.
"""

import argparse
import base64
import binascii
from collections.abc import Callable
import contextlib
import dataclasses
import hashlib
from http import server
import importlib
import io
import json
import os
import sys
import threading
import time
from typing import Any

import numpy as np
from PIL import Image

Sample = dict[str, Any]
"""Members of a sample by name, see the module's docstring."""
LARGEST = 1 << 28
"""Bytes of the largest request that is read."""


def example_score(sample: Sample) -> float:
  """Scores an answer with 1 or 0 for right or wrong, otherwise an image with its brightness.

  Raises:
    ValueError: there is neither an answer nor an image.
  """
  if sample['answer'] is not None and sample['reference'] is not None:
    return float(sample['answer'].strip().lower() == sample['reference'].strip().lower())
  if sample['image'] is None:
    raise ValueError('no image and no answer with its reference')
  return float(sample['image'].mean() / 255.0)


@dataclasses.dataclass(frozen=True)
class Faults:
  """Fractions in [0, 1] of all samples that get a fault.

  Attributes:
    fail: scored as an error; a chat is refused with HTTP 500, so retries do not help.
    slow: answered `slow_s` seconds later.
    slow_s: seconds.
    garbage: answered with text that is not a value.
    seed: selects the samples.
  """

  fail: float = 0.0
  slow: float = 0.0
  slow_s: float = 1.0
  garbage: float = 0.0
  seed: int = 0

  def hit(self, kind: str, sample: Sample) -> bool:
    """Whether a sample gets a fault ('fail', 'slow' or 'garbage')."""
    digest = hashlib.sha256(f'{self.seed} {kind}'.encode())
    for name in ('prompt', 'answer', 'image', 'source'):
      value = sample[name]
      digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return int.from_bytes(digest.digest()[:8], 'big') / 2**64 < vars(self)[kind]


class JudgeServer(server.ThreadingHTTPServer):
  """Serves scores until `shutdown`; `stats` counts requests, samples and most requests at once."""

  daemon_threads = True
  request_queue_size = 128  # Clients that connect at once; the default of 5 drops some.

  def __init__(
    self,
    score: Callable[[Sample], float] = example_score,
    host: str = '127.0.0.1',
    port: int = 0,
    faults: Faults = Faults(),
  ):
    """Listens at an address; a port of 0 takes a free one."""
    super().__init__((host, port), Handler)
    self.score, self.faults = score, faults
    self.stats = {'requests': 0, 'samples': 0, 'most_at_once': 0}
    self._now = 0
    self._lock = threading.Lock()

  def enter(self, samples: int) -> None:
    """Counts a request that begins."""
    with self._lock:
      self._now += 1
      self.stats['requests'] += 1
      self.stats['samples'] += samples
      self.stats['most_at_once'] = max(self.stats['most_at_once'], self._now)

  def leave(self) -> None:
    """Counts a request that ends."""
    with self._lock:
      self._now -= 1


class Handler(server.BaseHTTPRequestHandler):
  """Answers one request after the other of a connection."""

  protocol_version = 'HTTP/1.1'  # Keeps connections open.
  disable_nagle_algorithm = True  # Small replies do not wait for an acknowledgement.
  server: JudgeServer

  def do_GET(self) -> None:  # pylint: disable=invalid-name
    """Sends statistics."""
    if self.path == '/stats':
      self._reply(200, self.server.stats)
    else:
      self._reply(404, {'error': 'GET /stats, or POST samples'})

  def do_POST(self) -> None:  # pylint: disable=invalid-name
    """Sends the scores of a batch, or the answer of a chat."""
    size = self.headers.get('Content-Length', '')
    if not size.isdigit() or int(size) > LARGEST:
      self.close_connection = True  # The body stays unread.
      self._reply(413, {'error': f'a request of at most {LARGEST} bytes, with its length'})
      return
    data = self.rfile.read(int(size))
    chat = self.path.endswith('/chat/completions')
    try:
      body = json.loads(data)
      samples = [chat_sample(body)] if chat else batch_samples(body)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
      self._reply(400, {'error': f'not understood: {error!r}'})
      return
    self.server.enter(len(samples))
    try:
      if any(self.server.faults.hit('slow', sample) for sample in samples):
        time.sleep(self.server.faults.slow_s)
      scores = [self._score(sample) for sample in samples]
    finally:
      self.server.leave()
    if not chat:
      self._reply(200, {'scores': scores})
    elif 'error' in scores[0]:
      self._reply(500, {'error': {'message': scores[0]['error']}})
    else:
      message = {'role': 'assistant', 'content': str(scores[0]['value'])}
      choices = [{'index': 0, 'finish_reason': 'stop', 'message': message}]
      completion = {'object': 'chat.completion', 'model': body.get('model'), 'choices': choices}
      self._reply(200, completion)

  def _score(self, sample: Sample) -> dict[str, Any]:
    """Returns the entry of a sample in a reply, with its value or error."""
    faults = self.server.faults
    if faults.hit('fail', sample):
      return {'id': sample['id'], 'error': 'a fault was asked for'}
    if faults.hit('garbage', sample):
      return {'id': sample['id'], 'value': 'It depends.'}
    try:
      return {'id': sample['id'], 'value': float(self.server.score(sample))}
    except Exception as error:  # The other samples of the batch keep their scores.
      return {'id': sample['id'], 'error': repr(error)}

  def _reply(self, status: int, value: Any) -> None:
    """Sends a JSON value."""
    data = json.dumps(value).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    try:
      self.wfile.write(data)
    except OSError:  # The client has closed the connection.
      self.close_connection = True

  def log_message(self, *args: Any) -> None:
    """Logs nothing; the default is a line for every request."""


def batch_samples(body: dict[str, Any]) -> list[Sample]:
  """Returns the samples of a batch request, with images decoded."""
  return [
    {
      'task': body['task'],
      'id': sample['id'],
      'prompt': sample['prompt'],
      'answer': sample.get('answer'),
      'reference': sample.get('reference'),
      'kind': sample.get('kind'),
      'spec': sample.get('spec'),
      'questions': sample.get('questions') or [],
      'image': decode(sample.get('image')),
      'source': decode(sample.get('source')),
    }
    for sample in body['samples']
  ]


def chat_sample(body: dict[str, Any]) -> Sample:
  """Returns the sample of a chat request: the content of its last message."""
  content = body['messages'][-1]['content']
  parts: list[dict[str, Any]] = (
    [{'type': 'text', 'text': content}] if isinstance(content, str) else content
  )
  images = [
    decode(part['image_url']['url'].partition('base64,')[2])
    for part in parts
    if part['type'] == 'image_url'
  ]
  image, source = [*reversed(images), None, None][:2]
  return {
    'task': None,
    'id': '0',
    'answer': None,
    'reference': None,
    'kind': None,
    'spec': None,
    'questions': [],
    'prompt': '\n'.join(part['text'] for part in parts if part['type'] == 'text'),
    'image': image,
    'source': source,
  }


def decode(png: str | None) -> np.ndarray | None:
  """Decodes a base64 PNG to uint8 (Y, X, 3); None stays None.

  Raises:
    ValueError, OSError: the text is not base64, or not an image.
  """
  if png is None:
    return None
  try:
    data = base64.b64decode(png, validate=True)
  except binascii.Error as error:
    raise ValueError(f'an image is not base64: {error}') from error
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def load_score(path: str) -> Callable[[Sample], float]:
  """Imports the function at 'module:function'; '' is the example."""
  if not path:
    return example_score
  sys.path.insert(0, os.getcwd())  # As `python -m` does.
  module, _, name = path.partition(':')
  return vars(importlib.import_module(module))[name]


def main() -> None:
  """Runs the command: serves until it is interrupted."""
  parser = argparse.ArgumentParser(description='Scores images and answers over HTTP.')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen at')
  parser.add_argument('--port', type=int, default=8000, help='0 takes a free one')
  parser.add_argument('--score', default='', help="'module:function'; default: an example")
  parser.add_argument('--fail-rate', type=float, default=0.0, help='fraction scored as an error')
  parser.add_argument('--slow-rate', type=float, default=0.0, help='fraction answered late')
  parser.add_argument('--slow-s', type=float, default=1.0, help='seconds that those take longer')
  parser.add_argument('--garbage-rate', type=float, default=0.0, help='fraction without a value')
  parser.add_argument('--seed', type=int, default=0, help='of the faults')
  args = parser.parse_args()
  faults = Faults(
    fail=args.fail_rate,
    slow=args.slow_rate,
    slow_s=args.slow_s,
    garbage=args.garbage_rate,
    seed=args.seed,
  )
  judge = JudgeServer(load_score(args.score), args.host, args.port, faults)
  print(f'listening at http://{args.host}:{judge.server_port}', flush=True)
  with contextlib.suppress(KeyboardInterrupt):
    judge.serve_forever()


if __name__ == '__main__':
  main()
