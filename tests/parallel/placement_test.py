"""Meshes, row blocks and trees, on a mesh of one device and on meshes that are only described."""

import re
import types as python_types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from configs import bagel_7b
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import placement
from lvrpo_jax.training import prompts
from lvrpo_jax.training import step as step_lib


class MeshTest(parameterized.TestCase):
  def test_rest(self):
    for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, 1)):
      mesh = mesh_lib.make_mesh(shape, jax.devices()[:1])
      self.assertEqual(dict(mesh.shape), dict(data=1, fsdp=1, tensor=1))

  @parameterized.parameters((2, 1, 1), (-1, 3, 1), (1, 1, 2))
  def test_sizes_that_do_not_fit_are_named(self, *shape):
    message = re.escape(f'parallel.mesh is {shape}, which does not multiply to the 1 devices')
    with self.assertRaisesRegex(ValueError, message):
      mesh_lib.make_mesh(shape, jax.devices()[:1])

  def test_two_free_sizes(self):
    with self.assertRaisesRegex(ValueError, r'parallel.mesh is \(-1, -1, 1\): at most one'):
      mesh_lib.make_mesh((-1, -1, 1), jax.devices()[:1])


def sliced(slices, count, platform='gpu'):
  """Devices of several slices; those of TPUs lie in squares of four columns."""
  return [
    python_types.SimpleNamespace(
      id=number,
      slice_index=number // count,
      process_index=number // count,
      platform=platform,
      device_kind=platform,
      core_on_chip=0,
      coords=(number % count // 4, number % 4, 0),
    )
    for number in range(slices * count)
  ]


class SlicesTest(parameterized.TestCase):
  def make(self, shape, devices, slices=(-1, 1, 1)):
    """The grid of devices that becomes the mesh; jax takes only real ones for a mesh."""
    with mock.patch.object(mesh_lib, 'Mesh') as mesh:
      mesh_lib.make_mesh(shape, devices, slices)
    return mesh.call_args.args[0]

  @parameterized.parameters(
    (4, 8, 'gpu', (-1, 1, 1), (4, 8, 1)),
    (8, 8, 'gpu', (-1, 1, 1), (8, 8, 1)),
    (2, 16, 'tpu', (-1, 1, 1), (2, 16, 1)),
    (2, 64, 'tpu', (-1, 1, 1), (4, 32, 1)),
    (4, 8, 'gpu', (1, -1, 1), (1, 32, 1)),
    (8, 8, 'gpu', (1, -1, 1), (2, 32, 1)),
    (1, 8, 'gpu', (-1, 1, 1), (1, 8, 1)),
    (1, 64, 'tpu', (-1, 1, 1), (2, 32, 1)),
  )
  def test_the_largest_model_fits_slices(self, count, each, platform, slices, want):
    """A size of 0 stays within a slice, unless the config puts slices along its axis."""
    shape = tuple(bagel_7b.get_config().parallel.mesh)
    grid = self.make(shape, sliced(count, each, platform), slices)
    self.assertEqual(grid.shape, want)
    self.assertLen({d.id for d in grid.flat}, count * each)

  def test_slices_lie_along_the_axis_of_the_config(self):
    for axis, slices in enumerate(((-1, 1, 1), (1, -1, 1), (1, 1, -1))):
      grid = self.make((4, 4, 4), sliced(4, 16, 'tpu'), slices)
      self.assertEqual(grid.shape, (4, 4, 4))
      for number, part in enumerate(np.split(grid, 4, axis)):
        self.assertEqual({d.slice_index for d in part.flat}, {number})

  def test_slices_that_do_not_divide(self):
    with self.assertRaisesRegex(
      ValueError,
      r'parallel.slices is \(4, 1, 1\); allowed: divisors of '
      r'parallel.mesh = \(1, 32, 1\)',
    ):
      self.make((1, 32, 1), sliced(4, 8))
    with self.assertRaisesRegex(
      ValueError,
      r'parallel.slices is \(3, 1, 1\), which does not '
      'multiply to the 4 slices',
    ):
      self.make((-1, 0, 1), sliced(4, 8), (3, 1, 1))


class RowBlockTest(parameterized.TestCase):
  def mesh(self, shape, processes):
    """A described mesh whose devices belong to these processes, in order."""
    devices = np.array([python_types.SimpleNamespace(process_index=p) for p in processes])
    return python_types.SimpleNamespace(
      devices=devices.reshape(shape), shape=dict(zip(mesh_lib.AXES, shape))
    )

  @parameterized.parameters(
    ((1, 1, 4), (0, 0, 1, 1), [(0, 1), (0, 1)]),
    ((2, 1, 2), (0, 0, 1, 1), [(0, 2), (1, 2)]),
    ((2, 1, 2), (1, 1, 0, 0), [(1, 2), (0, 2)]),
    ((2, 1, 2), (0, 1, 0, 1), [(0, 1), (0, 1)]),
    ((2, 2, 2), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 4), (1, 4), (2, 4), (3, 4)]),
    ((2, 1, 4), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
  )
  def test_blocks(self, shape, processes, want):
    mesh = self.mesh(shape, processes)
    for process, block in enumerate(want):
      with mock.patch.multiple(
        jax, process_count=lambda: len(want), process_index=lambda process=process: process
      ):
        self.assertEqual(multihost.row_block(mesh), block)

  @parameterized.parameters(((3, 1, 2), (0, 0, 0, 1, 1, 1)), ((3, 1, 1), (0, 0, 1)))
  def test_rows_that_overlap(self, shape, processes):
    message = re.escape(f'parallel.mesh is {shape} over 2 processes')
    with (
      mock.patch.multiple(jax, process_count=lambda: 2, process_index=lambda: 0),
      self.assertRaisesRegex(ValueError, f'{message}.*allowed: meshes on which any two'),
    ):
      multihost.row_block(self.mesh(shape, processes))

  def test_rows_that_processes_cannot_share_evenly(self):
    """65 rows on 16 processes are no batch of 64."""
    experiment = python_types.SimpleNamespace(mesh=self.mesh((16, 1, 1), range(16)))
    with (
      mock.patch.multiple(jax, process_count=lambda: 16, process_index=lambda: 3),
      self.assertRaisesRegex(ValueError, "^65 rows of task 'edit' .* 16 processes"),
    ):
      prompts.task_batches(experiment, 'align', {'generate': 64, 'edit': 65}, None)


