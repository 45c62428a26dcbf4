"""The dual encoder of a released folder, and that of the data: their images and their texts."""

import json
import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
from PIL import Image
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

from configs import base as base_config
from configs import tiny
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models.siglip import model as siglip
from lvrpo_jax.models.siglip import params as siglip_params
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import scorer as scorer_lib
from lvrpo_jax.runtime import dual_encoder
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from tests.helpers import jax_settings
from tests.helpers import scene as scene_lib

setUpModule, tearDownModule = jax_settings.of_module(jax_default_matmul_precision='highest')

GOLDENS = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'siglip'
CASE = GOLDENS / 'siglip_square'
PLAIN = ('a', 'red', 'blue', 'green', 'circle', 'cross', 'square', 'above', 'below', 'two', 'an')
"""Words of captions, in lower case."""
WORDS = ('<unk>', '</s>', '<pad>', *PLAIN, *(f'word{i}' for i in range(3 + len(PLAIN), 50)))
"""The vocabulary by id."""
LENGTH, SIDE, EOS, PAD = 9, 28, 1, 2

MODEL = siglip.Siglip(
  siglip.SiglipVisionConfig(32, 48, 2, 4, SIDE, 7),
  siglip.SiglipTextConfig(32, 64, 2, 2, len(WORDS), LENGTH, 32),
)
"""The network of the folder, sizes by hand."""


def write_tokenizer(folder, end=True, **settings):
  """Writes a tokenizer of whole words.

  Args:
    end: whether it puts an end token behind every text.
    **settings: of its `tokenizer_config.json`, which is left out where there are none.
  """
  vocabulary = {word: i for i, word in enumerate(WORDS)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
  tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  if end:
    tokenizer.post_processor = processors.TemplateProcessing(
      single='$A </s>', special_tokens=[('</s>', EOS)]
    )
  # As released tokenizers do; the lengths of rows are the dual encoder's own matter.
  tokenizer.enable_truncation(5)
  tokenizer.enable_padding(length=7, pad_id=0, pad_token='<unk>')
  tokenizer.save(str(folder / 'tokenizer.json'))
  (folder / 'tokenizer_config.json').unlink(missing_ok=True)
  if settings:
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


class FolderTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    for name in ('config.json', 'model.safetensors'):
      shutil.copy(CASE / name, self.folder / name)
    write_tokenizer(self.folder)

  def change_config(self, change):
    path = self.folder / 'config.json'
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


class EmbeddingTest(FolderTestCase):
  def setUp(self):
    super().setUp()
    self.params = siglip_params.load(self.folder, MODEL)

  def apply(self, x, method):
    return jax.jit(MODEL.apply, static_argnames='method')({'params': self.params}, x, method=method)

  def test_network_of_the_folder(self):
    encoder = dual_encoder.released(self.folder)
    self.assertEqual(encoder.module, MODEL)
    self.assertEqual(encoder.image_size, SIDE)

  def test_texts_are_those_of_hugging_face(self):
    write_tokenizer(self.folder, end=False)
    encoder = dual_encoder.released(self.folder)
    ids, want = (np.load(CASE / f'{name}.npz') for name in ('inputs', 'outputs'))
    texts = [' '.join(WORDS[i] for i in row) for row in ids['ids_BL']]
    found, cut = encoder.token_ids(texts)
    np.testing.assert_array_equal(found, ids['ids_BL'])
    self.assertFalse(cut.any())
    pooled, tokens = encoder.embed_text(self.params, found)
    np.testing.assert_allclose(pooled, want['text_BD'], rtol=1e-4, atol=1e-4)
    for got, expected in zip((pooled, tokens), self.apply(ids['ids_BL'], 'embed_text')):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

  def test_images_are_those_of_hugging_face(self):
    encoder = dual_encoder.released(self.folder)
    floats = np.load(CASE / 'inputs.npz')['image_BYXC']
    pixels = np.round((floats + 1.0) * 127.5).astype(np.uint8)
    found = encoder.embed_image(self.params, jnp.asarray(pixels))
    exact = self.apply(pixels.astype(np.float32) / 127.5 - 1.0, 'embed_image')
    for got, expected in zip(found, exact):
      np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    want = np.load(CASE / 'outputs.npz')['image_BD']  # Of pixels that are not rounded.
    np.testing.assert_allclose(found[0], want, atol=5e-4)
    self.assertGreater(np.abs(want - want[[1, 2, 0]]).max(), 5e-2)

  @parameterized.parameters(20, 32, 56)
  def test_images_of_other_sizes_are_resampled(self, side):
    encoder = dual_encoder.released(self.folder)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 5, 5, 3)).astype(np.uint8)

    def grow(image, to):
      return np.asarray(Image.fromarray(image).resize((to, to), Image.BICUBIC))

    images = np.stack([grow(image, side) for image in coarse])
    # What Hugging Face's processor does: bicubic with antialiasing, rounded to bytes.
    resampled = np.stack([grow(image, SIDE) for image in images])
    found, _ = encoder.embed_image(self.params, jnp.asarray(images))
    want, _ = self.apply(resampled.astype(np.float32) / 127.5 - 1.0, 'embed_image')
    np.testing.assert_allclose(found, want, atol=6e-4)  # Bilinear: 1.1e-3 and more.
    self.assertGreater(np.abs(np.asarray(want) - np.asarray(want)[[1, 2, 0]]).max(), 4e-2)


