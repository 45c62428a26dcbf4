"""Tests of lvrpo_jax.models.siglip."""

import functools
import json
import math
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors_numpy

from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.siglip import model as siglip
from lvrpo_jax.models.siglip import params as siglip_params
from tests.helpers import jax_settings

setUpModule, tearDownModule = jax_settings.of_module(
  jax_default_matmul_precision='highest', jax_numpy_rank_promotion='raise'
)

GOLDENS = pathlib.Path(__file__).resolve().parents[2] / 'goldens' / 'siglip'
SIGLIP_CASES = ('siglip_square', 'siglip_other_widths', 'siglip_cropped')
SIGLIP2_CASES = ('siglip2_square', 'siglip2_other_widths')


def _text_config(hidden, mlp, layers, heads, projection) -> siglip.SiglipTextConfig:
  return siglip.SiglipTextConfig(hidden, mlp, layers, heads, 50, 9, projection)


SIZES = {
  'square': (
    siglip.SiglipVisionConfig(32, 48, 2, 4, 28, 7),
    _text_config(32, 64, 2, 2, 32),
  ),
  'other_widths': (
    siglip.SiglipVisionConfig(24, 80, 1, 3, 24, 8, eps=1e-5),
    _text_config(16, 40, 1, 4, 24),
  ),
}


def _hugging_face_model(folder: pathlib.Path) -> siglip.Siglip:
  """The model of a Hugging Face configuration; variable-size ones have a table of patches only."""
  config = json.loads((folder / 'config.json').read_text())
  vision, text = config['vision_config'], config['text_config']
  patch = vision['patch_size']
  image_size = vision.get('image_size') or math.isqrt(vision['num_patches']) * patch

  def widths(tower: dict) -> dict:
    return {
      'hidden': tower['hidden_size'],
      'mlp': tower['intermediate_size'],
      'layers': tower['num_hidden_layers'],
      'heads': tower['num_attention_heads'],
      'eps': tower['layer_norm_eps'],
    }

  return siglip.Siglip(
    siglip.SiglipVisionConfig(image_size=image_size, patch=patch, **widths(vision)),
    siglip.SiglipTextConfig(
      vocab=text['vocab_size'],
      max_positions=text['max_position_embeddings'],
      projection=text['projection_size'],
      **widths(text),
    ),
  )


def _shapes(model: siglip.Siglip) -> dict:
  size = model.vision_config.image_size
  image, ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 3), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), image, ids)['params']


