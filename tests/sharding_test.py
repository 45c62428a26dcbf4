"""Tests of lvrpo_jax.sharding; a mesh of one device and meshes that are only described."""

import dataclasses
import functools
import importlib
import pathlib
import re
import types as python_types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from configs import bagel_7b
from configs import base
from lvrpo_jax import job as job_lib
from lvrpo_jax import pretrain
from lvrpo_jax import sharding
from lvrpo_jax import step as step_lib
from lvrpo_jax import weights
from lvrpo_jax.models import released
from lvrpo_jax.models import unified

REPLICATED_KERNELS = {
    'vae2llm/kernel', 'llm2vae/kernel',  # A few channels on one side.
}
"""Kernels that no rule of the table splits."""


def described(data=1, fsdp=1, tensor=1):
  """The part of a mesh that `partition` reads."""
  return python_types.SimpleNamespace(shape=dict(data=data, fsdp=fsdp, tensor=tensor))


def names(tree):
  return {'/'.join(k.key for k in path): leaf.shape
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def abstract_params():
  config = base.get_config()
  data = job_lib.load_symbol(config.data.source, 'data.source')(
      seed=0, generate_kinds={'colors': 1.}, question_kinds={'color': 1.}, wrong=0., chatty=0.,
      plan=0., describe=0., drop=0.)
  policy = job_lib.small_policy(config, data)
  return jax.eval_shape(lambda: unified.init(policy.config, jax.random.key(0)))


def autoencoder_names():
  """Names of the parameters of a released model's autoencoder."""
  vae = released.autoencoder(bagel_7b.get_config().architecture.to_dict())
  return names(jax.eval_shape(lambda: vae.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))[
      'params']))


@functools.cache
def job_of(config):
  """The job of a config on one device; nothing is made."""
  return job_lib.build(importlib.import_module(f'configs.{config}').get_config(),
                       pathlib.Path('unused'), jax.devices()[:1])


@functools.cache
def shapes_of(config, kind):
  """Shapes and dtypes of the parameters of a job, by name."""
  tree = weights.template(job_of(config), kind)
  return {sharding.name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class MeshTest(parameterized.TestCase):

  def test_rest(self):
    for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, 1)):
      mesh = sharding.make_mesh(shape, jax.devices()[:1])
      self.assertEqual(dict(mesh.shape), dict(data=1, fsdp=1, tensor=1))

  @parameterized.parameters((2, 1, 1), (-1, 3, 1), (1, 1, 2))
  def test_sizes_that_do_not_fit_are_named(self, *shape):
    message = re.escape(f'parallel.mesh is {shape}, which does not multiply to the 1 devices')
    with self.assertRaisesRegex(ValueError, message):
      sharding.make_mesh(shape, jax.devices()[:1])

  def test_two_free_sizes(self):
    with self.assertRaisesRegex(ValueError, r'parallel.mesh is \(-1, -1, 1\): at most one'):
      sharding.make_mesh((-1, -1, 1), jax.devices()[:1])


