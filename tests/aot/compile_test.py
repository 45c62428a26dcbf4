"""Tests of lvrpo_jax.aot: what it compiles is what a run calls. See also `compile_tpu_test`."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import tempfile
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from configs import tiny
from lvrpo_jax.aot import compile as aot_compile
from lvrpo_jax.aot import describe as describe_lib
from lvrpo_jax.aot import programs as programs_lib
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from lvrpo_jax.training import learner as learner_lib
from lvrpo_jax.training import prompts as prompts_lib


def make_experiment(**changes):
  """The tiny experiment with changes to `config.align`, by section."""
  config = tiny.get_config()
  config.model.depth = 1
  config.align.update(rollout=dict(steps=3, window=1))
  config.align.update(changes)
  return experiment_lib.build(config, pathlib.Path('unused'))


def signature(tree):
  return jax.tree.map(lambda x: (tuple(x.shape), jnp.dtype(x.dtype).name), tree)


class ProgramsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.experiment = make_experiment()
    cls.programs = programs_lib.programs(cls.experiment)

  @parameterized.parameters(
    dict(),
    dict(image=dict(objective='flow_grpo', draws=3), rollout=dict(guidance=2.0)),
    dict(image=dict(draws=3), prompts=dict(think_generate=2)),
    dict(image=dict(objective='flow_grpo'), prompts=dict(think_generate=2)),
    dict(lora=dict(rank=2)),
  )
  def test_arguments_are_those_of_an_iteration(self, **changes):
    experiment = make_experiment(**changes)
    programs, policy = programs_lib.programs(experiment), experiment.policy
    image = jnp.zeros((1, policy.image_size, policy.image_size, 3))
    params, vae_params, dual_encoder_params = (
      bagel.init(policy.config, jax.random.key(0)),
      policy.vae.init(jax.random.key(0), image)['params'],
      experiment.dual_encoder.module.init(
        jax.random.key(0), image, experiment.dual_encoder.token_ids([''])[0]
      )['params'],
    )
    learner = learner_lib.Learner(experiment, params, vae_params, dual_encoder_params)
    data = prompts_lib.prompt_batches(experiment)
    batch = prompts_lib.next_prompts(experiment, data, data)

    class Called(Exception):
      pass

    def step(*arguments):
      raise Called(*arguments)

    learner.step = step
    with self.assertRaises(Called) as caught:
      learner.iterate(batch, 1)
    self.assertEqual(signature(programs['step']().arguments), signature(caught.exception.args))
    everything = {}
    for name in ('text', 'image'):
      asked = programs[name]().arguments
      self.assertEqual(signature(asked[:2]), signature(((params,), vae_params)))
      everything.update(signature(asked[2]))
    self.assertEqual(everything, signature(batch.prompts))

  def test_measures_what_it_compiles(self):
    chip = aot_compile.Chip(flops=1e9, hbm=1e6, bandwidth=1e6, network=1e6)
    program = self.programs['text']()
    with tempfile.TemporaryDirectory() as folder:
      out = aot_compile.measure('text', program, chip, pathlib.Path(folder))
      self.assertIn('ENTRY', (pathlib.Path(folder) / 'text.hlo.txt').read_text())
    json.dumps(out)
    self.assertEqual((out['chips'], out['mesh']), (1, [1, 1, 1]))
    given = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.arguments))
    self.assertLessEqual(out['hbm_bytes']['arguments'], given)  # The compiler drops unused ones.
    self.assertGreater(out['hbm_bytes']['arguments'], 0.2 * given)
    # The state of an update stays while a rollout runs: policy, reference, old policy and moments.
    size = sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(program.arguments[0]))
    self.assertAlmostEqual(out['hbm_bytes']['resident'] / size, 5.0, delta=0.01)
    self.assertAlmostEqual(out['arithmetic_seconds'], out['flops'] / 1e9, delta=1e-3)
    self.assertEqual(sum(out['collective_bytes'].values()), 0)
    self.assertEqual(out['unknown_loops'], 0)
    self.assertEqual(out['fits'], out['hbm_peak_bytes'] <= 0.85e6)


class DescribeTest(absltest.TestCase):
  def test_table(self):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      describe_lib.describe(tiny.get_config(), pathlib.Path('unused'))
    *rows, total = printed.getvalue().splitlines()
    self.assertRegex(rows[0], r'parameter +shape +partition +bytes a device')
    found = {row.split('  ')[0]: row for row in rows[1:]}
    self.assertRegex(
      found['base/trunk/layers/und/q_proj/kernel'], r'\(2, 16, 16\) +\(-, fsdp, tensor\) +2,048$'
    )
    experiment = experiment_lib.build(tiny.get_config(), pathlib.Path('unused'))
    leaves = [
      leaf
      for kind in (weights.BASE, weights.VAE, weights.DUAL_ENCODER)
      for leaf in jax.tree.leaves(weights.template(experiment, kind))
    ]
    self.assertLen(found, len(leaves))
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    listed = sum(int(re.search(r'([\d,]+)$', row)[1].replace(',', '')) for row in rows[1:])
    self.assertEqual(listed, size)
    self.assertIn(f'{size:,} of {size:,} bytes', total)


class TopologyTest(parameterized.TestCase):
  @parameterized.parameters('', 'v9:2x2', 'h100')
  def test_unknown_chip_is_named(self, topology):
    config = tiny.get_config()
    config.compile.topology = topology
    with self.assertRaisesRegex(
      ValueError, f"config.compile.topology is '{topology}'; allowed: .*v5p"
    ):
      aot_compile.run(config, pathlib.Path('unused'))

  @parameterized.parameters(
    ('v4:2x2x2', 'megacore', 'v4-16'), ('v5p:2x2x2', None, 'v5p-16'), ('v6e:2x4', None, 'v6e-8')
  )
  def test_a_chip_is_a_device(self, topology, asked, accelerator):
    def described(count):
      return types.SimpleNamespace(devices=[object() for _ in range(count)])

    with (
      mock.patch.dict(os.environ),
      mock.patch.object(
        aot_compile.topologies, 'get_topology_desc', return_value=described(8)
      ) as describe,
    ):
      os.environ.pop('TPU_ACCELERATOR_TYPE', None)
      self.assertLen(aot_compile.devices(topology), 8)
      self.assertEqual(os.environ['TPU_ACCELERATOR_TYPE'], accelerator)
      self.assertEqual(describe.call_args.kwargs.get('chip_config_name'), asked)
      describe.return_value = described(16)
      with self.assertRaisesRegex(ValueError, f"'{topology}'.* 16 devices; .* 8 chips"):
        aot_compile.devices(topology)


MEASURED = {
  'program': 'step',
  'fits': True,
  'hbm_share': 0.2,
  'replicated': {},
  'collective_bytes': {'all-gather': 0},
}


class LimitsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('fits', {'fits': False, 'hbm_share': 0.9}, r'fits is false, hbm_share is 0\.9; .* 0\.85'),
    ('ratio', {'collective_ratio': 1.31}, r'collective_ratio is 1\.31; .* 1\.3$'),
    ('replicated', {'replicated': {'vae/b': 2**21, 'base/a': 2**22}}, 'are base/a, vae/b;'),
  )
  def test_each_is_named(self, _, measures, message):
    (fault,) = aot_compile.exceeded({**MEASURED, **measures})
    self.assertRegex(fault, f'^step: .*{message}')

  def test_what_stays_below_is_fine(self):
    self.assertEqual(aot_compile.exceeded({**MEASURED, 'collective_ratio': 1.3}), [])
    self.assertEqual(aot_compile.exceeded({**MEASURED, 'program': 'text'}), [])

  def test_all_programs_are_measured_before_the_end(self):
    config = tiny.get_config()
    config.compile.topology = 'v5p:2x2x1'
    bytes_of_ten_passes = (
      10
      * 2
      * sum(x.size for x in jax.tree.leaves(weights.template(make_experiment(), weights.BASE)))
    )
    measures = {
      'text': {'fits': False, 'hbm_share': 1.5},
      'image': {},
      'step': {'collective_bytes': {'all-gather': bytes_of_ten_passes}},
    }
    printed, workdir = io.StringIO(), pathlib.Path(self.create_tempdir().full_path)
    with (
      mock.patch.multiple(
        aot_compile,
        build=lambda *_: make_experiment(),
        measure=lambda name, *_: {**MEASURED, 'program': name, **measures[name]},
      ),
      mock.patch.object(programs_lib, 'programs', lambda _: dict.fromkeys(measures, dict)),
      contextlib.redirect_stdout(printed),
      self.assertRaises(aot_compile.Exceeded) as caught,
    ):
      aot_compile.run(config, workdir)
    self.assertRegex(str(caught.exception), '^text: fits .*; step: collective_ratio is 3.333; ')
    lines = [json.loads(line) for line in printed.getvalue().splitlines()]
    self.assertEqual([line['program'] for line in lines], ['text', 'image', 'step'])
    self.assertEqual(lines[2]['objective'], config.align.image.objective)
    self.assertNotIn('objective', lines[0])
    self.assertEqual((workdir / 'compile.jsonl').read_text(), printed.getvalue())


AXES = (AxisType.Auto,) * 3


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of which nothing is asked but where it stands in a mesh."""

  id: int
  platform: str = 'cpu'
  device_kind: str = 'cpu'
  process_index: int = 0


