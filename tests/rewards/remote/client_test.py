"""Tests of remote judges against servers on loopback: scores, secrets."""

import ast
import base64
import collections
import io
import json
import os
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from jax import numpy as jnp
import numpy as np
from PIL import Image

from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import protocols as remote_protocols
from tests.helpers import judge_fixtures as fixtures

PICKLES = {'pickle', '_pickle', 'marshal', 'shelve', 'dill', 'cloudpickle'}
"""Modules whose data may hold code."""


def imported(source):
  """All parts of the names that a program imports, and of the modules that it imports them from."""
  names = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      names.add(node.module or '')
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names |= {alias.name for alias in node.names}
  return {part for name in names for part in name.split('.')}


class ScoresTest(fixtures.JudgeTestCase):
  @parameterized.parameters(
    ('batch', '/score', 1), ('batch', '/score', 4), ('chat', '/v1/chat/completions', 1)
  )
  def test_values_and_order(self, protocol, path, batch):
    web = self.real()
    pixels = fixtures.images(5, 4)
    scored = self.score(self.judge(web.url + path, protocol=protocol, batch=batch), outputs=pixels)
    self.assert_scores(scored, pixels)
    self.assertEqual((scored.value_BG.dtype, scored.valid_BG.dtype), (np.float32, np.bool_))
    self.assertTrue(scored.valid_BG.all())
    self.assertEqual(web.stats['requests'], 20 // batch)
    stats = dict(scored.stats)
    self.assertBetween(stats.pop('seconds'), 0.0, 20.0)
    self.assertEqual({k: v for k, v in stats.items() if v}, {'samples': 20, 'asked': 20})

  def test_device_arrays_are_copied(self):
    pixels = jnp.asarray(fixtures.images())
    judge = self.judge(self.real().url)
    samples, _ = remote_protocols.samples_of('generate', fixtures.prompts(), pixels)
    self.assertFalse(np.shares_memory(samples[0].image, np.asarray(pixels)))
    future = judge.submit('generate', fixtures.prompts(), pixels)
    pixels.delete()
    self.assert_scores(future.result(fixtures.FOREVER_S), fixtures.images())

  def test_batch_request(self):
    web = self.script(lambda n, body, h: (200, fixtures.scores(body)))
    source = fixtures.images(1, 1, seed=1)[0, 0]
    example = examples_lib.Example(
      0, 'make it {red}', source=source, answer='yes', kind='recolor', spec={'keep': [np.int64(3)]}
    )
    self.score(self.judge(web.url), 'edit', [example], fixtures.images(1, 1))
    (body,) = web.bodies
    (sample,) = body['samples']

    def decode(png):
      return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))

    np.testing.assert_array_equal(decode(sample.pop('image')), fixtures.images(1, 1)[0, 0])
    np.testing.assert_array_equal(decode(sample.pop('source')), source)
    self.assertEqual(body['task'], 'edit')
    self.assertEqual(
      sample,
      {
        'id': '0',
        'prompt': 'make it {red}',
        'answer': None,
        'reference': 'yes',
        'kind': 'recolor',
        'spec': {'keep': [3]},
        'questions': [],
      },
    )

  def test_answers(self):
    web = self.real()
    source = fixtures.images(1, 1)[0, 0]
    examples = [
      examples_lib.Example(i, f'what colour is {i} ?', source=source, answer=word)
      for i, word in enumerate(('red', 'blue'))
    ]
    scored = self.score(
      self.judge(web.url),
      'understand',
      examples,
      [['red', 'blue', 'red'], ['blue', 'green', 'red']],
    )
    np.testing.assert_array_equal(scored.value_BG, [[1, 0, 1], [1, 0, 0]])
    # Equal answers to one question are asked for once.
    self.assertEqual((scored.stats['asked'], scored.stats['cached']), (5, 1))

  @parameterized.parameters(
    ('generate', '', 'How well does the image show this: prompt 0\n', 1),
    (
      'understand',
      'Is {answer} right for {prompt}? {"a": 1}',
      'Is {kind} right for prompt 0? {"a": 1}',
      1,
    ),
    ('edit', 'See {prompt}', 'See prompt 0', 2),
  )
  def test_chat_request(self, task, template, text, pictures):
    web = self.script(lambda n, body, h: (200, fixtures.words('1')))
    source = fixtures.images(1, 1, seed=1)[0, 0]
    (example,) = fixtures.prompts(1, source=None if task == 'generate' else source, kind='secret')
    outputs = [['{kind}']] if task == 'understand' else fixtures.images(1, 1)
    judge = self.judge(
      web.url,
      protocol='chat',
      model='critic',
      template=template,
      body={'max_tokens': 4, 'temperature': None},
    )
    self.assertEqual(self.score(judge, task, [example], outputs).value_BG, [[1]])
    (body,) = web.bodies
    ((said, *urls),) = [m['content'] for m in body.pop('messages')]
    self.assertStartsWith(said['text'], text)
    self.assertLen(urls, pictures)
    prefix, data = urls[0]['image_url']['url'].split(',')
    self.assertEqual(prefix, 'data:image/png;base64')
    first = fixtures.images(1, 1)[0, 0] if task == 'generate' else source
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(data))), first)
    self.assertEqual(body, {'model': 'critic', 'max_tokens': 4})

  @parameterized.parameters(
    ('0.25', 0.25),
    (' 1\n', 1),
    ('0', 0),
    ('Yes', 1),
    ('no.', 0),
    ('1.5', 'range'),
    ('-0.1', 'range'),
    ('nan', 'garbage'),
    ('1/2', 'garbage'),
    ('0.7 or so', 'garbage'),
    ('', 'garbage'),
    ('Score: 0.7', 'garbage'),
    ('yes, no', 'garbage'),
    ('5e-05', 5e-5),
    ('2.5E-1', 0.25),
    ('1e+16', 'range'),
    ('1e999', 'range'),
    ('inf', 'garbage'),
    ('-nan', 'garbage'),
    ('1e', 'garbage'),
    ('e-1', 'garbage'),
    ('1e-1 or so', 'garbage'),
    ('\u0660', 'garbage'),
    ('0,5', 'garbage'),
    ('true', 'garbage'),
    (None, 'garbage'),
    (0.5, 'garbage'),
  )
  def test_chat_is_read_strictly(self, said, expected):
    endpoint = remote_client.Endpoint('http://x', 'chat', 'm')
    self.assertEqual(
      remote_protocols.read(endpoint, json.dumps(fixtures.words(said)).encode(), 1), [expected]
    )

  @parameterized.parameters(
    '{"choices": []}',
    '[]',
    '{"choices": [{"message": "1"}]}',
    '1',
    'null',
    '{"choices": {"0": 1}}',
    '[' * 100_000,
    '\xff',
  )
  def test_chat_of_another_form(self, reply):
    endpoint = remote_client.Endpoint('http://x', 'chat', 'm')
    self.assertEqual(remote_protocols.read(endpoint, reply.encode('latin1'), 1), ['garbage'])

  def test_bad_scores_are_invalid_and_spare_the_others(self):
    entries = [
      ('{"id": "0", "value": 0.25}', 0.25),
      ('{"id": "1", "value": NaN}', 'range'),
      ('{"id": "2", "value": 1.01}', 'range'),
      ('{"id": "3", "value": true}', 'garbage'),
      ('{"id": "4", "value": "0.5"}', 'garbage'),
      ('{"id": "5", "value": null}', 'garbage'),
      ('{"id": 6, "value": 0.5}', 'missing'),
      ('{"id": "8", "value": 0}', 0.0),
      ('{"id": "9", "error": "no"}', 'error'),
      ('{"id": "10", "value": -Infinity}', 'range'),
      ('{"id": "11"}', 'garbage'),
      ('{"id": "12", "value": 1, "error": ""}', 'garbage'),
      ('{"id": "13", "value": 1' + '0' * 400 + '}', 'range'),
      ('{"id": "14", "value": 1}', 1.0),
    ]
    lines = [entry for entry, _ in entries] + [
      '{"id": "nobody", "value": 0.5}',
      '"15"',
      '{"value": 1}',
      '{"id": ["16"], "value": 1}',
      '{"id": "17", "value": 0.5}',
      '{"id": "17", "value": 0.5}',
    ]
    expected = [v for _, v in entries[:7]] + ['missing'] + [v for _, v in entries[7:]]
    expected += ['missing', 'missing', 'garbage', 'missing', 0.75]
    lines.append('{"id": "19", "value": 0.75}')
    # Ids 7, 15, 16 and 18 have no entry of their own.
    web = self.script(
      lambda n, body, h: (200, ('{"scores": [' + ','.join(reversed(lines)) + ']}').encode())
    )
    scored = self.score(self.judge(web.url, batch=20), outputs=fixtures.images(4, 5))
    valid = np.array([not isinstance(v, str) for v in expected]).reshape(4, 5)
    value = np.array([0.0 if isinstance(v, str) else v for v in expected]).reshape(4, 5)
    np.testing.assert_array_equal(scored.valid_BG, valid)
    np.testing.assert_array_equal(scored.value_BG, value)
    self.assertEqual(
      self.failed(scored), dict(collections.Counter(v for v in expected if isinstance(v, str)))
    )

  @parameterized.parameters(5e-05, 1.5e-7, 1.0, 0.0)
  def test_protocols_agree_on_numbers(self, value):
    web = self.real(score=lambda sample: value)
    for protocol in ('batch', 'chat'):
      scored = self.score(
        self.judge(
          f'{web.url}/chat/completions' if protocol == 'chat' else web.url, protocol=protocol
        )
      )
      np.testing.assert_array_equal(scored.value_BG, np.full((2, 3), value, np.float32))
      self.assertTrue(scored.valid_BG.all())

  def test_wider_range(self):
    web = self.script(lambda n, body, h: (200, fixtures.scores(body, -3)))
    scored = self.score(self.judge(web.url, low=-5, high=5))
    np.testing.assert_array_equal(scored.value_BG, np.full((2, 3), -3.0))

  def test_no_samples(self):
    judge = self.judge('http://127.0.0.1:9')
    for outputs in (np.zeros((2, 0, 4, 4, 3), np.uint8), np.zeros((0, 3, 4, 4, 3), np.uint8)):
      self.assertEqual(self.score(judge, outputs=outputs).value_BG.shape, outputs.shape[:2])
    self.assertEqual(self.score(judge, 'understand', outputs=[]).valid_BG.shape, (0, 0))

  @parameterized.parameters(
    ('generate', fixtures.images().astype(np.float32), 2, 'uint8'),
    ('generate', fixtures.images()[0], 2, 'uint8'),
    ('generate', fixtures.images(), 3, '3 examples'),
    ('draw', fixtures.images(), 2, 'draw'),
    ('understand', [['a'], ['b', 'c']], 2, 'lists of str'),
    ('understand', [[1], [2]], 2, 'lists of str'),
  )
  def test_wrong_outputs(self, task, outputs, count, message):
    with self.assertRaisesRegex(ValueError, message):
      self.judge('http://127.0.0.1:9').submit(task, fixtures.prompts(count), outputs)

  def test_spec_without_json_form(self):
    future = self.judge('http://127.0.0.1:9').submit(
      'generate', fixtures.prompts(spec={'f': fixtures.images}), fixtures.images()
    )
    with self.assertRaisesRegex(TypeError, 'JSON-able'):
      future.result(fixtures.FOREVER_S)

  @parameterized.parameters(
    {'url': 'ftp://x'},
    {'url': 'x:80/score'},
    {'url': 'http://'},
    {'url': 'http://u:p@x/'},
    {'url': 'http://x:99999/'},
    {'protocol': 'pickle'},
    {'batch': 0},
    {'concurrency': 0},
    {'retries': -1},
    {'garbage_limit': -1},
    {'timeout_s': 0.0},
    {'deadline_s': float('nan')},
    {'low': 1.0},
    {'high': float('inf')},
    {'template': '{promt}'},
    {'protocol': 'chat'},
    {'api_key_env': 'NO_SUCH_NAME'},
  )
  def test_wrong_settings(self, **wrong):
    name = 'model' if wrong == {'protocol': 'chat'} else 'high' if 'low' in wrong else [*wrong][0]
    with self.assertRaisesRegex(ValueError, rf'align\.judges\.taste\.{name}'):
      remote_client.Judge(remote_client.Endpoint(**{'url': 'http://x', **wrong}), fixtures.KEY)


