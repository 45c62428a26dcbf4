"""Tests of lvrpo_jax.models.bagel.params."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
import tracemalloc
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors

from lvrpo_jax.models import layers
from lvrpo_jax.models import safetensors as safetensors_lib
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import params as bagel_params
from lvrpo_jax.models.bagel import tensor_names
from tests.helpers import jax_settings

MODEL = bagel.ModelConfig(
  vocab=20,
  width=16,
  depth=2,
  heads=4,
  kv_heads=2,
  ff_width=24,
  latent_channels=8,
  latent_side=3,
  vit=bagel.VitConfig(width=12, depth=3, heads=2, ff_width=20, patch=2, side=4),
  start_of_image=18,
  end_of_image=19,
)
AUTOENCODER = vae_lib.Autoencoder(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
FOUR_DEVICES = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tests.models.bagel import params_test
from lvrpo_jax.models.bagel import params
mesh = jax.make_mesh((4,), ('x',))
def place(leaf):
  axes = [i for i, size in enumerate(leaf.shape) if size % 4 == 0]
  spec = [None] * leaf.ndim
  if axes: spec[axes[-1]] = 'x'
  return NamedSharding(mesh, PartitionSpec(*spec))
for config in (params_test.MODEL, params_test.AUTOENCODER):
  plain = params.load(sys.argv[1], config)
  split = params.load(sys.argv[1], config, jax.tree.map(place, plain))
  jax.tree.map(np.testing.assert_array_equal, split, plain)
  assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
"""


@functools.cache
def abstract(config):
  """Returns shapes of the parameters, from the models themselves."""
  if isinstance(config, bagel.ModelConfig):
    return jax.eval_shape(lambda: bagel.init(config, jax.random.key(0)))
  return jax.eval_shape(config.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))['params']


