"""Small sequences and parameters for tests of the unified model."""

import functools

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
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
  """Builds a sequence of segments (kind, size); equal prefixes of `parts` have equal contents."""
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

  def join(xs, *empty):
    return np.concatenate(xs, axis=1) if xs else np.zeros((rows, 0, *empty))

  def layout(segment):
    fields = np.concatenate([np.zeros((5, 0), np.int32), *places[segment]], axis=1)
    return types.Layout(*(jnp.asarray(np.tile(x, (rows, 1))) for x in fields))

  def table(segment):
    place = np.concatenate(positions[segment] or [np.zeros(0)])
    return jnp.asarray(np.tile(place, (rows, 1)), jnp.int32)

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
  """Appends padding of arbitrary content to every segment."""
  rows = seq.ids_BL.shape[0]

  def fill(x, size, value):
    rest = jnp.full((rows, size - x.shape[1], *x.shape[2:]), value, x.dtype)
    return jnp.concatenate([x, rest], axis=1)

  def layout(x, size):
    return types.Layout(
      sample_BL=fill(x.sample_BL, size, types.PADDING),
      order_BL=fill(x.order_BL, size, 0),
      split_BL=fill(x.split_BL, size, 0),
      mode_BL=fill(x.mode_BL, size, types.FULL),
      position_BL=fill(x.position_BL, size, 3),
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
  """Builds one padded batch; row i has context i of `CONTEXTS` and then the segments `following`."""
  rows = [padded(sequence([*context, *following], rows=1)) for context in CONTEXTS]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def last(x, layout, count):
  """Returns the last `count` places of every row that are no padding."""
  stop = np.sum(np.asarray(layout.sample_BL) != types.PADDING, axis=1)
  return jnp.stack([row[n - count : n] for row, n in zip(x, stop, strict=True)])


@functools.cache
def parameters(config=CONFIG):
  """Returns parameters with noise on every leaf: no head is zero, no two experts are equal."""
  params = jax.jit(functools.partial(bagel.init, config))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  return jax.tree.unflatten(
    tree, [x + 0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
  )


@functools.partial(jax.jit, static_argnames=('method', 'config'))
def apply(params, *args, method, config):
  """Calls `Unified.<method>`, compiled once for every shape."""
  return bagel.Unified(config).apply({'params': params}, *args, method=method)


def run(*args, method, config=CONFIG):
  """Calls `Unified.<method>` on the parameters of these tests."""
  return apply(parameters(), *args, method=method, config=config)


def close(got, want, tolerance=1e-5):
  np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)
