"""Partitions of parameters by name, on meshes that are only described."""

import dataclasses
import functools
import importlib
import math
import pathlib
import re
import types as python_types

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from configs import bagel_7b
from lvrpo_jax.models import lora
from lvrpo_jax.parallel import partition_rules
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from lvrpo_jax.training import step as step_lib

REPLICATED_KERNELS = {
  'vae2llm/kernel',
  'llm2vae/kernel',  # A few channels on one side.
}
"""Kernels that no rule of the table splits."""


def described(data=1, fsdp=1, tensor=1):
  """The part of a mesh that `partition` reads."""
  return python_types.SimpleNamespace(shape={'data': data, 'fsdp': fsdp, 'tensor': tensor})


@functools.cache
def experiment_of(config):
  """The experiment of a config on one device; nothing is made."""
  return experiment_lib.build(
    importlib.import_module(f'configs.{config}').get_config(),
    pathlib.Path('unused'),
    jax.devices()[:1],
  )


@functools.cache
def shapes_of(config, kind):
  """Shapes and dtypes of the parameters of an experiment, by name."""
  tree = weights.template(experiment_of(config), kind)
  return {
    placement.parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def base_shapes():
  """Shapes of the parameters of the default policy, by name."""
  return {name: leaf.shape for name, leaf in shapes_of('base', weights.BASE).items()}


class PartitionTest(parameterized.TestCase):
  @parameterized.parameters(
    ('trunk/layers/und/q_proj/kernel', (2, 16, 8), P(None, 'fsdp', 'tensor')),
    ('trunk/layers/gen/down_proj/kernel', (2, 16, 8), P(None, 'tensor', 'fsdp')),
    ('trunk/layers/und/o_proj/kernel', (2, 16, 8), P(None, 'tensor', 'fsdp')),
    ('vit/layers/out_proj/kernel', (2, 16, 8), P(None, 'tensor', 'fsdp')),
    ('vit/layers/fc2/kernel', (2, 9, 8), P(None, None, ('fsdp', 'tensor'))),
    ('vit/patch_embedding/kernel', (9, 8), P(None, ('fsdp', 'tensor'))),
    ('latent_pos_embed', (9, 8), P(None, ('fsdp', 'tensor'))),
    ('latent_pos_embed', (9, 12), P(None, 'fsdp')),  # 12 does not divide by 8.
    ('decoder/up_0/block_1/conv2/kernel', (3, 3, 4, 8), P(None, None, None, ('fsdp', 'tensor'))),
    ('embed_tokens', (16, 8), P('tensor', 'fsdp')),
    ('lm_head/kernel', (16, 8), P('fsdp', 'tensor')),
    ('time_embedder/mlp_0/kernel', (16, 8), P(('fsdp', 'tensor'), None)),
    ('connector_fc1/kernel', (16, 8), P(('fsdp', 'tensor'), None)),
    ('trunk/layers/und/q_proj/bias', (2, 8), P(None, None)),
    ('.params/lm_head/kernel', (16, 8), P('fsdp', 'tensor')),
    ('step', (), P()),
  )
  def test_table(self, name, shape, want):
    self.assertEqual(partition_rules.partition(name, shape, described(fsdp=4, tensor=2)), want)

  @parameterized.parameters(
    {'data': 16, 'tensor': 4}, {'data': 2, 'fsdp': 32}, {'fsdp': 8, 'tensor': 4}
  )
  def test_the_largest_model_holds_nothing_large_whole(self, **sizes):
    for kind in (weights.BASE, weights.VAE):
      for name, leaf in shapes_of('bagel_7b', kind).items():
        spec = partition_rules.partition(name, leaf.shape, described(**sizes))
        parts = math.prod(
          sizes.get(axis, 1)
          for entry in spec
          if entry
          for axis in ((entry,) if isinstance(entry, str) else entry)
        )
        if parts == 1:
          self.assertLessEqual(math.prod(leaf.shape), partition_rules.SMALL, name)

  def test_what_rests_is_split_over_data_as_well(self):
    mesh = described(data=2, fsdp=4, tensor=2)
    kernel, want = 'lm_head/kernel', P(('data', 'fsdp'), 'tensor')
    for part in ('.opt_state/[0]/.mu/', '.opt_state/[1]/.nu/', '.old/', '.reference/', '[0]/.mu/'):
      self.assertEqual(partition_rules.partition(part + kernel, (16, 8), mesh), want)
    for part in ('.params/', '.ema/', ''):
      self.assertEqual(partition_rules.partition(part + kernel, (16, 8), mesh), P('fsdp', 'tensor'))
    self.assertEqual(
      partition_rules.partition('.old/' + kernel, (12, 8), mesh), P('fsdp', 'tensor')
    )
    self.assertEqual(
      partition_rules.partition('.old/' + kernel, (16, 8), described(fsdp=4, tensor=2)),
      P('fsdp', 'tensor'),
    )

  def test_axis_that_does_not_divide_is_named(self):
    with self.assertRaises(ValueError) as caught:
      partition_rules.partition('trunk/layers/und/q_proj/kernel', (2, 16, 9), described(tensor=4))
    for part in (
      'trunk/layers/und/q_proj/kernel',
      '(2, 16, 9)',
      'axis of 9',
      '4 devices',
      "'tensor'",
    ):
      self.assertIn(part, str(caught.exception))
    with self.assertRaisesRegex(ValueError, "axis of 9 .* 2 devices of mesh axis 'fsdp'"):
      partition_rules.partition('lm_head/kernel', (9, 8), described(fsdp=2))

  def test_table_covers_the_kernels(self):
    shapes = base_shapes()
    kernels = {name for name in shapes if name.endswith('kernel')}
    self.assertGreater(len(kernels), 20)
    bare = {
      name
      for name in kernels
      if not any(partition_rules.partition(name, shapes[name], described()))
    }
    self.assertEqual(bare, REPLICATED_KERNELS)
    every = [*shapes, *shapes_of('bagel_7b', weights.VAE), *shapes_of('base', weights.DUAL_ENCODER)]
    for pattern, _ in partition_rules.TABLE:
      self.assertTrue(any(re.search(pattern, name) for name in every), pattern)

  def test_most_parameters_are_split(self):
    shapes = base_shapes()
    sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    split = sum(
      size
      for name, size in sizes.items()
      if any(partition_rules.partition(name, shapes[name], described()))
    )
    self.assertGreater(split / sum(sizes.values()), 0.85)

  def test_default_model_fits_small_meshes(self):
    for sizes in ({'fsdp': 8}, {'fsdp': 2, 'tensor': 2}, {'tensor': 2}):
      for name, shape in base_shapes().items():
        partition_rules.partition(name, shape, described(**sizes))


class DualEncoderTest(parameterized.TestCase):
  """Every mesh of the policy also fits the dual encoder."""

  @parameterized.parameters(
    ('vision/layers_0/attention/q_proj/kernel', (1152, 16, 72), P('fsdp', None, None)),
    ('text/layers_0/attention/out_proj/kernel', (16, 72, 1152), P(None, None, 'fsdp')),
    ('vision/head/attention/v_proj/kernel', (4, 1152, 16, 72), P(None, 'fsdp', None, None)),
    ('text/layers_0/mlp/fc2/kernel', (4304, 1152), P(None, 'fsdp')),
    ('text/tokens/embedding', (151669, 96), P(None, 'fsdp')),
    ('vision/positions', (729, 1152), P(None, 'fsdp')),
    ('vision/layers_0/attention/q_proj/kernel', (96, 4, 24), P()),  # At most 1 MB.
  )
  def test_large_parameters_are_split_by_width(self, name, shape, want):
    self.assertEqual(partition_rules.partition(name, shape, described(fsdp=32, tensor=4)), want)

  def test_what_does_not_divide_is_whole_with_one_warning(self):
    case = 'text/tokens/embedding', (151669, 100), described(fsdp=32, tensor=4)
    with self.assertLogs(level='WARNING') as logged:
      self.assertEqual(partition_rules.partition(*case), P())
    self.assertIn(
      'text/tokens/embedding of shape (151669, 100), of the dual encoder, does not divide',
      logged.output[0],
    )
    with self.assertNoLogs(level='WARNING'):
      partition_rules.partition(*case)

  @parameterized.product(
    config=('tiny', 'base', 'bagel_7b'),
    mesh=((1, 8, 1), (1, 32, 1), (1, 64, 1), (2, 32, 1), (2, 4, 4)),
  )
  def test_templates(self, config, mesh):
    """The policy's widths of 16 (tiny) and 96 (base) bound fsdp; nothing else does."""
    _, fsdp, tensor = mesh
    kinds = [weights.DUAL_ENCODER]
    if fsdp <= {'tiny': 8, 'base': 32, 'bagel_7b': 64}[config]:
      kinds.append(weights.VAE)
      if config != 'base' or tensor == 1:  # It has one key/value head, of 48 values.
        kinds.append(weights.BASE)
    where = jax.sharding.AbstractMesh(mesh, partition_rules.AXES)
    for kind in kinds:
      template = weights.template(dataclasses.replace(experiment_of(config), mesh=where), kind)
      for leaf in jax.tree.leaves(template):
        self.assertIs(leaf.sharding.mesh, where)
        leaf.sharding.shard_shape(leaf.shape)  # It raises where an axis does not divide.

  def test_no_parameter_above_a_megabyte_is_whole_in_bagel_7b(self):
    mesh = described(data=2, fsdp=32)
    sizes = {}
    for kind in (weights.BASE, weights.VAE, weights.DUAL_ENCODER):
      found = shapes_of('bagel_7b', kind)
      sizes[kind] = sum(x.size * x.dtype.itemsize for x in found.values())
      whole = {
        name: x.shape
        for name, x in found.items()
        if not any(partition_rules.partition(name, x.shape, mesh))
        and x.size * x.dtype.itemsize > 2**20
      }
      self.assertEqual(whole, {})
    # All of the dual encoder is 1.4 MB, so every device holds it whole.
    self.assertBetween(sizes[weights.DUAL_ENCODER], 1.4e6, 1.5e6)
    self.assertGreater(sizes[weights.BASE], 5e10)


class AdapterTest(parameterized.TestCase):
  """Low-rank adapters lie as their kernels do."""

  @parameterized.parameters(
    ('und/q_proj/kernel/a', (28, 3584, 16), P(None, ('fsdp', 'tensor'), None)),
    ('und/q_proj/kernel/b', (28, 16, 3584), P(None, None, ('tensor', 'fsdp'))),
    ('gen/down_proj/kernel/a', (28, 18944, 16), P(None, ('tensor', 'fsdp'), None)),
    ('gen/down_proj/kernel/b', (28, 16, 3584), P(None, None, ('fsdp', 'tensor'))),
    ('und/k_proj/kernel/b', (28, 16, 12), P(None, None, 'tensor')),  # 12 is no multiple of 32.
    ('und/k_proj/kernel/a', (28, 24, 16), P(None, 'fsdp', None)),
  )
  def test_factors(self, name, shape, want):
    mesh = described(data=2, fsdp=8, tensor=4)
    for part in ('', '.params/', '.old/', '.opt_state/[0]/.mu/'):
      self.assertEqual(partition_rules.partition(f'{part}trunk/layers/{name}', shape, mesh), want)

  def test_axis_that_does_not_divide_is_named(self):
    with self.assertRaisesRegex(ValueError, "q_proj/kernel/a .* axis of 9 .* axis 'fsdp'"):
      partition_rules.partition('trunk/layers/und/q_proj/kernel/a', (2, 9, 4), described(fsdp=2))

  @parameterized.parameters((1, 32, 1), (2, 4, 4), (1, 8, 4))
  def test_nothing_large_of_a_state_is_whole(self, *mesh):
    """Adapters, their moments, their running mean and the old policy of the largest model."""
    mesh = jax.sharding.AbstractMesh(mesh, partition_rules.AXES)
    config = bagel_7b.get_config().align.lora
    params = weights.template(experiment_of('bagel_7b'), weights.BASE)
    state = jax.eval_shape(
      lambda p: step_lib.init(
        lora.init(p, 16, config.target, jax.random.key(0)), optax.adam(1.0), ema=True, old=True
      ),
      params,
    )
    where = placement.tree_shardings(state, mesh)
    sizes = [
      (x.size, math.prod(s.shard_shape(x.shape)))
      for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True)
    ]
    self.assertGreater(max(whole for whole, _ in sizes), 2**22)
    for whole, part in sizes:
      self.assertLessEqual(part, whole if whole <= partition_rules.SMALL else whole / 4)