class TextTest(FolderTestCase):
  def test_rows_are_padded_and_cut_to_the_length_of_the_tower(self):
    encoder = dual_encoder.released(self.folder)
    ids_of = {word: i for i, word in enumerate(WORDS)}
    fits = ['red'] * (LENGTH - 1)
    long = ['blue', *fits, 'two', 'circle']
    with self.assertLogs(level='WARNING') as logged:
      ids, cut = encoder.token_ids([' '.join(words) for words in (fits, long, ['a', 'new'], [])])
      encoder.token_ids([' '.join(long)])
    np.testing.assert_array_equal(cut, [False, True, False, False])
    red = ids_of['red']
    np.testing.assert_array_equal(
      ids,
      [
        [red] * (LENGTH - 1) + [EOS],
        [ids_of['blue'], *[red] * (LENGTH - 2), EOS],  # Its end token stays.
        [ids_of['a'], ids_of['<unk>'], EOS] + [EOS] * (LENGTH - 3),
        [EOS] * LENGTH,
      ],
    )
    self.assertEqual((ids.dtype, ids.shape), (np.int32, (4, LENGTH)))
    (line,) = logged.output  # Once a run.
    self.assertIn(f'{len(long)} tokens, of which the dual encoder reads {LENGTH - 1}', line)

  def test_without_an_end_token(self):
    write_tokenizer(self.folder, end=False)
    ids, cut = dual_encoder.released(self.folder).token_ids(['red ' * 20, 'red ' * LENGTH, 'red'])
    red = WORDS.index('red')
    np.testing.assert_array_equal(ids, [[red] * LENGTH, [red] * LENGTH, [red] + [EOS] * 8])
    np.testing.assert_array_equal(cut, [True, False, False])

  @parameterized.parameters(
    ({}, EOS, 0),
    (dict(pad_token='<pad>'), PAD, 0),
    (dict(pad_token={'content': '<pad>', 'special': True}), PAD, 0),
    (dict(pad_token=None, do_lower_case=True), EOS, WORDS.index('red')),
    (dict(do_lower_case=False), EOS, 0),
  )
  def test_settings_of_the_tokenizer(self, settings, pad, first):
    write_tokenizer(self.folder, **settings)
    ids, _ = dual_encoder.released(self.folder).token_ids(['RED circle'])
    circle = WORDS.index('circle')
    np.testing.assert_array_equal(ids, [[first, circle, EOS, *[pad] * (LENGTH - 3)]])

  def test_captions_that_fit_are_whole_with_the_tokenizer_of_the_data(self):
    experiment = scene_lib.build(dict(semantic=1.0))
    limit = experiment.config.data.prompt_tokens
    token_ids = experiment.dual_encoder.token_ids
    ids, cut = token_ids(['red ' * limit, 'red ' * (limit + 1), ''])
    np.testing.assert_array_equal(cut, [False, True, False])
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[:, -1], [experiment.policy.eos] * 3)
    np.testing.assert_array_equal(token_ids(['red ' * limit])[0], ids[:1])

  def test_sizes_of_the_small_one(self):
    tokenizer = tokenizer_lib.from_words(['red', 'blue'])
    settings = base_config.dual_encoder()
    settings.update(width=24, heads=3, depth=2, ff_width=40, patch=8)
    encoder = dual_encoder.small(ml_collections.FrozenConfigDict(settings), tokenizer, 32, 5)
    vision, text = encoder.module.vision_config, encoder.module.text_config
    self.assertEqual(
      (vision.image_size, vision.patch, vision.hidden, vision.layers, vision.heads, vision.mlp),
      (32, 8, 24, 2, 3, 40),
    )
    self.assertEqual(
      (text.vocab, text.max_positions, text.projection, text.hidden, text.layers),
      (len(tokenizer), 6, 24, 24, 2),
    )


