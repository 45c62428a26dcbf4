"""A run moves from eight devices to four; see `restore_program`."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
import jax_settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = f'{jax_settings.QUICK_COMPILE} --xla_force_host_platform_device_count=8'


class RestoreTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
    done = subprocess.run(
        [sys.executable, str(ROOT / 'tests' / 'restore_program.py')], cwd=ROOT,
        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': FLAGS, 'PYTHONPATH': path},
        capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
      raise AssertionError(f'the program failed:\n{done.stderr[-4000:]}')
    cls.out = json.loads(done.stdout.splitlines()[-1])

  def test_four_devices_hold_what_eight_held(self):
    self.assertEqual(self.out['restored'], 0.)
    self.assertEqual(self.out['devices'], [4])

  def test_they_go_on_alike(self):
    self.assertLess(self.out['continued'], 1e-6)
    self.assertGreater(self.out['moved'], 1e-2)

  def test_no_array_is_gathered(self):
    self.assertEqual(self.out['gathered_by_save'], [])
    self.assertEqual(self.out['gathered_by_restore'], [])
    # Looking at the parameters does gather those that are split.
    self.assertEqual(self.out['gathered_by_looking'], self.out['split'])
    self.assertGreater(self.out['split'], 20)


if __name__ == '__main__':
  absltest.main()
