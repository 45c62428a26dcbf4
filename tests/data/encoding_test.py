"""Tests of lvrpo_jax.data.{pipeline,mixture}."""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from configs import base
from lvrpo_jax import types
from lvrpo_jax.data import encoding
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import loader
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.data.shapes import source as shapes_source
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

PAD = types.PADDING
WORDS = ('a', 'red', 'circle', 'what', 'colour', '?')
TOKENIZER = tokenizer_lib.from_words(WORDS)
A, RED, CIRCLE = (TOKENIZER.encode(word)[0] for word in WORDS[:3])
BOS, EOS = TOKENIZER.bos, TOKENIZER.eos
SOI, EOI = TOKENIZER.start_of_image, TOKENIZER.end_of_image
SOURCE = np.full((4, 4, 3), 9, np.uint8)
TARGET = np.full((4, 4, 3), 200, np.uint8)


def encoder(**changes):
  return encoding.Encoder(
    TOKENIZER,
    encoding.Template(
      **{
        **dict(prompt_words=3, answer_words=2, vit_tokens=2, latent_tokens=1, image_size=4),
        **changes,
      }
    ),
  )


def example(prompt, **kwargs):
  return examples_lib.Example(5, prompt, **kwargs)


def rows(layout, row):
  """(sample, order, split, mode, position) of a row, as lists."""
  return [
    x[row].tolist()
    for x in (
      layout.sample_BL,
      layout.order_BL,
      layout.split_BL,
      layout.mode_BL,
      layout.position_BL,
    )
  ]


class EncoderTest(parameterized.TestCase):
  def test_generate(self):
    batch = encoder()(
      'generate',
      [example('a red circle', target=TARGET), example('a', target=TARGET, drop_text=True)],
    )
    p = batch.prompts
    np.testing.assert_array_equal(p.ids_BL, [[BOS, A, RED, CIRCLE, EOS], [BOS, A, EOS, EOS, EOS]])
    self.assertEqual(
      rows(p.text, 0), [[0] * 5, [0, 1, 2, 3, 4], [0] * 5, [types.CAUSAL] * 5, [0, 1, 2, 3, 4]]
    )
    self.assertEqual(rows(p.text, 1)[0], [PAD] * 5)
    np.testing.assert_array_equal(p.next_position_B, [5, 0])
    np.testing.assert_array_equal(p.index_B, [5, 5])
    for empty in (p.vit.sample_BL, p.gen.sample_BL):
      self.assertEqual(empty.shape, (2, 0))
    self.assertEqual(p.source_BYXC.size, 0)
    np.testing.assert_array_equal(batch.target_BYXC, [TARGET, TARGET])
    self.assertEqual((batch.answer_BL.shape, batch.answer_mask_BL.shape), ((2, 0), (2, 0)))

  def test_understand(self):
    batch = encoder()(
      'understand',
      [
        example('what colour ?', source=SOURCE, answer='red'),
        example('a', source=SOURCE, answer='red circle'),
      ],
    )
    p = batch.prompts
    what, colour, mark = TOKENIZER.encode('what colour ?')
    np.testing.assert_array_equal(
      p.ids_BL, [[SOI, EOI, BOS, what, colour, mark, EOS], [SOI, EOI, BOS, A, EOS, EOS, EOS]]
    )
    self.assertEqual(
      rows(p.text, 1),
      [
        [0, 0, 0, 0, 0, PAD, PAD],
        [0, 3, 4, 5, 6, 7, 8],
        [0, 0, 1, 1, 1, 1, 1],
        [types.FULL] * 2 + [types.CAUSAL] * 5,
        [0, 0, 1, 2, 3, 4, 5],
      ],
    )
    self.assertEqual(rows(p.vit, 1), [[0, 0], [1, 2], [0, 0], [types.FULL] * 2, [0, 0]])
    self.assertEqual(p.gen.sample_BL.shape, (2, 0))
    np.testing.assert_array_equal(p.next_position_B, [6, 4])
    np.testing.assert_array_equal(p.source_BYXC, [SOURCE, SOURCE])
    np.testing.assert_array_equal(batch.answer_BL, [[BOS, RED, EOS, EOS], [BOS, RED, CIRCLE, EOS]])
    np.testing.assert_array_equal(batch.answer_mask_BL, [[1, 1, 0], [1, 1, 1]])
    self.assertEqual(batch.target_BYXC.size, 0)

  def test_edit(self):
    batch = encoder()(
      'edit',
      [
        example('a', source=SOURCE, target=TARGET),
        example('a', source=SOURCE, target=TARGET, drop_vit=True),
      ],
    )
    p = batch.prompts
    np.testing.assert_array_equal(p.ids_BL[0], [SOI, EOI, SOI, EOI, BOS, A, EOS, EOS, EOS])
    self.assertEqual(rows(p.gen, 0), [[0], [1], [0], [types.FULL], [0]])
    self.assertEqual(rows(p.vit, 0), [[0, 0], [4, 5], [1, 1], [types.FULL] * 2, [1, 1]])
    self.assertEqual(
      rows(p.text, 0),
      [
        [0] * 7 + [PAD] * 2,
        [0, 2, 3, 6, 7, 8, 9, 10, 11],
        [0, 0, 1, 1, 2, 2, 2, 2, 2],
        [types.FULL] * 4 + [types.CAUSAL] * 5,
        [0, 0, 1, 1, 2, 3, 4, 5, 6],
      ],
    )
    np.testing.assert_array_equal(p.next_position_B, [5, 5])
    self.assertEqual(rows(p.vit, 1)[0], [PAD, PAD])
    self.assertEqual(rows(p.text, 1)[0][:4], [0, 0, PAD, PAD])
    np.testing.assert_array_equal(batch.target_BYXC[0], TARGET)

  def test_uniform_rows_have_one_shape(self):
    encode = encoder(uniform=True)
    picture = dict(source=SOURCE, target=TARGET, answer='a')
    prompts = {task: encode(task, [example('a', **picture)]).prompts for task in tasks.TASKS}
    shapes = {task: [x.shape for x in jax.tree.leaves(p)] for task, p in prompts.items()}
    self.assertEqual(shapes['generate'], shapes['edit'])
    self.assertEqual(shapes['understand'], shapes['edit'])
    self.assertEqual(shapes['think_generate'], shapes['edit'])
    generate, understand = prompts['generate'], prompts['understand']
    self.assertEqual(rows(generate.text, 0)[0], [PAD] * 4 + [0] * 3 + [PAD] * 2)
    self.assertEqual(rows(generate.vit, 0)[0] + rows(generate.gen, 0)[0], [PAD] * 3)
    self.assertEqual(rows(understand.vit, 0)[0] + rows(understand.gen, 0)[0], [0, 0, PAD])
    self.assertEqual([int(p.next_position_B[0]) for p in prompts.values()], [3, 4, 5, 3])

  @parameterized.parameters(
    ('generate', 'a a red circle', 'prompt_words'), ('understand', 'red circle a', 'answer')
  )
  def test_too_long_text_is_named(self, task, text, key):
    kwargs = dict(answer=text, source=SOURCE) if task == 'understand' else dict(target=TARGET)
    prompt = 'a' if task == 'understand' else text
    with self.assertRaisesRegex(ValueError, f"'{text}' has {len(text.split())} tokens.*{key}"):
      encoder()(task, [example(prompt, **kwargs)])