def sliced(slices, count, platform='gpu'):
  """Devices of several slices; those of TPUs lie in squares of four columns."""
  return [python_types.SimpleNamespace(
      id=number, slice_index=number // count, process_index=number // count, platform=platform,
      device_kind=platform, core_on_chip=0, coords=(number % count // 4, number % 4, 0))
          for number in range(slices * count)]


class SlicesTest(parameterized.TestCase):

  def make(self, shape, devices, slices=(-1, 1, 1)):
    """The grid of devices that becomes the mesh; jax takes only real ones for a mesh."""
    with mock.patch.object(sharding, 'Mesh') as mesh:
      sharding.make_mesh(shape, devices, slices)
    return mesh.call_args.args[0]

  @parameterized.parameters(
      (4, 8, 'gpu', (-1, 1, 1), (4, 8, 1)), (8, 8, 'gpu', (-1, 1, 1), (8, 8, 1)),
      (2, 16, 'tpu', (-1, 1, 1), (2, 16, 1)), (2, 64, 'tpu', (-1, 1, 1), (4, 32, 1)),
      (4, 8, 'gpu', (1, -1, 1), (1, 32, 1)), (8, 8, 'gpu', (1, -1, 1), (2, 32, 1)),
      (1, 8, 'gpu', (-1, 1, 1), (1, 8, 1)), (1, 64, 'tpu', (-1, 1, 1), (2, 32, 1)))
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
    with self.assertRaisesRegex(ValueError, r'parallel.slices is \(4, 1, 1\); allowed: divisors of '
                                r'parallel.mesh = \(1, 32, 1\)'):
      self.make((1, 32, 1), sliced(4, 8))
    with self.assertRaisesRegex(ValueError, r'parallel.slices is \(3, 1, 1\), which does not '
                                'multiply to the 4 slices'):
      self.make((-1, 0, 1), sliced(4, 8), (3, 1, 1))


class RowBlockTest(parameterized.TestCase):

  def mesh(self, shape, processes):
    """A described mesh whose devices belong to these processes, in order."""
    devices = np.array([python_types.SimpleNamespace(process_index=p) for p in processes])
    return python_types.SimpleNamespace(devices=devices.reshape(shape),
                                        shape=dict(zip(sharding.AXES, shape)))

  @parameterized.parameters(
      ((1, 1, 4), (0, 0, 1, 1), [(0, 1), (0, 1)]),
      ((2, 1, 2), (0, 0, 1, 1), [(0, 2), (1, 2)]),
      ((2, 1, 2), (1, 1, 0, 0), [(1, 2), (0, 2)]),
      ((2, 1, 2), (0, 1, 0, 1), [(0, 1), (0, 1)]),
      ((2, 2, 2), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 4), (1, 4), (2, 4), (3, 4)]),
      ((2, 1, 4), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]))
  def test_blocks(self, shape, processes, want):
    mesh = self.mesh(shape, processes)
    for process, block in enumerate(want):
      with mock.patch.multiple(jax, process_count=lambda: len(want),
                               process_index=lambda process=process: process):
        self.assertEqual(sharding.row_block(mesh), block)

  @parameterized.parameters(((3, 1, 2), (0, 0, 0, 1, 1, 1)), ((3, 1, 1), (0, 0, 1)))
  def test_rows_that_overlap(self, shape, processes):
    message = re.escape(f'parallel.mesh is {shape} over 2 processes')
    with mock.patch.multiple(jax, process_count=lambda: 2, process_index=lambda: 0):
      with self.assertRaisesRegex(ValueError, f'{message}.*allowed: meshes on which any two'):
        sharding.row_block(self.mesh(shape, processes))


  def test_rows_that_processes_cannot_share_evenly(self):
    """65 rows on 16 processes are no batch of 64."""
    job = python_types.SimpleNamespace(mesh=self.mesh((16, 1, 1), range(16)))
    with mock.patch.multiple(jax, process_count=lambda: 16, process_index=lambda: 3):
      with self.assertRaisesRegex(ValueError, "^65 rows of task 'edit' .* 16 processes"):
        pretrain.task_batches(job, None, {'generate': 64, 'edit': 65}, None)


