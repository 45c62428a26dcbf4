"""Rewards of samples: what is computed for which weights, and what frozen models see."""

import dataclasses
import functools
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.models.bagel import policy
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.rewards import judging
from lvrpo_jax.rewards import mutual
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.rewards import rules
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import experience
from lvrpo_jax.training import reward_metrics
from tests.helpers import noise

ROWS, GROUP = 3, 4
NOBODY = pending.PendingRewards({}, lambda: None)
GIVEN = {}
"""What `own_reward` gives."""


def own_reward(examples, outputs):
  """A reward of the user's, named by import path."""
  assert len(examples) == len(outputs)
  return GIVEN['value'], GIVEN['valid']


def build(weights, **changes):
  """The tiny job, every task of which is paid by these components."""
  config = tiny.get_config()
  config.model.depth = 1
  config.align.update(group=GROUP, generate=ROWS, understand=ROWS, edit=ROWS, **changes)
  for rewards in config.align.rewards.values():
    rewards.update({name: weights.get(name, 0.0) for name in rewards})
  return experiment_lib.build(config, pathlib.Path('unused'))


class Scene:
  """A job with samples of all its tasks."""

  def __init__(self, weights, **changes):
    self.experiment = build(weights, **changes)
    self.collector = experience.Collector(self.experiment)
    self.params, self.vae, self.siglip = noise.parameters(self.experiment)
    self.words = experiment_lib.word_table(self.experiment, self.siglip)
    rng = np.random.default_rng(1)
    side = self.experiment.policy.image_size
    self.pixels = jnp.asarray(rng.integers(0, 256, (ROWS, GROUP, side, side, 3)), jnp.uint8)
    length = self.experiment.config.data.answer_tokens + 1
    self.tokens = jnp.full((ROWS, GROUP, length), self.experiment.policy.eos, jnp.int32)
    said = [self.experiment.data.tokenizer.encode(word)[0] for word in ('red', 'two', 'yes', 'circle')]
    self.tokens = self.tokens.at[:, :, 0].set(np.array(said))

  def tasks(self, *names, examples=None):
    """Prompts of tasks, of the data or of `examples`."""
    rows = {t: examples or [self.experiment.data.example(t, 'align', i) for i in range(ROWS)] for t in names}
    return experience.Tasks(
      rows, {t: self.experiment.place(self.experiment.encoder(t, r).prompts) for t, r in rows.items()}
    )

  def judges(self, **changes):
    return experience.Judges(self.params, self.siglip, self.words)._replace(**changes)

  def images(self, task='generate', judges=None, vae=None, **kwargs):
    return self.collector.image_rewards(
      task,
      self.tasks(task, **kwargs),
      self.pixels,
      judges or self.judges(),
      vae or self.vae,
      1,
      NOBODY,
    )

  def answers(self, judges=None, vae=None, **kwargs):
    return self.collector.text_rewards(
      self.tasks('understand', **kwargs),
      self.tokens,
      judges or self.judges(),
      vae or self.vae,
      NOBODY,
    )


class WeightsTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(rules=1.0), dict(reference=None, siglip=None, words_WD=None)),
    (dict(semantic=1.0), dict(reference=None, words_WD=None)),
    (dict(dense=1.0, rules=1.0), dict(reference=None)),
    (dict(knowledge=1.0), dict(siglip=None, words_WD=None)),
    (dict(mutual=1.0), dict(siglip=None, words_WD=None)),
  )
  def test_what_has_no_weight_is_not_computed(self, weights, absent):
    scene = Scene(weights)
    judges = scene.judges(**absent)
    for task in ('generate', 'edit'):
      found, _ = scene.images(task, judges)
      self.assertEqual(found.keys(), weights.keys())
    if 'dense' not in weights:
      found, _ = scene.answers(judges)
      self.assertEqual(found.keys(), weights.keys())

  def test_a_component_does_not_depend_on_the_others(self):
    halves = ('semantic', 'knowledge'), ('dense', 'mutual')
    scene = Scene(dict.fromkeys(sum(halves, ()), 1.0))
    everything = scene.images()[0], scene.answers()[0]
    for names in halves:
      half = Scene(dict.fromkeys(names, 1.0))
      for found, want in zip((half.images()[0], half.answers()[0]), everything):
        for name, reward in found.items():
          np.testing.assert_allclose(reward.value_BG, want[name].value_BG, rtol=1e-5, atol=1e-6)
          self.assertGreater(reward.value_BG.std(), 1e-5)


