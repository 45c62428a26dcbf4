"""Tests of remote judges of knowledge, which are asked the questions that a prompt implies."""

from concurrent import futures
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from configs import base
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.rewards import scorer as scorer_lib
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.rewards.remote import protocols as remote_protocols
from lvrpo_jax.runtime import validate
from tests.helpers import judge_fixtures as fixtures

QUESTIONS = (('is there a {kind} fox ?', 'yes'), ('how many foxes are there ?', 'two'))
KNOWLEDGE = 'Question: {question} Is the answer {expected}? yes or no'


def texts(web):
  """Texts of the chat requests that came in, in order."""
  return [body['messages'][0]['content'][0]['text'] for body in web.bodies]


class QuestionsTest(fixtures.JudgeTestCase):
  def chat(self, reply='yes', **kwargs):
    web = self.script(lambda n, body, h: (200, fixtures.words(reply)))
    return web, self.judge(web.url, protocol='chat', concurrency=1, **kwargs)

  def ask(self, judge, examples, iteration=0, task='generate', outputs=None):
    outputs = fixtures.images(len(examples), 1) if outputs is None else outputs
    return judge.submit(task, examples, outputs, iteration).result(fixtures.FOREVER_S)

  def test_batch_sends_all_questions(self):
    web = self.real(score=lambda sample: len(sample['questions']) / 2)
    examples = [examples_lib.Example(i, 'p', questions=QUESTIONS[:i]) for i in range(3)]
    np.testing.assert_array_equal(
      self.ask(self.judge(web.url), examples).value_BG, [[0], [0.5], [1]]
    )
    web = self.script(lambda n, body, h: (200, fixtures.scores(body)))
    self.ask(self.judge(web.url), examples[2:])
    self.assertEqual(
      web.bodies[0]['samples'][0]['questions'],
      [{'question': question, 'answer': answer} for question, answer in QUESTIONS],
    )

  def test_chat_asks_one_question_an_iteration(self):
    web, judge = self.chat(template=KNOWLEDGE)
    example = examples_lib.Example(0, 'p', questions=QUESTIONS, kind='secret')
    asked = [self.ask(judge, [example], iteration).stats['asked'] for iteration in range(3)]
    self.assertEqual(asked, [1, 1, 0])  # The third asks the first question again.
    self.assertEqual(
      texts(web),
      [
        'Question: is there a {kind} fox ? Is the answer yes? yes or no',
        'Question: how many foxes are there ? Is the answer two? yes or no',
      ],
    )

  def test_iterations_share_what_names_no_question(self):
    web, judge = self.chat(template='Rate: {prompt}')
    example = examples_lib.Example(0, 'p', questions=QUESTIONS)
    for iteration in range(2):
      self.ask(judge, [example], iteration)
    self.assertEqual(texts(web), ['Rate: p'])

  def test_prompts_without_a_question_are_invalid_and_not_sent(self):
    web, judge = self.chat(template=KNOWLEDGE)
    examples = [examples_lib.Example(0, 'p'), examples_lib.Example(1, 'q', questions=QUESTIONS)]
    scored = self.ask(judge, examples)
    np.testing.assert_array_equal(scored.valid_BG, [[False], [True]])
    self.assertEqual(self.failed(scored), {'unasked': 1})
    self.assertEqual((scored.stats['asked'], scored.stats['cached']), (1, 0))
    # No outage either: there was nothing to ask.
    self.assertFalse(self.ask(judge, examples[:1]).valid_BG.any())
    self.assertLen(web.bodies, 1)

  def test_understand_asks_its_prompt(self):
    web, judge = self.chat(template='{question} {expected} {answer}')
    self.ask(
      judge, [examples_lib.Example(0, 'what colour ?', answer='red')], 0, 'understand', [['blue']]
    )
    self.assertEqual(texts(web), ['what colour ? red blue'])

  def test_templates_by_task(self):
    web, judge = self.chat(template='all {prompt}', templates={'edit': 'an edit', 'generate': ''})
    for task in ('generate', 'edit'):
      self.ask(judge, fixtures.prompts(1), 0, task)
    self.assertEqual(texts(web), ['all prompt 0', 'an edit'])

  def test_a_template_of_images_spares_the_others(self):
    web, judge = self.chat(templates={'generate': KNOWLEDGE})
    self.ask(judge, fixtures.prompts(1), 0, 'understand', [['a']])
    self.assertEqual(
      texts(web), [remote_protocols.TEMPLATES['understand'].format(prompt='prompt 0', answer='a')]
    )

  @parameterized.parameters(
    (
      {'template': '{prompt} {promt}'},
      r'taste\.template names the field \{promt\}; allowed: .*\{question\}, \{expected\}$',
    ),
    ({'templates': {'edit': '{source}'}}, r'taste\.templates\.edit names the field \{source\}'),
    ({'templates': {'draw': 'x'}}, r"taste\.templates holds \['draw'\]; allowed: .*'edit'"),
  )
  def test_unknown_fields_and_tasks(self, wrong, message):
    with self.assertRaisesRegex(ValueError, message):
      remote_client.Judge(remote_client.Endpoint('http://x', **wrong), fixtures.KEY)


