"""What lvrpo_jax.aot says of programs that XLA:TPU has compiled; no TPU is needed, libtpu is.

Minutes of compilation, so it is a command of its own, in an environment with `.[tpu]`:

    python -m pytest tests/aot/compile_tpu_test.py

Where libtpu is not installed, everything here is skipped.
"""

import contextlib
import importlib.util
import io
import json
import pathlib
import unittest

from absl.testing import absltest

from configs import tiny
from lvrpo_jax.aot import compile as aot_compile

MISSING = "libtpu is not installed: pip install -e '.[tpu]'"


@unittest.skipUnless(importlib.util.find_spec('libtpu'), MISSING)
class CompiledTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = tiny.get_config()
    config.compile.topology = 'v5p:2x2x1'
    config.align.update(prompts=dict(generate=4, understand=4, edit=4))
    config.parallel.update(mesh=(1, 2, 2), rollout_mesh=(2, 1, 2))
    config.compile.programs = ('text', 'step')
    printed, cls.fault = io.StringIO(), ''
    with contextlib.redirect_stdout(printed):
      try:
        aot_compile.run(config, pathlib.Path(absltest.get_default_test_tmpdir()) / 'tiny')
      except aot_compile.Exceeded as error:
        cls.fault = str(error)
    cls.out = {line['program']: line for line in map(json.loads, printed.getvalue().splitlines())}

  def test_every_program_is_counted(self):
    self.assertEqual(list(self.out), ['text', 'step'])
    for name, out in self.out.items():
      with self.subTest(name):
        self.assertEqual(out['chips'], 4)
        self.assertGreater(out['flops'], 0)
        for kind in ('arguments', 'temporaries', 'output'):
          self.assertGreater(out['hbm_bytes'][kind], 0, kind)
        self.assertTrue(out['fits'])
        self.assertGreater(sum(out['collective_bytes'].values()), 0)
        self.assertEqual(out['unknown_loops'], 0)
        self.assertEqual(out['replicated'], {})
    self.assertEqual([out['mesh'] for out in self.out.values()], [[2, 1, 2], [1, 2, 2]])
    # The state of an update stays on the chips during rollouts, and is updated in place.
    self.assertGreater(self.out['text']['hbm_bytes']['resident'], 0)
    self.assertGreater(self.out['step']['hbm_bytes']['alias'], 0)

  def test_limits(self):
    """Weights this small move less than what their activations take."""
    self.assertGreater(self.out['step']['collective_ratio'], aot_compile.MAX_TRAFFIC_RATIO)
    self.assertStartsWith(self.fault, 'step: collective_ratio is ')
    self.assertNotIn(';', self.fault.partition('allowed')[2])


@unittest.skipUnless(importlib.util.find_spec('libtpu'), MISSING)
class DevicesTest(absltest.TestCase):
  def test_a_chip_is_a_device(self):
    for topology, kind in (
      ('v4:2x2x2', 'TPU v4'),
      ('v5p:2x2x2', 'TPU v5'),
      ('v6e:2x4', 'TPU v6 lite'),
    ):
      with self.subTest(topology):
        found = aot_compile.devices(topology)
        self.assertLen(found, 8)
        self.assertEqual({device.device_kind for device in found}, {kind})

  def test_unknown_shape_is_explained(self):
    with self.assertRaisesRegex(ValueError, "'v5p:3x5x7'.* expected a name such as"):
      aot_compile.devices('v5p:3x5x7')


if __name__ == '__main__':
  absltest.main()