class OwnDataTest(parameterized.TestCase):
  """Examples of a data class that knows less, or other things, than the shapes world."""

  def examples(self, scene, task, **changes):
    return [dataclasses.replace(scene.experiment.data.example(task, 'align', 5 + i), **changes) for i in range(ROWS)]

  @parameterized.parameters('generate', 'edit')
  def test_no_spec_where_rules_have_no_weight(self, task):
    scene = Scene(dict(semantic=1.0))
    rewards, facts = scene.images(task, examples=self.examples(scene, task, spec=None))
    self.assertEqual(rewards.keys(), {'semantic'})
    self.assertEqual(facts, {})

  def test_no_answer_where_rules_have_no_weight(self):
    scene = Scene(dict(semantic=1.0))
    rewards, facts = scene.answers(examples=self.examples(scene, 'understand', answer=None))
    self.assertEqual(rewards.keys(), {'semantic'})
    self.assertEqual(facts.keys(), {'truncated/understand', 'truncated/captions'})

  def test_rules_name_the_example_without_a_record(self):
    scene = Scene(dict(rules=0.5))
    for task, changes in (
      ('generate', dict(spec=None)),
      ('edit', dict(spec=None)),
      ('understand', dict(answer=None)),
    ):
      examples = self.examples(scene, task, **changes)
      score = scene.answers if task == 'understand' else functools.partial(scene.images, task)
      with self.assertRaisesRegex(
        ValueError,
        f"example {examples[0].index} of '{task}' has no .*"
        f'config.align.rewards.{task}.rules is 0.5.*expected',
      ):
        score(examples=examples)

  def test_semantic_names_the_example_without_a_statement(self):
    scene = Scene(dict(semantic=1.0))
    examples = self.examples(scene, 'understand', statement=None)
    with self.assertRaisesRegex(
      ValueError, f'example {examples[0].index} .* has no statement, .*understand.semantic'
    ):
      scene.answers(examples=examples)

  def test_answers_are_read_as_the_data_says(self):
    scene = Scene(dict(rules=1.0))
    examples = self.examples(scene, 'understand', answer='nothing')
    with (
      mock.patch.object(scene.experiment.data, 'read_answer', {'red': 'nothing'}.get),
      mock.patch.object(scene.experiment.data, 'well_formed', lambda text: text == 'two'),
    ):
      rewards, facts = scene.answers(examples=examples)
    np.testing.assert_array_equal(facts['correct'], [[1, 0, 0, 0]] * ROWS)
    np.testing.assert_array_equal(facts['format'], [[0, 1, 0, 0]] * ROWS)
    np.testing.assert_array_equal(
      rewards['rules'].value_BG, rules.text_reward(facts['correct'], facts['format'])
    )


class OwnRewardTest(parameterized.TestCase):
  def scene(self, *tasks):
    return Scene({}, custom={task: f'{__name__}:own_reward' for task in tasks})

  @parameterized.parameters(
    ((ROWS, GROUP), (ROWS, 1)),
    ((ROWS, 1), (ROWS, GROUP)),
    ((GROUP,), (ROWS, GROUP)),
    ((ROWS, GROUP), ()),
    ((ROWS * GROUP,), (ROWS * GROUP,)),
  )
  def test_other_shapes_are_refused(self, value, valid):
    scene = self.scene('generate', 'understand')
    for task, score in (('generate', scene.images), ('understand', scene.answers)):
      with (
        mock.patch.dict(GIVEN, value=np.zeros(value), valid=np.ones(valid, bool)),
        self.assertRaises(ValueError) as caught,
      ):
        score()
      self.assertIn(
        f"config.align.custom.{task} is '{__name__}:own_reward', which gave arrays of "
        f'shapes {[value, valid]}; expected',
        str(caught.exception),
      )
      self.assertIn(f'shape (B, G) = {(ROWS, GROUP)}', str(caught.exception))

  def test_right_shapes_pass(self):
    value = np.arange(ROWS * GROUP, dtype=np.float32).reshape(ROWS, GROUP)
    value[0, 1] = np.nan
    with mock.patch.dict(GIVEN, value=value, valid=(value != 2).astype(int)):
      custom = self.scene('generate').images()[0]['custom']
    np.testing.assert_array_equal(custom.value_BG, np.nan_to_num(value))
    np.testing.assert_array_equal(custom.valid_BG, np.isfinite(value) & (value != 2))
    self.assertEqual(custom.valid_BG.dtype, bool)


