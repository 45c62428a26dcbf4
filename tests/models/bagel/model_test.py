"""Tests of lvrpo_jax.models.bagel.model."""

import dataclasses
import functools

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.models import attention
from lvrpo_jax.models.bagel import model as bagel
from tests.models.bagel import sequences


class InfluenceTest(absltest.TestCase):
  def test_gradients_follow_the_mask(self):
    """Outputs depend on an input exactly where the mask allows it, after several layers.

    The rule is transitive (a token sees all that its visible tokens see), so depth adds no path.
    The test covers causality of text, full attention inside images, and that no later token sees a
    noised image.
    """
    seq = sequences.sequence(
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
    seq = seq.replace(ids_BL=jnp.arange(count)[None])  # Every token has its own row of the table.
    direction = np.random.default_rng(0).normal(size=sequences.CONFIG.width).astype(np.float32)

    @jax.jit
    def gradients(params, seq, place):
      def output(table, patches, latents):
        h_und, h_gen, _ = bagel.Unified(sequences.CONFIG).apply(
          {'params': {**params, 'embed_tokens': table}},
          seq.replace(patches_BNP=patches, latents_BNC=latents),
          method='forward',
        )
        return (jnp.concatenate([h_und, h_gen], axis=1)[0] @ direction)[place]

      return jax.grad(output, (0, 1, 2))(params['embed_tokens'], seq.patches_BNP, seq.latents_BNC)

    got = []
    for place in range(count + seq.patches_BNP.shape[1] + seq.latents_BNC.shape[1]):
      table, patches, latents = gradients(sequences.parameters(), seq, place)
      got.append(
        np.concatenate([np.abs(x).sum(-1) for x in (table[:count], patches[0], latents[0])])
      )
    got = np.array(got)
    layout = attention.join(seq.text, seq.vit, seq.gen)
    want = np.asarray(attention.keep_mask(layout, layout))[0]
    np.testing.assert_array_equal(got[~want], 0.0)
    self.assertGreater(got[want].min(), 1e-9)


class CacheTest(absltest.TestCase):
  """Passes with a cache agree with the whole sequence; rows have different contexts and padding."""

  def context(self):
    return sequences.run(sequences.contexts(), method='prefill')

  def test_read_and_decode_equal_forward(self):
    length = 4
    whole = sequences.contexts(('text', length))
    want = sequences.last(sequences.run(whole, method='__call__')[0], whole.text, length)
    ids = sequences.last(whole.ids_BL, whole.text, length)[:, None]
    sequences.close(sequences.run(self.context(), ids, method='read')[:, 0], want)
    row = bagel.empty_row(sequences.CONFIG, (len(sequences.CONTEXTS), 1), length + 1)
    for i in range(length):
      logits, row = sequences.run(self.context(), row, jnp.int32(i), ids[..., i], method='decode')
      sequences.close(logits[:, 0], want[:, i])

  def test_velocity_equals_forward(self):
    whole = sequences.contexts(('noise', 4))

    def pick(x):
      return sequences.last(x, whole.gen, 4)

    want = pick(sequences.run(whole, method='__call__')[1])
    got = sequences.run(
      self.context(),
      pick(whole.latents_BNC)[:, None],
      pick(whole.time_BN)[:, None, 0],
      pick(whole.latent_position_BN),
      method='velocity',
    )
    sequences.close(got[:, 0], want)
    self.assertEqual(got.dtype, jnp.float32)
    self.assertGreater(np.abs(want).max(), 0.1)

  def test_rows_share_a_context_and_keep_apart(self):
    rng = np.random.default_rng(0)
    B, M, cache = len(sequences.CONTEXTS), 3, self.context()
    ids = jnp.asarray(rng.integers(0, 38, (B, M, 4)), jnp.int32)
    x = jnp.asarray(rng.normal(size=(B, M, 4, 3)), jnp.float32)
    time = jnp.asarray(rng.uniform(size=(B, M)), jnp.float32)
    position = jnp.tile(jnp.arange(4), (B, 1))
    logits = sequences.run(cache, ids, method='read')
    v = sequences.run(cache, x, time, position, method='velocity')
    for m in range(M):
      one = slice(m, m + 1)
      sequences.close(logits[:, one], sequences.run(cache, ids[:, one], method='read'))
      sequences.close(
        v[:, one], sequences.run(cache, x[:, one], time[:, one], position, method='velocity')
      )
    row = bagel.empty_row(sequences.CONFIG, (B, M), 4)
    for i in range(4):
      decoded, row = sequences.run(cache, row, jnp.int32(i), ids[..., i], method='decode')
      sequences.close(decoded, logits[:, :, i])

  def test_padding_changes_nothing(self):
    parts = [*sequences.CONTEXTS[-1], ('noise', 4)]
    plain = sequences.sequence(parts, rows=len(sequences.CONTEXTS))
    logits, v = sequences.run(plain, method='__call__')
    got_logits, got_v = sequences.run(sequences.padded(plain), method='__call__')
    L, N = plain.ids_BL.shape[1], plain.patches_BNP.shape[1]
    self.assertLess(L + N, got_logits.shape[1])
    sequences.close(got_v[:, : v.shape[1]], v)
    sequences.close(got_logits[:, :L], logits[:, :L])
    sequences.close(got_logits[:, sequences.SIZES[0] : sequences.SIZES[0] + N], logits[:, L:])
    valid = sequences.run(sequences.padded(plain), method='prefill').valid_BS
    self.assertEqual(valid[0].sum(), L + N + v.shape[1])

  def test_order_in_memory_is_free(self):
    seq = sequences.contexts(('noise', 4))

    def turn(tree):
      return jax.tree.map(lambda x: x[:, ::-1], tree)

    turned = seq.replace(
      **{
        name: turn(seq.__dict__[name])
        for name in ('ids_BL', 'text', 'latents_BNC', 'latent_position_BN', 'time_BN', 'gen')
      }
    )
    logits, v = sequences.run(seq, method='__call__')
    got_logits, got_v = sequences.run(turned, method='__call__')
    real = np.asarray(seq.text.sample_BL != types.PADDING)
    sequences.close(
      turn(got_logits[:, : sequences.SIZES[0]])[real], logits[:, : sequences.SIZES[0]][real]
    )
    real = np.asarray(seq.gen.sample_BL != types.PADDING)
    sequences.close(turn(got_v)[real], v[real])


class InitTest(absltest.TestCase):
  def test_fresh_parameters(self):
    params = jax.jit(functools.partial(bagel.init, sequences.CONFIG))(jax.random.key(3))
    layers = params['trunk']['layers']
    jax.tree.map(np.testing.assert_array_equal, layers['gen'], layers['und'])
    self.assertEqual(layers['und']['q_proj']['kernel'].shape, (2, 16, 16))
    np.testing.assert_array_equal(params['llm2vae']['kernel'], 0.0)
    self.assertEqual({x.dtype for x in jax.tree.leaves(params)}, {jnp.dtype('float32')})

  def test_compute_dtype(self):
    config = dataclasses.replace(sequences.CONFIG, dtype='bfloat16')
    seq = sequences.contexts(('noise', 4))
    logits, v = sequences.run(seq, method='__call__', config=config)
    self.assertEqual((logits.dtype, v.dtype), (jnp.bfloat16, jnp.bfloat16))
    want = sequences.run(seq, method='__call__')
    real = np.asarray(seq.text.sample_BL != types.PADDING)
    sequences.close(
      logits[:, : sequences.SIZES[0]].astype(jnp.float32)[real],
      want[0][:, : sequences.SIZES[0]][real],
      0.2,
    )


if __name__ == '__main__':
  absltest.main()
