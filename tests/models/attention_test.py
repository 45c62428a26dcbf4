"""Tests of lvrpo_jax.models.attention and splash."""

import functools
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.models import attention
from lvrpo_jax.models import splash

CAUSAL, FULL, NOISE = types.CAUSAL, types.FULL, types.NOISE


def layout(modes, splits, samples=None, orders=None):
  """Builds a layout of one row; the order is the index in the list unless given."""
  count = len(modes)

  def row(values):
    return np.array([values], np.int32)

  return types.Layout(
    sample_BL=row(samples or [0] * count),
    order_BL=row(orders or range(count)),
    split_BL=row(splits),
    mode_BL=row(modes),
    position_BL=row([0] * count),
  )


def random_layout(rng, rows, count):
  """Builds rows of several samples with splits of every mode, shuffled, partly padding."""
  out = []
  for _ in range(rows):
    sample = np.sort(rng.integers(0, 2, count))
    split = np.cumsum(rng.random(count) < 0.4)
    split = split * 2 + sample  # A split never crosses samples.
    mode_of = rng.integers(0, 3, split.max() + 1)
    order = np.arange(count)
    padded = np.where(rng.random(count) < 0.2, types.PADDING, sample)
    shuffle = rng.permutation(count)
    out.append([x[shuffle] for x in (padded, order, split, mode_of[split], order)])
  return types.Layout(*(np.array(x, np.int32) for x in zip(*out, strict=True)))


def visible(query, key, row, i, j):
  """Applies the rule of the docstring to one pair."""

  def at(part, name, place):
    return part.__dict__[f'{name}_BL'][row, place]

  if at(key, 'sample', j) == types.PADDING or at(query, 'sample', i) != at(key, 'sample', j):
    return False
  same = at(query, 'split', i) == at(key, 'split', j)
  if at(key, 'mode', j) == NOISE and not same:
    return False
  if at(key, 'order', j) <= at(query, 'order', i):
    return True
  return same and at(key, 'mode', j) != CAUSAL


def normal(rng, *shape):
  """Draws standard normal numbers in float32."""
  return rng.normal(size=shape).astype(np.float32)


def assert_trees_close(got, want, tolerance=2e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), got, want
  )