class TruncatedTest(absltest.TestCase):
  def test_answers_without_an_end_are_counted(self):
    scene = Scene(dict(rules=1.0))
    word = int(scene.tokens[0, 0, 0])
    length = scene.tokens.shape[-1]
    scene.tokens = scene.tokens.at[0, 1].set(word).at[2, :2].set(word)  # Without an end token,
    scene.tokens = scene.tokens.at[1, 0, : length - 1].set(word)  # and with one in the last place.
    _, facts = scene.answers()
    want = np.zeros((ROWS, GROUP))
    want[0, 1] = want[2, :2] = 1
    np.testing.assert_array_equal(facts['truncated/understand'], want)
    credit = advantage_lib.Advantages(None, None, {}, {})
    metrics = reward_metrics.reward_metrics('understand', {}, facts, credit)
    self.assertAlmostEqual(metrics['truncated/understand'], 3 / (ROWS * GROUP))
    self.assertIn('accuracy/understand/correct', metrics)

  def test_statements_that_the_judge_cannot_hold_are_counted_and_logged(self):
    scene = Scene(dict(semantic=1.0))
    limit = scene.experiment.config.data.prompt_tokens
    # Of the first prompt all statements fit, of the others those of two answers do not.
    say = lambda long: lambda word: ' '.join([word] * (limit + (long and word in ('red', 'two'))))
    examples = [
      dataclasses.replace(scene.experiment.data.example('understand', 'align', i), statement=say(i > 0))
      for i in range(ROWS)
    ]
    with self.assertLogs(level='WARNING') as logged:
      _, facts = scene.answers(examples=examples)
      scene.answers(examples=examples)
    np.testing.assert_array_equal(
      facts['truncated/captions'], [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    )
    self.assertLen(logged.output, 1)  # Once a run, with the first such text.
    self.assertIn('red red', logged.output[0])
    self.assertIn(f'{limit + 1} tokens, of which the judge reads {limit}', logged.output[0])

  def test_captions_that_fit_are_whole(self):
    experiment = build(dict(semantic=1.0))
    limit = experiment.config.data.prompt_tokens
    ids, cut = experiment.captions_and_cut(['red ' * limit, 'red ' * (limit + 1), ''])
    np.testing.assert_array_equal(cut, [False, True, False])
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[:, -1], [experiment.policy.eos] * 3)
    np.testing.assert_array_equal(experiment.dual_encoder.token_ids(['red ' * limit])[0], ids[:1])


class AnswersTest(absltest.TestCase):
  def similarity(self, scene, images, texts):
    """Cosines of images and texts, each of its own."""
    embed = jax.jit(lambda params, *pairs: scene.experiment.dual_encoder.module.apply({'params': params}, *pairs))
    image, text, _, _ = embed(
      scene.siglip, policy.to_unit(np.stack(images)), scene.experiment.dual_encoder.token_ids(texts)[0]
    )
    return np.sum(np.asarray(image) * np.asarray(text), axis=-1)

  def test_semantic_compares_the_image_with_the_answer_as_a_statement(self):
    scene = Scene(dict(semantic=1.0))
    scene.tokens = scene.tokens.at[:, 3].set(scene.tokens[:, 0])
    examples = [scene.experiment.data.example('understand', 'eval', i, 'color') for i in range(ROWS)]
    pairs = [
      (e.source, e.statement(word)) for e in examples for word in ('red', 'two', 'yes', 'red')
    ]
    value = scene.answers(examples=examples)[0]['semantic'].value_BG
    np.testing.assert_allclose(value.ravel(), self.similarity(scene, *zip(*pairs)), atol=1e-6)
    np.testing.assert_allclose(value[:, 3], value[:, 0], atol=1e-6)  # The same answer.
    self.assertGreater(value[:, :3].std(axis=1).min(), 1e-4)
    # A similarity of image and question would be the same for a whole group.
    asked = [(e.source, e.prompt) for e in examples for _ in range(GROUP)]
    constant = self.similarity(scene, *zip(*asked)).reshape(ROWS, GROUP)
    self.assertLess(constant.std(axis=1).max(), 1e-6)


