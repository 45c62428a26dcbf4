"""Tests of the semantic, knowledge and rule rewards against loops and small scenes."""

import dataclasses
import functools
import math

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.data import detection
from lvrpo_jax.data import examples
from lvrpo_jax.data.shapes import detect_moments
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import source as shapes_source
from lvrpo_jax.data.shapes import world
from lvrpo_jax.rewards import knowledge
from lvrpo_jax.rewards import rules
from lvrpo_jax.rewards import semantic


def units(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


DATA = shapes_source.ShapesData(
  seed=0,
  generate_kinds={'colors': 1.0},
  question_kinds={'color': 1.0},
  wrong=0.0,
  chatty=0.0,
  plan=0.0,
  describe=0.0,
  drop=0.0,
)


class SemanticTest(parameterized.TestCase):
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
    shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
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


class KnowledgeTest(absltest.TestCase):
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


def scene(*objects):
  """A scene of (shape, colour, cell)."""
  rng = np.random.default_rng(0)
  return render.Scene(tuple(render.draw_object(rng, *o) for o in objects))


def one(shape, color=None):
  entry = {'class': shape, 'count': 1} | ({'color': color} if color else {})
  return {'tag': 'colors' if color else 'single_object', 'include': [entry], 'exclude': []}


class RuleTest(parameterized.TestCase):
  def test_images_meet_their_own_record_in_order(self):
    circle, cross, pair = (
      render.render(s)
      for s in (
        scene(('circle', 'red', 0)),
        scene(('cross', 'blue', 3)),
        scene(('circle', 'red', 0), ('cross', 'blue', 3)),
      )
    )
    images = np.stack([[circle, cross, pair], [cross, pair, circle]])
    correct, parts = rules.images(
      detect_moments.detect_components, images, [one('circle', 'red'), one('cross')]
    )
    np.testing.assert_array_equal(correct, [[1, 0, 1], [1, 1, 0]])
    self.assertEqual((correct.dtype, parts.dtype), (np.float32, np.float32))
    self.assertTrue(np.all(parts[correct == 0] < 1))
    # A right image with an object that nobody asked for is paid less.
    fewer = 1 - rules.SURPLUS_PENALTY
    np.testing.assert_array_equal(parts[correct == 1], [1, fewer, 1, fewer])
    self.assertGreaterEqual(parts.min(), 0)

  def test_the_detector_sees_pixels_only(self):
    seen = []

    def detector(images_RYXC):
      seen.append(images_RYXC)
      return [[] for _ in images_RYXC]

    images = np.arange(2 * 3 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 3, 32, 32, 3)
    correct, parts = rules.images(detector, images, [one('circle')] * 2)
    np.testing.assert_array_equal(seen[0], images.reshape(6, 32, 32, 3))
    np.testing.assert_array_equal(correct, np.zeros((2, 3)))
    np.testing.assert_array_equal(parts, np.zeros((2, 3)))

  def test_edits_are_judged_against_their_own_source(self):
    items = [world.World().edit(i, 'train', kind) for i, kind in enumerate(('recolor', 'add'))]
    source, target = (
      np.stack([render.render(s) for s in side])
      for side in ([i.scene for i in items], [i.target for i in items])
    )
    images = np.stack([target, source], axis=1)
    specs = [item.spec for item in items]
    correct, parts = rules.edits(detect_moments.detect_components, source, images, specs)
    np.testing.assert_array_equal(correct, [[1, 0], [1, 0]])
    self.assertTrue(np.all(parts[:, 0] == 1) and np.all(parts[:, 1] < 1))
    swapped, _ = rules.edits(detect_moments.detect_components, source[::-1], images, specs)
    np.testing.assert_array_equal(swapped, np.zeros((2, 2)))

  def test_answers(self):
    texts = [['red', 'it is red .', 'think : a red circle ; red', 'blue'], ['two', '', '?', 'yes']]
    correct, well_formed = rules.answers(texts, ['red', 'two'], DATA.read_answer, DATA.well_formed)
    np.testing.assert_array_equal(correct, [[1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(well_formed, [[1, 0, 1, 1], [1, 0, 0, 1]])

  def test_answers_are_read_as_the_data_says(self):
    read = lambda text: text.rstrip('.').split()[-1] if text else None
    correct, well_formed = rules.answers(
      [['Paris', 'It is Paris.', 'Rome', '']], ['Paris'], read, lambda text: text.endswith('.')
    )
    np.testing.assert_array_equal(correct, [[1, 1, 0, 0]])
    np.testing.assert_array_equal(well_formed, [[0, 1, 0, 0]])

  def test_regions_are_those_of_the_images(self):
    width, height = 96, 64

    def detector(images_RYXC):
      # At (40, 20): to the left and at the top here, to the right and at the bottom of 32 pixels.
      return [[detection.Detection('circle', 'red', (35, 15, 45, 25), 0.9)] for _ in images_RYXC]

    spec = one('circle')
    spec['include'][0]['region'] = 'top left'
    images = np.zeros((1, 2, height, width, 3), np.uint8)
    correct, parts = rules.images(detector, images, [spec])
    np.testing.assert_array_equal(correct, np.ones((1, 2)))
    np.testing.assert_array_equal(parts, np.ones((1, 2)))

  @parameterized.parameters(
    ('generate', 'spec', "'include': .*'class': 'circle'"),
    ('edit', 'spec', "'keep': .*'new': "),
    ('understand', 'answer', "such as 'red'"),
  )
  def test_what_rules_compare_with_must_be_there(self, task, field, form):
    known = examples.Example(3, 'a', answer='red', spec=one('circle'))
    self.assertEqual(rules.targets(task, [known], 'it'), [getattr(known, field)])
    unknown = dataclasses.replace(known, index=7, **{field: None})
    with self.assertRaisesRegex(
      ValueError, f"example 7 of '{task}' has no {field}, .*the weight.*expected .*{form}"
    ):
      rules.targets(task, [known, unknown], 'the weight')

  @parameterized.parameters('images', 'edits')
  def test_the_records_shown_can_be_read(self, kind):
    images = np.zeros((1, 1, 32, 32, 3), np.uint8)
    nothing = lambda images_RYXC: [[] for _ in images_RYXC]
    given = (images[0],) if kind == 'edits' else ()
    correct, parts = getattr(rules, kind)(nothing, *given, images, [rules.RECORDS[kind]])
    self.assertEqual(correct, 0.0)
    self.assertLess(parts, 1.0)

  def test_text_reward_pays_the_answer_more_than_the_format(self):
    correct, well_formed = np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([[1.0, 0.0, 1.0, 0.0]])
    np.testing.assert_allclose(rules.text_reward(correct, well_formed), [[1.0, 0.8, 0.2, 0.0]])


if __name__ == '__main__':
  absltest.main()