class PartitionTest(parameterized.TestCase):
  """Meshes of several devices that are only described."""

  @parameterized.parameters(
    ((2, 4, 1), P('fsdp', 'tensor'), 8.0 * 16 * 2 / 4),
    ((2, 2, 2), P('fsdp', 'tensor'), 64.0),
    ((8, 1, 1), P('fsdp', 'tensor'), 256.0),
    ((2, 4, 1), P(('data', 'fsdp')), 32.0),
  )
  def test_bytes_follow_the_partition(self, shape, spec, wanted):
    mesh = AbstractMesh(shape, mesh_lib.AXES, axis_types=AXES)
    leaf = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    self.assertEqual(programs_lib.bytes_of({'a': leaf, 'b': [leaf]}), 2 * wanted)

  def test_what_every_device_holds_whole(self):
    def tree(*shape):
      mesh = AbstractMesh(shape, mesh_lib.AXES, axis_types=AXES)

      def leaf(spec):
        return jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, spec))

      small = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=NamedSharding(mesh, P()))
      return {
        'a': {'fsdp': leaf(P('fsdp')), 'tensor': leaf(P(None, 'tensor'))},
        'none': leaf(P()),
        'small': small,
      }

    size = 2**21
    self.assertEqual(aot_compile.large_replicated(tree(2, 2, 2)), {'none': size})
    self.assertEqual(aot_compile.large_replicated(tree(2, 1, 4)), {'none': size, 'a/fsdp': size})
    self.assertEqual(
      aot_compile.large_replicated(tree(8, 1, 1)), {'none': size, 'a/fsdp': size, 'a/tensor': size}
    )
    self.assertEqual(aot_compile.large_replicated(tree(1, 1, 1)), {})
    self.assertLen(aot_compile.large_replicated(tree(2, 2, 2), limit=0), 2)

  @parameterized.parameters(
    ('TPU v5', 64, 0, 1),
    ('TPU v5', 16, 0, 2),
    ('TPU v5', 8, 0, 8),
    ('TPU v6 lite', 64, 0, 8),
    ('NVIDIA H100 80GB HBM3', 32, 0, 1),
    ('NVIDIA H100 80GB HBM3', 16, 0, 8),
    ('TPU v6 lite', 64, 4, 4),
  )
  def test_contexts_are_encoded_as_seldom_as_memory_lets(self, kind, count, asked, want):
    config = tiny.get_config()
    config.align.rollout.group_size = 8
    config.parallel.update(mesh=(-1, 0, 1), group_parts=asked)
    chips = [Chip(id=number, device_kind=kind) for number in range(count)]
    experiment = experiment_lib.build(config, pathlib.Path('unused'), chips)
    self.assertEqual(experiment.group_parts, want)

  def test_each_program_is_looked_at_on_its_own_mesh(self):
    """Split in the update, and on data alone in rollouts."""
    config = tiny.get_config()
    config.align.update(prompts=dict(understand=8, generate=8, edit=8))
    config.parallel.update(mesh=(1, 4, 2), rollout_mesh=(8, 1, 1))
    chips = [Chip(id=number) for number in range(8)]
    with mock.patch.object(aot_compile, 'devices', return_value=chips):
      programs = programs_lib.programs(aot_compile.build(config, pathlib.Path('unused')))
    found = {
      name: set(aot_compile.large_replicated(make().held, limit=500))
      for name, make in programs.items()
    }
    self.assertContainsSubset({'base/connector_fc1/kernel', 'base/vit_pos_embed'}, found['text'])
    self.assertEqual(found['text'], found['image'])
    # The small autoencoder is split nowhere.
    self.assertEqual({name.split('/')[0] for name in found['step']}, {weights.VAE})


if __name__ == '__main__':
  absltest.main()