def _random_params(shapes: dict) -> dict:
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.path = self.folder / 'model.safetensors'
    self.model = siglip.Siglip(*SIZES['square'])
    self.params = _random_params(_shapes(self.model))

  @parameterized.parameters(True, False)
  def test_round_trip_is_the_identity(self, conv):
    siglip_params.save(self.params, self.path, self.model, conv)
    jax.tree.map(
      np.testing.assert_array_equal, siglip_params.load(self.folder, self.model), self.params
    )

  def test_names_and_shapes_of_the_file(self):
    siglip_params.save(self.params, self.path, self.model)
    tensors = safetensors_numpy.load_file(self.path)
    for name, shape in {
      'vision_model.embeddings.patch_embedding.weight': (32, 3, 7, 7),
      'vision_model.embeddings.position_embedding.weight': (16, 32),
      'vision_model.head.attention.in_proj_weight': (96, 32),
      'vision_model.head.attention.in_proj_bias': (96,),
      'text_model.encoder.layers.1.self_attn.out_proj.weight': (32, 32),
      'text_model.encoder.layers.0.mlp.fc1.weight': (64, 32),
      'logit_scale': (1,),
    }.items():
      self.assertEqual(tensors[name].shape, shape, name)

  @parameterized.parameters(
    ('vision_model.encoder.layers.0.mlp.fc1.weight', lambda x: x.T.copy()),
    ('text_model.embeddings.token_embedding.weight', lambda x: x.T.copy()),
    ('vision_model.embeddings.position_embedding.weight', lambda x: x.reshape(8, 64)),
    ('vision_model.head.attention.in_proj_weight', lambda x: x.T.copy()),
    ('text_model.embeddings.token_embedding.weight', lambda x: x.astype(np.int32)),
    ('logit_scale', lambda x: x.astype(np.int32)),
  )
  def test_nothing_is_bent_into_shape(self, name, change):
    siglip_params.save(self.params, self.path, self.model)
    tensors = safetensors_numpy.load_file(self.path)
    tensors[name] = change(tensors[name])
    safetensors_numpy.save_file(tensors, self.path)
    with self.assertRaisesRegex(ValueError, f'tensor {name} in .* expected'):
      siglip_params.load(self.folder, self.model)

  def test_tables_of_indices_are_ignored(self):
    siglip_params.save(self.params, self.path, self.model)
    tensors = safetensors_numpy.load_file(self.path)
    tensors['vision_model.embeddings.position_ids'] = np.arange(16)[None]
    safetensors_numpy.save_file(tensors, self.path)
    jax.tree.map(
      np.testing.assert_array_equal, siglip_params.load(self.folder, self.model), self.params
    )

  def test_an_index_that_is_none(self):
    for content in ('{}', '[]', 'no JSON'):
      (self.folder / 'model.safetensors.index.json').write_text(content)
      with self.assertRaisesRegex(ValueError, 'model.safetensors.index.json is no index'):
        siglip_params.load(self.folder, self.model)

  @parameterized.parameters('missing', 'unknown', 'misshapen', 'truncated')
  def test_a_bad_file_is_named(self, fault):
    siglip_params.save(self.params, self.path, self.model)
    tensors = safetensors_numpy.load_file(self.path)
    name, message = 'text_model.head.weight', 'text_model.head.weight'
    if fault == 'missing':
      del tensors[name]
    elif fault == 'unknown':
      tensors['extra.weight'], message = np.zeros(3, np.float32), 'extra.weight'
    else:
      tensors[name] = tensors[name][:-1].copy()
    safetensors_numpy.save_file(tensors, self.path)
    if fault == 'truncated':
      self.path.write_bytes(self.path.read_bytes()[:-9])
      message = 'cannot be read'
    with self.assertRaisesRegex(ValueError, message):
      siglip_params.load(self.folder, self.model)


class HuggingFaceParityTest(parameterized.TestCase):
  """The arrays of `GOLDENS`, which tests/goldens/make_siglip.py writes."""

  def _load(self, case: str) -> tuple[siglip.Siglip, dict, dict, dict]:
    """The model of a case, its variables, its inputs and its golden outputs."""
    model = _hugging_face_model(GOLDENS / case)
    inputs, outputs = (dict(np.load(GOLDENS / case / f'{n}.npz')) for n in ('inputs', 'outputs'))
    return model, {'params': siglip_params.load(GOLDENS / case, model)}, inputs, outputs

  def _assert_close(self, got: dict, want: dict):
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      np.testing.assert_allclose(got[name], value, atol=1e-4, rtol=1e-4, err_msg=name)

  def test_every_folder_has_a_test(self):
    self.assertEqual({path.name for path in GOLDENS.iterdir()}, {*SIGLIP_CASES, *SIGLIP2_CASES})

  @parameterized.parameters(*SIGLIP_CASES, *SIGLIP2_CASES)
  def test_written_file_is_that_of_hugging_face(self, case):
    model = _hugging_face_model(GOLDENS / case)
    path = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory())) / 'model.safetensors'
    params = siglip_params.load(GOLDENS / case, model)
    siglip_params.save(params, path, model, conv=case in SIGLIP_CASES)
    theirs = safetensors_numpy.load_file(GOLDENS / case / 'model.safetensors')
    ours = safetensors_numpy.load_file(path)
    self.assertEqual(ours.keys(), theirs.keys())
    for name, value in theirs.items():
      np.testing.assert_array_equal(ours[name], value, err_msg=name, strict=True)

  @parameterized.parameters(*SIGLIP_CASES)
  def test_siglip(self, case):
    model, variables, inputs, want = self._load(case)

    @jax.jit
    def ours(variables, image_BYXC, ids_BL, text_mask_BL):
      image_BD, text_BD, scale, bias = model.apply(variables, image_BYXC, ids_BL)
      apply = functools.partial(model.apply, variables)
      return {
        'image_BD': image_BD,
        'text_BD': text_BD,
        'logits_per_text_BB': scale * text_BD @ image_BD.T + bias,
        'loss': siglip.siglip_loss(image_BD, text_BD, scale, bias),
        'hidden_BND': apply(image_BYXC, projected=False, method='embed_image')[1],
        'masked_text_BD': apply(ids_BL, text_mask_BL, method='embed_text')[0],
      }

    self._assert_close(ours(variables, **inputs), want)

  @parameterized.parameters(*SIGLIP2_CASES)
  def test_siglip2_with_grids_smaller_and_larger_than_the_table(self, case):
    model, variables, inputs, want = self._load(case)

    @jax.jit
    def ours(variables, patches_BNP, patch_mask_BN, grid_B2, ids_BL, text_mask_BL):
      apply = functools.partial(model.apply, variables)
      image_BD, hidden_BND = apply(
        patches_BNP, patch_mask_BN, grid_B2, projected=False, method='embed_patches'
      )
      text_BD = apply(ids_BL, method='embed_text')[0]
      scale, bias = apply(method='scale_and_bias')
      return {
        'image_BD': image_BD,
        'text_BD': text_BD,
        'logits_per_text_BB': scale * text_BD @ image_BD.T + bias,
        'loss': siglip.siglip_loss(image_BD, text_BD, scale, bias),
        'hidden_BND': jnp.where(patch_mask_BN[..., None], hidden_BND, 0),
        'masked_text_BD': apply(ids_BL, text_mask_BL, method='embed_text')[0],
      }

    self._assert_close(ours(variables, **inputs), want)


class SiglipTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.vision, cls.text = SIZES['other_widths']
    model = siglip.Siglip(cls.vision, cls.text)
    cls.variables = {'params': _random_params(_shapes(model))}
    cls.apply = staticmethod(jax.jit(model.apply, static_argnames='method'))
    rng = np.random.default_rng(3)
    size = cls.vision.image_size
    cls.image = rng.uniform(-1, 1, (4, size, size, 3)).astype(np.float32)
    cls.ids = rng.integers(0, cls.text.vocab, (4, 6))

  def test_joint_space_has_unit_vectors(self):
    pooled, patches = self.apply(self.variables, self.image, method='embed_image')
    text, tokens = self.apply(self.variables, self.ids, method='embed_text')
    self.assertEqual(patches.shape, (4, self.vision.side**2, self.vision.hidden))
    self.assertEqual(tokens.shape, (4, 6, self.vision.hidden))
    for x in (pooled, patches, text, tokens):
      np.testing.assert_allclose(np.linalg.norm(x, axis=-1), np.ones(x.shape[:-1]), rtol=1e-5)
    np.testing.assert_array_equal(text, tokens[:, -1])

  def test_batch_order_does_not_matter(self):
    order = np.array([2, 0, 3, 1])
    for method, batch in (('embed_image', self.image), ('embed_text', self.ids)):
      pooled, _ = self.apply(self.variables, batch, method=method)
      mixed, _ = self.apply(self.variables, batch[order], method=method)
      np.testing.assert_allclose(mixed, pooled[order], atol=1e-6)
      self.assertGreater(np.abs(pooled - pooled[order]).max(), 1e-2)

  def test_full_grid_equals_square_image(self):
    patches = vae_lib.patchify(self.image, self.vision.patch)
    mask = np.ones(patches.shape[:2], bool)
    grid = np.full((4, 2), self.vision.side)
    square = self.apply(self.variables, self.image, method='embed_image')
    packed = self.apply(self.variables, patches, mask, grid, method='embed_patches')
    for a, b in zip(square, packed, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)

  def test_padding_patches_are_not_seen(self):
    patches = np.array(vae_lib.patchify(self.image, self.vision.patch))
    grid = np.array([[2, 3]] * 4)
    mask = np.broadcast_to(np.arange(patches.shape[1]) < 6, patches.shape[:2])
    args = (mask, grid)
    pooled, features = self.apply(self.variables, patches, *args, method='embed_patches')
    patches[:, 6:] = 100
    again, same = self.apply(self.variables, patches, *args, method='embed_patches')
    np.testing.assert_array_equal(pooled, again)
    np.testing.assert_array_equal(features[:, :6], same[:, :6])

  def test_projected_patch_is_the_pooling_of_that_patch_alone(self):
    hidden = np.random.default_rng(4).normal(size=(2, 5, self.vision.hidden)).astype(np.float32)
    head = siglip.PoolingHead(self.vision)
    variables = {'params': self.variables['params']['vision']['head']}
    apply = jax.jit(head.apply, static_argnames='method')
    each = apply(variables, hidden, method='each')
    alone = apply(variables, hidden.reshape(10, 1, -1), None)
    np.testing.assert_allclose(each.reshape(10, -1), alone, atol=1e-5)

  def test_text_attention_is_bidirectional_and_masked_tokens_are_not_seen(self):
    changed = self.ids.copy()
    changed[:, 3] = (changed[:, 3] + 1) % self.text.vocab
    _, tokens = self.apply(self.variables, self.ids, method='embed_text')
    _, other = self.apply(self.variables, changed, method='embed_text')
    self.assertGreater(np.abs(tokens[:, 0] - other[:, 0]).max(), 1e-4)
    mask = np.broadcast_to(np.arange(6) != 3, (4, 6))
    pooled, _ = self.apply(self.variables, self.ids, mask, method='embed_text')
    unmoved, _ = self.apply(self.variables, changed, mask, method='embed_text')
    np.testing.assert_array_equal(pooled, unmoved)

  def test_start_of_scale_and_bias(self):
    model = siglip.Siglip(self.vision, self.text)
    (scale, bias), _ = model.init_with_output(jax.random.key(0), method='scale_and_bias')
    np.testing.assert_allclose([scale, bias], [10, -10], rtol=1e-6)

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, 'not 24 x 24'):
      self.apply(self.variables, self.image[:, :16], method='embed_image')
    with self.assertRaisesRegex(ValueError, 'texts have 10 tokens, at most 9'):
      self.apply(self.variables, np.zeros((1, 10), int), method='embed_text')
    with self.assertRaisesRegex(ValueError, '5 heads'):
      _shapes(siglip.Siglip(siglip.SiglipVisionConfig(32, 48, 1, 5, 28, 7), self.text))