class SecretTest(fixtures.JudgeTestCase):
  def test_key_is_sent_and_kept_nowhere(self):
    # The server repeats the key in all that it says.
    def script(number, body, handler):
      said = f'bad key {handler.headers["Authorization"]}'
      return (200, fixtures.words('0.5')) if number < 2 else (200, fixtures.words(said))

    web = self.script(script)
    path = self.folder / 'cache.jsonl'
    judge = self.judge(web.url, protocol='chat', api_key_env='TASTE_KEY', cache=str(path))
    with self.assertLogs(None, 'DEBUG') as logs:
      scored = self.score(judge)
      self.assertEqual(self.failed(scored), {'garbage': 4})
      web.script = lambda n, body, h: (401, h.headers['Authorization'].encode())
      with self.assertRaises(remote_client.JudgeUnavailable) as caught:
        self.score(judge, outputs=fixtures.images(seed=1))
    self.assertEqual({h['Authorization'] for h in web.headers}, {f'Bearer {fixtures.SECRET}'})
    self.assertIn('Bearer ***', str(caught.exception))
    kept = [
      *logs.output,
      str(caught.exception),
      path.read_text(),
      repr(judge._endpoint),
      repr(scored),
    ]
    self.assertNotIn(fixtures.SECRET, ''.join(kept))

  def test_key_that_is_no_key(self):
    with (
      mock.patch.dict(os.environ, {'TASTE_KEY': f'{fixtures.SECRET}\nX: y'}),
      self.assertRaisesRegex(ValueError, 'TASTE_KEY') as caught,
    ):
      self.judge('http://x', api_key_env='TASTE_KEY')
    self.assertNotIn(fixtures.SECRET, str(caught.exception))

  def test_netrc_is_not_sent(self):
    (self.folder / 'netrc').write_text('machine 127.0.0.1 login me password open\n')
    web = self.script(lambda n, body, h: (200, fixtures.scores(body)))
    with mock.patch.dict(os.environ, {'NETRC': str(self.folder / 'netrc')}):
      self.score(self.judge(web.url))
    self.assertNotIn('Authorization', web.headers[0])

  @parameterized.parameters(
    'import os, pickle',
    'import pickle as p',
    'from pickle import loads',
    'import dill.source',
    'from multiprocessing.reduction import pickle',
    'def f():\n  from cloudpickle import loads',
  )
  def test_pickle_is_found(self, source):
    self.assertLen(imported(source) & PICKLES, 1)

  def test_no_pickle(self):
    for folder in ('lvrpo_jax', 'launch', 'configs', 'tests'):
      paths = sorted((fixtures.ROOT / folder).rglob('*.py'))
      self.assertNotEmpty(paths)
      for path in paths:
        self.assertEmpty(imported(path.read_text()) & PICKLES, path)


if __name__ == '__main__':
  absltest.main()
