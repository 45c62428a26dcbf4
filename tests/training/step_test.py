"""Tests of the optimizer step, on a linear model."""

import re
import types as python_types

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
import optax

from lvrpo_jax import ops
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.training import step as step_lib

ROWS = 8


def make_loss():
  """Two terms of unlike weights, so that a mean of means would be wrong."""

  def weights(batch):
    return {'fit': jnp.sum(batch['mask']), 'size': jnp.float32(batch['x'].shape[0])}

  def sums(params, state, frozen, batch):
    del state
    out = batch['x'] @ params['kernel'] + params['bias'] + frozen['shift']
    error = jnp.square(out[:, 0] - batch['y'])
    fit, weight = ops.masked_sum(error, batch['mask'])
    return (
      {'fit': fit, 'size': jnp.sum(jnp.square(out))},
      {'error': (fit, weight), 'largest_row': (jnp.sum(out), jnp.float32(len(out)))},
    )

  def split_group(batch, parts):
    """Every row is a group of its own here: the parts of a row are rows."""
    return jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)

  return step_lib.Loss(weights, sums, {'fit': 2.0, 'size': 0.25}, split_group)


def make_batch():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  return {
    'x': normal(ROWS, 3),
    'y': normal(ROWS),
    'mask': np.array([1, 1, 1, 0, 0, 0, 0, 1], bool),
    'unused': np.zeros((ROWS, 0), np.float32),
  }


def make_params():
  rng = np.random.default_rng(1)
  return {'kernel': jnp.asarray(rng.normal(size=(3, 1)), jnp.float32), 'bias': jnp.zeros(1)}


FROZEN = {'shift': np.float32(0.5)}
RATE = 0.1
SGD = optax.sgd(RATE)


def run(batch, optimizer=SGD, ema=True, **kwargs):
  state = step_lib.init(make_params(), optimizer, ema=ema)
  return jax.jit(step_lib.make_step(make_loss(), optimizer, **kwargs))(state, FROZEN, batch)


def close(got, want, tolerance=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), got, want
  )


class StepTest(parameterized.TestCase):
  def test_by_hand(self):
    batch, params = make_batch(), jax.tree.map(np.asarray, make_params())
    state, metrics = run(batch)
    out = (batch['x'] @ params['kernel'])[:, 0] + params['bias'] + 0.5
    mask = batch['mask'].astype(float)
    fit = np.sum(mask * (out - batch['y']) ** 2) / mask.sum()
    size = np.sum(out**2) / ROWS
    d_out = 2.0 * 2 * mask * (out - batch['y']) / mask.sum() + 0.25 * 2 * out / ROWS
    grad = {'kernel': batch['x'].T @ d_out[:, None], 'bias': d_out.sum(keepdims=True)}
    close(state.params, jax.tree.map(lambda p, g: p - RATE * g, params, grad), 1e-5)
    want = {
      'loss': 2.0 * fit + 0.25 * size,
      'loss/fit': 2.0 * fit,
      'loss/size': 0.25 * size,
      'error': fit,
      'largest_row': out.mean(),
      'skipped': 0.0,
      'grad_norm': np.sqrt(sum(np.sum(g**2) for g in grad.values())),
    }
    close(metrics, {k: np.float32(v) for k, v in want.items()}, 1e-5)
    self.assertEqual(int(state.step), 1)

  @parameterized.parameters(2, 4, 8)
  def test_micro_batches_change_nothing(self, parts):
    optimizer = optax.adam(0.01, eps=1e-3)
    want = run(make_batch(), optimizer, ema_decay=0.5)
    close(run(make_batch(), optimizer, ema_decay=0.5, micro_batches=parts), want)

  @parameterized.parameters((1, 2), (2, 2), (2, 4))
  def test_parts_of_groups_change_nothing(self, micro_batches, parts):
    optimizer = optax.adam(0.01, eps=1e-3)
    close(
      run(make_batch(), optimizer, ema_decay=0.5, micro_batches=micro_batches, group_parts=parts),
      run(make_batch(), optimizer, ema_decay=0.5),
    )

  @parameterized.parameters((1, np.nan), (1, np.inf), (2, np.nan))
  def test_gradient_that_is_not_finite_is_skipped(self, parts, value):
    optimizer = optax.adam(0.01)
    batch = make_batch()
    batch['x'][0, 0] = value
    before = step_lib.init(make_params(), optimizer, ema=True)
    # The running mean stands elsewhere than the parameters, as it does in a run.
    before = before.replace(ema=jax.tree.map(lambda x: x + 1.0, before.params))
    step = jax.jit(step_lib.make_step(make_loss(), optimizer, 0.9, parts))
    after, metrics = step(before, FROZEN, batch)
    for name in ('params', 'opt_state', 'ema'):
      jax.tree.map(np.testing.assert_array_equal, after.__dict__[name], before.__dict__[name])
    self.assertEqual((float(metrics['skipped']), int(after.step)), (1.0, 1))
    again, metrics = step(after, FROZEN, make_batch())
    self.assertEqual((float(metrics['skipped']), int(again.step)), (0.0, 2))
    self.assertGreater(float(jnp.abs(again.params['kernel'] - before.params['kernel']).max()), 0.0)

  def test_running_mean(self):
    state, _ = run(make_batch(), ema_decay=0.9)
    close(
      state.ema, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, make_params(), state.params)
    )
    self.assertIsNone(run(make_batch(), ema=False)[0].ema)

  def test_empty_term_adds_nothing(self):
    batch = make_batch()
    batch['mask'][:] = False
    _, metrics = run(batch)
    self.assertEqual((float(metrics['loss/fit']), float(metrics['skipped'])), (0.0, 0.0))
    self.assertTrue(np.isfinite(float(metrics['loss'])))

  def test_init_copies(self):
    state = step_lib.init(make_params(), optax.sgd(1.0), old=True)
    self.assertIsNone(state.ema)
    jax.tree.map(np.testing.assert_array_equal, state.old, state.params)
    self.assertIsNot(state.old['kernel'], state.params['kernel'])


