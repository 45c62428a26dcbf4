"""Tokenizers of words and of files encode, decode, and keep the ids of special tokens."""

import json
import pathlib
import tempfile

from absl.testing import absltest
import tokenizers
from tokenizers import models as token_models
from tokenizers import pre_tokenizers

from lvrpo_jax.data import tokenizer as tokenizer_lib

WORDS = ('a', 'red', 'circle', '?', ';')
SPECIAL = tuple(tokenizer_lib.SPECIAL.values())


class WordsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.tokenizer = tokenizer_lib.from_words(WORDS)

  def test_round_trip(self):
    for text in ('a red circle ?', 'circle ; circle', ''):
      ids = self.tokenizer.encode(text)
      self.assertLen(ids, len(text.split()))
      self.assertEqual(self.tokenizer.decode(ids), text)

  def test_one_token_a_word_and_the_special_ones(self):
    t = self.tokenizer
    ids = [t.encode(word)[0] for word in WORDS] + [t.bos, t.eos, t.start_of_image, t.end_of_image]
    self.assertLen(set(ids), len(WORDS) + 4)
    self.assertLess(max(ids), len(t))
    self.assertLen(t, len(WORDS) + 5)
    self.assertEqual(t.added, 4)

  def test_unknown_word_is_named(self):
    with self.assertRaisesRegex(ValueError, "'blue' in 'a blue circle'"):
      self.tokenizer.encode('a blue circle')

  def test_case_counts(self):
    with self.assertRaisesRegex(ValueError, "'Red'"):
      self.tokenizer.encode('a Red circle')

  def test_decode_stops_at_the_end_token(self):
    t = self.tokenizer
    ids = [t.bos, *t.encode('a red'), t.start_of_image, t.eos, *t.encode('circle'), t.eos]
    self.assertEqual(t.decode(ids), 'a red')
    self.assertEqual(t.decode([t.eos, *t.encode('a')]), '')

  def test_special_tokens_are_not_made_of_text(self):
    self.assertEqual(self.tokenizer.encode('a <|im_end|>')[1], self.tokenizer.eos)

  def test_save_and_load(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.tokenizer.save(folder / 'tokenizer.json')
    for path in (folder, folder / 'tokenizer.json', str(folder)):
      loaded = tokenizer_lib.from_path(path)
      self.assertEqual(loaded.added, 0)
      self.assertLen(loaded, len(self.tokenizer))
      self.assertEqual(loaded.encode('a red ?'), self.tokenizer.encode('a red ?'))
      self.assertEqual(loaded.decode(loaded.encode('a red ?')), 'a red ?')
      self.assertEqual(
        (loaded.bos, loaded.eos, loaded.start_of_image, loaded.end_of_image),
        (
          self.tokenizer.bos,
          self.tokenizer.eos,
          self.tokenizer.start_of_image,
          self.tokenizer.end_of_image,
        ),
      )
      with self.assertRaisesRegex(ValueError, "'blue'"):
        loaded.encode('blue')


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write_bpe(self, special=()):
    """A byte-level vocabulary with the two merges 're' and 'red'."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*alphabet, 're', 'red', *special])}
    (self.folder / 'vocab.json').write_text(json.dumps(vocabulary))
    (self.folder / 'merges.txt').write_text('#version: 0.2\nr e\nre d\n')
    return vocabulary

  def test_vocabulary_and_merges(self):
    vocabulary = self.write_bpe()
    t = tokenizer_lib.from_path(self.folder)
    # A byte-level vocabulary writes a space as 'Ġ'.
    want = [vocabulary[token] for token in ('red', 'Ġ', 'red', '1', '2')]
    self.assertEqual(t.encode('red red12'), want)
    self.assertEqual((t.added, len(t)), (4, len(vocabulary) + 4))
    for text in ('Redo: the ärger, 123!', ' two  spaces\n\nand lines', "I'll"):
      self.assertEqual(t.decode(t.encode(text)), text)

  def test_text_is_normalised(self):
    self.write_bpe()
    t = tokenizer_lib.from_path(self.folder)
    self.assertEqual(t.encode('e\u0301'), t.encode('\u00e9'))

  def test_special_tokens_at_hand_are_kept(self):
    vocabulary = self.write_bpe(SPECIAL[:3])
    t = tokenizer_lib.from_path(self.folder)
    self.assertEqual((t.bos, t.eos, t.start_of_image), tuple(vocabulary[s] for s in SPECIAL[:3]))
    self.assertEqual((t.added, t.end_of_image), (1, len(vocabulary)))

  def test_special_tokens_of_a_file_are_found(self):
    backend = tokenizers.Tokenizer(token_models.WordLevel({'a': 0, '[UNK]': 1}, unk_token='[UNK]'))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([SPECIAL[1]])
    backend.save(str(self.folder / 'tokenizer.json'))
    t = tokenizer_lib.from_path(self.folder)
    self.assertEqual((t.eos, t.added), (2, 3))

  def test_tokens_beside_the_vocabulary_keep_their_ids(self):
    size = len(self.write_bpe())
    ids = {
      '<|endoftext|>': size,
      SPECIAL[0]: size + 1,
      SPECIAL[1]: size + 2,
      '<tool>': size + 3,
      SPECIAL[2]: size + 4,
      SPECIAL[3]: size + 5,
    }
    names = list(ids)
    (self.folder / 'added_tokens.json').write_text(
      json.dumps({name: ids[name] for name in reversed(names[:3])})
    )
    (self.folder / 'tokenizer_config.json').write_text(
      json.dumps({'added_tokens_decoder': {str(ids[name]): {'content': name} for name in names}})
    )
    t = tokenizer_lib.from_path(self.folder)
    self.assertEqual(
      (t.added, t.bos, t.eos, t.start_of_image, t.end_of_image),
      (0, size + 1, size + 2, size + 4, size + 5),
    )
    (self.folder / 'tokenizer_config.json').unlink()
    (self.folder / 'added_tokens.json').write_text(json.dumps({SPECIAL[0]: size + 7}))
    with self.assertRaisesRegex(ValueError, f'should have id {size + 7}, but would have {size}'):
      tokenizer_lib.from_path(self.folder)
    (self.folder / 'added_tokens.json').write_text('[')
    with self.assertRaisesRegex(ValueError, 'cannot read .*added_tokens.json'):
      tokenizer_lib.from_path(self.folder)

  def test_missing(self):
    for path in (self.folder, self.folder / 'gone'):
      with self.assertRaisesRegex(FileNotFoundError, f'{path}.*tokenizer.json.*merges.txt'):
        tokenizer_lib.from_path(path)

  def test_half_of_the_pair_is_missing(self):
    self.write_bpe()
    (self.folder / 'merges.txt').unlink()
    with self.assertRaises(FileNotFoundError):
      tokenizer_lib.from_path(self.folder)

  def test_no_tokenizer(self):
    path = self.folder / 'tokenizer.json'
    path.write_text('{"model": 1}')
    with self.assertRaisesRegex(ValueError, f'{path} is no tokenizer'):
      tokenizer_lib.from_path(self.folder)


if __name__ == '__main__':
  absltest.main()
