"""Examples of the shapes data source: splits, frequencies, and answers as found."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from configs import base
from lvrpo_jax.data import encoding
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.data.shapes import source as shapes_source
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording

PRETRAIN, ALIGN = examples_lib.PRETRAIN, examples_lib.ALIGN


@functools.cache
def default_source():
  """The source of the default config."""
  options = base.get_config().data.options.to_dict()
  return shapes_source.ShapesData(seed=0, **options)


def make_source(**changes):
  """A source of few kinds, whose answers are right."""
  options = {
    'generate_kinds': {'colors': 1.0},
    'question_kinds': {'color': 1.0},
    'wrong': 0.0,
    'chatty': 0.0,
    'plan': 0.0,
    'describe': 0.0,
    'drop': 0.0,
  }
  return shapes_source.ShapesData(seed=0, **{**options, **changes})


def training_examples(task, split, count=60):
  """The first examples of a task in a training split of the default source."""
  return [default_source().example(task, split, index) for index in range(count)]


class SourceTest(parameterized.TestCase):
  @parameterized.parameters(*tasks.TASKS)
  def test_every_text_fits_the_default_template(self, task):
    lengths = base.get_config().data
    template = encoding.Template(
      prompt_tokens=lengths.prompt_tokens,
      answer_tokens=lengths.answer_tokens,
      vit_tokens=4,
      latent_tokens=4,
    )
    encode = encoding.Encoder(default_source().tokenizer, template)
    for split in (PRETRAIN, ALIGN):
      examples = training_examples(task, split)
      self.assertLen(encode(task, examples).prompts.index_B, len(examples))

  @parameterized.parameters(*tasks.TASKS)
  def test_deterministic(self, task):
    runs = (training_examples(task, PRETRAIN, 5) for _ in range(2))
    for one, two in zip(*runs, strict=True):
      self.assertEqual(
        (one.prompt, one.answer, one.drop_text), (two.prompt, two.answer, two.drop_text)
      )
      np.testing.assert_array_equal(one.target, two.target)

  @parameterized.parameters(*tasks.TASKS)
  def test_alignment_prompts_are_no_rows_of_pretraining(self, task):
    pretraining = {example.index for example in training_examples(task, PRETRAIN)}
    prompts = [example.index for example in training_examples(task, ALIGN)]
    self.assertLen(set(prompts), 60)
    self.assertEmpty(pretraining & set(prompts))
    # The largest index of either is still below the first of the other, and an int32.
    self.assertGreaterEqual(min(prompts), shapes_source.ALIGN_OFFSET)
    self.assertLess(2 * shapes_source.ALIGN_OFFSET - 1, 2**31)

  @parameterized.parameters(*tasks.TASKS)
  def test_evaluation_shares_no_meaning(self, task):
    held_out = {
      default_source().example(task, split, index, kind).meaning
      for split in (examples_lib.EVAL, examples_lib.UNSEEN)
      for kind in default_source().categories(task, split)
      for index in range(25)
    }
    self.assertGreater(len(held_out), 20)
    for split in (ALIGN, PRETRAIN):
      seen = {example.meaning for example in training_examples(task, split, 150)}
      self.assertGreater(len(seen), 50)
      self.assertEmpty(seen & held_out)

  def test_meanings_of_prompts_are_in_the_training_split(self):
    fraction = default_source().world.eval_fraction
    for example in training_examples('generate', ALIGN):
      self.assertFalse(splits.is_held_out(example.meaning, fraction))

  def test_kinds_follow_their_weights(self):
    data = make_source(generate_kinds={'colors': 3.0, 'counting': 1.0})
    kinds = [data.example('generate', ALIGN, i).kind for i in range(400)]
    self.assertEqual(set(kinds), {'colors', 'counting'})
    self.assertAlmostEqual(kinds.count('colors') / 400, 0.75, delta=0.07)
    self.assertEqual({data.example('understand', ALIGN, i).kind for i in range(20)}, {'color'})

  def test_answers_as_found(self):
    for wrong in (0.0, 1.0):
      data = make_source(wrong=wrong)
      for index in range(20):
        right = data.world.question(index, 'train', 'color').answer
        found = data.example('understand', PRETRAIN, index).answer
        self.assertEqual(wording.read_answer(found)[0] == right, wrong == 0.0)

  def test_texts_are_left_out_in_pretraining_alone(self):
    for drop in (0.0, 1.0):
      data = make_source(drop=drop)
      dropped = {data.example('generate', PRETRAIN, index).drop_text for index in range(9)}
      self.assertEqual(dropped, {bool(drop)})
    self.assertFalse(make_source(drop=1.0).example('generate', ALIGN, 0).drop_text)

  def test_descriptions_take_their_share(self):
    data = make_source(describe=0.25)
    asked = [data.example('understand', PRETRAIN, i).prompt in wording.DESCRIBE for i in range(400)]
    self.assertAlmostEqual(np.mean(asked), 0.25, delta=0.07)
    self.assertNoCommonElements(
      [data.example('understand', ALIGN, i).prompt for i in range(50)], wording.DESCRIBE
    )

  def test_texts_of_pairs_are_of_the_vocabulary(self):
    data = default_source()
    for index in range(30):
      image, text = data.image_text_pair(index)
      self.assertEqual((image.shape, image.dtype), ((data.image_size,) * 2 + (3,), np.uint8))
      data.tokenizer.encode(text)


if __name__ == '__main__':
  absltest.main()