class BatchesTest(parameterized.TestCase):
  def make(self, shard=(0, 1), length=8, size=2):
    return loader.batches(loader.IndexedSource(lambda i: i * 10, length), size, np.array, shard)

  def take(self, iterator, count):
    return [next(iterator).tolist() for _ in range(count)]

  def test_source_order_and_repetition(self):
    self.assertEqual(self.take(self.make(), 5), [[0, 10], [20, 30], [40, 50], [60, 70], [0, 10]])

  def test_deterministic(self):
    self.assertEqual(self.take(self.make(), 6), self.take(self.make(), 6))

  @parameterized.parameters(0, 1, 4, 7)
  def test_resume(self, done):
    first = self.make()
    self.take(first, done)
    state = first.get_state()
    want = self.take(first, 5)
    second = self.make()
    self.take(second, 2)
    second.set_state(state)
    self.assertEqual(self.take(second, 5), want)

  def test_shards_cover_all_rows_once(self):
    parts = [self.take(self.make((index, 2)), 2) for index in range(2)]
    flat = [list(itertools.chain(*part)) for part in parts]
    self.assertEqual(flat, [[0, 20, 40, 60], [10, 30, 50, 70]])

  def test_shards_together_equal_one_process(self):
    whole = self.take(self.make(size=4), 3)
    parts = [self.take(self.make((index, 2)), 3) for index in range(2)]
    for step in range(3):
      self.assertEqual(sorted(parts[0][step] + parts[1][step]), sorted(whole[step]))


@functools.cache
def world():
  d = base.get_config().data
  return shapes_source.ShapesData(
    seed=0,
    generate_kinds=d.generate_kinds.to_dict(),
    question_kinds=d.question_kinds.to_dict(),
    wrong=d.wrong,
    chatty=d.chatty,
    plan=d.plan,
    describe=d.describe,
    drop=d.drop,
  )