class KeepMaskTest(parameterized.TestCase):
  def test_example_of_the_docstring(self):
    ttccnn = layout([CAUSAL] * 2 + [FULL] * 2 + [NOISE] * 2, [0, 0, 1, 1, 2, 2])
    want = [
      [1, 0, 0, 0, 0, 0],
      [1, 1, 0, 0, 0, 0],
      [1, 1, 1, 1, 0, 0],
      [1, 1, 1, 1, 0, 0],
      [1, 1, 1, 1, 1, 1],
      [1, 1, 1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(attention.keep_mask(ttccnn, ttccnn)[0], want)

  @parameterized.parameters(CAUSAL, FULL, NOISE)
  def test_later_tokens_do_not_see_a_noised_image(self, mode):
    key = layout([CAUSAL] * 2 + [FULL] * 2 + [NOISE] * 2, [0, 0, 1, 1, 2, 2])
    query = layout([mode], [3], orders=[6])
    np.testing.assert_array_equal(attention.keep_mask(query, key)[0, 0], [1, 1, 1, 1, 0, 0])

  def test_samples_do_not_see_each_other(self):
    both = layout([CAUSAL] * 4, [0, 0, 1, 1], samples=[0, 0, 1, 1])
    want = np.kron(np.eye(2), np.tril(np.ones((2, 2))))
    np.testing.assert_array_equal(attention.keep_mask(both, both)[0], want)

  def test_padding_is_never_visible(self):
    padded = layout([FULL] * 3, [0, 0, 0], samples=[0, types.PADDING, 0])
    mask = np.asarray(attention.keep_mask(padded, padded))[0]
    self.assertFalse(mask[:, 1].any())
    self.assertTrue(mask[[0, 2]][:, [0, 2]].all())

  def test_oracle_over_all_pairs(self):
    rng = np.random.default_rng(0)
    query, key = random_layout(rng, 6, 17), random_layout(rng, 6, 23)
    for q, k in ((query, key), (key, key)):
      got = np.asarray(attention.keep_mask(q, k))
      want = np.array(
        [
          [
            [visible(q, k, b, i, j) for j in range(k.sample_BL.shape[1])]
            for i in range(q.sample_BL.shape[1])
          ]
          for b in range(6)
        ]
      )
      np.testing.assert_array_equal(got, want)
      self.assertBetween(want.mean(), 0.05, 0.95)

  def test_join(self):
    rng = np.random.default_rng(0)
    parts = [random_layout(rng, 2, n) for n in (3, 1, 4)]
    joined = attention.join(*parts)
    np.testing.assert_array_equal(joined.split_BL[:, 3:4], parts[1].split_BL)
    np.testing.assert_array_equal(joined.order_BL[:, 4:], parts[2].order_BL)


class RopeTest(absltest.TestCase):
  def test_oracle(self):
    K, theta = 6, 100.0
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, K)).astype(np.float32)
    position = np.array([[0, 1, 7], [5, 5, 1000]])
    got = attention.apply_rope(x, *attention.rope_table(position, K, theta))
    want = np.empty_like(x)
    for b in range(2):
      for i in range(3):
        for j in range(K // 2):
          angle = position[b, i] * theta ** (-2 * j / K)
          rotation = np.exp(1j * angle)
          turned = (x[b, i, :, j] + 1j * x[b, i, :, j + K // 2]) * rotation
          want[b, i, :, j], want[b, i, :, j + K // 2] = turned.real, turned.imag
    np.testing.assert_allclose(got, want, atol=2e-4)

  def test_products_depend_on_distance_alone(self):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 8)).astype(np.float32)

    def product(i, j):
      turned_q = attention.apply_rope(q, *attention.rope_table(np.array([i]), 8, 1e4))
      turned_k = attention.apply_rope(k, *attention.rope_table(np.array([j]), 8, 1e4))
      return float(jnp.sum(turned_q * turned_k))

    self.assertAlmostEqual(product(3, 1), product(13, 11), places=5)
    self.assertNotAlmostEqual(product(3, 1), product(3, 2), places=3)


def attend_oracle(q, keys, values, masks):
  """Computes attention in float64, head by head, over the concatenated blocks."""
  B, M, L, H, K = q.shape

  def concatenate(blocks):
    rows = [
      np.broadcast_to(x if x.ndim == 5 else x[:, None], (B, M, *x.shape[-3:])) for x in blocks
    ]
    return np.concatenate(rows, axis=2).astype(np.float64)

  k, v = concatenate(keys), concatenate(values)
  mask = np.concatenate(
    [np.broadcast_to(m, (B, M, L, x.shape[-3])) for m, x in zip(masks, keys, strict=True)], axis=-1
  )
  out = np.zeros(q.shape)
  for h in range(H):
    j = h // (H // k.shape[3])
    logits = np.einsum('bmlk,bmsk->bmls', q[:, :, :, h], k[:, :, :, j]) / np.sqrt(K)
    weight = np.where(mask, np.exp(logits - logits.max()), 0)
    weight /= weight.sum(-1, keepdims=True)
    out[:, :, :, h] = np.einsum('bmls,bmsk->bmlk', weight, v[:, :, :, j])
  return out


class AttendTest(parameterized.TestCase):
  @parameterized.product(
    shared=([True], [False], [True, False], [True, False, True]), kv_heads=(1, 2, 6)
  )
  def test_oracle(self, shared, kv_heads):
    B, M, L, H, K = 2, 3, 4, 6, 8
    rng = np.random.default_rng(0)
    q = normal(rng, B, M, L, H, K)
    keys, values, masks = [], [], []
    for i, one in enumerate(shared):
      shape = (B, 3 + i, kv_heads, K) if one else (B, M, 3 + i, kv_heads, K)
      keys.append(normal(rng, *shape))
      values.append(normal(rng, *shape))
      mask = rng.random((B, 1 if one else M, L, 3 + i)) < 0.6
      mask[..., 0] |= i == 0
      masks.append(mask)
    blocks = [
      attention.Block(k, v, attention.Mask(m)) for k, v, m in zip(keys, values, masks, strict=True)
    ]
    got = attention.attend(q, blocks)
    np.testing.assert_allclose(got, attend_oracle(q, keys, values, masks), atol=1e-5)

  def test_heads_are_repeated_not_tiled(self):
    q = np.zeros((1, 1, 1, 4, 2), np.float32)
    v = np.array([1.0, 2.0], np.float32).reshape(1, 1, 2, 1) * np.ones((1, 1, 2, 2), np.float32)
    out = attention.attend(q, [attention.Block(v, v, attention.Mask())])
    np.testing.assert_array_equal(out[0, 0, 0, :, 0], [1.0, 1.0, 2.0, 2.0])

  def test_hidden_keys_have_no_influence(self):
    rng = np.random.default_rng(0)
    q, k, v = normal(rng, 1, 1, 2, 2, 4), normal(rng, 1, 3, 1, 4), normal(rng, 1, 3, 1, 4)
    mask = attention.Mask(np.array([[[[True, True, False]]]]))

    def run(k, v):
      return np.asarray(attention.attend(q, [attention.Block(k, v, mask)]))

    other_k, other_v = k.copy(), v.copy()
    other_k[:, 2], other_v[:, 2] = 100.0, -100.0
    np.testing.assert_array_equal(run(k, v), run(other_k, other_v))

  def test_no_visible_key_is_finite(self):
    rng = np.random.default_rng(0)
    v = normal(rng, 1, 3, 1, 4)
    out = attention.attend(
      np.ones((1, 1, 1, 1, 4), np.float32),
      [attention.Block(v, v, attention.Mask(np.zeros((1, 1, 1, 3), bool)))],
    )
    np.testing.assert_allclose(out[0, 0, 0, 0], v[0, :, 0].mean(0), atol=1e-6)


def case(masked, seed=0, dtype='float32', sizes=(2, 2, 4, 2), L=72, S=40):
  """Builds queries and blocks of grouped heads: a context that rows share, and the rows' own."""
  (B, M, H, J), K = sizes, 16
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  valid = jnp.asarray(rng.random((B, S)) < 0.7).at[:, 0].set(True)
  own = jnp.asarray(np.random.default_rng(seed + 1).random((B, L)) < 0.7)
  mask = {
    'context': (attention.Mask(keys=valid), attention.Mask()),
    'causal': (attention.Mask(keys=valid), attention.Mask(causal=True)),
    'causal_padded': (attention.Mask(keys=valid), attention.Mask(keys=own, causal=True)),
    'causal_offset': (attention.Mask(), attention.Mask(causal=True)),
    'alone': (None, attention.Mask()),
    'dense': (
      None,
      attention.Mask(jnp.asarray(rng.random((B, 1, L, L)) < 0.4) | jnp.eye(L, dtype=bool)),
    ),
  }[masked]
  blocks = [] if mask[0] is None else [attention.Block(draw(B, S, J, K), draw(B, S, J, K), mask[0])]
  return draw(B, M, L, H, K), [
    *blocks,
    attention.Block(draw(B, M, L, J, K), draw(B, M, L, J, K), mask[1]),
  ]


def value_and_gradients(attend, q, blocks):
  """Returns the output, and gradients of queries, keys and values of its weighted sum."""
  weight = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), jnp.float32)

  def total(arrays):
    q, kv = arrays
    out = attend(q, [b._replace(k=k, v=v) for b, (k, v) in zip(blocks, kv, strict=True)])
    return jnp.sum(weight * out), out

  run = jax.jit(jax.value_and_grad(total, has_aux=True))
  (_, out), grads = run((q, [(b.k, b.v) for b in blocks]))
  return out, grads


