"""Knowledge reward, and the questions that it and 'mutual' ask the frozen reference."""

import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data.shapes import source as shapes_source
from lvrpo_jax.rewards import knowledge
from lvrpo_jax.rewards import mutual
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import align
from tests.helpers import scene as scene_lib

ROWS, GROUP, Scene = scene_lib.ROWS, scene_lib.GROUP, scene_lib.Scene


class TwinAnswers(shapes_source.ShapesData):
  """A data source, two answers of which begin with the same word."""

  @property
  def answers(self):
    return (*super().answers, 'red circle')


class FunctionsTest(absltest.TestCase):
  def test_probabilities_over_the_candidates(self):
    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    candidates = np.array([7, 0, 4])
    weight = np.exp(logits[:, candidates])
    np.testing.assert_allclose(
      knowledge.answer_probabilities(jnp.asarray(logits), candidates),
      weight / weight.sum(-1, keepdims=True),
      rtol=1e-5,
    )

  def test_other_tokens_do_not_matter(self):
    logits = np.zeros((1, 5), np.float32)
    louder = logits + np.array([0.0, 0.0, 50.0, 0.0, 0.0], np.float32)
    out = [
      knowledge.answer_probabilities(jnp.asarray(x), np.array([0, 1])) for x in (logits, louder)
    ]
    np.testing.assert_array_equal(*out)

  def test_agreement_over_the_questions_asked(self):
    probability = np.random.default_rng(1).dirichlet(np.ones(4), size=(3, 2, 3))
    answer = np.array([[0, 1, 3], [2, 2, 2], [1, 0, 0]])
    asked = np.array([[True, True, True], [True, False, True], [False, False, False]])
    expected = np.zeros((3, 2))
    for b, g in np.ndindex(3, 2):
      right = [probability[b, g, q, answer[b, q]] for q in range(3) if asked[b, q]]
      expected[b, g] = np.mean(right) if right else 0.0
    out = knowledge.agreement(jnp.float32(probability), jnp.asarray(answer), jnp.asarray(asked))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def first_tokens(scene):
  """First token of every answer, by the tokenizer itself."""
  return [scene.data.tokenizer.encode(answer)[0] for answer in scene.data.answers]


class AnswersTest(absltest.TestCase):
  def test_every_answer_is_worth_what_the_reference_gives_it(self):
    scene = Scene(dict(knowledge=1.0))
    words = [
      ['red', 'two', 'yes', 'circle'],
      ['circle', 'no', 'one', 'red'],
      ['blue', 'blue', 'the', 'two'],
    ]  # 'the' answers nothing.
    scene.say(words)
    found = scene.values('understand')['knowledge']
    answers = list(scene.data.answers)
    ask = jax.jit(functools.partial(reference_qa.first_token, scene.experiment))
    for b, row in enumerate(words):
      example = scene.data.example('understand', 'align', b)
      prompts = scene.experiment.encoder('understand', [example]).prompts
      p = special.softmax(
        np.asarray(ask(scene.frozen, prompts)[0], np.float64)[first_tokens(scene)]
      )
      want = [p[answers.index(w)] if w in answers else 0.0 for w in row]
      np.testing.assert_allclose(found[b], want, rtol=1e-4, atol=1e-6)
    self.assertEqual(found[2, 2], 0.0)


class AnswerIdsTest(parameterized.TestCase):
  def build(self, task, settings):
    """The tiny experiment with answers that begin alike, and one reward more."""
    config = tiny.get_config()
    config.data.source = f'{__name__}:TwinAnswers'
    for entries in config.align.rewards.values():
      for name, entry in entries.items():
        entry.weight = float(name == 'rules')
    config.align.rewards[task].asked = settings
    return experiment_lib.build(config, pathlib.Path('unused'))

  def test_first_tokens_in_the_order_of_the_answers(self):
    scene = Scene(dict(rules=1.0))
    ids = reference_qa.answer_ids(scene.experiment, 'config.key')
    self.assertEqual(ids.tolist(), first_tokens(scene))
    self.assertLen(set(ids.tolist()), len(scene.data.answers))

  @parameterized.product(kind=('knowledge', 'mutual'), task=('generate', 'understand', 'edit'))
  def test_answers_that_begin_alike_are_refused(self, kind, task):
    settings = dict(kind=kind, weight=1.0, questions=1)
    with self.assertRaisesRegex(
      ValueError,
      f"config.align.rewards.{task}.asked reads .*'red' and 'red circle' .* begin with the same "
      f'one; set config.align.rewards.{task}.asked.weight to 0',
    ):
      align.check(self.build(task, settings))
    align.check(self.build(task, {**settings, 'weight': 0.0}))


class BlindTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.scene = Scene(dict(mutual=1.0))
    cls.first_token = staticmethod(
      jax.jit(functools.partial(reference_qa.first_token, cls.scene.experiment))
    )

  def logits(self, prompts):
    return np.asarray(self.first_token(self.scene.frozen, prompts))

  def test_the_reference_sees_no_image(self):
    scene = self.scene
    examples = scene.examples('understand')
    blind = reference_qa.mask_images(scene.experiment, examples)
    seen = scene.prompts('understand', examples).prompts['understand']
    self.assertTrue(np.all(blind.vit.sample_BL == types.PADDING))
    self.assertFalse(np.any(seen.vit.sample_BL == types.PADDING))
    tokenizer = scene.data.tokenizer
    frame = np.isin(blind.ids_BL, (tokenizer.start_of_image, tokenizer.end_of_image))
    self.assertTrue(np.all(np.asarray(blind.text.sample_BL)[frame] == types.PADDING))
    np.testing.assert_array_equal(*(np.asarray(p.text.sample_BL)[~frame] for p in (blind, seen)))

    def other(prompts):
      return prompts.replace(source_BYXC=255 - prompts.source_BYXC)

    np.testing.assert_array_equal(self.logits(blind), self.logits(other(blind)))
    change = np.abs(self.logits(seen) - self.logits(other(seen)))
    self.assertGreater(change.max(axis=1).min(), 1e-3)

  def test_the_gain_is_that_of_seeing(self):
    scene = self.scene
    batch = scene.prompts('understand')
    blind = reference_qa.mask_images(scene.experiment, batch.examples['understand'])
    seen, without = (self.logits(p)[:, None] for p in (batch.prompts['understand'], blind))
    ids = np.array(first_tokens(scene))
    number = [scene.data.answers.index(word) for word in scene_lib.WORDS]
    want = mutual.gain(
      np.repeat(seen, GROUP, axis=1)[..., ids],
      without[..., ids],
      np.broadcast_to(number, (ROWS, GROUP)),
    )
    value = scene.values('understand')['mutual']
    np.testing.assert_allclose(value, want, atol=1e-5)
    self.assertGreater(np.abs(value).max(), 1e-3)


class TurnsTest(absltest.TestCase):
  def test_every_question_has_its_turn(self):
    pairs = tuple((f'question {i}', 'yes') for i in range(5))
    example = examples_lib.Example(0, '', questions=pairs)
    self.assertEqual([example.asked(i) for i in range(7)], [*pairs, *pairs[:2]])
    self.assertEqual(
      [example.inquiry(i, 2) for i in range(3)],
      [[pairs[0], pairs[1]], [pairs[2], pairs[3]], [pairs[4], pairs[0]]],
    )
    self.assertCountEqual(example.inquiry(3, 9), pairs)
    self.assertEqual(examples_lib.Example(0, '').asked(3), ('', ''))
    self.assertEqual(examples_lib.Example(0, '').inquiry(3, 2), [])


if __name__ == '__main__':
  absltest.main()
