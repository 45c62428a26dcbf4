"""Encoded rows of every task, against hand-worked ids and layouts."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import encoding
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib

PAD = types.PADDING
WORDS = ('a', 'red', 'circle', 'what', 'colour', '?')
TOKENIZER = tokenizer_lib.from_words(WORDS)
A, RED, CIRCLE = (TOKENIZER.encode(word)[0] for word in WORDS[:3])
BOS, EOS = TOKENIZER.bos, TOKENIZER.eos
SOI, EOI = TOKENIZER.start_of_image, TOKENIZER.end_of_image
SOURCE = np.full((4, 4, 3), 9, np.uint8)
TARGET = np.full((4, 4, 3), 200, np.uint8)


def encoder(**changes):
  """An encoder of short rows."""
  template = encoding.Template(
    prompt_tokens=3, answer_tokens=2, vit_tokens=2, latent_tokens=1, image_size=4
  )
  return encoding.Encoder(TOKENIZER, dataclasses.replace(template, **changes))


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
    picture = {'source': SOURCE, 'target': TARGET, 'answer': 'a'}
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
    ('generate', 'a a red circle', 'prompt_tokens'),
    ('understand', 'red circle a', 'answer_tokens'),
  )
  def test_too_long_text_is_named(self, task, text, key):
    if task == 'understand':
      row = example('a', answer=text, source=SOURCE)
    else:
      row = example(text, target=TARGET)
    with self.assertRaisesRegex(ValueError, f"'{text}' has {len(text.split())} tokens.*{key}"):
      encoder()(task, [row])


if __name__ == '__main__':
  absltest.main()
