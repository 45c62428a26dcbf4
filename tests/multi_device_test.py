"""Updates and rollouts on eight devices equal those on one; see `multi_device_program`."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = ('--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 '
         '--xla_cpu_multi_thread_eigen=false')
TOLERANCE = 1e-5


class MultiDeviceTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'multi_device_program.py')], cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': FLAGS, 'PYTHONPATH': path},
        capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
      raise AssertionError(f'the program failed:\n{done.stderr[-4000:]}')
    cls.out = json.loads(done.stdout.splitlines()[-1])

  @parameterized.product(loss=('pretrain', 'align'), mesh=('data', 'fsdp', 'mixed', 'pmap'))
  def test_update_equals_one_device(self, loss, mesh):
    one, got = self.out[f'{loss}/one'], self.out[f'{loss}/{mesh}']
    self.assertEqual(one['skipped'], 0.)
    self.assertGreater(abs(one['loss']), 0.01)
    self.assertGreater(one['moved'], 1e-3)
    self.assertLess(got['params'], TOLERANCE)
    self.assertLess(got['loss'] / max(1., abs(one['loss'])), TOLERANCE)

  def test_rollouts_equal_one_device(self):
    got = self.out['rollout']
    self.assertEqual(got['tokens'], 0)
    self.assertLess(got['logp'], TOLERANCE)
    self.assertLess(got['latents'], 1e-4)  # Rounding grows along a trajectory.
    self.assertLessEqual(got['pixels'], 1)
    self.assertGreater(got['distinct_answers'], 4)
    self.assertGreater(got['deviation'], 0.01)


if __name__ == '__main__':
  absltest.main()
