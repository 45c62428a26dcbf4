"""Rows that do not divide, on four devices; `rows_test` reads its output.

Not a test by itself: the number of devices has to be set before JAX starts. Prints one JSON object:
by case, what was raised, or the shape of a device's part.
"""

import json

import jax
from jax import numpy as jnp
import numpy as np
import optax

from lvrpo_jax.parallel import activations
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.training import step as step_lib
from tests.training import step_test


def constrained(mesh, names, shape):
  """A device's part of an activation that is laid out by name."""
  out = mesh_lib.scoped(jax.jit(lambda x: activations.constrain(x + 1, *names)), mesh)(
    jnp.zeros(shape)
  )
  return list(out.addressable_shards[0].data.shape)


def folded(mesh, shape):
  """A device's part of what `together` returns for two arrays."""

  def run(x):
    return activations.together(lambda y: 2 * y, [x, x])[0]

  out = mesh_lib.scoped(jax.jit(run), mesh)(jnp.ones(shape))
  np.testing.assert_array_equal(out, np.full(shape, 2.0))
  return list(out.addressable_shards[0].data.shape)


def stepped(mesh, rows, micro_batches=1, group_parts=1, runner='jit'):
  """The loss after a step whose batch has one task."""
  task = {k: v[:rows] for k, v in step_test.make_batch().items()}
  inner = step_test.make_loss()
  loss = inner._replace(
    weights=lambda batch: inner.weights(batch['edit']),
    sums=lambda params, state, frozen, batch: inner.sums(params, state, frozen, batch['edit']),
    split_group=lambda batch, parts: placement.split_micro_batches(batch, parts),
  )
  optimizer = optax.sgd(0.1)
  step = step_lib.compile_step(
    loss, optimizer, mesh, micro_batches=micro_batches, group_parts=group_parts, runner=runner
  )
  _, metrics = step(
    step_lib.init(step_test.make_params(), optimizer), step_test.FROZEN, {'edit': task}
  )
  return float(metrics['loss'])


def resting(runner):
  """Parameters after two steps of a state and a batch that lie on the mesh as those of a run do."""
  mesh = mesh_lib.make_mesh((4, 1, 1))
  loss = step_lib.Loss(
    lambda batch: {'fit': jnp.float32(8)},
    lambda params, state, frozen, batch: (
      {'fit': jnp.sum(jnp.square(batch @ params['lm_head']['kernel']))},
      {},
    ),
    {'fit': 1.0},
  )
  optimizer = optax.adam(0.1)
  step = step_lib.compile_step(loss, optimizer, mesh, runner=runner)
  params = {'lm_head': {'kernel': jnp.arange(8.0).reshape(4, 2)}}
  state = placement.shard_state(step_lib.init(params, optimizer), mesh)
  assert not state.opt_state[0].mu['lm_head']['kernel'].is_fully_replicated
  batch = placement.shard_rows(np.arange(32.0).reshape(8, 4).astype(np.float32), mesh)
  for _ in range(2):
    state, _ = step(state, {}, batch)
  return np.asarray(state.params['lm_head']['kernel']).ravel().tolist()


def main():
  assert len(jax.devices()) == 4, jax.devices()
  rows, mixed, heads = (mesh_lib.make_mesh(shape) for shape in ((4, 1, 1), (2, 2, 1), (2, 1, 2)))
  cases = {
    'rows_8': lambda: constrained(rows, ('rows',), (8, 3)),
    'rows_6': lambda: constrained(rows, ('rows',), (6, 3)),
    'rows_6_fsdp': lambda: constrained(mixed, ('rows',), (6, 3)),
    'rows_1': lambda: constrained(rows, ('rows',), (1, 3)),
    'heads_4': lambda: constrained(heads, ('rows', None, 'heads'), (2, 5, 4, 3)),
    'heads_3': lambda: constrained(heads, ('rows', None, 'heads'), (2, 5, 3, 3)),
    'together_4': lambda: folded(rows, (4, 2, 3, 5)),
    'together_1': lambda: folded(rows, (1, 2, 2, 5)),
    'together_2': lambda: folded(rows, (2, 2, 3, 5)),
    'step_8': lambda: stepped(rows, 8),
    'step_8_parts': lambda: stepped(rows, 8, 2),
    'step_8_pmap': lambda: stepped(rows, 8, 2, runner='pmap'),
    **{f'resting_{runner}': lambda runner=runner: resting(runner) for runner in ('jit', 'pmap')},
    'step_6': lambda: stepped(rows, 6),
    'step_8_in_4': lambda: stepped(mixed, 8, 4),
    'step_8_in_8': lambda: stepped(mixed, 8, 8),
    'step_8_in_3': lambda: stepped(mixed, 8, 3),
    'step_8_groups': lambda: stepped(mixed, 8, 1, 4),
  }
  out = {}
  for name, run in cases.items():
    try:
      out[name] = run()
    except ValueError as error:
      out[name] = f'ValueError: {error}'
  print(json.dumps(out))


if __name__ == '__main__':
  main()
