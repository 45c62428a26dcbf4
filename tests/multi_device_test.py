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
         '--xla_cpu_use_fusion_emitters=false '  # A third of the compile time.
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

  @parameterized.parameters('data', 'fsdp', 'mixed', 'pmap')
  def test_update_equals_one_device(self, mesh):
    self.assertLess(self.out[mesh]['params'], TOLERANCE)
    want, got = self.out['one']['metrics'], self.out[mesh]['metrics']
    self.assertEqual(got.keys(), want.keys())
    for name, value in want.items():
      self.assertAlmostEqual(got[name], value, delta=TOLERANCE * max(1., abs(value)), msg=name)

  def test_update_moves(self):
    metrics = self.out['one']['metrics']
    self.assertEqual(metrics['skipped'], 0.)
    self.assertGreater(self.out['one']['moved'], 1e-3)
    for name in ('pretrain/generate', 'pretrain/understand', 'align/generate', 'align/understand',
                 'align/generate_penalty', 'align/understand_penalty'):
      self.assertGreater(abs(metrics[f'loss/{name}']), 1e-4, name)

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