class RefusedTest(FolderTestCase):
  def refuse(self, message):
    with self.assertRaises(ValueError) as caught:
      dual_encoder.released(self.folder)
    self.assertStartsWith(str(caught.exception), f"config.dual_encoder.path is '{self.folder}'")
    self.assertIn(message, str(caught.exception))

  @parameterized.parameters('config.json', 'tokenizer.json')
  def test_a_file_that_is_not_there(self, name):
    (self.folder / name).unlink()
    self.refuse('')

  @parameterized.parameters(('config.json', ''), ('tokenizer.json', 'tokenizer.json'))
  def test_a_file_that_is_something_else(self, name, message):
    (self.folder / name).write_text('no JSON')
    self.refuse(message)

  def test_another_model(self):
    self.change_config(lambda config: config.update(model_type='clip'))
    self.refuse("model_type 'clip'; allowed: 'siglip', 'siglip2'")

  def test_a_model_of_flexible_size(self):
    shutil.copy(GOLDENS / 'siglip2_square' / 'config.json', self.folder / 'config.json')
    self.refuse('NaFlex')

  def test_a_padding_token_that_is_not_there(self):
    write_tokenizer(self.folder, pad_token='<blank>')
    self.refuse("no token '<blank>' to pad with")


class ExperimentTest(FolderTestCase):
  def build(self):
    config = tiny.get_config()
    config.model.depth = 1
    config.dual_encoder.path = str(self.folder)
    config.align.prompts.update(generate=2, understand=2, edit=0)
    config.align.rollout.group_size = 2
    for entries in config.align.rewards.values():
      for name, entry in entries.items():
        entry.weight = float(name == 'semantic')
    return experiment_lib.build(config, pathlib.Path('unused'))

  def test_the_weights_of_the_folder(self):
    experiment = self.build()
    self.assertEqual(experiment.dual_encoder.module, MODEL)
    params = weights.read_dual_encoder(experiment)
    want = siglip_params.load(self.folder, MODEL)
    jax.tree.map(np.testing.assert_array_equal, params, want)

  def test_other_weights_are_refused(self):
    self.change_config(lambda config: config['text_config'].update(intermediate_size=48))
    with self.assertRaisesRegex(ValueError, f"config.dual_encoder.path is '{self.folder}': "):
      weights.read_dual_encoder(self.build())

  def test_semantic_reward_by_the_released_model(self):
    experiment = self.build()
    encoder, params = experiment.dual_encoder, weights.read_dual_encoder(experiment)
    scorer, frozen = scorer_lib.Scorer(experiment), base.RewardParams(None, None, params)
    scorer.load(frozen)
    rng = np.random.default_rng(0)
    examples = [experiment.data.example('generate', 'align', i) for i in range(2)]
    pixels = jnp.asarray(rng.integers(0, 256, (2, 2, 32, 32, 3)), jnp.uint8)
    prompts = experiment.encoder('generate', examples).prompts
    samples = scorer.samples('generate', examples, pixels, 1)
    found, _ = scorer.score(samples, prompts, frozen, scene_lib.NOBODY)
    texts, _ = encoder.embed_text(params, encoder.token_ids([e.prompt for e in examples])[0])
    for b, g in np.ndindex(2, 2):
      image, _ = encoder.embed_image(params, pixels[b, g][None])
      want = float(np.asarray(image[0]) @ np.asarray(texts[b]))
      self.assertAlmostEqual(float(found['semantic'].value_BG[b, g]), want, places=5)
    self.assertGreater(np.ptp(np.asarray(found['semantic'].value_BG)), 1e-3)


if __name__ == '__main__':
  absltest.main()
