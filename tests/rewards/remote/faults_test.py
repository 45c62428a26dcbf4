"""Tests of remote judges that fail: faults, retries, deadlines, outages; and of their server."""

import collections
import subprocess
import sys
import textwrap
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from launch import judge_server
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import http as remote_http
from lvrpo_jax.rewards.remote import protocols as remote_protocols
from tests.helpers import judge_fixtures as fixtures


class FaultsTest(fixtures.JudgeTestCase):
  @parameterized.parameters(
    ('batch', 'fail', 'error'),
    ('batch', 'garbage', 'garbage'),
    ('chat', 'fail', 'status'),
    ('chat', 'garbage', 'garbage'),
  )
  def test_a_tenth_fails(self, protocol, fault, cause):
    faults = judge_server.Faults(**{fault: 0.1, 'slow': 0.1, 'slow_s': 0.02}, seed=1)
    web = self.real(faults=faults)
    pixels = fixtures.images(10, 8)
    scored = self.score(
      self.judge(f'{web.url}/{protocol}/completions', protocol=protocol, batch=4, retries=1),
      outputs=pixels,
    )
    bad = ~scored.valid_BG
    self.assertBetween(bad.sum(), 1, 20)
    self.assertEqual(self.failed(scored), {cause: bad.sum()})
    self.assertEqual(scored.stats['retried'], bad.sum() if cause == 'status' else 0)
    self.assert_scores(scored, pixels)

  def test_slow_samples_miss_the_deadline_alone(self):
    web = self.real(faults=judge_server.Faults(slow=0.1, slow_s=6.0, seed=2))
    pixels = fixtures.images(10, 4)
    judge = self.judge(web.url, batch=1, concurrency=12, deadline_s=1.5)
    start = time.monotonic()
    scored = self.score(judge, outputs=pixels)
    self.assertBetween(time.monotonic() - start, 1.4, 3.0)
    bad = ~scored.valid_BG
    self.assertBetween(bad.sum(), 1, 8)
    self.assertLessEqual(self.failed(scored).keys(), {'deadline', 'timeout'})
    self.assert_scores(scored, pixels)

  def hang(self, number, body, handler):
    del number, body, handler
    time.sleep(6.0)

  def trickle_body(self, number, body, handler):
    del number, body
    handler.send_response(200)
    handler.send_header('Content-Length', '1000')
    handler.end_headers()
    self.trickle(handler)

  def trickle_endless_body(self, number, body, handler):
    del number, body
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n')
    self.trickle(handler)

  def trickle_headers(self, number, body, handler):
    del number, body
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nX: ')
    self.trickle(handler)

  def trickle(self, handler):
    try:
      for _ in range(120):
        handler.wfile.write(b' ')
        time.sleep(0.05)
    except OSError:
      pass

  @parameterized.parameters('hang', 'trickle_body', 'trickle_endless_body', 'trickle_headers')
  def test_deadline_holds(self, how):
    web = self.script(getattr(self, how))
    judge = self.judge(web.url, deadline_s=0.5)
    start = time.monotonic()
    with self.assertRaisesRegex(remote_client.JudgeUnavailable, fixtures.KEY):
      self.score(judge)
    self.assertBetween(time.monotonic() - start, 0.45, 2.0)
    # The threads are free again for the next call.
    web.script = lambda n, body, h: (200, fixtures.scores(body))
    start = time.monotonic()
    self.assertTrue(self.score(judge).valid_BG.all())
    self.assertLess(time.monotonic() - start, 1.5)

  def test_timeout_of_a_try_counts_every_byte(self):
    def script(number, body, handler):
      if number == 0:
        return self.trickle_body(number, body, handler)
      return 200, fixtures.scores(body)

    web = self.script(script)
    scored = self.score(self.judge(web.url, batch=6, timeout_s=0.3))
    self.assertTrue(scored.valid_BG.all())
    self.assertEqual(scored.stats['retried'], 1)

  @parameterized.parameters(500, 503, 429)
  def test_retries_are_bounded_and_counted(self, status):
    web = self.script(lambda n, body, h: (status, b'no'))
    with self.assertRaisesRegex(remote_client.JudgeUnavailable, f'HTTP {status}'):
      self.score(self.judge(web.url, batch=6, retries=2))
    self.assertLen(web.bodies, 3)

  def test_passing_failures_are_retried(self):
    def script(number, body, handler):
      if number == 0:
        return 503, b''
      if number == 1:  # no reply at all
        return None
      if number == 2:  # half a reply
        handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"scores"')
        return None
      return 200, fixtures.scores(body)

    web = self.script(script)
    scored = self.score(self.judge(web.url, batch=6, concurrency=1, retries=3))
    self.assertTrue(scored.valid_BG.all())
    self.assertEqual((scored.stats['retried'], len(web.bodies)), (3, 4))

  def test_waits_get_longer(self):
    web = self.script(lambda n, body, h: (503, b''))
    with (
      mock.patch.object(remote_http, 'BACKOFF_S', 0.04),
      self.assertRaises(remote_client.JudgeUnavailable),
    ):
      self.score(self.judge(web.url, batch=6, retries=3))
    waits = np.diff(web.times)
    self.assertTrue(np.all(waits >= 0.5 * 0.04 * 2.0 ** np.arange(3)), waits)

  @parameterized.parameters('0.4', 'date')
  def test_retry_after(self, after):
    if after == 'date':  # of whole seconds, at least 0.4 s ahead
      after = time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime(time.time() + 1.4))
    web = self.script(
      lambda n, body, h: (200, fixtures.scores(body)) if n else (429, b'', {'Retry-After': after})
    )
    scored = self.score(self.judge(web.url, batch=6))
    self.assertTrue(scored.valid_BG.all())
    self.assertBetween(np.diff(web.times)[0], 0.39, 1.6)

  def test_retry_after_beyond_the_deadline_ends_the_call(self):
    web = self.script(lambda n, body, h: (429, b'', {'Retry-After': '3600'}))
    start = time.monotonic()
    with self.assertRaisesRegex(remote_client.JudgeUnavailable, 'HTTP 429'):
      self.score(self.judge(web.url, batch=6))
    self.assertLess(time.monotonic() - start, 1.0)
    self.assertLen(web.bodies, 1)

  @parameterized.parameters(
    ('', 0),
    ('soon', 0),
    ('nan', 0),
    ('-5', 0),
    ('7', 7),
    ('Wed, 21 Oct 2015 07:28:00 GMT', 0),
    ('99999999999', 0),
  )
  def test_retry_after_is_read(self, value, seconds):
    self.assertEqual(remote_http._retry_after(value), seconds)

  @parameterized.parameters(400, 401, 404, 422, 302)
  def test_refusals_are_not_retried(self, status):
    web = self.script(lambda n, body, h: (status, b'bad model', {'Location': '/other'}))
    with self.assertRaisesRegex(
      remote_client.JudgeUnavailable, f'HTTP {status}.*bad model.*Correct'
    ):
      self.score(self.judge(web.url, batch=6))
    self.assertLen(web.bodies, 1)

  def test_one_refused_request_spares_the_others(self):
    web = self.script(lambda n, body, h: (200, fixtures.scores(body)) if n else (400, b''))
    scored = self.score(self.judge(web.url))
    self.assertEqual(scored.valid_BG.sum(), 4)
    self.assertEqual(self.failed(scored), {'status': 2})

  def test_dead_server(self):
    web = fixtures.Scripted(None)
    port = web.server_port
    web.server_close()  # Nobody listens there now.
    start = time.monotonic()
    with self.assertRaises(remote_client.JudgeUnavailable) as caught:
      self.score(self.judge(f'http://127.0.0.1:{port}/score?token=abc', deadline_s=3))
    self.assertLess(time.monotonic() - start, 3.0)
    message = str(caught.exception)
    for part in (
      fixtures.KEY,
      f'http://127.0.0.1:{port}/score',
      'deadline_s = 3',
      'refused',
      'Start it',
      'then run the same command: the run resumes from its checkpoint',
    ):
      self.assertIn(part, message)
    self.assertNotIn('token', message)
    self.assertIsInstance(caught.exception, RuntimeError)

  @parameterized.parameters(b'<html>busy</html>', b'', b'{"scores": {"0": 1}}', b'[]')
  def test_garbage_is_no_outage(self, reply):
    web = self.script(lambda n, body, h: (200, reply))
    judge = self.judge(web.url, garbage_limit=0)
    with self.assertLogs('absl', 'WARNING') as logs:
      for _ in range(2):
        scored = self.score(judge)
        self.assertFalse(scored.valid_BG.any())
        self.assertEqual(self.failed(scored), {'garbage': 6})
    self.assertLen(logs.output, 1)  # in a minute
    self.assertIn(f"{fixtures.KEY}: 6 of 6 samples got no value: {{'garbage': 6}}", logs.output[0])
    self.assertIn(reply.decode(), logs.output[0])
    judge._warned -= remote_client.WARN_EVERY_S
    with self.assertLogs('absl', 'WARNING') as logs:
      self.score(judge)
    self.assertIn('12 of 12 samples', logs.output[0])

  @parameterized.parameters(
    (b'<html>Please log in</html>', 'Please log in'),
    (b'{"scores": [{"id": "0", "error": "no such model"}]}', 'no such model'),
    (b'{"scores": [{"id": "0", "value": 7}]}', 'value'),
  )
  def test_garbage_without_end_is_an_outage(self, reply, quoted):
    web = self.script(lambda n, body, h: (200, reply))
    judge = self.judge(web.url)
    for _ in range(2):
      self.assertFalse(self.score(judge).valid_BG.any())
    for count in (3, 4):
      with self.assertRaises(remote_client.JudgeUnavailable) as caught:
        self.score(judge)
      for part in (
        fixtures.KEY,
        web.url,
        'garbage_limit = 3',
        f'{count} times',
        quoted,
        'then run the same command: the run resumes from its checkpoint',
      ):
        self.assertIn(part, str(caught.exception))

  def test_garbage_is_counted_in_a_row_and_by_task(self):
    web = self.script(
      lambda n, body, h: (200, fixtures.scores(body) if body['task'] == 'edit' else b'busy')
    )
    judge = self.judge(web.url, garbage_limit=2)
    self.score(judge)
    for seed in range(2):
      self.assertTrue(self.score(judge, 'edit', outputs=fixtures.images(seed=seed)).valid_BG.all())
    with self.assertRaisesRegex(
      remote_client.JudgeUnavailable, "2 times in a row for 'generate'.*'busy'"
    ):
      self.score(judge)
    garbled, web.script = web.script, lambda n, body, h: (200, fixtures.scores(body))
    self.score(judge)  # starts the count again
    web.script = garbled
    other = fixtures.images(seed=3)
    self.assertFalse(self.score(judge, outputs=other).valid_BG.any())
    with self.assertRaises(remote_client.JudgeUnavailable):
      self.score(judge, outputs=other)

  def test_starved_call_is_no_outage(self):
    # One call keeps the only thread busy with replies until both deadlines have passed.
    web = self.real(faults=judge_server.Faults(slow=1.0, slow_s=0.1))
    judge = self.judge(web.url, batch=1, concurrency=1, deadline_s=1.0)
    calls = [
      judge.submit('generate', fixtures.prompts(), fixtures.images(2, 10, seed))
      for seed in range(2)
    ]
    failed = collections.Counter()
    for call in calls:
      failed.update(self.failed(call.result(fixtures.FOREVER_S)))
    self.assertLessEqual(failed.keys(), {'deadline', 'timeout'})
    self.assertBetween(failed.total(), 20, 39)

  def test_concurrency_is_limited_over_calls(self):
    web = self.real(faults=judge_server.Faults(slow=1.0, slow_s=0.03))
    judge = self.judge(web.url, batch=1, concurrency=3)
    pixels = [fixtures.images(seed=seed) for seed in range(3)]
    calls = [judge.submit('generate', fixtures.prompts(), x) for x in pixels]
    for call, x in zip(calls, pixels, strict=True):
      self.assert_scores(call.result(fixtures.FOREVER_S), x)
    self.assertEqual(web.stats['most_at_once'], 3)

  def test_submit_returns_at_once_and_close_ends_calls(self):
    web = self.script(self.hang)
    judge = self.judge(web.url)
    start = time.monotonic()
    future = judge.submit('generate', fixtures.prompts(), fixtures.images())
    self.assertFalse(future.done())
    judge.close()
    with self.assertRaisesRegex(RuntimeError, 'closed'):
      future.result(fixtures.FOREVER_S)
    self.assertLess(time.monotonic() - start, 2.0)
    with self.assertRaisesRegex(RuntimeError, 'closed'):
      judge.submit('generate', fixtures.prompts(), fixtures.images())

  def test_threads_do_not_hold_up_the_exit(self):
    web = self.script(self.hang)
    program = textwrap.dedent(f"""
        import sys
        import numpy as np
        from lvrpo_jax.data import examples
        from lvrpo_jax.rewards.remote import client
        judge = client.Judge(client.Endpoint({web.url!r}), 'k')
        judge.submit('generate', [examples.Example(0, 'p')], np.zeros((1, 2, 4, 4, 3), np.uint8))
        sys.stdin.read()
    """)
    process = subprocess.Popen(
      [sys.executable, '-c', program], stdin=subprocess.PIPE, cwd=fixtures.ROOT
    )
    while not web.bodies:
      self.assertIsNone(process.poll())
      time.sleep(0.01)
    process.stdin.close()
    self.assertEqual(process.wait(20.0), 0)


