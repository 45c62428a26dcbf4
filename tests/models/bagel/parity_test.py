"""Parity with the released BAGEL implementation: every array of a folder of golden numbers.

The folder holds a tiny model with random weights, inputs and what the released code computes from
them in float32. It is tests/goldens/bagel, or what the environment variable LVRPO_PARITY_DIR
names; nothing here depends on its sizes.
"""

import functools
import re
from unittest import mock

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import types
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import packing
from lvrpo_jax.models import attention
from lvrpo_jax.models import layers
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import params as bagel_params
from lvrpo_jax.models.bagel import trunk
from lvrpo_jax.rollouts import guidance as guidance_lib
from tests.helpers import jax_settings
from tests.helpers import parity_world
from tests.helpers import released_packing

TOLERANCE = 1e-4  # both absolute and relative
GREY_LEVEL_SHARE = 0.01  # of the bytes of an image may differ, by one grey level
MISTAKE = 1000 * TOLERANCE  # a mistake moves some number by more than this
THINK_POINTS = 4  # of the time grid of the think case; the golden folder's notes fix three steps
GROUPS = (
  'train/grad',
  'train/',
  'pack/',
  'und/',
  'und2/',
  'gen/batch',
  'gen/',
  'cfgmix/',
  'edit/',
  'think/',
  'vit/',
  'vae/',
  'misc/',
)

setUpModule, tearDownModule = jax_settings.of_module(
  jax_default_matmul_precision='highest',
  # Compilation takes nearly all the time; the numbers agree with full optimization too.
  jax_disable_most_optimizations=True,
)


def group_of(name: str) -> str:
  """The first prefix in `GROUPS` of an array's name."""
  return next(prefix for prefix in GROUPS if name.startswith(prefix))


