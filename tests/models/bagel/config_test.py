"""Tests of lvrpo_jax.models.bagel.config and tensor_names."""

import json
import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from configs import bagel_1p5b
from configs import bagel_7b
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import tensor_names

QWEN_7B = {
  'vocab_size': 152064,
  'hidden_size': 3584,
  'num_hidden_layers': 28,
  'num_attention_heads': 28,
  'num_key_value_heads': 4,
  'intermediate_size': 18944,
  'rms_norm_eps': 1e-6,
  'rope_theta': 1e6,
  'hidden_act': 'silu',
  'tie_word_embeddings': True,
}
SIGLIP = {
  'hidden_size': 1152,
  'num_hidden_layers': 27,
  'num_attention_heads': 16,
  'intermediate_size': 4304,
  'patch_size': 14,
  'image_size': 980,
  'layer_norm_eps': 1e-6,
  'hidden_act': 'gelu_pytorch_tanh',
  'rope': True,
}


class ReleasedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    (self.folder / 'llm_config.json').write_text(json.dumps(QWEN_7B))
    (self.folder / 'vit_config.json').write_text(json.dumps(SIGLIP))
    (self.folder / 'config.json').write_text('{}')
    self.config = bagel_config.read_config(self.folder)

  def test_shapes_of_the_7b_model(self):
    """Counts and shapes are those of the released `ema.safetensors`."""
    places = tensor_names.places(bagel_config.model_config(self.config))

    def count(names):
      return sum(int(np.prod(places[name].shape)) for name in names)

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
    places = tensor_names.places(config)
    self.assertLen(places, 1223)
    count = sum(np.prod(place.shape, dtype=np.int64) for place in places.values())
    D, F, V, K = config.width, config.ff_width, config.vocab, config.width // config.heads
    kv = config.kv_heads * K
    layer = 2 * D * D + 2 * D * kv + D + 2 * kv + 2 * K + 3 * D * F + 2 * D
    vit, vit_F, P = 1152, 4304, 3 * 14**2
    tower = 26 * (4 * (vit * vit + vit) + 2 * vit * vit_F + vit_F + vit + 4 * vit)
    tower += P * vit + vit + 70**2 * vit + 2 * vit
    rest = (vit * D + D) + (D * D + D) + (256 * D + D) + (D * D + D) + (64 * D + D) + (64 * D + 64)
    self.assertEqual(count, 2 * 28 * layer + 2 * V * D + 2 * D + tower + rest + (64**2 + 70**2) * D)
    self.assertEqual(count, total or count)

  def test_shapes_of_the_autoencoder(self):
    places = tensor_names.places(bagel_config.autoencoder(self.config))
    self.assertLen(places, 244)
    self.assertEqual(sum(int(np.prod(p.shape)) for p in places.values()), 83_819_683)
    self.assertEqual(places['encoder.conv_in.weight'].shape, (128, 3, 3, 3))
    self.assertEqual(places['decoder.conv_in.weight'].shape, (512, 16, 3, 3))

  def test_the_table_reads_both_ways(self):
    for config, rules in (
      (bagel_config.model_config(self.config), tensor_names.MODEL_RULES),
      (bagel_config.autoencoder(self.config), tensor_names.AUTOENCODER_RULES),
    ):
      for tensor, place in tensor_names.places(config).items():
        self.assertEqual(tensor_names.parameter_path(tensor, rules), (place.path, place.layer))
    with self.assertRaisesRegex(ValueError, 'rotary.inv_freq'):
      tensor_names.parameter_path('rotary.inv_freq', tensor_names.MODEL_RULES)

  def test_scripts_overrule_the_files(self):
    config = bagel_config.model_config(self.config)
    self.assertEqual((config.vit.depth, config.vit.side, config.latent_side), (26, 70, 64))
    self.assertEqual((config.heads, config.kv_heads, config.rope_theta), (28, 4, 1e6))
    self.assertEqual(config.latent_channels, 64)
    self.assertEqual((config.start_of_image, config.end_of_image), (151652, 151653))

  def test_a_third_file_replaces_values_of_the_scripts(self):
    small = {**self.config['vae_config'], 'ch': 32, 'z_channels': 4}
    for given, key, value in (
      ({'latent_patch_size': 4}, 'latent_patch_size', 4),
      ({'vae_config': small}, 'vae_config', small),
      ({'vae_config': {'z_channels': 4}}, 'vae_config', self.config['vae_config']),
      ({'model_type': 'bagel'}, 'latent_patch_size', 2),
    ):
      (self.folder / 'config.json').write_text(json.dumps(given))
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

  def test_default_epsilon_of_the_tower(self):
    vit = dict(self.config['vit_config'])
    del vit['layer_norm_eps']
    self.assertEqual(bagel_config.model_config({**self.config, 'vit_config': vit}).vit.eps, 1e-6)

  def test_files_without_a_configuration_are_named(self):
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
