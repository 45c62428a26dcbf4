"""Tests of lvrpo_jax.rollouts.generator: buckets, and the few programs that they leave to compile."""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from configs import tiny
from lvrpo_jax import flow
from lvrpo_jax.rollouts import generator
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from tests.helpers import released_folder


class BucketTest(parameterized.TestCase):
  @parameterized.parameters(
    (1000, 1000, (64, 64)),
    (1010, 990, (64, 64)),
    (900, 1600, (36, 64)),
    (10, 1, (64, 32)),
    (1, 10, (32, 64)),
    (400, 300, (64, 48)),
    (300, 401, (48, 64)),
  )
  def test_ratio(self, width, height, expected):
    self.assertEqual(generator.bucket(width, height, 64), expected)

  def test_images_keep_their_ratio_within_a_bucket(self):
    """Neighbouring ratios are at most 4/3 apart, so the nearest is within the root of that."""
    for ratio in np.geomspace(0.5, 2, 101):
      w, h = generator.bucket(int(1000 * ratio), 1000, 960)
      self.assertLess(abs(np.log(w / h / ratio)), np.log(4 / 3) / 2 + 2e-3)

  @parameterized.parameters((0, 0), (1, 32), (32, 32), (33, 64), (64, 64), (65, 128), (1000, 1024))
  def test_text(self, count, expected):
    self.assertEqual(generator.text_bucket(count), expected)


class ModelTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    base = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    config = tiny.get_config()
    config.checkpoint = str(released_folder.write(base / 'released'))
    cls.experiment = experiment_lib.build(config, base / 'work')
    cls.params, cls.vae_params = weights.load_newest(cls.experiment)

  def model(self, buckets):
    return generator.Model(
      self.experiment.policy, self.experiment.data.tokenizer, self.params, self.vae_params, buckets
    )

  def edit(self, model, size, prompt):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    contexts, shape = model.contexts('edit', prompt, image, '', jax.random.key(0))
    guidance = guidance_lib.Guidance(3.0, 2.0, 0.0, 1.0, 'global', 0.0)
    drawn = model.draw(contexts, shape, guidance, flow.time_grid(3, 1.0), jax.random.key(1))
    self.assertEqual(drawn.shape, (*shape, 3))
    model.answer(contexts.main, generator.Decoding(3), jax.random.key(2))

  def test_nothing_compiles_after_the_buckets_have_been_seen(self):
    model = self.model(True)

    def programs():
      return [
        f._cache_size()
        for f in (model._prefill, model._answer, model._step, model._encode, model._decode)
      ]

    self.edit(model, (40, 40), 'remove the circle')
    first = programs()
    for size, prompt in (
      ((41, 39), 'remove it'),
      ((90, 91), 'add a red circle , please'),
      ((300, 301), 'circle'),
    ):
      self.edit(model, size, prompt)
    self.assertEqual(programs(), first)
    self.edit(model, (40, 80), 'remove the circle')
    self.assertNotEqual(programs(), first)  # Another ratio is another program: they are counted.

  def test_guided_picture_without_a_system_prompt(self):
    """The branch without the text then has nothing before the image."""
    drawn = []
    for buckets in (True, False):
      model = self.model(buckets)
      contexts, _ = model.contexts('generate', 'a red circle', None, '', jax.random.key(0))
      self.assertEmpty(contexts.without_text)
      guidance = guidance_lib.Guidance(4.0, 1.0, 0.0, 1.0, 'global', 0.0)
      drawn.append(
        model.draw(contexts, (24, 24), guidance, flow.time_grid(3, 1.0), jax.random.key(1)).astype(
          int
        )
      )
      unguided = model.draw(
        contexts,
        (24, 24),
        guidance_lib.Guidance(1.0, 1.0, 0.0, 1.0, 'global', 0.0),
        flow.time_grid(3, 1.0),
        jax.random.key(1),
      ).astype(int)
      self.assertGreater(np.abs(drawn[-1] - unguided).max(), 1)
    self.assertLessEqual(np.abs(drawn[0] - drawn[1]).max(), 1)

  def test_padding_of_a_bucket_changes_nothing(self):
    def segments(model):
      return [model.text('a red circle')]

    with_room, exact = (
      model.prefill(segments(model)) for model in (self.model(True), self.model(False))
    )
    self.assertGreater(with_room.valid_BS.shape[1], exact.valid_BS.shape[1])
    self.assertEqual(with_room.next_position_B[0], exact.next_position_B[0])
    valid = np.asarray(with_room.valid_BS[0])
    np.testing.assert_allclose(with_room.k_EBSJK[:, 0, valid], exact.k_EBSJK[:, 0], atol=1e-5)
    np.testing.assert_allclose(with_room.v_EBSJK[:, 0, valid], exact.v_EBSJK[:, 0], atol=1e-5)


if __name__ == '__main__':
  absltest.main()
