"""Tests of lvrpo_jax.models.{unified,mot,vit}."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.models import attention
from lvrpo_jax.models.bagel import model as bagel

CONFIG = bagel.ModelConfig(
  vocab=40,
  width=16,
  depth=2,
  heads=4,
  kv_heads=2,
  ff_width=24,
  latent_channels=3,
  latent_side=4,
  vit=bagel.VitConfig(width=8, depth=1, heads=2, ff_width=8, patch=2, side=4),
  start_of_image=38,
  end_of_image=39,
  rope_theta=100.0,
)
MODE = {'text': types.CAUSAL, 'vit': types.FULL, 'clean': types.FULL, 'noise': types.NOISE}
CONTEXTS = (
  (('text', 5),),
  (('vit', 4), ('text', 3)),
  (('clean', 4), ('vit', 4), ('text', 3)),
  (('text', 2), ('clean', 4), ('text', 2), ('vit', 3)),
)
SIZES = (12, 4, 8)
"""Places in memory for text, ViT and latents of a context and what follows it."""


def sequence(parts, rows=2, seed=0):
  """A sequence of segments (kind, size); equal prefixes of `parts` have equal contents."""
  places = {'text': [], 'vit': [], 'gen': []}
  values = {'ids': [], 'patches': [], 'latents': [], 'time': []}
  positions = {'vit': [], 'gen': []}
  order = position = 0

  def put(segment, orders, split, mode, where):
    count = len(orders)
    places[segment].append(
      np.stack(
        [
          np.zeros(count),
          orders,
          np.full(count, split),
          np.full(count, mode),
          np.broadcast_to(where, count),
        ]
      ).astype(np.int32)
    )

  for split, (kind, size) in enumerate(parts):
    rng = np.random.default_rng((seed, split))
    if kind == 'text':
      put('text', order + np.arange(size), split, MODE[kind], position + np.arange(size))
      values['ids'].append(rng.integers(0, 38, (rows, size)))
      order, position = order + size, position + size
      continue
    put('text', np.array([order, order + size + 1]), split, MODE[kind], position)
    values['ids'].append(np.tile([38, 39], (rows, 1)))
    segment = 'vit' if kind == 'vit' else 'gen'
    put(segment, order + 1 + np.arange(size), split, MODE[kind], position)
    positions[segment].append(np.arange(size))
    if kind == 'vit':
      values['patches'].append((split, rng.normal(size=(rows, size, 12))))
    else:
      values['latents'].append(rng.normal(size=(rows, size, 3)))
      time = rng.uniform(0.1, 0.9, (rows, 1)) if kind == 'noise' else np.zeros((rows, 1))
      values['time'].append(np.repeat(time, size, axis=1))
    order, position = order + size + 2, position + 1
  join = lambda xs, *empty: np.concatenate(xs, axis=1) if xs else np.zeros((rows, 0, *empty))
  layout = lambda segment: types.Layout(
    *(
      jnp.asarray(np.tile(x, (rows, 1)))
      for x in np.concatenate([np.zeros((5, 0), np.int32), *places[segment]], axis=1)
    )
  )
  table = lambda segment: jnp.asarray(
    np.tile(np.concatenate(positions[segment] or [np.zeros(0)]), (rows, 1)), jnp.int32
  )
  image = [np.full((rows, x.shape[1]), split) for split, x in values['patches']]
  return types.Sequence(
    ids_BL=jnp.asarray(join(values['ids']), jnp.int32),
    text=layout('text'),
    patches_BNP=jnp.asarray(join([x for _, x in values['patches']], 12), jnp.float32),
    patch_position_BN=table('vit'),
    patch_image_BN=jnp.asarray(join(image), jnp.int32),
    vit=layout('vit'),
    latents_BNC=jnp.asarray(join(values['latents'], 3), jnp.float32),
    latent_position_BN=table('gen'),
    time_BN=jnp.asarray(join(values['time']), jnp.float32),
    gen=layout('gen'),
    next_position_B=jnp.full(rows, position, jnp.int32),
  )


def padded(seq, sizes=SIZES):
  """The same sequence with garbage at the end of every segment, marked as padding."""
  rows = seq.ids_BL.shape[0]

  def fill(x, size, value):
    rest = jnp.full((rows, size - x.shape[1], *x.shape[2:]), value, x.dtype)
    return jnp.concatenate([x, rest], axis=1)

  def layout(x, size):
    return types.Layout(
      fill(x.sample_BL, size, types.PADDING),
      fill(x.order_BL, size, 0),
      fill(x.split_BL, size, 0),
      fill(x.mode_BL, size, types.FULL),
      fill(x.position_BL, size, 3),
    )

  text, vit, gen = sizes
  return seq.replace(
    ids_BL=fill(seq.ids_BL, text, 7),
    text=layout(seq.text, text),
    vit=layout(seq.vit, vit),
    gen=layout(seq.gen, gen),
    patches_BNP=fill(seq.patches_BNP, vit, 5.0),
    patch_position_BN=fill(seq.patch_position_BN, vit, 1),
    patch_image_BN=fill(seq.patch_image_BN, vit, -1),
    latents_BNC=fill(seq.latents_BNC, gen, 5.0),
    latent_position_BN=fill(seq.latent_position_BN, gen, 1),
    time_BN=fill(seq.time_BN, gen, 0.5),
  )


def contexts(*following):
  """All contexts, and what follows each, as the rows of one padded batch."""
  rows = [padded(sequence([*context, *following], rows=1)) for context in CONTEXTS]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def last(x, layout, count):
  """The last `count` places of every row that are no padding."""
  stop = np.sum(np.asarray(layout.sample_BL) != types.PADDING, axis=1)
  return jnp.stack([row[n - count : n] for row, n in zip(x, stop)])


@functools.cache
def parameters(config=CONFIG):
  """Fresh parameters with noise on every leaf: no head is zero, no two experts are equal."""
  params = jax.jit(functools.partial(bagel.init, config))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  return jax.tree.unflatten(
    tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  )


@functools.partial(jax.jit, static_argnames=('method', 'config'))
def apply(params, *args, method, config):
  """`Unified.<method>`, compiled once for every shape."""
  return bagel.Unified(config).apply({'params': params}, *args, method=method)


def run(*args, method, config=CONFIG):
  """`Unified.<method>` on the parameters of these tests."""
  return apply(parameters(), *args, method=method, config=config)


def close(got, want, tolerance=1e-5):
  np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)


class InfluenceTest(absltest.TestCase):
  def test_gradients_follow_the_mask(self):
    """An output depends on an input exactly where the mask allows it, after several layers.

    The rule is transitive (what a token sees, sees nothing that the token does not), so depth
    adds no path. It holds causality of text, full attention inside images, and that a noised
    image is visible to nothing that follows.
    """
    seq = sequence(
      [
        ('text', 3),
        ('vit', 3),
        ('text', 2),
        ('clean', 3),
        ('noise', 3),
        ('text', 2),
        ('noise', 3),
        ('text', 1),
      ],
      rows=1,
    )
    count = seq.ids_BL.shape[1]
    seq = seq.replace(ids_BL=jnp.arange(count)[None])  # A row of the table for every place.
    direction = np.random.default_rng(0).normal(size=CONFIG.width).astype(np.float32)

    @jax.jit
    def gradients(params, seq, place):
      def output(table, patches, latents):
        h_und, h_gen, _ = bagel.Unified(CONFIG).apply(
          {'params': {**params, 'embed_tokens': table}},
          seq.replace(patches_BNP=patches, latents_BNC=latents),
          method='forward',
        )
        return (jnp.concatenate([h_und, h_gen], axis=1)[0] @ direction)[place]

      return jax.grad(output, (0, 1, 2))(params['embed_tokens'], seq.patches_BNP, seq.latents_BNC)

    got = []
    for place in range(count + seq.patches_BNP.shape[1] + seq.latents_BNC.shape[1]):
      table, patches, latents = gradients(parameters(), seq, place)
      got.append(
        np.concatenate([np.abs(x).sum(-1) for x in (table[:count], patches[0], latents[0])])
      )
    got = np.array(got)
    layout = attention.join(seq.text, seq.vit, seq.gen)
    want = np.asarray(attention.keep_mask(layout, layout))[0]
    np.testing.assert_array_equal(got[~want], 0.0)
    self.assertGreater(got[want].min(), 1e-9)


QUESTION = (('vit', 4), ('text', 3))
DRAWING = (('vit', 4), ('text', 3), ('noise', 4))


@functools.partial(jax.jit, static_argnames='config')
def weighted_gradient(params, seq, text_weight_L, image_weight, config):
  def loss(params):
    logits, v = bagel.Unified(config).apply({'params': params}, seq)
    return jnp.sum(jnp.sin(logits) * text_weight_L[:, None]) + jnp.sum(jnp.sin(v) * image_weight)

  return jax.grad(loss)(params)


def gradient(parts, head, config=CONFIG):
  """Gradient of a loss on the text before the last image ('text') or on velocities ('image')."""
  seq = sequence(parts)
  count = seq.ids_BL.shape[1] + seq.patches_BNP.shape[1]
  text = np.arange(count) < seq.ids_BL.shape[1] - (0 if parts[-1][0] == 'text' else 2)
  image = np.float32(head == 'image')
  return weighted_gradient(parameters(), seq, text * (1 - image), image, config)


class ExpertsTest(parameterized.TestCase):
  def assert_zero(self, tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      np.testing.assert_array_equal(leaf, 0.0, err_msg=str(path))

  def assert_used(self, tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      self.assertGreater(np.abs(leaf).max(), 0.0, str(path))

  @parameterized.named_parameters(('no_latents', QUESTION), ('later_latents', DRAWING))
  def test_text_does_not_reach_the_generation_expert(self, parts):
    grad = gradient(parts, 'text')
    self.assert_zero(
      [
        grad['trunk']['layers']['gen'],
        grad['trunk']['norm_gen'],
        grad['vae2llm'],
        grad['llm2vae'],
        grad['time_embedder'],
      ]
    )
    self.assert_zero([grad['vit_pos_embed'], grad['latent_pos_embed']])  # Fixed tables.
    self.assert_used(
      [
        grad['trunk']['layers']['und'],
        grad['trunk']['norm_und'],
        grad['embed_tokens'],
        grad['lm_head'],
        grad['connector_fc1'],
      ]
    )

  def test_image_trains_both_experts(self):
    grad = gradient(DRAWING, 'image')
    layers = grad['trunk']['layers']
    self.assert_used(
      [
        layers['gen'],
        layers['und']['k_proj']['kernel'],
        grad['vae2llm'],
        grad['llm2vae'],
        grad['time_embedder'],
        grad['embed_tokens'],
        grad['vit'],
      ]
    )
    self.assert_zero([grad['lm_head'], grad['trunk']['norm_und']])
    # Keys and values of the last layer are the last of the understanding expert that is read.
    self.assert_zero(layers['und']['o_proj']['kernel'][-1])

  def test_frozen_understanding(self):
    config = dataclasses.replace(CONFIG, freeze_und=True)
    grad = gradient(DRAWING, 'image', config)
    self.assert_zero([grad['trunk']['layers']['und'], grad['embed_tokens']])
    self.assert_used([grad['trunk']['layers']['gen']])

  @parameterized.parameters({'remat': 'full', 'unroll': 2}, {'remat': 'dots_saveable'})
  def test_execution_does_not_change_gradients(self, **changes):
    other = gradient(DRAWING, 'image', dataclasses.replace(CONFIG, **changes))
    jax.tree.map(functools.partial(close, tolerance=1e-4), other, gradient(DRAWING, 'image'))


class CacheTest(absltest.TestCase):
  """The rows of a batch are different contexts, so padding is everywhere."""

  def context(self):
    return run(contexts(), method='prefill')

  def test_read_and_decode_equal_forward(self):
    length = 4
    whole = contexts(('text', length))
    want = last(run(whole, method='__call__')[0], whole.text, length)
    ids = last(whole.ids_BL, whole.text, length)[:, None]
    close(run(self.context(), ids, method='read')[:, 0], want)
    row = bagel.empty_row(CONFIG, (len(CONTEXTS), 1), length + 1)
    for i in range(length):
      logits, row = run(self.context(), row, jnp.int32(i), ids[..., i], method='decode')
      close(logits[:, 0], want[:, i])

  def test_velocity_equals_forward(self):
    whole = contexts(('noise', 4))
    pick = lambda x: last(x, whole.gen, 4)
    want = pick(run(whole, method='__call__')[1])
    got = run(
      self.context(),
      pick(whole.latents_BNC)[:, None],
      pick(whole.time_BN)[:, None, 0],
      pick(whole.latent_position_BN),
      method='velocity',
    )
    close(got[:, 0], want)
    self.assertEqual(got.dtype, jnp.float32)
    self.assertGreater(np.abs(want).max(), 0.1)

  def test_rows_share_a_context_and_keep_apart(self):
    rng = np.random.default_rng(0)
    B, M, cache = len(CONTEXTS), 3, self.context()
    ids = jnp.asarray(rng.integers(0, 38, (B, M, 4)), jnp.int32)
    x = jnp.asarray(rng.normal(size=(B, M, 4, 3)), jnp.float32)
    time = jnp.asarray(rng.uniform(size=(B, M)), jnp.float32)
    position = jnp.tile(jnp.arange(4), (B, 1))
    logits = run(cache, ids, method='read')
    v = run(cache, x, time, position, method='velocity')
    for m in range(M):
      one = slice(m, m + 1)
      close(logits[:, one], run(cache, ids[:, one], method='read'))
      close(v[:, one], run(cache, x[:, one], time[:, one], position, method='velocity'))
    row = bagel.empty_row(CONFIG, (B, M), 4)
    for i in range(4):
      decoded, row = run(cache, row, jnp.int32(i), ids[..., i], method='decode')
      close(decoded, logits[:, :, i])

  def test_padding_changes_nothing(self):
    parts = [*CONTEXTS[-1], ('noise', 4)]
    plain = sequence(parts, rows=len(CONTEXTS))
    logits, v = run(plain, method='__call__')
    got_logits, got_v = run(padded(plain), method='__call__')
    L, N = plain.ids_BL.shape[1], plain.patches_BNP.shape[1]
    self.assertLess(L + N, got_logits.shape[1])
    close(got_v[:, : v.shape[1]], v)
    close(got_logits[:, :L], logits[:, :L])
    close(got_logits[:, SIZES[0] : SIZES[0] + N], logits[:, L:])
    valid = run(padded(plain), method='prefill').valid_BS
    self.assertEqual(valid[0].sum(), L + N + v.shape[1])

  def test_order_in_memory_is_free(self):
    seq = contexts(('noise', 4))
    turn = lambda tree: jax.tree.map(lambda x: x[:, ::-1], tree)
    turned = seq.replace(
      **{
        name: turn(seq.__dict__[name])
        for name in ('ids_BL', 'text', 'latents_BNC', 'latent_position_BN', 'time_BN', 'gen')
      }
    )
    logits, v = run(seq, method='__call__')
    got_logits, got_v = run(turned, method='__call__')
    real = np.asarray(seq.text.sample_BL != types.PADDING)
    close(turn(got_logits[:, : SIZES[0]])[real], logits[:, : SIZES[0]][real])
    real = np.asarray(seq.gen.sample_BL != types.PADDING)
    close(turn(got_v)[real], v[real])


class InitTest(absltest.TestCase):
  def test_fresh_parameters(self):
    params = jax.jit(functools.partial(bagel.init, CONFIG))(jax.random.key(3))
    layers = params['trunk']['layers']
    jax.tree.map(np.testing.assert_array_equal, layers['gen'], layers['und'])
    self.assertEqual(layers['und']['q_proj']['kernel'].shape, (2, 16, 16))
    np.testing.assert_array_equal(params['llm2vae']['kernel'], 0.0)
    self.assertEqual({x.dtype for x in jax.tree.leaves(params)}, {jnp.dtype('float32')})

  def test_compute_dtype(self):
    config = dataclasses.replace(CONFIG, dtype='bfloat16')
    seq = contexts(('noise', 4))
    logits, v = run(seq, method='__call__', config=config)
    self.assertEqual((logits.dtype, v.dtype), (jnp.bfloat16, jnp.bfloat16))
    want = run(seq, method='__call__')
    real = np.asarray(seq.text.sample_BL != types.PADDING)
    close(logits[:, : SIZES[0]].astype(jnp.float32)[real], want[0][:, : SIZES[0]][real], 0.2)


if __name__ == '__main__':
  absltest.main()