class MixtureTest(parameterized.TestCase):
  def examples(self, make, count=60):
    return [make(i) for i in range(count)]

  @parameterized.parameters(*tasks.TASKS)
  def test_every_text_fits_the_default_template(self, task):
    d = base.get_config().data
    encode = encoding.Encoder(
      world().tokenizer, encoding.Template(d.prompt_words, d.answer_words, 4, 4)
    )
    for make in (world().pretraining, world().prompt):
      examples = self.examples(functools.partial(make, task))
      batch = encode(task, examples)
      self.assertLen(batch.prompts.index_B, len(examples))

  @parameterized.parameters(*tasks.TASKS)
  def test_deterministic(self, task):
    for one, two in zip(
      self.examples(functools.partial(world().pretraining, task), 5),
      self.examples(functools.partial(world().pretraining, task), 5),
    ):
      self.assertEqual(
        (one.prompt, one.answer, one.drop_text), (two.prompt, two.answer, two.drop_text)
      )
      np.testing.assert_array_equal(one.target, two.target)

  @parameterized.parameters(*tasks.TASKS)
  def test_alignment_prompts_are_no_rows_of_pretraining(self, task):
    pretraining = {world().pretraining(task, i).index for i in range(60)}
    prompts = [world().prompt(task, i).index for i in range(60)]
    self.assertLen(set(prompts), 60)
    self.assertEmpty(pretraining & set(prompts))
    # The largest row number of either still is below the first of the other, and an int32.
    self.assertGreaterEqual(min(prompts), shapes_source.ALIGN_OFFSET)
    self.assertLess(2 * shapes_source.ALIGN_OFFSET - 1, 2**31)

  @parameterized.parameters(*tasks.TASKS)
  def test_evaluation_shares_no_meaning(self, task):
    held_out = {
      world().evaluation(task, split, kind, i).meaning
      for split in ('eval', 'unseen')
      for kind in world().kinds(task, split)
      for i in range(25)
    }
    self.assertGreater(len(held_out), 20)
    for make in (world().prompt, world().pretraining):
      seen = {make(task, i).meaning for i in range(150)}
      self.assertGreater(len(seen), 50)
      self.assertEmpty(seen & held_out)

  def test_meanings_of_prompts_are_in_the_training_split(self):
    for i in range(60):
      self.assertFalse(
        splits.is_held_out(world().prompt('generate', i).meaning, world().world.eval_fraction)
      )

  def test_kinds_follow_their_weights(self):
    data = shapes_source.ShapesData(
      seed=0,
      generate_kinds={'colors': 3.0, 'counting': 1.0},
      question_kinds={'color': 1.0},
      wrong=0.0,
      chatty=0.0,
      plan=0.0,
      describe=0.0,
      drop=0.0,
    )
    kinds = [data.example('generate', 'align', i).kind for i in range(400)]
    self.assertEqual(set(kinds), {'colors', 'counting'})
    self.assertAlmostEqual(kinds.count('colors') / 400, 0.75, delta=0.07)
    self.assertEqual({data.example('understand', 'align', i).kind for i in range(20)}, {'color'})

  def test_answers_as_found(self):
    data = lambda wrong, drop: shapes_source.ShapesData(
      seed=0,
      generate_kinds={'colors': 1.0},
      question_kinds={'color': 1.0},
      wrong=wrong,
      chatty=0.0,
      plan=0.0,
      describe=0.0,
      drop=drop,
    )
    for wrong in (0.0, 1.0):
      for i in range(20):
        right = data(wrong, 0.0).world.question(i, 'train', 'color').answer
        said = data(wrong, 0.0).pretraining('understand', i).answer
        self.assertEqual(wording.read_answer(said)[0] == right, wrong == 0.0)
    for drop in (0.0, 1.0):
      self.assertEqual(
        {data(0.0, drop).pretraining('generate', i).drop_text for i in range(9)}, {bool(drop)}
      )
    self.assertFalse(data(0.0, 1.0).prompt('generate', 0).drop_text)

  def test_descriptions_take_their_share(self):
    data = shapes_source.ShapesData(
      seed=0,
      generate_kinds={'colors': 1.0},
      question_kinds={'color': 1.0},
      wrong=0.0,
      chatty=0.0,
      plan=0.0,
      describe=0.25,
      drop=0.0,
    )
    asked = [data.example('understand', 'pretrain', i).prompt in wording.DESCRIBE for i in range(400)]
    self.assertAlmostEqual(np.mean(asked), 0.25, delta=0.07)
    self.assertNoCommonElements(
      [data.example('understand', 'align', i).prompt for i in range(50)], wording.DESCRIBE
    )

  def test_judge_pairs_speak_the_vocabulary(self):
    for i in range(30):
      image, text = world().judge_pair(i)
      self.assertEqual((image.shape, image.dtype), ((world().image_size,) * 2 + (3,), np.uint8))
      world().tokenizer.encode(text)


if __name__ == '__main__':
  absltest.main()
