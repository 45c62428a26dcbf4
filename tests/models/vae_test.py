"""Tests of lvrpo_jax.models.vae."""

import functools
import json
import os
import pathlib
import re

from absl.testing import absltest
from absl.testing import parameterized
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from lvrpo_jax.models import vae as vae_lib
from tests.helpers import jax_settings

setUpModule, tearDownModule = jax_settings.of_module(
  jax_default_matmul_precision='highest', jax_numpy_rank_promotion='raise'
)

_DEFAULT_PARITY = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'bagel'
PARITY_DIR = pathlib.Path(os.environ.get('LVRPO_PARITY_DIR', _DEFAULT_PARITY))


def _released_params(path: pathlib.Path) -> dict:
  """Reads the released names: dots inside a block's name become underscores."""
  flat = {}
  for name, array in safetensors.load_file(path).items():
    name = re.sub(r'(down|up)\.(\d+)\.block\.(\d+)', r'\1_\2_block_\3', name)
    name = re.sub(r'(down|up)\.(\d+)\.(down|up)sample', r'\1_\2_\3sample', name)
    name = name.replace('mid.', 'mid_')
    owner, leaf = name.rsplit('.', 1)
    if leaf == 'weight':
      leaf = 'kernel' if array.ndim == 4 else 'scale'
      array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    flat[*owner.split('.'), leaf] = jnp.asarray(array)
  return traverse_util.unflatten_dict(flat)


def _channels_last(array: np.ndarray) -> np.ndarray:
  return np.moveaxis(array, -3, -1)


class ParityTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.inputs = np.load(PARITY_DIR / 'inputs.npz')
    cls.outputs = np.load(PARITY_DIR / 'outputs.npz')
    cls.config = json.loads((PARITY_DIR / 'config.json').read_text())
    fields = cls.config['vae_config']
    names = 'ch num_res_blocks z_channels in_channels out_ch scale_factor shift_factor'.split()
    cls.model = vae_lib.Autoencoder(
      ch_mult=tuple(fields['ch_mult']), **{name: fields[name] for name in names}
    )
    cls.variables = {'params': _released_params(PARITY_DIR / 'ae.safetensors')}
    cls.apply = staticmethod(jax.jit(cls.model.apply, static_argnames='method'))

  def _input(self, name):
    return jnp.asarray(_channels_last(self.inputs[name]))

  def _assert_golden(self, got, name, **kwargs):
    golden = _channels_last(self.outputs[name])
    np.testing.assert_allclose(got, golden, atol=1e-4, rtol=1e-4, err_msg=name, **kwargs)

  def test_downsample(self):
    self.assertEqual(self.model.downsample, self.config['vae_config']['downsample'])

  def test_tree_is_that_of_init(self):
    side = self.model.downsample
    image = jnp.zeros((1, side, side, self.model.in_channels))
    shapes = jax.eval_shape(self.model.init, jax.random.key(0), image)
    self.assertEqual(
      jax.tree.map(lambda x: x.shape, shapes), jax.tree.map(lambda x: x.shape, self.variables)
    )

  def test_encode(self):
    image = self._input('vae/image_a')[None]
    eps = self._input('vae/eps_a')

    @jax.jit
    def encode(variables):
      apply = functools.partial(self.model.apply, variables, image)
      moments = apply(method='moments')
      return *moments, apply(method='encode_mean'), apply(eps, method='encode')

    mean, logvar, latent, sample = encode(self.variables)
    self._assert_golden(jnp.concatenate([mean, logvar], axis=-1), 'vae/moments_a')
    self._assert_golden(mean, 'vae/mean_a')
    self._assert_golden(latent, 'vae/latent_mean_a')
    self._assert_golden(sample, 'vae/latent_sampled_a')

  def test_zero_padding_changes_latents(self):
    image_a, image_b = self._input('vae/image_a'), self._input('vae/image_b')
    sides = np.maximum(image_a.shape, image_b.shape)
    padded = [jnp.pad(x, [(0, n) for n in sides - np.array(x.shape)]) for x in (image_a, image_b)]
    batch = self.apply(self.variables, jnp.stack(padded), method='moments')
    self._assert_golden(jnp.concatenate(batch, axis=-1), 'vae/moments_padded_batch')
    alone = self.apply(self.variables, image_b[None], method='moments')
    self._assert_golden(jnp.concatenate(alone, axis=-1), 'vae/moments_b')

  def test_decode(self):
    image = self.apply(self.variables, self._input('vae/decode_in'), method='decode')
    self._assert_golden(image, 'vae/decode_out')

  def test_latent_tokens(self):
    patch = self.config['latent_patch_size']
    latent = _channels_last(self.outputs['gen/cfg_unpacked_latent'])[None]
    tokens = self.outputs['gen/cfg_final_latent'][None]
    np.testing.assert_array_equal(vae_lib.patchify(latent, patch), tokens)
    grid = (latent.shape[1] // patch, latent.shape[2] // patch)
    np.testing.assert_array_equal(vae_lib.unpatchify(tokens, grid, patch), latent)
    decoded = self.apply(self.variables, jnp.asarray(latent), method='decode')[0]
    self._assert_golden(decoded, 'gen/cfg_decoded')

  def test_vision_patches(self):
    patch = self.config['vit_config']['patch_size']
    tokens = [vae_lib.patchify(self._input(f'vit/image_{i}')[None], patch)[0] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(tokens), self.outputs['vit/patches'])


class PatchifyTest(parameterized.TestCase):
  def test_order(self):
    image = np.random.default_rng(0).normal(size=(2, 6, 4, 3))
    tokens = vae_lib.patchify(image, 2)
    self.assertEqual(tokens.shape, (2, 6, 12))
    for row in range(3):
      for column in range(2):
        block = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(tokens[:, 2 * row + column], block.reshape(2, 12))

  @parameterized.parameters(1, 2, 4)
  def test_inverse(self, patch):
    image = np.random.default_rng(0).normal(size=(2, 8, 12, 3))
    grid = (8 // patch, 12 // patch)
    np.testing.assert_array_equal(
      vae_lib.unpatchify(vae_lib.patchify(image, patch), grid, patch), image
    )

  def test_errors(self):
    with self.assertRaisesRegex(ValueError, '6 x 5'):
      vae_lib.patchify(np.zeros((1, 6, 5, 3)), 2)
    with self.assertRaisesRegex(ValueError, '2 x 2'):
      vae_lib.unpatchify(np.zeros((1, 3, 12)), (2, 2), 2)
    with self.assertRaisesRegex(ValueError, 'width 13'):
      vae_lib.unpatchify(np.zeros((1, 4, 13)), (2, 2), 2)


class AutoencoderTest(absltest.TestCase):
  def test_sides_must_divide(self):
    model = vae_lib.Autoencoder(ch=32, ch_mult=(1, 1), num_res_blocks=1)
    with self.assertRaisesRegex(ValueError, '4 x 5'):
      jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 5, 3)))

  def test_released_size(self):
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    params = jax.eval_shape(vae_lib.Autoencoder().init, jax.random.key(0), image)['params']
    sizes = [x.size for x in jax.tree.leaves(params)]
    self.assertLen(sizes, 244)
    self.assertEqual(sum(sizes), 83_819_683)


class PatchAutoencoderTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    rng = np.random.default_rng(0)
    # A few smooth directions with a falling spectrum on top of small noise.
    directions = rng.normal(size=(20, 4 * 4 * 3))
    codes = rng.normal(size=(64 * 6, 20)) * 0.7 ** np.arange(20)
    patches = codes @ directions + 0.05 * rng.normal(size=(64 * 6, 48)) + rng.normal(size=48)
    cls.image = np.asarray(vae_lib.unpatchify(patches.reshape(64, 6, 48), (2, 3), 4), np.float32)
    cls.patches = np.asarray(vae_lib.patchify(cls.image, 4), np.float64).reshape(-1, 48)
    cls.model = vae_lib.PatchAutoencoder(patch=4, z_channels=8)
    cls.jitted = staticmethod(jax.jit(cls.model.apply, static_argnames='method'))
    cls.params = vae_lib.fit_patch_autoencoder(cls.model, cls.image)
    singular = np.linalg.svd(cls.patches - cls.patches.mean(axis=0), compute_uv=False)
    cls.variance = singular**2 / len(cls.patches)
    cls.noise = cls.variance[8:].mean()

  def _apply(self, method, *args):
    return self.jitted({'params': self.params}, *args, method=method)

  def test_latents_are_white(self):
    latent = np.asarray(self._apply('encode_mean', self.image)).reshape(-1, 8)
    self.assertEqual(self._apply('encode_mean', self.image).shape, (64, 2, 3, 8))
    np.testing.assert_allclose(latent.mean(axis=0), np.zeros(8), atol=1e-5)
    np.testing.assert_allclose(latent.T @ latent / len(latent), np.eye(8), atol=1e-4)

  def test_reconstruction_error_is_the_discarded_variance(self):
    image = self._apply('__call__', self.image)
    error = (
      np.square(vae_lib.patchify(image, 4) - vae_lib.patchify(self.image, 4)).sum(axis=-1).mean()
    )
    np.testing.assert_allclose(error, self.variance[8:].sum(), rtol=1e-4)

  def test_channels_fall_in_variance(self):
    share = []
    for channel in range(8):
      latent = np.zeros((1, 1, 1, 8), np.float32)
      zero = self._apply('decode', latent)
      latent[..., channel] = 1
      share.append(np.square(self._apply('decode', latent) - zero).sum())
    np.testing.assert_allclose(share, self.variance[:8], rtol=1e-4)

  def test_posterior_is_that_of_probabilistic_pca(self):
    # Bayes' rule for x = W z + mean + noise, with W the maximum-likelihood solution, up to signs.
    centred = self.patches - self.patches.mean(axis=0)
    _, _, basis = np.linalg.svd(centred, full_matrices=False)
    factor = basis[:8].T * np.sqrt(self.variance[:8] - self.noise)
    precision = factor.T @ factor / self.noise + np.eye(8)
    expected = centred @ factor @ np.linalg.inv(precision) / self.noise
    mean, logvar = self._apply('moments', self.image)
    mean = np.asarray(mean).reshape(-1, 8)
    signs = np.sign((mean * expected).sum(axis=0))
    np.testing.assert_allclose(mean, expected * signs, atol=1e-4)
    covariance = np.diag(np.exp(np.asarray(logvar)[0, 0, 0]))
    np.testing.assert_allclose(covariance, np.linalg.inv(precision), atol=1e-5)

  def test_sampling(self):
    eps = np.random.default_rng(1).normal(size=(64, 2, 3, 8)).astype(np.float32)
    sample = self._apply('encode', self.image, eps)
    step = (sample - self._apply('encode_mean', self.image)) / eps
    expected = np.sqrt(self.noise / (self.variance[:8] - self.noise))
    np.testing.assert_allclose(step, np.broadcast_to(expected, step.shape), rtol=2e-2)

  def test_signs_are_fixed(self):
    kernel = np.asarray(self.params['decoder']['kernel'])
    np.testing.assert_allclose(kernel.max(axis=1), np.abs(kernel).max(axis=1))
    # A reordering perturbs the covariance only by rounding.
    again = vae_lib.fit_patch_autoencoder(self.model, self.image[::-1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), self.params, again)

  def test_hidden_layer_starts_silent(self):
    model = vae_lib.PatchAutoencoder(patch=4, z_channels=8, hidden=5)
    params = vae_lib.fit_patch_autoencoder(model, self.image)
    got = jax.jit(model.apply)({'params': params}, self.image)
    np.testing.assert_allclose(got, self._apply('__call__', self.image), atol=1e-5)
    image = self.image[:2]

    def loss(p):
      return jnp.square(model.apply({'params': p}, image) - image).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    self.assertGreater(np.abs(gradient['decoder_out']['kernel']).max(), 0)

  def test_fitted_tree_is_that_of_init(self):
    fresh = jax.eval_shape(self.model.init, jax.random.key(0), self.image[:1])['params']

    def shape(tree):
      return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    self.assertEqual(shape(fresh), shape(self.params))

  @parameterized.parameters(0, 3)
  def test_too_few_directions(self, directions):
    rng = np.random.default_rng(0)
    image = np.zeros((40, 4, 4, 3))
    image += (rng.normal(size=(40, directions)) @ rng.normal(size=(directions, 48))).reshape(
      image.shape
    )
    with self.assertRaisesRegex(ValueError, f'{directions} directions'):
      vae_lib.fit_patch_autoencoder(self.model, image)


if __name__ == '__main__':
  absltest.main()
