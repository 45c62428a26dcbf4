"""Servers on loopback and a test case for remote judges."""

from http import server
import json
import os
import pathlib
import tempfile
import threading
import time
from unittest import mock

from absl.testing import parameterized
import numpy as np

from launch import judge_server
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import http as remote_http

KEY = 'align.judges.taste'
SECRET = 'sk-very-secret-0123'
ROOT = pathlib.Path(__file__).resolve().parents[2]
FOREVER_S = 60.0


class Scripted(server.ThreadingHTTPServer):
  """Answers with what `script(number of the request, parsed body, handler)` returns.

  That is (status, JSON value or bytes) or (status, value, headers), or None if the script has
  written to the connection itself. `bodies` and `headers` hold what came in, `times` when.
  """

  daemon_threads = True
  request_queue_size = 64

  def __init__(self, script):
    super().__init__(('127.0.0.1', 0), ScriptedHandler)
    self.script, self.bodies, self.headers, self.times = script, [], [], []
    self.lock = threading.Lock()


class ScriptedHandler(server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with self.server.lock:
      number = len(self.server.bodies)
      self.server.bodies.append(body)
      self.server.headers.append(dict(self.headers))
      self.server.times.append(time.monotonic())
    reply = self.server.script(number, body, self)
    if reply is None:
      self.close_connection = True
      return
    status, value, headers = (*reply, {})[:3]
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    self.send_response(status)
    for name, text in {'Content-Length': str(len(data)), **headers}.items():
      self.send_header(name, text)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *args):
    pass


def scores(body, value=0.5):
  """A batch reply that gives every sample the same value."""
  return {'scores': [{'id': s['id'], 'value': value} for s in body['samples']]}


def words(text):
  """A chat reply."""
  return {'choices': [{'message': {'role': 'assistant', 'content': text}}]}


def images(B=2, G=3, seed=0):
  """Noise of different brightness."""
  rng = np.random.default_rng(seed)
  top = rng.integers(20, 256, (B, G, 1, 1, 1))
  return (rng.random((B, G, 4, 5, 3)) * top).astype(np.uint8)


def prompts(B=2, **kwargs):
  """Examples of different prompts."""
  return [examples_lib.Example(i, f'prompt {i}', **kwargs) for i in range(B)]


def brightness(images_BGYXC):
  """What `judge_server.example_score` gives."""
  return images_BGYXC.mean(axis=(2, 3, 4)) / 255.0


class JudgeTestCase(parameterized.TestCase):
  """Starts servers and judges, and ends them with the test."""

  def setUp(self):
    super().setUp()
    self.enterContext(mock.patch.dict(os.environ, {'NO_PROXY': '*', 'TASTE_KEY': SECRET}))
    self.enterContext(mock.patch.object(remote_http, 'BACKOFF_S', 0.01))
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def serve(self, web):
    """Runs a server until the test ends; returns its address."""
    threading.Thread(target=web.serve_forever, kwargs={'poll_interval': 0.01}, daemon=True).start()
    self.addCleanup(web.server_close)
    self.addCleanup(web.shutdown)
    return f'http://127.0.0.1:{web.server_port}'

  def script(self, script):
    web = Scripted(script)
    web.url = self.serve(web)
    return web

  def real(self, **kwargs):
    web = judge_server.JudgeServer(**kwargs)
    web.url = self.serve(web)
    return web

  def judge(self, url, **kwargs):
    kwargs = {'deadline_s': 20.0, 'timeout_s': 10.0, 'batch': 2, 'concurrency': 4, **kwargs}
    if kwargs.get('protocol') == 'chat':
      kwargs.setdefault('model', 'm')
    judge = remote_client.Judge(remote_client.Endpoint(url=url, **kwargs), KEY)
    self.addCleanup(judge.close)
    return judge

  def score(self, judge, task='generate', examples=None, outputs=None):
    outputs = images() if outputs is None else outputs
    examples = prompts(len(outputs)) if examples is None else examples
    return judge.submit(task, examples, outputs).result(FOREVER_S)

  def failed(self, scored):
    """Counts of the causes, without zeros."""
    return {
      cause: scored.stats[f'failed_{cause}']
      for cause in remote_client.CAUSES
      if scored.stats[f'failed_{cause}']
    }

  def assert_scores(self, scored, pixels_BGYXC):
    """Valid samples have the value of their image, and the others 0."""
    np.testing.assert_allclose(
      scored.value_BG, np.where(scored.valid_BG, brightness(pixels_BGYXC), 0.0), rtol=1e-6
    )