class MaskTest(parameterized.TestCase):
  def test_arrays(self):
    keys = jnp.asarray([[True, False, True], [False, True, True]])
    every, causal = np.ones((3, 3), bool), np.tri(3, dtype=bool)
    for mask, want in (
      (attention.Mask(), [every]),
      (attention.Mask(causal=True), [causal]),
      (attention.Mask(keys=keys), [every & row for row in keys]),
      (attention.Mask(keys=keys, causal=True), [causal & row for row in keys]),
    ):
      got = jnp.broadcast_to(mask.array(3, 3), (len(want), 1, 3, 3))
      np.testing.assert_array_equal(got[:, 0], want)


class ImplementationsTest(parameterized.TestCase):
  """Interpreted kernels of accelerators agree with plain attention."""

  @parameterized.product(
    masked=('context', 'causal', 'causal_padded', 'alone', 'dense'), name=('splash', 'cudnn')
  )
  def test_agrees_with_xla(self, masked, name):
    attend = {
      'splash': functools.partial(attention.attend_splash, interpret=True),
      # The same call with masks and layouts, but without the kernel of the GPU.
      'cudnn': functools.partial(attention.attend_cudnn, implementation='xla'),
    }[name]
    q, blocks = case(masked)
    want = value_and_gradients(attention.attend_xla, q, blocks)
    got = value_and_gradients(attend, q, blocks)
    self.assertGreater(min(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)), 0.1)
    assert_trees_close(got, want)

  @parameterized.parameters(
    ('causal_offset', 'float32', 520, 600),
    ('causal_padded', 'bfloat16', 520, 600),
    ('context', 'float32', 200, 600),
    ('dense', 'float32', 520, 40),
  )
  def test_splash_of_several_blocks(self, masked, dtype, L, S):
    """Sequences above 512 tokens have blocks of 512; the causal diagonal starts inside of one."""
    self.assertEqual(splash.block(L), 512 if L > 512 else 128)
    self.assertGreater(L, splash.block(L))
    self.assertGreater(L + S, 512)
    q, blocks = case(masked, dtype=dtype, sizes=(1, 1, 2, 1), L=L, S=S)

    def widen(tree):
      return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    want = value_and_gradients(attention.attend_xla, widen(q), widen(blocks))
    got = value_and_gradients(functools.partial(attention.attend_splash, interpret=True), q, blocks)
    self.assertEqual({x.dtype.name for x in jax.tree.leaves(got)}, {dtype})
    self.assertGreater(min(float(jnp.abs(g).max()) for g in jax.tree.leaves(want)), 0.1)
    # bfloat16 has eight significant bits.
    assert_trees_close(widen(got), want, 2e-5 if dtype == 'float32' else 1e-2)

  @parameterized.parameters('context', 'causal', 'alone', 'dense')
  def test_cudnn_gets_even_lengths(self, masked):
    """Odd numbers of queries (65) and keys (65, 105) are padded, as cuDNN cannot train on them."""
    plain = jax.nn.dot_product_attention

    def refusing(q, k, v, **options):
      self.assertEqual((q.shape[1] % 2, k.shape[1] % 2, v.shape[1] % 2), (0, 0, 0))
      self.assertEqual(options['mask'].shape[2:], (q.shape[1], k.shape[1]))
      return plain(q, k, v, **options)

    q, blocks = case(masked, L=65)
    want = value_and_gradients(attention.attend_xla, q, blocks)
    with mock.patch.object(jax.nn, 'dot_product_attention', refusing):
      got = value_and_gradients(
        functools.partial(attention.attend_cudnn, implementation='xla'), q, blocks
      )
    assert_trees_close(got, want)

  @parameterized.parameters('splash', 'cudnn', 'xla')
  def test_short_queries_use_plain_attention(self, name):
    q, blocks = case('context')
    self.assertEqual(attention.choose(name, q, blocks), name)
    self.assertEqual(attention.choose(name, q[:, :, :1], blocks), 'xla')
    self.assertEqual(attention.choose('auto', q, blocks), 'xla')

  @parameterized.parameters(
    ('tpu', 'float32', 'splash'),
    ('tpu', 'bfloat16', 'splash'),
    ('gpu', 'bfloat16', 'cudnn'),
    ('gpu', 'float16', 'cudnn'),
    ('gpu', 'float32', 'xla'),
    ('cpu', 'bfloat16', 'xla'),
  )
  def test_auto_is_the_kernel_of_the_platform(self, backend, dtype, wanted):
    q, blocks = case('context', dtype=dtype)
    with mock.patch.object(jax, 'default_backend', return_value=backend):
      self.assertEqual(attention.choose('auto', q, blocks), wanted)
      self.assertEqual(attention.choose('auto', q[:, :, :1], blocks), 'xla')
      of_rows = attention.Mask(jnp.ones((1, 2, 1, 1), bool))
      masked = [*blocks[:1], blocks[1]._replace(mask=of_rows)]
      self.assertEqual(attention.choose('auto', q, masked), 'xla')


if __name__ == '__main__':
  absltest.main()