class PartitionTest(parameterized.TestCase):

  @parameterized.parameters(
      ('trunk/layers/und/q_proj/kernel', (2, 16, 8), P(None, 'fsdp', 'tensor')),
      ('trunk/layers/gen/down_proj/kernel', (2, 16, 8), P(None, 'tensor', 'fsdp')),
      ('trunk/layers/und/o_proj/kernel', (2, 16, 8), P(None, 'tensor', 'fsdp')),
      ('vit/layers/out_proj/kernel', (2, 16, 8), P(None, 'tensor', 'fsdp')),
      ('vit/layers/fc2/kernel', (2, 9, 8), P(None, None, 'fsdp')),
      ('vit/patch_embedding/kernel', (9, 8), P(None, 'fsdp')),
      ('latent_pos_embed', (9, 8), P(None, 'fsdp')),
      ('decoder/up_0/block_1/conv2/kernel', (3, 3, 4, 8), P(None, None, None, 'fsdp')),
      ('embed_tokens', (16, 8), P('tensor', 'fsdp')),
      ('lm_head/kernel', (16, 8), P('fsdp', 'tensor')),
      ('time_embedder/mlp_0/kernel', (16, 8), P('fsdp', None)),
      ('connector_fc1/kernel', (16, 8), P('fsdp', None)),
      ('trunk/layers/und/q_proj/bias', (2, 8), P(None, None)),
      ('.params/lm_head/kernel', (16, 8), P('fsdp', 'tensor')),
      ('step', (), P()),
  )
  def test_table(self, name, shape, want):
    self.assertEqual(sharding.partition(name, shape, described(fsdp=4, tensor=2)), want)

  def test_what_rests_is_split_over_data_as_well(self):
    mesh = described(data=2, fsdp=4, tensor=2)
    kernel, want = 'lm_head/kernel', P(('data', 'fsdp'), 'tensor')
    for part in ('.opt_state/[0]/.mu/', '.opt_state/[1]/.nu/', '.old/', '.reference/', '[0]/.mu/'):
      self.assertEqual(sharding.partition(part + kernel, (16, 8), mesh), want)
    for part in ('.params/', '.ema/', ''):
      self.assertEqual(sharding.partition(part + kernel, (16, 8), mesh), P('fsdp', 'tensor'))
    self.assertEqual(sharding.partition('.old/' + kernel, (12, 8), mesh), P('fsdp', 'tensor'))
    self.assertEqual(sharding.partition('.old/' + kernel, (16, 8), described(fsdp=4, tensor=2)),
                     P('fsdp', 'tensor'))

  def test_axis_that_does_not_divide_is_named(self):
    with self.assertRaises(ValueError) as caught:
      sharding.partition('trunk/layers/und/q_proj/kernel', (2, 16, 9), described(tensor=4))
    for part in ('trunk/layers/und/q_proj/kernel', '(2, 16, 9)', 'axis of 9', '4 devices',
                 "'tensor'"):
      self.assertIn(part, str(caught.exception))
    with self.assertRaisesRegex(ValueError, "axis of 9 .* 2 devices of mesh axis 'fsdp'"):
      sharding.partition('lm_head/kernel', (9, 8), described(fsdp=2))

  def test_table_covers_the_kernels(self):
    shapes = names(abstract_params())
    kernels = {name for name in shapes if name.endswith('kernel')}
    self.assertGreater(len(kernels), 20)
    bare = {name for name in kernels
            if not any(sharding.partition(name, shapes[name], described()))}
    self.assertEqual(bare, REPLICATED_KERNELS)
    every = [*shapes, *autoencoder_names(), *shapes_of('base', weights.JUDGE)]
    for pattern, _ in sharding.TABLE:
      self.assertTrue(any(re.search(pattern, name) for name in every), pattern)

  def test_most_parameters_are_split(self):
    shapes = names(abstract_params())
    size = lambda chosen: sum(int(np.prod(shapes[name])) for name in chosen)
    split = [name for name in shapes if any(sharding.partition(name, shapes[name], described()))]
    self.assertGreater(size(split) / size(shapes), 0.85)

  def test_default_model_fits_small_meshes(self):
    for sizes in (dict(fsdp=8), dict(fsdp=2, tensor=2), dict(tensor=2)):
      for name, shape in names(abstract_params()).items():
        sharding.partition(name, shape, described(**sizes))


