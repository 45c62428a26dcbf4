"""Tests of what remote judges keep: keys that cover what a value depends on, and the file."""

import subprocess
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from configs import base
from lvrpo_jax.data import examples
from lvrpo_jax.rewards import base as rewards_base
from lvrpo_jax.rewards.remote import cache as remote_cache
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import protocols as remote_protocols
from lvrpo_jax.rewards.remote import reward as remote_reward
from tests.helpers import judge_fixtures as fixtures


class CacheTest(fixtures.JudgeTestCase):
  def test_no_request_for_what_is_known(self):
    web = self.real()
    judge = self.judge(web.url)
    first, second = (self.score(judge) for _ in range(2))
    np.testing.assert_array_equal(first.value_BG, second.value_BG)
    self.assertEqual(web.stats['samples'], 6)
    self.assertEqual((second.stats['asked'], second.stats['cached']), (0, 6))

  @parameterized.parameters(
    {'prompt': 'other'},
    {'spec': {'a': 1}},
    {'kind': 'k'},
    {'answer': 'x'},
    {'source': np.zeros((2, 2, 3), np.uint8)},
  )
  def test_key_covers_the_question(self, **change):
    web = self.real()
    judge = self.judge(web.url)
    example = examples.Example(0, 'prompt')
    self.score(judge, examples=[example], outputs=fixtures.images(1, 2))
    changed = examples.Example(1, **{'prompt': 'prompt', **change})
    scored = self.score(judge, 'generate', [changed], fixtures.images(1, 2))
    self.assertEqual(scored.stats['asked'], 2)
    self.score(judge, 'edit', [example], fixtures.images(1, 2))
    self.assertEqual(web.stats['samples'], 6)

  def test_key_covers_the_judge(self):
    plain = remote_client.Endpoint('http://x', model='a')
    samples, _ = remote_protocols.samples_of('generate', fixtures.prompts(1), fixtures.images(1, 1))
    keys = {
      next(remote_protocols.keys_of(e, 'generate', samples))
      for e in (
        plain,
        *(
          remote_client.Endpoint(**{'url': 'http://x', 'model': 'a', **change})
          for change in (
            {'url': 'http://y'},
            {'protocol': 'chat'},
            {'model': 'b'},
            {'template': 't'},
            {'body': {'top_p': 1}},
            {'timeout_s': 3.0},
            {'cache': 'file'},
          )
        ),
      )
    }
    self.assertLen(keys, 6)  # Neither the timeout nor the file changes a value.
    other_shape = fixtures.images(1, 1).reshape(1, 1, 5, 4, 3)
    samples, _ = remote_protocols.samples_of('generate', fixtures.prompts(1), other_shape)
    self.assertNotIn(next(remote_protocols.keys_of(plain, 'generate', samples)), keys)

  def test_file_survives_a_torn_line(self):
    web = self.real()
    path = self.folder / 'new' / 'cache.jsonl'
    judge = self.judge(web.url, cache=str(path))
    first = self.score(judge)
    judge.close()
    lines = path.read_bytes().splitlines(keepends=True)
    self.assertLen(lines, 6)
    path.write_bytes(b''.join(lines[:-1]) + lines[-1][:-9])
    for asked in (1, 0):  # The lost value is asked for, and then there on a line of its own.
      judge = self.judge(web.url, cache=str(path))
      again = self.score(judge)
      judge.close()
      np.testing.assert_array_equal(first.value_BG, again.value_BG)
      self.assertEqual(again.stats['asked'], asked)

  def test_bad_lines_are_passed_over(self):
    path = self.folder / 'cache.jsonl'
    path.write_bytes(
      b'\xff\n[]\n1\n{"key": "a"}\n{"key": "b", "value": NaN}\n'
      b'{"key": "c", "value": true}\n{"key": "d", "value": 0.5}\n'
    )
    cache = remote_cache.Cache(str(path))
    self.addCleanup(cache.close)
    self.assertEqual([cache.get(key) for key in 'abcd'], [None, None, None, 0.5])

  def test_a_file_is_of_one_judge(self):
    path = str(self.folder / 'cache.jsonl')
    judge = self.judge('http://x', cache=path)
    with self.assertRaisesRegex(ValueError, rf'{fixtures.KEY}\.cache is {path!r}, which another'):
      self.judge('http://x', cache=path)
    judge.close()
    self.judge('http://x', cache=path).close()

  def test_a_killed_process_leaves_no_lock(self):
    path = str(self.folder / 'cache.jsonl')
    program = (
      'import sys; from lvrpo_jax.rewards.remote import cache; '
      'kept = cache.Cache(sys.argv[1]); print("open", flush=True); input()'
    )
    with subprocess.Popen(
      [sys.executable, '-c', program, path],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      cwd=fixtures.ROOT,
    ) as process:
      self.assertEqual(process.stdout.readline(), b'open\n')
      with self.assertRaises(BlockingIOError):
        remote_cache.Cache(path)
      process.kill()
      process.wait()
      remote_cache.Cache(path).close()

  @parameterized.parameters((1, 0, ''), (2, 0, '.0'), (2, 1, '.1'))
  def test_processes_have_files_of_their_own(self, count, index, suffix):
    config = base.get_config()
    config.align.remote_judge.update(url='http://x', cache=str(self.folder / 'scores'))
    experiment = mock.Mock(config=config, shared={})
    with mock.patch.multiple('jax', process_count=lambda: count, process_index=lambda: index):
      remote = remote_reward.Remote('generate', config.align.rewards.generate.remote, experiment)
    samples = rewards_base.Samples('generate', fixtures.prompts(), fixtures.images(), 1, str)
    with mock.patch.object(remote_client.Judge, 'submit'):
      remote.submit(samples)
    remote.close()
    self.assertEqual([path.name for path in self.folder.iterdir()], [f'scores{suffix}'])

  def test_memory_is_bounded(self):
    with mock.patch.object(remote_cache, 'MOST', 2):
      cache = remote_cache.Cache('')
      for key in 'ab':
        cache.put(key, 1.0)
      cache.get('a')
      cache.put('c', 1.0)
      self.assertEqual([cache.get(key) for key in 'abc'], [1.0, None, 1.0])

  def test_failures_are_not_kept(self):
    web = self.script(lambda n, body, h: (200, fixtures.scores(body, 0.5 if n else 2.0)))
    judge = self.judge(web.url, batch=6)
    self.assertFalse(self.score(judge).valid_BG.any())
    self.assertTrue(self.score(judge).valid_BG.all())

  def test_kept_values_meet_a_new_range(self):
    web = self.script(lambda n, body, h: (200, fixtures.scores(body, 0.5)))
    path = str(self.folder / 'cache.jsonl')
    judge = self.judge(web.url, cache=path)
    self.score(judge)
    judge.close()
    scored = self.score(self.judge(web.url, cache=path, high=0.4))
    self.assertEqual(self.failed(scored), {'range': 6})

  def test_a_kept_yes_is_not_that_of_another_range(self):
    web = self.script(lambda n, body, h: (200, fixtures.words('yes' if n % 2 else 'no')))
    path = str(self.folder / 'cache.jsonl')
    for asked, wide in (
      (2, {'low': 0.0, 'high': 1}),
      (2, {'low': -1.0, 'high': 2.0}),
      (0, {'low': 0, 'high': 1.0}),
    ):
      judge = self.judge(web.url, protocol='chat', cache=path, **wide)
      scored = self.score(judge, outputs=fixtures.images(1, 2))
      judge.close()
      self.assertEqual(scored.stats['asked'], asked)
      self.assertCountEqual(scored.value_BG[0], [wide['low'], wide['high']])

  def test_full_disk_ends_the_file_alone(self):
    web = self.real()
    judge = self.judge(web.url, cache=str(self.folder / 'cache.jsonl'))
    judge._cache._file.close()
    judge._cache._file = mock.Mock()
    judge._cache._file.write.side_effect = OSError('No space left')
    with self.assertLogs('absl', 'WARNING') as logs:
      self.assertTrue(self.score(judge).valid_BG.all())
    self.assertLen(logs.output, 1)
    self.assertEqual(self.score(judge).stats['asked'], 0)


if __name__ == '__main__':
  absltest.main()
