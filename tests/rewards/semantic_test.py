"""Semantic and dense rewards: each image and answer meets its own text in the dual encoder."""

import dataclasses
import functools
import math
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import scorer as scorer_lib
from lvrpo_jax.rewards import semantic
from tests.helpers import scene as scene_lib

ROWS, GROUP, Scene = scene_lib.ROWS, scene_lib.GROUP, scene_lib.Scene


def units(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


class FunctionsTest(parameterized.TestCase):
  def test_cosine_of_each_pair(self):
    image, text = units(2, 3, 4), units(2, 3, 4, seed=1)
    expected = [[image[b, g] @ text[b, g] for g in range(3)] for b in range(2)]
    np.testing.assert_allclose(semantic.similarity(image, text), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(semantic.similarity(image, image), np.ones((2, 3)), rtol=1e-6)

  def test_one_text_for_a_group(self):
    image, text = units(2, 3, 4), units(2, 1, 4, seed=1)
    np.testing.assert_allclose(
      semantic.similarity(image, text),
      semantic.similarity(image, np.tile(text, (1, 3, 1))),
      rtol=1e-6,
    )

  @parameterized.parameters(1, 2, 5)
  def test_dense_against_loops(self, top):
    patch, word = units(2, 3, 5, 4), units(6, 4, seed=1)
    row = np.array([[2, 0, 0], [5, 3, 4]])
    count = np.array([[2, 1, 0], [1, 1, 1]])  # The last place of the first prompt is padding.
    expected = np.zeros((2, 3))
    for b, g in np.ndindex(2, 3):
      matches = [
        np.mean(sorted(patch[b, g] @ word[w])[-top:])
        for w, n in zip(row[b], count[b])
        for _ in range(n)
      ]
      expected[b, g] = np.mean(matches)
    np.testing.assert_allclose(
      semantic.dense(patch, word, row, count, top), expected, rtol=1e-5, atol=1e-6
    )

  def test_dense_costs_the_words_of_a_prompt_not_those_of_the_vocabulary(self):
    B, G, K, N, D = 2, 3, 14, 4096, 8

    def shape(*sizes, dtype=jnp.float32):
      return jax.ShapeDtypeStruct(sizes, dtype)

    numbers = shape(B, K, dtype=jnp.int32)
    program = jax.make_jaxpr(functools.partial(semantic.dense, top=2))(
      shape(B, G, N, D), shape(152_064, D), numbers, numbers
    )
    sizes = [math.prod(x.aval.shape) for equation in program.eqns for x in equation.outvars]
    self.assertEqual(max(sizes), B * G * K * N)

  def hot(self, patch, word, top):
    """Scores of one word before and after one patch matches it as well as can be."""
    hot = patch.copy()
    hot[:, :, 0] = word
    numbers = np.zeros((len(patch), 1), np.int32), np.ones((len(patch), 1), np.int32)
    return [np.asarray(semantic.dense(x, word, *numbers, top)) for x in (patch, hot)]

  @parameterized.parameters(1, 2, 3, 6)
  def test_one_hot_patch_gains_a_share_of_what_the_maximum_gives(self, top):
    word, patch = units(1, 4), np.repeat(units(5, 7, 1, 4, seed=1), 6, axis=2)
    before, after = self.hot(patch, word, top)
    _, maximum = self.hot(patch, word, 1)
    np.testing.assert_allclose(maximum, np.ones((5, 7)), rtol=1e-6)  # It is satisfied.
    np.testing.assert_allclose(after - before, (maximum - before) / top, atol=1e-6)

  @parameterized.parameters(1, 2, 3, 6)
  def test_the_other_patches_bound_the_score_of_one_hot_patch(self, top):
    word, patch = units(1, 4), units(50, 4, 6, 4, seed=2)
    before, after = self.hot(patch, word, top)
    rest = np.sort(patch[:, :, 1:] @ word[0], axis=-1)[..., ::-1]
    bound = (1 + (top - 1) * rest[..., 0]) / top
    self.assertTrue(np.all(after <= bound + 1e-6))
    self.assertTrue(np.all(after - before <= 2 / top + 1e-6))

  def test_a_prompt_without_key_words_is_zero(self):
    none = np.zeros((1, 5), np.int32)
    out = semantic.dense(units(1, 2, 3, 4), units(5, 4), none, none)
    np.testing.assert_array_equal(out, np.zeros((1, 2)))


class AnswersTest(absltest.TestCase):
  def similarity(self, scene, images, texts):
    """Cosines of images and texts, each of its own."""
    (image, _), text = scene.embed(np.stack(images), texts)
    return np.sum(image * text, axis=-1)

  def test_semantic_compares_the_image_with_the_answer_as_a_statement(self):
    scene = Scene(dict(semantic=1.0))
    said = ('red', 'two', 'yes', 'red')
    scene.say([said] * ROWS)
    examples = scene.examples('understand', 'eval', category='color')
    pairs = [(e.source, e.statement(word)) for e in examples for word in said]
    value = scene.values('understand', examples)['semantic']
    np.testing.assert_allclose(value.ravel(), self.similarity(scene, *zip(*pairs)), atol=1e-6)
    np.testing.assert_allclose(value[:, 3], value[:, 0], atol=1e-6)  # The same answer.
    self.assertGreater(value[:, :3].std(axis=1).min(), 1e-4)
    # A similarity of image and question would be the same for a whole group.
    asked = [(e.source, e.prompt) for e in examples for _ in range(GROUP)]
    constant = self.similarity(scene, *zip(*asked)).reshape(ROWS, GROUP)
    self.assertLess(constant.std(axis=1).max(), 1e-6)

  def test_a_reply_without_an_answer_stays_as_it_is(self):
    scene = Scene(dict(semantic=1.0))
    scene.say([('red', 'the', 'above', 'circle')] * ROWS)
    examples = scene.examples('understand', 'eval', category='color')
    said = [
      text for e in examples for text in (e.statement('red'), 'the', 'above', e.statement('circle'))
    ]
    shown = [e.source for e in examples for _ in range(GROUP)]
    value = scene.values('understand', examples)['semantic']
    np.testing.assert_allclose(value.ravel(), self.similarity(scene, shown, said), atol=1e-6)


class TruncatedTest(absltest.TestCase):
  def test_statements_that_the_encoder_cannot_hold_are_counted_and_logged(self):
    scene = Scene(dict(semantic=1.0))
    limit = scene.experiment.config.data.prompt_tokens

    # Of the first prompt all statements fit, of the others those of two answers do not.
    def say(long):
      return lambda word: ' '.join([word] * (limit + (long and word in ('red', 'two'))))

    examples = [
      dataclasses.replace(e, statement=say(i > 0))
      for i, e in enumerate(scene.examples('understand'))
    ]
    with self.assertLogs(level='WARNING') as logged:
      _, facts = scene.score('understand', examples)
      scene.score('understand', examples)
    np.testing.assert_array_equal(
      facts['truncated/captions'], [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    )
    self.assertLen(logged.output, 1)  # Once a run, with the first such text.
    self.assertIn('red red', logged.output[0])
    self.assertIn(f'{limit + 1} tokens, of which the dual encoder reads {limit}', logged.output[0])


class DenseTest(absltest.TestCase):
  def test_key_words_of_prompts(self):
    experiment = scene_lib.build(dict(dense=1.0))
    words, most = sorted(experiment.data.key_words), experiment.config.data.prompt_tokens
    texts = ['a red circle above a red cross', 'an image']
    row, count = semantic.key_words(words, texts, most)
    self.assertEqual(row.shape, (2, experiment.config.data.prompt_tokens))
    found = {words[r]: n for r, n in zip(row[0], count[0]) if n}
    self.assertEqual(found, {'red': 2, 'circle': 1, 'above': 1, 'cross': 1})
    self.assertEqual(count[1].sum(), 0)

  def test_table_holds_the_key_words(self):
    scene = Scene(dict(dense=1.0))
    settings = scene.experiment.config.align.rewards.generate.dense
    table = semantic.Dense('generate', settings, scene.experiment).load(scene.frozen)
    words = sorted(scene.data.key_words)
    self.assertEqual(table.shape[0], len(words))
    for word in ('blue', 'two', 'left'):
      _, (vector,) = scene.embed(texts=[word])
      np.testing.assert_allclose(table[words.index(word)], vector, atol=1e-6)

  def test_nobody_pays_for_no_table(self):
    absent = base.RewardParams(None, None, None)
    with mock.patch.object(semantic.Dense, 'load', return_value=()) as load:
      scorer_lib.Scorer(scene_lib.build(dict(semantic=1.0))).load(absent)
      load.assert_not_called()
      scorer_lib.Scorer(scene_lib.build(dict(dense=1.0))).load(absent)
      self.assertEqual(load.call_count, 2)  # Of two tasks that sample images.

  def test_more_patches_than_there_are_stop_before_any_work(self):
    patches = 4

    def build_at(top, weights):
      entries = {t: {'dense': {'top': top}} for t in ('generate', 'edit', 'think_generate')}
      return scorer_lib.Scorer(scene_lib.build(weights, entries))

    build_at(patches, dict(dense=1.0))
    build_at(patches + 1, dict(semantic=1.0))
    for top in (0, patches + 1):
      with self.assertRaisesRegex(
        ValueError,
        f'config.align.rewards.generate.dense.top is {top}; allowed: 1 to the {patches} ',
      ):
        build_at(top, dict(dense=1.0))


if __name__ == '__main__':
  absltest.main()