class KnowledgeTest(absltest.TestCase):
  def test_every_answer_is_worth_what_the_reference_gives_it(self):
    scene = Scene(dict(knowledge=1.0))
    words = [
      ['red', 'two', 'yes', 'circle'],
      ['circle', 'no', 'one', 'red'],
      ['blue', 'blue', 'the', 'two'],
    ]  # 'the' answers nothing.
    encode = scene.experiment.data.tokenizer.encode
    scene.tokens = scene.tokens.at[:, :, 0].set(
      np.array([[encode(word)[0] for word in row] for row in words])
    )
    found = scene.answers()[0]['knowledge'].value_BG
    ids = scene.experiment.answer_ids
    ask = jax.jit(functools.partial(judging.first_token, scene.experiment))
    for b, row in enumerate(words):
      example = scene.experiment.data.example('understand', 'align', b)
      prompts = scene.experiment.encoder('understand', [example]).prompts
      logits = np.asarray(ask(scene.judges(), scene.vae, prompts)[0], np.float64)[ids]
      p = np.exp(logits - logits.max())
      p /= p.sum()
      want = [
        p[scene.experiment.data.answers.index(w)] if w in scene.experiment.data.answers else 0.0 for w in row
      ]
      np.testing.assert_allclose(found[b], want, rtol=1e-4, atol=1e-6)
    self.assertEqual(found[2, 2], 0.0)


class BlindTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.scene = Scene(dict(mutual=1.0))
    cls.first_token = staticmethod(jax.jit(functools.partial(judging.first_token, cls.scene.experiment)))

  def logits(self, prompts):
    return np.asarray(self.first_token(self.scene.judges(), self.scene.vae, prompts))

  def test_the_reference_sees_no_image(self):
    scene = self.scene
    examples = [scene.experiment.data.example('understand', 'align', i) for i in range(ROWS)]
    blind = reference_qa.mask_images(scene.experiment, examples)
    seen = scene.tasks('understand', examples=examples).prompts['understand']
    self.assertTrue(np.all(blind.vit.sample_BL == types.PADDING))
    self.assertFalse(np.any(seen.vit.sample_BL == types.PADDING))
    frame = np.isin(
      blind.ids_BL, (scene.experiment.data.tokenizer.start_of_image, scene.experiment.data.tokenizer.end_of_image)
    )
    self.assertTrue(np.all(np.asarray(blind.text.sample_BL)[frame] == types.PADDING))
    np.testing.assert_array_equal(*(np.asarray(p.text.sample_BL)[~frame] for p in (blind, seen)))
    other = lambda prompts: prompts.replace(source_BYXC=255 - prompts.source_BYXC)
    np.testing.assert_array_equal(self.logits(blind), self.logits(other(blind)))
    change = np.abs(self.logits(seen) - self.logits(other(seen)))
    self.assertGreater(change.max(axis=1).min(), 1e-3)

  def test_the_gain_is_that_of_seeing(self):
    prompts = self.scene.tasks('understand')
    blind = reference_qa.mask_images(self.scene.experiment, prompts.examples['understand'])
    seen, without = (self.logits(p)[:, None] for p in (prompts.prompts['understand'], blind))
    ids = self.scene.experiment.answer_ids
    number = [self.scene.experiment.data.answers.index(word) for word in ('red', 'two', 'yes', 'circle')]
    want = mutual.gain(
      np.repeat(seen, GROUP, axis=1)[..., ids],
      without[..., ids],
      np.broadcast_to(number, (ROWS, GROUP)),
    )
    value = self.scene.answers()[0]['mutual'].value_BG
    np.testing.assert_allclose(value, want, atol=1e-5)
    self.assertGreater(np.abs(value).max(), 1e-3)


