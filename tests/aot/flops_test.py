"""Tests of arithmetic: compiled passes run one expert per token, and counts of traced programs."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.aot import flops as flops_lib
from lvrpo_jax.models.bagel import model as bagel

WIDTH, DEPTH, HEADS, KV_HEADS, FF, VOCAB, CHANNELS = 128, 2, 4, 2, 512, 96, 16
TIME_FEATURES = 256
CONFIG = bagel.ModelConfig(
  vocab=VOCAB,
  width=WIDTH,
  depth=DEPTH,
  heads=HEADS,
  kv_heads=KV_HEADS,
  ff_width=FF,
  latent_channels=CHANNELS,
  latent_side=8,
  unroll=DEPTH,
  vit=bagel.VitConfig(16, 1, 2, 16, patch=2, side=4),
  start_of_image=1,
  end_of_image=2,
)
TOLERANCE = 0.05


def abstract(*shape, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(shape, dtype)


def layout(rows, length):
  return types.Layout(*(abstract(rows, length) for _ in range(5)))


def sequence(rows, und, gen):
  """Returns rows of `und` text tokens and `gen` latent tokens."""

  def floats(*shape):
    return abstract(*shape, dtype=jnp.float32)

  return types.Sequence(
    ids_BL=abstract(rows, und),
    text=layout(rows, und),
    patches_BNP=floats(rows, 0, CONFIG.vit.patch**2 * 3),
    patch_position_BN=abstract(rows, 0),
    patch_image_BN=abstract(rows, 0),
    vit=layout(rows, 0),
    latents_BNC=floats(rows, gen, CHANNELS),
    latent_position_BN=abstract(rows, gen),
    time_BN=floats(rows, gen),
    gen=layout(rows, gen),
    next_position_B=abstract(rows),
  )


def flops(function, *args):
  return jax.jit(function).lower(*args).compile().cost_analysis()['flops']


def apply(method):
  def function(params, *args):
    return bagel.Unified(CONFIG).apply({'params': params}, *args, method=method)

  return function


def layer_flops(tokens, keys):
  """Returns multiplications and additions of all layers for new tokens that see `keys` keys."""
  kv = KV_HEADS * WIDTH // HEADS
  linear = 2 * WIDTH * WIDTH + 2 * WIDTH * kv + 3 * WIDTH * FF
  return DEPTH * tokens * 2 * (linear + 2 * keys * WIDTH)


class FlopsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.params = jax.eval_shape(lambda: bagel.init(CONFIG, jax.random.key(0)))

  @parameterized.parameters((32, 128), (128, 32))
  def test_every_token_takes_one_expert(self, und, gen):
    rows = 2
    needed = rows * (
      layer_flops(und + gen, und + gen)
      + und * 2 * WIDTH * VOCAB
      + gen * 2 * (2 * CHANNELS * WIDTH + TIME_FEATURES * WIDTH + WIDTH * WIDTH)
    )
    found = flops(apply('__call__'), self.params, sequence(rows, und, gen))
    self.assertBetween(found / needed, 1 - TOLERANCE, 1 + TOLERANCE)
    # The bound is sharp: both experts on all tokens would need nearly twice as much.
    self.assertGreater((needed + rows * layer_flops(und + gen, 0)) / needed, 1 + 10 * TOLERANCE)

  def test_a_group_shares_one_prefill(self):
    rows, group, tokens, image = 2, 8, 64, 16
    context = sequence(rows, tokens, 0)
    x = abstract(rows, group, image, CHANNELS, dtype=jnp.float32)
    time = abstract(rows, group, dtype=jnp.float32)
    position = abstract(rows, image)
    cache = jax.eval_shape(apply('prefill'), self.params, context)
    both = flops(
      lambda params, seq, *args: apply('velocity')(params, apply('prefill')(params, seq), *args),
      self.params,
      context,
      x,
      time,
      position,
    )
    images = flops(apply('velocity'), self.params, cache, x, time, position)
    prefill = flops(apply('prefill'), self.params, context)
    self.assertBetween((both - images) / prefill, 1 - TOLERANCE, 1 + TOLERANCE)


class CountTest(parameterized.TestCase):
  """Tests the counter of programs that are only traced."""

  def count(self, function, *args, unknown=1):
    return flops_lib.count(jax.make_jaxpr(function)(*args).jaxpr, unknown)

  def test_products(self):
    a, b = abstract(3, 4, 5, dtype=jnp.float32), abstract(3, 5, 6, dtype=jnp.float32)
    self.assertEqual(self.count(lambda a, b: jnp.tanh(a @ b), a, b), 2 * 3 * 4 * 5 * 6)

  def test_convolution(self):
    image, kernel = abstract(2, 8, 8, 3, dtype=jnp.float32), abstract(3, 3, 3, 7, dtype=jnp.float32)

    def convolve(x, w):
      return jax.lax.conv_general_dilated(
        x, w, (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
      )

    self.assertEqual(self.count(convolve, image, kernel), 2 * (2 * 4 * 4 * 7) * (3 * 3 * 3))

  def test_control_flow(self):
    x = abstract(4, 4, dtype=jnp.float32)
    once = 2 * 4**3

    def scan(x):
      return jax.lax.scan(lambda c, _: (c @ x, None), x, None, length=5)[0]

    def loop(x):
      return jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ x, x)

    def choice(x):
      return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x)

    def remat(x):
      return jnp.sum(jax.checkpoint(lambda y: jnp.tanh(y @ y))(x))

    self.assertEqual(self.count(scan, x), 5 * once)
    self.assertEqual(self.count(loop, x, unknown=3), 3 * once)
    self.assertEqual(self.count(choice, x), 2 * once)
    self.assertEqual(self.count(jax.grad(remat), x), 4 * once)  # Twice forward, two gradients.

  @parameterized.parameters((16, 64), (64, 16))
  def test_agrees_with_the_compiler(self, und, gen):
    params = jax.eval_shape(lambda: bagel.init(CONFIG, jax.random.key(0)))
    args = params, sequence(2, und, gen)
    got = self.count(apply('__call__'), *args)
    want = flops(apply('__call__'), *args)
    self.assertLess(abs(got / want - 1), TOLERANCE)


if __name__ == '__main__':
  absltest.main()