class ParityTest(absltest.TestCase):
  total = 0

  def setUp(self):
    super().setUp()
    self.w = parity_world.world()
    self.checked = {}

  @classmethod
  def tearDownClass(cls):
    print(f'parity: {cls.total} arrays checked in {parity_world.PARITY_DIR}')
    super().tearDownClass()

  def check(self, name, value):
    """Compares with a golden array; integers, booleans and strings exactly."""
    want, value = self.w.outputs[name], np.asarray(value)
    self.assertEqual(value.shape, want.shape, name)
    if want.dtype.kind in 'biU':
      np.testing.assert_array_equal(value, want, name)
      self.checked[name] = 0.0
    elif want.dtype == np.uint8:
      away = np.abs(value.astype(int) - want.astype(int))
      self.assertLessEqual(away.max(), 1, name)
      self.assertLessEqual(np.mean(away > 0), GREY_LEVEL_SHARE, name)
      self.checked[name] = 0.0
    else:
      np.testing.assert_allclose(value, want, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)
      self.checked[name] = float(np.max(np.abs(value - want), initial=0.0))

  def finish(self, *groups):
    """Every array of the groups was checked; prints their largest deviations."""
    for group in groups:
      names = {name for name in self.w.outputs if group_of(name) == group}
      done = {name for name in self.checked if group_of(name) == group}
      self.assertEmpty(names - done, 'not checked')
      worst = max(done, key=self.checked.get)
      print(
        f'parity: {group:12} {len(done):3} arrays, largest deviation '
        f'{self.checked[worst]:.1e} in {worst}'
      )
      type(self).total += len(done)

  def test_every_array_has_a_group(self):
    for name in self.w.outputs:
      self.assertTrue(name.startswith(GROUPS), name)

  def test_train(self):
    w, t = self.w, parity_world.train()
    for name, value in released_packing.reference_arrays(t.packed).items():
      np.testing.assert_allclose(value, w.inputs[f'train/{name}'], 1e-6, err_msg=name)
    np.testing.assert_array_equal(
      parity_world.to_first(t.padded_YXC), w.inputs['train/padded_images']
    )

    def embed(method, *args):
      return w.apply(w.params, *args, method=method)

    seq = t.sequence
    vit = (seq.patches_BNP, seq.patch_position_BN, seq.patch_image_BN)

    def connector(m, *args):
      return m.embed_patches(*args)

    vit_tokens = embed(connector, *vit)[0]
    position = w.params['vit_pos_embed'][seq.patch_position_BN[0]]
    inputs = np.concatenate(
      [
        embed('embed_text', seq.ids_BL)[0],
        vit_tokens,
        embed('embed_latents', seq.latents_BNC, seq.time_BN, seq.latent_position_BN)[0],
      ]
    )
    everything = attention.join(attention.join(seq.text, seq.vit), seq.gen)
    back = np.argsort(t.order)
    (total, details), _ = parity_world.train_results()
    for name, value in {
      'attention_keep': np.asarray(attention.keep_mask(everything, everything)[0])[back][:, back],
      'padded_latent': parity_world.to_first(t.latent_YXC),
      'latents_clean': t.clean,
      'timesteps_shifted': t.time,
      'x_t': t.x_t,
      'timestep_embed': embed(lambda m, x: m.time_embedder(x), t.time),
      'latent_pos_embed': w.params['latent_pos_embed'][seq.latent_position_BN[0]],
      'vae2llm': embed(lambda m, x: m.vae2llm(x), t.x_t),
      'vit_features': embed(lambda m, *args: m.vit(*args)[0], *vit)[0],
      'connector': vit_tokens - position,
      'vit_pos_embed': position,
      'input_sequence': inputs[back],
      'loss_total': total,
    }.items():
      self.check(f'train/{name}', value)
    for name, value in details.items():
      inside = name in ('last_hidden', 'text_logits_all', 'layer_outputs')
      self.check(f'train/{name}', t.logical(value) if inside else value)
    self.finish('train/')

  def test_gradients(self):
    gradients = dict(bagel_params.tensors(parity_world.train_results()[1], self.w.model_config))
    names = self.w.outputs['train/grad_names']

    def norm(name):
      return np.sqrt(np.sum(np.square(gradients[name], dtype=np.float64)))

    self.check('train/grad_names', names)
    self.check('train/grad_l2', np.array([norm(name) for name in names]))
    for name in gradients.keys() - set(names):
      self.assertEqual(norm(name), 0.0, name)
    for name in self.w.outputs:
      if name.startswith('train/grad/'):
        self.check(name, gradients[name.removeprefix('train/grad/')])
    self.finish('train/grad')

  def test_pack(self):
    w = self.w
    kinds = dict(text=packing.Text, vit=packing.Vit, vae=packing.Latent)
    samples = parity_world.train_samples(w)[2:4]
    packs = {}
    for case in ('text', 'vit', 'vae', 'all'):
      kind = kinds.get(case, packing.Segment)
      drops = [[s.droppable and isinstance(s, kind) for s in sample] for sample in samples]
      packs[f'drop_{case}'] = packing.pack(samples, w.form, drops)
    for case in ('loss', 'cond'):
      prefix = f'pack/frames_{case}'
      position = w.latent_position(w.inputs[f'{prefix}/frame_hw'])
      frames = [
        packing.Latent(position, target=case == 'loss', frame_delta=delta)
        for delta in (*w.inputs[f'{prefix}/frame_delta'].tolist(), None)
      ]
      packs[f'frames_{case}'] = packing.pack(
        [[w.text(f'{prefix}/text_0'), *frames, w.text(f'{prefix}/text_1')]], w.form
      )
    for name in (name for name in w.outputs if name.startswith('pack/')):
      _, case, array = name.split('/')
      packed = packs[case]
      draws = np.where(packed.target_BN, packed.sequence.gen.split_BL, -1)
      self.check(
        name,
        {
          **released_packing.reference_arrays(packed),
          'number_of_distinct_timesteps': np.int32(len(np.unique(draws))),
        }[array],
      )
    self.finish('pack/')

  def check_cache(self, case, cache, places):
    self.check(f'{case}/k_cache', cache.k_EBSJK[:, 0, places])
    self.check(f'{case}/v_cache', cache.v_EBSJK[:, 0, places])

  def test_understanding(self):
    w = self.w
    for case in ('und', 'und2'):
      system = [w.text(f'{case}/system_ids')] if f'{case}/system_ids' in w.inputs else []
      cache, hidden, places = w.context([*system, *w.vits(case), w.text(f'{case}/prompt_ids')])
      skipped = sum(len(text.ids) + 2 for text in system)
      self.check(f'{case}/prefill_hidden', hidden[places[skipped:]])
      self.check_cache(case, cache, places)
      self.check(f'{case}/kv_len', np.int32(len(places)))
      self.check(f'{case}/rope_next', cache.next_position_B[0])
      length = len(w.outputs[f'{case}/generated'])
      tokens = w.greedy(cache, length, eos=-1)
      generated = np.array([w.form.bos, *tokens[:-1]])
      self.check(f'{case}/generated', generated)
      logits = w.read(w.params, cache, generated[None, None])[0, 0]
      self.check(f'{case}/step_logits', logits)
      np.testing.assert_array_equal(np.argmax(logits, axis=-1), tokens)
      stopped = w.greedy(cache, length, int(w.inputs[f'{case}/stop_id']))
      self.check(f'{case}/generated_until_stop', np.array([w.form.bos, *stopped]))
    self.finish('und/', 'und2/')

  def check_walk(self, prefix, settings, caches, noise, position, plain=False):
    """Runs guided sampling with the settings of a case; returns the final latent tokens."""
    w = self.w

    def scale(name):
      return 1.0 if plain else settings.get(name, 1.0)

    guidance = guidance_lib.Guidance(
      scale('cfg_text_scale'),
      scale('cfg_img_scale'),
      *settings['interval'],
      renorm=settings['renorm_type'],
    )
    grid = flow.time_grid(settings['num_timesteps'], settings['shift'])
    walk = w.walk(w.params, caches, guidance, noise, position, grid)
    if f'{prefix}_timesteps' in w.outputs:
      self.check(f'{prefix}_timesteps', grid[:-1])
      self.check(f'{prefix}_x_steps', walk.x_TBGNC[:, 0, 0])
      self.check(f'{prefix}_v_steps', walk.v_TBGNC[:, 0, 0])
      self.check(f'{prefix}_cfg_text_scale_used', walk.text_scale_T)
      self.check(f'{prefix}_cfg_img_scale_used', walk.image_scale_T)
    final = walk.latents_BGNC[0, 0]
    name = f'{prefix}_final_latent'
    self.check(name if name in w.outputs else f'{prefix}/final_latent', final)
    return final

  def decoded(self, tokens, image_hw):
    """Latent (Y, X, C) and image (Y, X, 3) of latent tokens."""
    latent = vae_lib.unpatchify(tokens[None], self.w.grid(image_hw), self.w.patch)
    return latent[0], np.asarray(self.w.decode_image(latent)[0])

  def test_generation(self):
    w, hw = self.w, self.w.inputs['gen/image_hw']
    position, noise = w.latent_position(hw), w.inputs['gen/noise']
    segments = dict(main=[w.text('gen/prompt_ids')], without_text=[])
    segments['without_images'] = segments['main']
    caches = w.contexts(segments)
    query = packing.Latent(position, target=True)
    packed = {
      name: released_packing.reference_arrays(packing.pack([[*value, query]], w.form))
      for name, value in segments.items()
    }
    rope = {
      name: arrays['packed_position_ids'][-(len(position) + 2) :] for name, arrays in packed.items()
    }
    self.check('gen/packed_position_ids', rope['main'])
    self.check('gen/cfg_text_position_ids', rope['without_text'])
    self.check('gen/packed_vae_position_ids', packed['main']['packed_latent_position_ids'])
    self.check('gen/packed_text_ids', packed['main']['packed_text_ids'][-2:])
    for name, cache in caches.items():
      self.assertEqual(cache.next_position_B[0], rope[name][0])

    def velocity(name, t):
      return w.velocity(w.params, caches[name], noise, jnp.float32(t), position)

    v, u = velocity('main', 1.0), velocity('without_text', 1.0)
    self.check('gen/v_t1', v)
    self.check('gen/v_t1_uncond', u)
    settings = w.config['cases']['gen']
    scale = settings['cfg_text_scale']
    for name in w.outputs:
      if time := re.fullmatch(r'gen/v_t(0\.\d+)', name):
        self.check(name, velocity('main', float(time[1])))
      elif setting := re.fullmatch(r'gen/v_t1_cfg_(\w+)_min([\d.]+)', name):
        self.check(name, flow.guide(v, u, v, scale, 1.0, setting[1], float(setting[2])))
    self.check('gen/v_t1_cfg_norenorm', flow.guide(v, u, v, scale, 1.0, 'global', 1.0))
    self.check_walk('gen/plain', settings, caches, noise, position, plain=True)
    final = self.check_walk('gen/cfg', settings, caches, noise, position)
    latent, image = self.decoded(final, hw)
    self.check('gen/cfg_unpacked_latent', parity_world.to_first(latent))
    self.check('gen/cfg_decoded', parity_world.to_first(image))
    self.check('gen/cfg_image_u8', image_files.to_bytes(image))
    self.finish('gen/')

  def test_generation_of_a_batch(self):
    w, start, branches = self.w, 0, []
    empty = w.context([])[0]
    for i, hw in enumerate(w.inputs['gen/batch_image_hw']):
      position = w.latent_position(hw)
      noise = w.inputs['gen/batch_noise'][start : start + len(position)]
      start += len(position)
      cache = w.context([w.text(f'gen/batch_prompt_ids_{i}')])[0]
      branches.append(
        [w.velocity(w.params, c, noise, jnp.float32(1.0), position) for c in (cache, empty)]
      )
    # The global norm is taken over all images of the batch.
    v, u = (jnp.concatenate(parts) for parts in zip(*branches))
    scale = w.config['cases']['gen']['cfg_text_scale']
    self.check('gen/batch_v_t1', v)
    for renorm in ('global', 'channel'):
      self.check(f'gen/batch_v_t1_cfg_{renorm}', flow.guide(v, u, v, scale, 1.0, renorm, 0.0))
    self.finish('gen/batch')

  def test_guidance_formula(self):
    names = ('renorm_type', 'text_scale', 'img_scale', 'renorm_min')
    settings = [self.w.outputs[f'cfgmix/{name}'] for name in names]
    for name, value in zip(names, settings):
      self.check(f'cfgmix/{name}', value)
    self.check('cfgmix/result', parity_world.guidance_results(self.w))
    self.finish('cfgmix/')

  def test_edit(self):
    w = self.w
    hw = w.inputs['edit/image_vae'].shape[-2:]
    position, noise = w.latent_position(hw), w.inputs['edit/noise']
    segments = w.edit_segments
    caches = w.contexts(segments)
    clean, vit, _ = segments['main']
    start, end = w.apply(
      w.params, np.array([[w.form.start_of_image], [w.form.end_of_image]]), method='embed_text'
    )
    latents = w.apply(
      w.params,
      clean.tokens,
      np.zeros(len(clean.tokens)),
      clean.position_ids,
      method='embed_latents',
    )
    patches = w.apply(
      w.params,
      vit.patches[None],
      vit.position_ids[None],
      np.zeros((1, len(vit.patches)), int),
      method='embed_patches',
    )[0]
    self.check('edit/vae_context_input', jnp.concatenate([start, latents, end]))
    self.check('edit/vit_context_input', jnp.concatenate([start, patches, end]))
    _, _, places = w.context(segments['main'])
    self.check_cache('edit', caches['main'], places)
    for ours, name in (
      ('main', 'main'),
      ('without_text', 'cfg_text'),
      ('without_images', 'cfg_img'),
    ):
      self.check(f'edit/{name}_kv_len', np.sum(caches[ours].valid_BS, dtype=np.int32))
      self.check(f'edit/{name}_rope_next', caches[ours].next_position_B[0])

    def velocity(name, x, t):
      return w.velocity(w.params, caches[name], x, jnp.float32(t), position)

    v, v_text, v_image = (velocity(name, noise, 1.0) for name in segments)
    self.check('edit/v_t1', v)
    self.check('edit/v_t1_cfg_text_branch', v_text)
    self.check('edit/v_t1_cfg_img_branch', v_image)
    self.check(
      'edit/check_v', velocity('main', w.inputs['edit/check_x_t'], w.inputs['edit/check_t'])
    )
    settings = w.config['cases']['edit']
    a, b = settings['cfg_text_scale'], settings['cfg_img_scale']
    for name in w.outputs:
      if both := re.fullmatch(r'edit/v_t1_both_([a-z_]+?)(?:_min([\d.]+))?', name):
        self.check(name, flow.guide(v, v_text, v_image, a, b, both[1], float(both[2] or 0.0)))
    self.check('edit/v_t1_text_only_global', flow.guide(v, v_text, v_image, a, 1.0, 'global', 0.0))
    self.check('edit/v_t1_img_only', flow.guide(v, v_text, v_image, 1.0, b, 'global', 0.0))
    _, image = self.decoded(self.check_walk('edit/cfg', settings, caches, noise, position), hw)
    self.check('edit/cfg_decoded', parity_world.to_first(image))
    self.check('edit/cfg_image_u8', image_files.to_bytes(image))
    self.finish('edit/')

  def test_think(self):
    w, segments = self.w, self.w.think_segments
    vae_pixels, vit_pixels = w.think_pixels
    self.check('think/vae_pixels', vae_pixels)
    self.check('think/vit_pixels', vit_pixels)
    length = len(w.outputs['think/thought_ids'])
    thought = w.greedy(w.context(segments['main'])[0], length, w.form.eos)
    self.check('think/thought_ids', thought)
    hw = vae_pixels.shape[-2:]
    caches = w.contexts({**segments, 'main': [*segments['main'], packing.Text(thought)]})
    settings = {**w.config['cases']['edit'], 'num_timesteps': THINK_POINTS}
    final = self.check_walk(
      'think', settings, caches, w.inputs['think/noise'], w.latent_position(hw)
    )
    self.check('think/image_u8', image_files.to_bytes(self.decoded(final, hw)[1]))
    self.finish('think/')

  def test_vit(self):
    w = self.w
    packed = packing.pack([w.vits('vit')], w.form).sequence
    vit = (packed.patches_BNP, packed.patch_position_BN, packed.patch_image_BN)
    features, outputs = w.apply(w.params, *vit, method=lambda m, *args: m.vit(*args))
    tokens = w.apply(w.params, *vit, method='embed_patches')[0]
    self.check('vit/patches', packed.patches_BNP[0])
    self.check('vit/position_ids', packed.patch_position_BN[0])
    self.check('vit/layer_outputs', outputs[:, 0])
    self.check('vit/features', features[0])
    self.check('vit/llm_tokens', tokens)
    self.check('vit/connector', tokens - w.params['vit_pos_embed'][packed.patch_position_BN[0]])
    self.finish('vit/')

  def test_vae(self):
    w = self.w
    a, b = (parity_world.to_last(w.inputs[f'vae/image_{name}'])[None] for name in 'ab')

    def moments(image):
      return parity_world.to_first(np.concatenate(w.moments(image), axis=-1))

    padding = [(0, have - need) for have, need in zip(a.shape, b.shape)]
    self.check('vae/moments_a', moments(a))
    self.check('vae/mean_a', parity_world.to_first(w.moments(a)[0]))
    self.check('vae/moments_b', moments(b))
    self.check('vae/moments_padded_batch', moments(np.concatenate([a, np.pad(b, padding)])))
    self.check(
      'vae/latent_mean_a',
      parity_world.to_first(w.vae.apply({'params': w.vae_params}, a, method='encode_mean')),
    )
    self.check(
      'vae/latent_sampled_a',
      parity_world.to_first(w.encode(a, parity_world.to_last(w.inputs['vae/eps_a']))),
    )
    self.check(
      'vae/decode_out',
      parity_world.to_first(w.decode_image(parity_world.to_last(w.inputs['vae/decode_in']))),
    )
    self.finish('vae/')

  def test_misc(self):
    w, c = self.w, self.w.model_config
    t = jnp.asarray(w.inputs['misc/t'])
    self.check('misc/sinusoid', layers.time_features(t))
    self.check('misc/time_embed', w.apply(w.params, t, method=lambda m, x: m.time_embedder(x)))
    cos, sin = attention.rope_table(
      jnp.asarray(w.inputs['misc/rope_positions']), c.width // c.heads, c.rope_theta
    )
    self.check('misc/rope_cos', cos)
    self.check('misc/rope_sin', sin)
    positions = dict(extrapolate=layers.grid_positions, interpolate=interpolated_positions)
    for name in (name for name in w.outputs if name.startswith('misc/')):
      if grid := re.fullmatch(r'misc/grid_n(\d+)_shift([\d.]+)', name):
        self.check(name, flow.time_grid(int(grid[1]), float(grid[2])))
      elif ids := re.fullmatch(r'misc/pos_ids_(\w+?)_(\d+)x(\d+)', name):
        rows, columns = int(ids[2]) // c.vit.patch, int(ids[3]) // c.vit.patch
        self.check(name, positions[ids[1]](rows, columns, c.vit.side))
      elif rule := re.fullmatch(r'misc/resize_[a-z]+_(\d+)_(\d+)_(\d+)', name):
        self.check(name, self.resized(image_files.ResizeRule(*map(int, rule.groups()))))
      elif rule := re.fullmatch(
        r'misc/resize_[a-z]+_(\d+)_(\d+)_(\d+)_px(\d+)_imgnum(\d+)_and_(\d+)', name
      ):
        *sizes, first, second = map(int, rule.groups())
        self.check(
          name,
          np.stack(
            [self.resized(image_files.ResizeRule(*sizes, number)) for number in (first, second)],
            axis=1,
          ),
        )
    rule = image_files.ResizeRule(*w.config['cases']['transform']['vae'])
    self.check(
      'misc/pixels_transformed',
      parity_world.to_first(image_files.transform(w.inputs['misc/pixels_u8'], rule)),
    )
    self.finish('misc/')

  def resized(self, rule):
    sizes = self.w.inputs['misc/sizes_wh'].tolist()
    return np.array([image_files.resize_rule(*size, *rule) for size in sizes])


