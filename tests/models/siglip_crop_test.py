"""Tests of lvrpo_jax.models.siglip.model on image sides that are no multiple of the patch."""

import dataclasses
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.models.siglip import model as siglip
from lvrpo_jax.models.siglip import params as siglip_params
from tests.helpers import jax_settings

setUpModule, tearDownModule = jax_settings.of_module(
  jax_default_matmul_precision='highest', jax_numpy_rank_promotion='raise'
)

VISION = siglip.SiglipVisionConfig(
  hidden=24, mlp=32, layers=1, heads=3, image_size=20, patch=6, eps=1e-5
)
TEXT = siglip.SiglipTextConfig(
  hidden=16, mlp=32, layers=1, heads=2, vocab=50, max_positions=9, projection=24
)
EXTENT = 18
"""Pixels along a side that belong to whole patches."""


def variables(model, seed=0):
  """Returns random variables of a tower or a dual encoder, scaled so that softmax is not flat."""
  size = VISION.image_size
  args = [jnp.zeros((1, size, size, 3))]
  if isinstance(model, siglip.Siglip):
    args.append(jnp.zeros((1, 3), jnp.int32))
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


class CropTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.tower = siglip.VisionTower(VISION)
    self.variables = variables(self.tower)
    rng = np.random.default_rng(1)
    self.image = rng.uniform(-1, 1, (2, 20, 20, 3)).astype(np.float32)

  @parameterized.parameters((20, 6, 9), (384, 14, 729), (24, 8, 9), (13, 7, 1))
  def test_grid_has_the_whole_patches_of_a_side(self, size, patch, positions):
    tower = siglip.VisionTower(dataclasses.replace(VISION, image_size=size, patch=patch))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    (hidden, pooled), shapes = jax.eval_shape(tower.init_with_output, jax.random.key(0), image)
    self.assertEqual(shapes['params']['positions'].shape, (positions, 24))
    self.assertEqual((hidden.shape, pooled.shape), ((1, positions, 24), (1, 24)))

  def test_equals_the_cropped_image(self):
    cropped = siglip.VisionTower(dataclasses.replace(VISION, image_size=EXTENT))
    got = self.tower.apply(self.variables, self.image)
    want = cropped.apply(self.variables, self.image[:, :EXTENT, :EXTENT])
    for x, y in zip(got, want, strict=True):
      np.testing.assert_array_equal(x, y)

  def test_patch_embedding_is_a_strided_convolution_without_padding(self):
    """The image encoder of Hugging Face embeds patches by such a convolution."""
    dense = self.variables['params']['patch_embedding']
    kernel_YXCD = dense['kernel'].reshape(6, 6, 3, 24)
    want = jax.lax.conv_general_dilated(
      self.image, kernel_YXCD, (6, 6), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    _, state = self.tower.apply(
      self.variables, self.image, capture_intermediates=True, mutable=['intermediates']
    )
    (got,) = state['intermediates']['patch_embedding']['__call__']
    np.testing.assert_allclose(got, want.reshape(2, 9, 24) + dense['bias'][None, None], atol=1e-5)

  def test_gradients_reach_whole_patches_only(self):
    def output(image):
      return jnp.sum(jnp.sin(self.tower.apply(self.variables, image)[1]))

    size = np.abs(jax.jit(jax.grad(output))(self.image)).sum(axis=(0, 3))
    self.assertGreater(size[:EXTENT, :EXTENT].min(), 0)
    np.testing.assert_array_equal(size[EXTENT:], 0)
    np.testing.assert_array_equal(size[:, EXTENT:], 0)

  def test_other_sizes_are_refused(self):
    with self.assertRaisesRegex(ValueError, 'not 20 x 20'):
      self.tower.apply(self.variables, self.image[:, :EXTENT, :EXTENT])

  @parameterized.parameters(True, False)
  def test_files(self, conv):
    model = siglip.Siglip(VISION, TEXT)
    params = variables(model)['params']
    path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / 'model.safetensors'
    siglip_params.save(params, path, model, conv)
    jax.tree.map(np.testing.assert_array_equal, siglip_params.load(path, model), params)


if __name__ == '__main__':
  absltest.main()