class WholeTest(parameterized.TestCase):
  """What no rule splits is small, or is known to be whole."""

  def test_unknown_large_parameter_is_named(self):
    for part in ('', '.params/', '.opt_state/[0]/.nu/'):
      message = re.escape(f'{part}trunk/router/kernel of shape (512, 513) has more than 262144')
      known = r'partition_rules\.TABLE, or to partition_rules\.REPLICATED'
      with self.assertRaisesRegex(ValueError, f'{message}.*{known}'):
        partition_rules.partition(f'{part}trunk/router/kernel', (512, 513), described(tensor=2))

  def test_small_and_known_parameters_are_whole(self):
    for name, shape in (
      ('trunk/router/kernel', (512, 512)),
      ('vit/fc1/bias', (26, 99999)),
      ('trunk/layers/und/input_norm/scale', (80, 8192)),
      ('llm2vae/kernel', (8192, 64)),
      ('decoder/kernel', (512, 3072)),
    ):
      self.assertFalse(any(partition_rules.partition(name, shape, described(fsdp=8))), name)

  def test_one_device_asks_for_no_rules(self):
    self.assertFalse(any(partition_rules.partition('router/kernel', (999, 999), described())))

  def test_every_pattern_is_needed(self):
    every = [
      name
      for config in ('base', 'bagel_7b')
      for kind in (weights.BASE, weights.VAE)
      for name in shapes_of(config, kind)
    ]
    for pattern in partition_rules.REPLICATED:
      self.assertTrue(any(re.search(pattern, name) for name in every), pattern)


if __name__ == '__main__':
  absltest.main()
