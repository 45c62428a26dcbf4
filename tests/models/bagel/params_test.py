"""Tests of lvrpo_jax.models.bagel.params and config."""

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

from configs import bagel_1p5b
from configs import bagel_7b
from lvrpo_jax.models import layers
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import params as bagel_params
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
  vit=bagel.VitConfig(12, 3, 2, 20, patch=2, side=4),
  start_of_image=18,
  end_of_image=19,
)
AUTOENCODER = vae_lib.Autoencoder(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)
QWEN_7B = dict(
  vocab_size=152064,
  hidden_size=3584,
  num_hidden_layers=28,
  num_attention_heads=28,
  num_key_value_heads=4,
  intermediate_size=18944,
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  hidden_act='silu',
  tie_word_embeddings=True,
)
SIGLIP = dict(
  hidden_size=1152,
  num_hidden_layers=27,
  num_attention_heads=16,
  intermediate_size=4304,
  patch_size=14,
  image_size=980,
  layer_norm_eps=1e-6,
  hidden_act='gelu_pytorch_tanh',
  rope=True,
)

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
  """Shapes of the parameters, from the models themselves."""
  if isinstance(config, bagel.ModelConfig):
    return jax.eval_shape(lambda: bagel.init(config, jax.random.key(0)))
  return jax.eval_shape(config.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))['params']