class ConfigTest(parameterized.TestCase):
  def test_the_config_holds_every_setting(self):
    settings = base.get_config().align.remote_judge.to_dict()
    endpoint = remote_client.Endpoint(**{**settings, 'url': 'http://x'})
    self.assertEqual(endpoint.templates, dict.fromkeys(tasks_lib.TASKS, ''))
    remote_protocols.check(endpoint, 'config.align.remote_judge')

  @parameterized.parameters(
    ('template', 'template'), ('templates.understand', r'templates\.understand')
  )
  def test_answers_have_to_be_shown(self, key, named):
    config = base.get_config()
    config.align.remote_judge.update(url='http://x', protocol='chat', model='m')
    config.align.rewards.understand.remote.weight = 1.0
    validate.validate(config)
    config.align.remote_judge.update_from_flattened_dict({key: KNOWLEDGE})
    with self.assertRaisesRegex(ValueError, rf'remote_judge\.{named} is .*\{{answer\}}'):
      validate.validate(config)
    config.align.remote_judge.templates.understand = '{prompt} {answer}'
    validate.validate(config)

  def test_runs_at_once_share_no_cache(self):
    config = base.get_config()
    config.align.remote_judge.cache = 'scores'
    for program, workers in (('study', 1), ('train', 2)):
      config.update(program=program, study={'workers': workers})
      validate.validate(config)
    config.program = 'study'
    with self.assertRaisesRegex(
      ValueError, "remote_judge.cache is 'scores'; .*config.study.workers = 2"
    ):
      validate.validate(config)

  def test_scorer_asks_for_its_iteration(self):
    config = base.get_config()
    config.align.prompts.update(understand=0, edit=0)
    config.align.rewards.generate = {'taste': {'kind': 'remote', 'weight': 1.0}}
    config.align.remote_judge.url = 'http://x'
    scorer = scorer_lib.Scorer(mock.Mock(config=config, shared={}))
    self.addCleanup(scorer.close)
    examples, pixels = fixtures.prompts(), fixtures.images()
    samples = scorer.samples('generate', examples, pixels, 7)
    future = futures.Future()
    future.set_result('scores')
    with (
      mock.patch.object(pending, 'until_ready') as waited,
      mock.patch.object(remote_client.Judge, 'submit', return_value=future) as submit,
    ):
      asked = scorer.submit({'generate': samples}, self.fail)
    self.assertIs(waited.call_args.args[0], pixels)
    submit.assert_called_once()
    task, shown, outputs, iteration = submit.call_args.args
    self.assertEqual((task, shown, iteration), ('generate', examples, 7))
    np.testing.assert_array_equal(outputs, pixels)
    self.assertEqual(asked.result('generate', 'taste'), 'scores')


if __name__ == '__main__':
  absltest.main()