def two_steps(count, runner='jit', **kwargs):
  """State and metrics after two steps on the first `count` devices, and whether the states before
  are gone."""
  mesh = mesh_lib.make_mesh((-1, 1, 1), jax.devices()[:count])
  optimizer = optax.adam(0.01, eps=1e-3)
  step = step_lib.compile_step(make_loss(), optimizer, mesh, ema_decay=0.5, runner=runner, **kwargs)
  state, gone = step_lib.init(make_params(), optimizer, ema=True), []
  for _ in range(2):
    before = state
    state, metrics = step(before, FROZEN, make_batch())
    gone += [x.is_deleted() for x in jax.tree.leaves(before)]
  return (state, metrics), all(gone)


class CompileTest(parameterized.TestCase):
  @parameterized.parameters(dict(), dict(micro_batches=2), dict(micro_batches=2, group_parts=2))
  def test_runners_agree(self, **parts):
    one, two = two_steps(1)[0], two_steps(1, 'pmap', **parts)[0]
    close(one, two)
    jax.tree.map(lambda a, b: self.assertEqual(a.shape, b.shape), one, two)

  @parameterized.parameters('jit', 'pmap')
  def test_state_is_donated(self, runner):
    self.assertTrue(two_steps(1, runner)[1])

  @parameterized.parameters((1, 4, 1), (2, 1, 2), (1, 2, 2))
  def test_pmap_on_a_mesh_that_splits_parameters(self, *shape):
    mesh = python_types.SimpleNamespace(shape=dict(zip(mesh_lib.AXES, shape)))
    message = re.escape(f"parallel.runner is 'pmap' and parallel.mesh is {shape}; allowed: 'jit'")
    with self.assertRaisesRegex(ValueError, message):
      step_lib.compile_step(make_loss(), optax.sgd(1.0), mesh, runner='pmap')

  def test_unknown_runner(self):
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    with self.assertRaisesRegex(ValueError, "parallel.runner is 'mpi'; allowed: 'jit', 'pmap'"):
      step_lib.compile_step(make_loss(), optax.sgd(1.0), mesh, runner='mpi')


if __name__ == '__main__':
  absltest.main()