def interpolated_positions(rows: int, columns: int, side: int) -> np.ndarray:
  """Table rows of an image of rows x columns tokens, as the released code interpolates them."""
  boundaries = np.arange(1 / side, 1.0, 1 / side)
  row, column = (
    np.searchsorted(boundaries, np.arange(0, 1 - 1e-6, 1 / n), side='right')
    for n in (rows, columns)
  )
  return (row[:, None] * side + column[None]).reshape(-1).astype(np.int32)


class MistakesTest(absltest.TestCase):
  """Parity notices each mistake: the numbers above depend on what they claim to prove."""

  def deviation(self, name='last_hidden') -> float:
    """Largest deviation of a training array, with samples, layout and model made anew."""
    w = parity_world.world()
    t = parity_world.build_train(w)
    _, details = jax.jit(functools.partial(parity_world.train_losses, w))(w.params, t.batch)
    return float(np.max(np.abs(t.logical(details[name]) - w.outputs[f'train/{name}'])))

  def test_mask(self):
    honest = attention.keep_mask

    def visible(query, key):
      return honest(query, key.replace(mode_BL=jnp.minimum(key.mode_BL, types.FULL)))

    with mock.patch.object(attention, 'keep_mask', visible):
      self.assertGreater(self.deviation(), MISTAKE)

  def test_positions(self):
    honest = packing._advance
    with mock.patch.object(packing, '_advance', lambda segment: max(honest(segment), 1)):
      self.assertGreater(self.deviation(), MISTAKE)

    def own_width(rows, columns, side):
      return np.arange(rows * columns)

    with mock.patch.object(layers, 'grid_positions', own_width):
      self.assertGreater(self.deviation(), MISTAKE)

  def test_expert_slices(self):
    honest, other = trunk.Expert, {'und': 'gen', 'gen': 'und'}

    def swapped(name, **kwargs):
      return honest(name=other[name], **kwargs)

    with mock.patch.object(trunk, 'Expert', swapped):
      self.assertGreater(self.deviation(), MISTAKE)

  def test_time_features(self):
    honest = layers.time_features

    def sines_first(t):
      return jnp.concatenate(jnp.split(honest(t), 2, axis=-1)[::-1], axis=-1)

    with mock.patch.object(layers, 'time_features', sines_first):
      self.assertGreater(self.deviation(), MISTAKE)

  def test_guidance(self):
    w = parity_world.world()
    honest = flow.guide

    def late(v, u, w, a, b, renorm, floor):
      return honest(v, u, w, a, b, 'channel' if renorm == 'text_channel' else renorm, floor)

    with mock.patch.object(flow, 'guide', late):
      away = np.abs(parity_world.guidance_results(w) - w.outputs['cfgmix/result'])
    self.assertGreater(away.max(), MISTAKE)


if __name__ == '__main__':
  absltest.main()