class MetricsTest(absltest.TestCase):
  def test_valid_samples_alone_count(self):
    reward = types.Rewards(
      np.array([[1.0, 3.0, 99.0], [2.0, np.nan, -99.0], [99.0, 99.0, 99.0]], np.float32),
      np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool),
    )
    failed = types.Rewards(np.full((3, 3), 7.0, np.float32), np.zeros((3, 3), bool))
    credit = advantage_lib.Advantages(None, None, {'a': 0.25, 'b': 0.75}, {'a': 0.5, 'b': 1.0})
    facts = {'correct': np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])}
    metrics = reward_metrics.reward_metrics('edit', {'a': reward, 'b': failed}, facts, credit)
    want = {
      'accuracy/edit/correct': 3 / 9,
      'reward/edit/a': (1 + 3 + 2) / 3,
      'deviation/edit/a': (1.0 + 0.0) / 2,  # Of the two groups that have valid samples.
      'invalid/edit/a': 6 / 9,
      'share/edit/a': 0.25,
      'dead/edit/a': 0.5,
      'reward/edit/b': 0.0,
      'deviation/edit/b': 0.0,
      'invalid/edit/b': 1.0,
      'share/edit/b': 0.75,
      'dead/edit/b': 1.0,
    }
    self.assertEqual(metrics.keys(), want.keys())
    for name, value in want.items():
      self.assertAlmostEqual(float(metrics[name]), value, places=6, msg=name)

  def test_no_facts_no_accuracy(self):
    reward = types.Rewards(np.ones((2, 3), np.float32), np.ones((2, 3), bool))
    credit = advantage_lib.combine({'semantic': reward}, {'semantic': 1.0}, 'gdpo', 0.1)
    metrics = reward_metrics.reward_metrics('generate', {'semantic': reward}, {}, credit)
    self.assertIn('reward/generate/semantic', metrics)
    self.assertFalse([name for name in metrics if name.startswith('accuracy/')])
    self.assertTrue(np.isnan(align.score(metrics, '')))


class DenseTest(absltest.TestCase):
  def test_key_words_of_prompts(self):
    experiment = build(dict(dense=1.0))
    row, count = experiment_lib.key_words(experiment, ['a red circle above a red cross', 'an image'])
    self.assertEqual(row.shape, (2, experiment.config.data.prompt_tokens))
    words = sorted(experiment.data.key_words)
    found = {words[r]: n for r, n in zip(row[0], count[0]) if n}
    self.assertEqual(found, {'red': 2, 'circle': 1, 'above': 1, 'cross': 1})
    self.assertEqual(count[1].sum(), 0)

  def test_table_holds_the_key_words(self):
    experiment = build(dict(dense=1.0))
    siglip = noise.parameters(experiment)[2]
    table = experiment_lib.word_table(experiment, siglip)
    words = sorted(experiment.data.key_words)
    self.assertEqual(table.shape[0], len(words))
    for word in ('blue', 'two', 'left'):
      vector = experiment.dual_encoder.module.apply({'params': siglip}, experiment.dual_encoder.token_ids([word])[0], method='embed_text')[0][0]
      np.testing.assert_allclose(table[words.index(word)], vector, atol=1e-6)

  def test_nobody_pays_for_no_table(self):
    experiment = build(dict(semantic=1.0))
    self.assertLen(experiment_lib.word_table(experiment, None), 0)

  def test_more_patches_than_there_are_stop_before_any_work(self):
    patches = 4
    build_at = lambda top, weights: experience.Collector(build(weights, dense_top=top))
    build_at(patches, dict(dense=1.0))
    build_at(patches + 1, dict(semantic=1.0))
    with self.assertRaisesRegex(
      ValueError, f'config.align.dense_top is {patches + 1}; allowed: at most the {patches} '
    ):
      build_at(patches + 1, dict(dense=1.0))


if __name__ == '__main__':
  absltest.main()