def random_params(config, seed=0):
  """Returns parameters of `config` with random values, so that no two can be confused."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(config))


def new_folder(test: absltest.TestCase) -> pathlib.Path:
  """Creates an empty folder that lasts as long as the test."""
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


class RoundTripTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = new_folder(self)
    self.path = self.folder / 'ema.safetensors'

  @parameterized.named_parameters(('model', MODEL), ('autoencoder', AUTOENCODER))
  def test_bytes_survive(self, config):
    params = random_params(config)
    bagel_params.save(params, self.path, config)
    loaded = bagel_params.load(self.path, config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    bagel_params.save(loaded, self.folder / 'again.safetensors', config)
    self.assertEqual(self.path.read_bytes(), (self.folder / 'again.safetensors').read_bytes())

  def test_model_tensors_by_hand(self):
    params = random_params(MODEL)
    bagel_params.save(params, self.path, MODEL)
    got = safetensors.load_file(self.path)
    gen, und = (params['trunk']['layers'][name] for name in ('gen', 'und'))
    text, tower = 'language_model.model.layers.1.', 'vit_model.vision_model.'
    for name, want in {
      f'{text}self_attn.q_proj_moe_gen.weight': gen['q_proj']['kernel'][1].T,
      f'{text}self_attn.o_proj.weight': und['o_proj']['kernel'][1].T,
      f'{text}self_attn.v_proj_moe_gen.bias': gen['v_proj']['bias'][1],
      f'{text}self_attn.k_norm.weight': und['k_norm']['scale'][1],
      f'{text}mlp_moe_gen.down_proj.weight': gen['down_proj']['kernel'][1].T,
      f'{text}post_attention_layernorm_moe_gen.weight': gen['post_norm']['scale'][1],
      'language_model.model.norm_moe_gen.weight': params['trunk']['norm_gen']['scale'],
      'language_model.lm_head.weight': params['lm_head']['kernel'].T,
      'time_embedder.mlp.2.weight': params['time_embedder']['mlp_2']['kernel'].T,
      'connector.fc1.bias': params['connector_fc1']['bias'],
      'vit_pos_embed.pos_embed': params['vit_pos_embed'],
      f'{tower}encoder.layers.2.mlp.fc2.weight': params['vit']['layers']['fc2']['kernel'][2].T,
      f'{tower}encoder.layers.0.layer_norm1.weight': params['vit']['layers']['layer_norm1'][
        'scale'
      ][0],
      f'{tower}post_layernorm.bias': params['vit']['post_layernorm']['bias'],
    }.items():
      np.testing.assert_array_equal(got[name], want, name)

  def test_autoencoder_tensors_by_hand(self):
    params = random_params(AUTOENCODER)
    bagel_params.save(params, self.path, AUTOENCODER)
    got = safetensors.load_file(self.path)
    encoder, decoder = params['encoder'], params['decoder']
    kernel = encoder['down_1_block_0']['nin_shortcut']['kernel'][0, 0]
    np.testing.assert_array_equal(
      got['encoder.down.1.block.0.nin_shortcut.weight'], kernel.T[:, :, None, None]
    )
    self.assertEqual(got['encoder.conv_in.weight'].shape, (32, 3, 3, 3))
    self.assertEqual(
      got['encoder.conv_in.weight'][5, 2, 0, 1], encoder['conv_in']['kernel'][0, 1, 2, 5]
    )
    np.testing.assert_array_equal(
      got['decoder.up.1.upsample.conv.bias'], decoder['up_1_upsample']['conv']['bias']
    )
    np.testing.assert_array_equal(
      got['decoder.mid.attn_1.norm.weight'], decoder['mid_attn_1']['norm']['scale']
    )

  @parameterized.parameters(2, 5)
  def test_several_files(self, shards):
    params = random_params(MODEL)
    bagel_params.save(params, self.path, MODEL, shards)
    files = sorted(path.name for path in self.folder.iterdir())
    self.assertLen(files, shards + 1)
    self.assertIn(f'ema-00001-of-{shards:05}.safetensors', files)
    sizes = [(self.folder / name).stat().st_size for name in files if '-of-' in name]
    self.assertLess(max(sizes), 2.5 * sum(sizes) / shards)
    for path in (self.folder, self.path, self.folder / 'ema.safetensors.index.json'):
      jax.tree.map(np.testing.assert_array_equal, bagel_params.load(path, MODEL), params)

  def test_one_form_at_a_time(self):
    params = random_params(MODEL)
    bagel_params.save(params, self.path, MODEL)
    with self.assertRaisesRegex(ValueError, 'would contradict'):
      bagel_params.save(params, self.path, MODEL, shards=2)

  def test_a_failed_save_leaves_the_old_file(self):
    bagel_params.save(random_params(MODEL), self.path, MODEL)
    before = self.path.read_bytes()
    full = mock.patch.object(safetensors_lib.os, 'fsync', side_effect=OSError('disk full'))
    with full, self.assertRaisesRegex(OSError, 'disk full'):
      bagel_params.save(random_params(MODEL, seed=1), self.path, MODEL)
    self.assertEqual(self.path.read_bytes(), before)
    self.assertEqual([path.name for path in self.folder.iterdir()], ['ema.safetensors'])

  def test_slices_of_many_devices(self):
    bagel_params.save(random_params(MODEL), self.path, MODEL)
    bagel_params.save(random_params(AUTOENCODER), self.folder / 'ae.safetensors', AUTOENCODER)
    environment = {
      'XLA_FLAGS': f'{jax_settings.QUICK_COMPILE} --xla_force_host_platform_device_count=4',
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': str(jax_settings.ROOT),
    }
    done = subprocess.run(
      [sys.executable, '-c', FOUR_DEVICES, str(self.folder)],
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)

  def test_foreign_trees_are_not_saved(self):
    params = random_params(MODEL)
    with self.assertRaisesRegex(ValueError, 'lm_head/kernel is bfloat16'):
      head = {'kernel': jnp.bfloat16(params['lm_head']['kernel'])}
      bagel_params.save({**params, 'lm_head': head}, self.path, MODEL)
    with self.assertRaisesRegex(ValueError, 'differ in surplus'):
      bagel_params.save({**params, 'surplus': jnp.zeros(1)}, self.path, MODEL)
    self.assertEmpty(list(self.folder.iterdir()))


class LoadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.path = new_folder(self) / 'ema.safetensors'
    self.params = random_params(MODEL)
    bagel_params.save(self.params, self.path, MODEL)
    self.tensors = safetensors.load_file(self.path)

  def rewrite(self, **changes):
    """Rewrites the file with some tensors replaced, or removed where None."""
    new = {**self.tensors, **changes}
    safetensors.save_file({name: x for name, x in new.items() if x is not None}, self.path)

  def test_host_memory(self):
    """Loading takes at most twice the largest tensor beside the parameters, not a second copy."""
    config = dataclasses.replace(MODEL, vocab=4000, width=256, depth=4, ff_width=1024)
    bagel_params.save(random_params(config), self.path, config)
    sizes = [4 * int(np.prod(place.shape)) for place in tensor_names.places(config).values()]
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: where, abstract(config))
    tracemalloc.start()
    try:
      jax.block_until_ready(bagel_params.load(self.path, config, shardings))
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    self.assertLess(peak, sum(sizes) + 2 * max(sizes) + 2**20)
    self.assertGreater(sum(sizes), 5 * max(sizes))  # A second copy would exceed the bound.

  def test_truncated(self):
    self.path.write_bytes(self.path.read_bytes()[:-8])
    with self.assertRaisesRegex(ValueError, f'{self.path}.*truncated'):
      bagel_params.load(self.path, MODEL)

  def test_absent(self):
    self.path.unlink()
    with self.assertRaisesRegex(ValueError, f'neither {self.path} nor'):
      bagel_params.load(self.path, MODEL)

  def test_missing_tensor(self):
    self.rewrite(**{'llm2vae.weight': None})
    with self.assertRaisesRegex(ValueError, rf'llm2vae.weight .*\[8, 16\] is missing.*{self.path}'):
      bagel_params.load(self.path, MODEL)

  @parameterized.parameters('llm2vae.scale', 'vit_model.vision_model.encoder.layers.3.mlp.fc1.bias')
  def test_extra_tensor(self, name):
    self.rewrite(**{name: np.zeros(20, np.float32)})
    with self.assertRaisesRegex(ValueError, f'{name} in {self.path} is not of this'):
      bagel_params.load(self.path, MODEL)

  def test_misshapen_tensor(self):
    self.rewrite(**{'vae2llm.weight': self.tensors['vae2llm.weight'].T.copy()})
    with self.assertRaisesRegex(
      ValueError, rf'vae2llm.weight in {self.path} has shape \[8, 16\]; expected \[16, 8\]'
    ):
      bagel_params.load(self.path, MODEL)

  def test_wrong_dtype(self):
    self.rewrite(**{'vae2llm.bias': np.zeros(16, np.int32)})
    with self.assertRaisesRegex(ValueError, rf'vae2llm.bias in {self.path} has dtype I32.*\[16\]'):
      bagel_params.load(self.path, MODEL)

  def test_a_tensor_in_two_files(self):
    self.path.unlink()
    safetensors.save_file(self.tensors, self.path.with_name('a.safetensors'))
    safetensors.save_file(self.tensors, self.path.with_name('b.safetensors'))
    self.path.with_name('ema.safetensors.index.json').write_text(
      json.dumps({'weight_map': {'llm2vae.bias': 'a.safetensors', 'vae2llm.bias': 'b.safetensors'}})
    )
    with self.assertRaisesRegex(ValueError, 'a.safetensors and in .*b.safetensors'):
      bagel_params.load(self.path, MODEL)

  def test_half_precision_becomes_float32(self):
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in self.tensors.items()}
    safetensors.save_file(half, self.path)
    got = bagel_params.load(self.path, MODEL)
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(
        x, y.astype(ml_dtypes.bfloat16).astype(np.float32)
      ),
      got,
      self.params,
    )

  def test_latent_table_of_another_side(self):
    got = bagel_params.load(self.path, dataclasses.replace(MODEL, latent_side=5))
    np.testing.assert_array_equal(got['latent_pos_embed'], layers.sincos_table(5, 16))

  def test_vocabulary_padding(self):
    small = bagel_params.load(self.path, dataclasses.replace(MODEL, vocab=17))
    np.testing.assert_array_equal(small['embed_tokens'], self.params['embed_tokens'][:17])
    np.testing.assert_array_equal(
      small['lm_head']['kernel'], self.params['lm_head']['kernel'][:, :17]
    )
    large = bagel_params.load(self.path, dataclasses.replace(MODEL, vocab=22))
    head = self.params['lm_head']['kernel']
    np.testing.assert_array_equal(large['lm_head']['kernel'][:, :20], head)
    for column in (20, 21):
      np.testing.assert_allclose(large['lm_head']['kernel'][:, column], head.mean(1), atol=1e-6)
    np.testing.assert_allclose(
      large['embed_tokens'][21], self.params['embed_tokens'].mean(0), atol=1e-6
    )
    with self.assertRaisesRegex(ValueError, r'lm_head.*\[20, 16\]; expected \[2000, 16\]'):
      bagel_params.load(self.path, dataclasses.replace(MODEL, vocab=2000))


if __name__ == '__main__':
  absltest.main()
