"""Saves a state that lies on eight devices and goes on with it on four; `restore_test` reads it.

Not a test by itself: the number of devices has to be set before JAX starts. It prints one JSON
object.
"""

import json
import pathlib
import tempfile

import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib
from tests.helpers import noise

STEPS = 10
ROWS = 8


def quadratic():
  """A loss that pulls every parameter towards a value of the batch: next to nothing to compile."""

  def sums(params, state, frozen, batch):
    del state, frozen
    off = sum(jnp.sum(jnp.square(x - jnp.mean(batch))) for x in jax.tree.leaves(params))
    return {'off': off}, {}

  return step_lib.Loss(lambda batch: {'off': jnp.float32(len(batch))}, sums, {'off': 1.0})


def on(shape, count):
  """A mesh of the first devices, and the compiled step there."""
  mesh = mesh_lib.make_mesh(shape, jax.devices()[:count])
  optimizer = optimizer_lib.build(
    'adamw', optimizer_lib.schedule('constant', 1e-2, 100, 1), 0.9, 0.98, 1e-4, 0.01, 1.0
  )
  return mesh, optimizer, step_lib.compile_step(quadratic(), optimizer, mesh, ema_decay=0.9)


def fresh(mesh, optimizer, params):
  state = step_lib.init(jax.tree.map(jnp.array, params), optimizer, ema=True, old=True)
  return placement.shard_state(state.replace(reference=jax.tree.map(jnp.array, params)), mesh)


def run(state, mesh, step, first):
  for number in range(first, first + STEPS):
    batch = np.random.default_rng(number).normal(size=ROWS).astype(np.float32)
    state, _ = step(state, {}, placement.shard_rows(batch, mesh))
  return state


def gathered(tree):
  """Names of the leaves that lie in parts and of which the host holds the whole."""
  return [
    jax.tree_util.keystr(path)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
    if not x.is_fully_replicated and x._npy_value is not None
  ]


def main():
  assert len(jax.devices()) == 8, jax.devices()
  config = tiny.get_config()
  config.model.depth = 1
  params = noise.parameters(experiment_lib.build(config, pathlib.Path('unused')))[0]
  out = {}
  mesh, optimizer, step = on((2, 4, 1), 8)
  state = run(fresh(mesh, optimizer, params), mesh, step, 0)
  out['split'] = sum(not x.is_fully_replicated for x in jax.tree.leaves(state))
  with tempfile.TemporaryDirectory() as folder:
    store = checkpoint.Checkpoints(pathlib.Path(folder))
    store.save(STEPS, state, {})
    store.close()
    out['gathered_by_save'] = gathered(state)
    half, optimizer, fewer = on((1, 4, 1), 4)
    target = fresh(half, optimizer, jax.tree.map(np.zeros_like, params))
    store = checkpoint.Checkpoints(pathlib.Path(folder))
    restored, _ = store.restore(target)
    store.close()
  out['gathered_by_restore'] = gathered(restored) + gathered(target)
  out['devices'] = sorted({len(x.sharding.device_set) for x in jax.tree.leaves(restored)})

  def difference(one, two):
    return max(
      float(np.max(np.abs(np.float64(a) - np.float64(b))))
      for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )

  out['restored'] = difference(state, restored)
  out['gathered_by_looking'] = len(gathered(state))
  whole, rest = run(state, mesh, step, STEPS), run(restored, half, fewer, STEPS)
  out['continued'] = difference(whole, rest)
  out['moved'] = difference(whole.params, params)
  print(json.dumps(out))


if __name__ == '__main__':
  main()