class ServerTest(fixtures.JudgeTestCase):
  def test_command_line(self):
    (self.folder / 'mine.py').write_text('score = lambda sample: len(sample["prompt"]) / 10')
    process = subprocess.Popen(
      [
        sys.executable,
        fixtures.ROOT / 'launch' / 'judge_server.py',
        '--port=0',
        '--score=mine:score',
      ],
      stdout=subprocess.PIPE,
      text=True,
      cwd=self.folder,
    )
    self.addCleanup(process.stdout.close)
    self.addCleanup(process.wait)
    self.addCleanup(process.kill)
    url = process.stdout.readline().split()[-1]
    scored = self.score(self.judge(url))
    np.testing.assert_allclose(scored.value_BG, np.full((2, 3), 0.8), rtol=1e-6)

  def test_faults_follow_the_content(self):
    sample = {'prompt': 'a', 'answer': None, 'image': fixtures.images()[0, 0], 'source': None}
    hits = [
      [
        judge_server.Faults(fail=0.3, seed=seed).hit('fail', {**sample, 'prompt': str(i)})
        for i in range(300)
      ]
      for seed in (0, 0, 1)
    ]
    self.assertEqual(hits[0], hits[1])
    self.assertNotEqual(hits[0], hits[2])
    self.assertBetween(np.mean(hits[0]), 0.2, 0.4)

  def test_an_exception_of_the_score_is_one_sample(self):
    def score(sample):
      if sample['prompt'] == 'prompt 1':
        raise KeyError('oops')
      return 0.5

    scored = self.score(self.judge(self.real(score=score).url, batch=6))
    np.testing.assert_array_equal(scored.valid_BG, [[True] * 3, [False] * 3])

  def test_nonsense_is_refused(self):
    judge = self.judge(self.real().url)
    with (
      mock.patch.object(remote_protocols, 'encode', return_value=b'{"samples": 3}'),
      self.assertRaisesRegex(remote_client.JudgeUnavailable, 'HTTP 400.*not understood'),
    ):
      self.score(judge)


if __name__ == '__main__':
  absltest.main()