class JudgeTest(parameterized.TestCase):
  """The judge lies on every mesh on which the policy does."""

  @parameterized.parameters(
      ('vision/layers_0/attention/q_proj/kernel', (1152, 16, 72), P('fsdp', None, None)),
      ('text/layers_0/attention/out_proj/kernel', (16, 72, 1152), P(None, None, 'fsdp')),
      ('vision/head/attention/v_proj/kernel', (4, 1152, 16, 72), P(None, 'fsdp', None, None)),
      ('text/layers_0/mlp/fc2/kernel', (4304, 1152), P(None, 'fsdp')),
      ('text/tokens/embedding', (151669, 96), P(None, 'fsdp')),
      ('vision/positions', (729, 1152), P(None, 'fsdp')),
      ('vision/layers_0/attention/q_proj/kernel', (96, 4, 24), P()),  # At most 1 MB.
      ('text/tokens/embedding', (151669, 100), P()),  # Its width does not divide.
  )
  def test_large_parameters_are_split_by_width(self, name, shape, want):
    self.assertEqual(sharding.partition(name, shape, described(fsdp=32, tensor=4)), want)

  @parameterized.product(config=('tiny', 'base', 'bagel_7b'),
                         mesh=((1, 8, 1), (1, 32, 1), (1, 64, 1), (2, 32, 1), (2, 4, 4)))
  def test_templates(self, config, mesh):
    """The policy's widths of 16 (tiny) and 96 (base) bound fsdp; nothing bounds it for the judge."""
    _, fsdp, tensor = mesh
    kinds = [weights.JUDGE]
    if fsdp <= {'tiny': 8, 'base': 32, 'bagel_7b': 64}[config]:
      kinds.append(weights.VAE)
      if config != 'base' or tensor == 1:  # It has one key/value head, of 48 values.
        kinds.append(weights.BASE)
    where = jax.sharding.AbstractMesh(mesh, sharding.AXES)
    for kind in kinds:
      template = weights.template(dataclasses.replace(job_of(config), mesh=where), kind)
      for leaf in jax.tree.leaves(template):
        self.assertIs(leaf.sharding.mesh, where)
        leaf.sharding.shard_shape(leaf.shape)  # It raises where an axis does not divide.

  def test_no_parameter_above_a_megabyte_is_whole_in_bagel_7b(self):
    mesh = described(data=2, fsdp=32)
    sizes = {}
    for kind in (weights.BASE, weights.VAE, weights.JUDGE):
      found = shapes_of('bagel_7b', kind)
      sizes[kind] = sum(x.size * x.dtype.itemsize for x in found.values())
      whole = {name: x.shape for name, x in found.items()
               if not any(sharding.partition(name, x.shape, mesh))
               and x.size * x.dtype.itemsize > 2 ** 20}
      self.assertEqual(whole, {})
    # All of the judge is 1.4 MB, so every device holds it whole.
    self.assertBetween(sizes[weights.JUDGE], 1.4e6, 1.5e6)
    self.assertGreater(sizes[weights.BASE], 5e10)


class TreeTest(absltest.TestCase):

  def test_state_is_laid_out_like_its_parameters(self):
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    params = {'lm_head': {'kernel': np.zeros((4, 2), np.float32)}, 'norm': np.zeros(3, np.float32)}
    state = jax.eval_shape(lambda: step_lib.init(params, optax.adam(1.), ema=True))
    specs = jax.tree.map(lambda s: s.spec, sharding.tree_shardings(state, mesh))
    want = P('fsdp', 'tensor')
    moments = specs.opt_state[0]
    for tree in (specs.params, specs.ema, moments.mu, moments.nu):
      self.assertEqual(tree['lm_head']['kernel'], want)
      self.assertFalse(any(tree['norm']))
    self.assertFalse(any(specs.step) or any(moments.count))

  def test_split_rows(self):
    batch = {'a': np.arange(12).reshape(6, 2), 'empty': np.zeros((6, 0, 3))}
    split = sharding.split_rows(batch, 3)
    np.testing.assert_array_equal(split['a'][1], [[4, 5], [6, 7]])
    self.assertEqual(split['empty'].shape, (3, 2, 0, 3))
    with self.assertRaisesRegex(ValueError, '6 rows do not divide into 4 parts'):
      sharding.split_rows(batch, 4)

  def test_shard_rows_keeps_values(self):
    mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
    out = sharding.shard_rows({'a': np.arange(6)}, mesh)
    self.assertEqual(out['a'].sharding.spec, P(('data', 'fsdp')))
    np.testing.assert_array_equal(out['a'], np.arange(6))


if __name__ == '__main__':
  absltest.main()