class TreeTest(absltest.TestCase):
  def test_state_is_laid_out_like_its_parameters(self):
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    params = {'lm_head': {'kernel': np.zeros((4, 2), np.float32)}, 'norm': np.zeros(3, np.float32)}
    state = jax.eval_shape(lambda: step_lib.init(params, optax.adam(1.0), ema=True))
    specs = jax.tree.map(lambda s: s.spec, placement.tree_shardings(state, mesh))
    want = P('fsdp', 'tensor')
    moments = specs.opt_state[0]
    for tree in (specs.params, specs.ema, moments.mu, moments.nu):
      self.assertEqual(tree['lm_head']['kernel'], want)
      self.assertFalse(any(tree['norm']))
    self.assertFalse(any(specs.step) or any(moments.count))

  def test_split_rows(self):
    batch = {'a': np.arange(12).reshape(6, 2), 'empty': np.zeros((6, 0, 3))}
    split = placement.split_over_devices(batch, 3)
    np.testing.assert_array_equal(split['a'][1], [[4, 5], [6, 7]])
    self.assertEqual(split['empty'].shape, (3, 2, 0, 3))
    with self.assertRaisesRegex(ValueError, '6 rows do not divide into 4 parts'):
      placement.split_over_devices(batch, 4)

  def test_shard_rows_keeps_values(self):
    mesh = mesh_lib.make_mesh((1, 1, 1), jax.devices()[:1])
    out = placement.shard_rows({'a': np.arange(6)}, mesh)
    self.assertEqual(out['a'].sharding.spec, P(('data', 'fsdp')))
    np.testing.assert_array_equal(out['a'], np.arange(6))


if __name__ == '__main__':
  absltest.main()