_resize_positions = jax.jit(siglip.resize_positions, static_argnums=2)


class ResizePositionsTest(parameterized.TestCase):
  def test_own_grid_is_the_table(self):
    table = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    got = _resize_positions(jnp.asarray(table), jnp.array([[4, 4]]), 20)
    np.testing.assert_allclose(got[0, :16], table.reshape(16, 3), atol=1e-6)

  @parameterized.parameters((2, 7), (6, 3), (1, 1))
  def test_matches_antialiased_resize(self, rows, columns):
    table = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    got = _resize_positions(jnp.asarray(table), jnp.array([[rows, columns]]), 20)[0]
    want = jax.image.resize(table, (rows, columns, 3), 'linear', antialias=True).reshape(-1, 3)
    count = rows * columns
    np.testing.assert_allclose(got[:count], want, atol=1e-5)
    np.testing.assert_allclose(got[count:], np.broadcast_to(want[0], (20 - count, 3)), atol=1e-5)


class SiglipLossTest(absltest.TestCase):
  def test_matches_a_loop_over_pairs(self):
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 5, 7))
    scale, bias = 3.0, -1.5
    total = 0.0
    for i in range(5):
      for j in range(5):
        sign = 1 if i == j else -1
        total += np.log1p(np.exp(-sign * (scale * image[i] @ text[j] + bias)))
    got = siglip.siglip_loss(jnp.asarray(image), jnp.asarray(text), scale, bias)
    np.testing.assert_allclose(got, total / 5, rtol=1e-5)

  def test_matching_pairs_cost_less(self):
    image = jnp.eye(4)
    matched = siglip.siglip_loss(image, image, 10.0, -5.0)
    self.assertLess(matched, siglip.siglip_loss(image, image[::-1], 10.0, -5.0))
    np.testing.assert_array_less(0, matched)

  def test_finite_for_extreme_logits(self):
    image = jnp.eye(2)
    gradient = jax.grad(siglip.siglip_loss)(image, -image, 1e4, 0.0)
    self.assertTrue(np.isfinite(gradient).all())


if __name__ == '__main__':
  absltest.main()