def random_params(config, seed=0):
  """Parameters of `config`, all different, so that no two can be confused."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), abstract(config))


def new_folder(test: absltest.TestCase) -> pathlib.Path:
  """An empty folder that lasts as long as the test."""
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
    with mock.patch.object(bagel_params.os, 'fsync', side_effect=OSError('disk full')):
      with self.assertRaisesRegex(OSError, 'disk full'):
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
    """Writes the file anew with some tensors replaced, or removed where None."""
    new = {**self.tensors, **changes}
    safetensors.save_file({name: x for name, x in new.items() if x is not None}, self.path)

  def test_host_memory(self):
    """Twice the largest tensor beside the parameters themselves, not a second copy of them all."""
    config = dataclasses.replace(MODEL, vocab=4000, width=256, depth=4, ff_width=1024)
    bagel_params.save(random_params(config), self.path, config)
    sizes = [4 * int(np.prod(place.shape)) for place in bagel_params.places(config).values()]
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: where, abstract(config))
    tracemalloc.start()
    try:
      jax.block_until_ready(bagel_params.load(self.path, config, shardings))
      peak = tracemalloc.get_traced_memory()[1]
    finally:
      tracemalloc.stop()
    self.assertLess(peak, sum(sizes) + 2 * max(sizes) + 2**20)
    self.assertGreater(sum(sizes), 5 * max(sizes))  # So that a second copy would show.

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


class ReleasedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = new_folder(self)
    (self.folder / 'llm_config.json').write_text(json.dumps(QWEN_7B))
    (self.folder / 'vit_config.json').write_text(json.dumps(SIGLIP))
    (self.folder / 'config.json').write_text('{}')
    self.config = bagel_config.read_config(self.folder)

  def test_shapes_of_the_7b_model(self):
    """Counts and shapes of the released `ema.safetensors`."""
    places = bagel_params.places(bagel_config.model_config(self.config))
    count = lambda names: sum(int(np.prod(places[name].shape)) for name in names)
    self.assertLen(places, 1223)
    self.assertEqual(count(places), 14_607_260_128)
    self.assertEqual(count(n for n in places if n.startswith('language_model')), 14_141_252_608)
    self.assertEqual(count(n for n in places if '_moe_gen' in n), 6_525_628_928)
    tower = 'vit_model.vision_model.'
    for name, shape in {
      'language_model.model.embed_tokens.weight': (152064, 3584),
      'language_model.model.layers.27.self_attn.k_proj_moe_gen.weight': (512, 3584),
      'language_model.model.layers.0.mlp_moe_gen.gate_proj.weight': (18944, 3584),
      'language_model.model.layers.9.mlp.down_proj.weight': (3584, 18944),
      'latent_pos_embed.pos_embed': (4096, 3584),
      'vit_pos_embed.pos_embed': (4900, 3584),
      'vae2llm.weight': (3584, 64),
      'llm2vae.weight': (64, 3584),
      'time_embedder.mlp.0.weight': (3584, 256),
      'connector.fc1.weight': (3584, 1152),
      f'{tower}embeddings.patch_embedding.weight': (1152, 588),
      f'{tower}encoder.layers.25.mlp.fc1.weight': (4304, 1152),
    }.items():
      self.assertEqual(places[name].shape, shape, name)
    self.assertNotIn(f'{tower}encoder.layers.26.mlp.fc1.weight', places)

  @parameterized.named_parameters(('7b', bagel_7b, 14_607_260_128), ('1p5b', bagel_1p5b, None))
  def test_configs_of_the_released_sizes(self, module, total):
    config = bagel_config.model_config(module.get_config().architecture.to_dict())
    places = bagel_params.places(config)
    self.assertLen(places, 1223)
    count = sum(np.prod(place.shape, dtype=np.int64) for place in places.values())
    H, I, V, K = config.width, config.ff_width, config.vocab, config.width // config.heads
    kv = config.kv_heads * K
    layer = 2 * H * H + 2 * H * kv + H + 2 * kv + 2 * K + 3 * H * I + 2 * H
    vit, vit_I, P = 1152, 4304, 3 * 14**2
    tower = 26 * (4 * (vit * vit + vit) + 2 * vit * vit_I + vit_I + vit + 4 * vit)
    tower += P * vit + vit + 70**2 * vit + 2 * vit
    rest = (vit * H + H) + (H * H + H) + (256 * H + H) + (H * H + H) + (64 * H + H) + (64 * H + 64)
    self.assertEqual(count, 2 * 28 * layer + 2 * V * H + 2 * H + tower + rest + (64**2 + 70**2) * H)
    self.assertEqual(count, total or count)

  def test_shapes_of_the_autoencoder(self):
    places = bagel_params.places(bagel_config.autoencoder(self.config))
    self.assertLen(places, 244)
    self.assertEqual(sum(int(np.prod(p.shape)) for p in places.values()), 83_819_683)
    self.assertEqual(places['encoder.conv_in.weight'].shape, (128, 3, 3, 3))
    self.assertEqual(places['decoder.conv_in.weight'].shape, (512, 16, 3, 3))

  def test_the_table_reads_both_ways(self):
    for config, rules in (
      (bagel_config.model_config(self.config), bagel_params.MODEL_RULES),
      (bagel_config.autoencoder(self.config), bagel_params.AUTOENCODER_RULES),
    ):
      for tensor, place in bagel_params.places(config).items():
        self.assertEqual(bagel_params.parameter_path(tensor, rules), (place.path, place.layer))
    with self.assertRaisesRegex(ValueError, 'rotary.inv_freq'):
      bagel_params.parameter_path('rotary.inv_freq', bagel_params.MODEL_RULES)

  def test_scripts_overrule_the_files(self):
    config = bagel_config.model_config(self.config)
    self.assertEqual((config.vit.depth, config.vit.side, config.latent_side), (26, 70, 64))
    self.assertEqual((config.heads, config.kv_heads, config.rope_theta), (28, 4, 1e6))
    self.assertEqual(config.latent_channels, 64)
    self.assertEqual((config.start_of_image, config.end_of_image), (151652, 151653))

  def test_a_third_file_may_say_what_the_scripts_set(self):
    small = {**self.config['vae_config'], 'ch': 32, 'z_channels': 4}
    for said, key, value in (
      ({'latent_patch_size': 4}, 'latent_patch_size', 4),
      ({'vae_config': small}, 'vae_config', small),
      ({'vae_config': {'z_channels': 4}}, 'vae_config', self.config['vae_config']),
      ({'model_type': 'bagel'}, 'latent_patch_size', 2),
    ):
      (self.folder / 'config.json').write_text(json.dumps(said))
      config = bagel_config.read_config(self.folder)
      self.assertEqual(config[key], value)
      self.assertNotIn('model_type', config)

  def test_one_file(self):
    (self.folder / 'llm_config.json').unlink()
    (self.folder / 'config.json').write_text(json.dumps(self.config))
    self.assertEqual(bagel_config.read_config(self.folder), self.config)

  def test_unsupported_values(self):
    llm, vit = self.config['llm_config'], self.config['vit_config']
    for changed, message in (
      ({'llm_config': {**llm, 'qk_norm': False}}, 'llm_config.qk_norm is False'),
      ({'vit_config': {**vit, 'rope': True}}, 'vit_config.rope is True'),
      ({'interpolate_pos': True}, '^interpolate_pos is True'),
      ({'vit_max_num_patch_per_side': 32}, 'is 32, but the vision tower has 70'),
      ({'special_tokens': {}}, 'no special_tokens.start_of_image'),
      ({'llm_config': {**llm, 'hidden_size': '16'}}, "llm_config.hidden_size is '16'; expected"),
      ({'llm_config': {**llm, 'num_key_value_heads': 5}}, 'num_attention_heads 28 is no mult'),
      ({'vit_config': {**vit, 'num_attention_heads': 7}}, 'hidden_size 1152 is no multiple'),
      ({'vit_config': []}, 'no vit_config'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        bagel_config.model_config({**self.config, **changed})
    with self.assertRaisesRegex(ValueError, 'downsample is 16; the levels give 8'):
      bagel_config.autoencoder({'vae_config': {**self.config['vae_config'], 'downsample': 16}})

  def test_a_tower_that_does_not_say_its_epsilon(self):
    vit = {k: v for k, v in self.config['vit_config'].items() if k != 'layer_norm_eps'}
    self.assertEqual(bagel_config.model_config({**self.config, 'vit_config': vit}).vit.eps, 1e-6)

  def test_files_that_hold_no_configuration(self):
    for name, content, message in (
      ('vit_config.json', b'[1]', 'vit_config.json: it holds no JSON object'),
      ('vit_config.json', b'{}', 'no vit_config.num_hidden_layers'),
      ('llm_config.json', b'\xff\xfe', 'cannot read .*llm_config.json'),
      ('config.json', b'[]', 'config.json: it holds no JSON object'),
    ):
      path = self.folder / name
      before = path.read_bytes() if path.exists() else None
      path.write_bytes(content)
      with self.assertRaisesRegex(ValueError, message):
        bagel_config.read_config(self.folder)
      if before is None:
        path.unlink()
      else:
        path.write_bytes(before)

  def test_absent_folder(self):
    with self.assertRaisesRegex(ValueError, 'config.json'):
      bagel_config.read_config(self.folder / 'nowhere')


if __name__ == '__main__':
  absltest.main()
