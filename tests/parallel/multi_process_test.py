"""Two processes equal one, read each other's checkpoints, share rows, and stop at once."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized

from tests.helpers import jax_settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = (
  f'{jax_settings.QUICK_COMPILE} --xla_cpu_multi_thread_eigen=false '
  '--xla_force_host_platform_device_count='
)
TOLERANCE = 1e-5


def free_port():
  with socket.socket() as server:
    server.bind(('localhost', 0))
    return server.getsockname()[1]


def start(name, devices, *arguments):
  """Starts a program of the tests on so many devices."""
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
  return subprocess.Popen(
    [sys.executable, '-m', name, *map(str, arguments)],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'PYTHONPATH': path,
      'XLA_FLAGS': f'{FLAGS}{devices}',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, timeout=600):
  """The JSON object that a program has printed."""
  try:
    out, errors = process.communicate(timeout=timeout)
  finally:
    process.kill()
  if process.returncode:
    raise AssertionError(f'the program failed:\n{errors[-4000:]}')
  return json.loads(out.splitlines()[-1])


class MultiProcessTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    folder, address = pathlib.Path(folder.name), f'localhost:{free_port()}'

    def run(count, process):
      return start(
        'tests.helpers.multi_process_program', 8 // count, folder, address, count, process
      )

    both = [run(2, process) for process in range(2)]
    for process in both:
      cls.addClassCleanup(process.kill)
    cls.files = [finish(process) for process in both]
    cls.out = finish(run(1, 0))

  def test_state_equals_that_of_one_process(self):
    self.assertGreater(self.out['moved'], 2e-4)
    self.assertLess(self.out['difference'], TOLERANCE)
    self.assertEqual(self.out['reference'], 0.0)
    self.assertLess(self.out['old'], TOLERANCE)
    self.assertLess(self.out['optimizer'], TOLERANCE)
    self.assertEqual((self.out['step'], self.out['iterations']), (1, [1, 1]))

  def test_metrics_equal_those_of_one_process(self):
    one, several = self.out['metrics']
    self.assertEqual(one.keys(), several.keys())
    self.assertIn('reward/generate/rules', one)
    for name, value in one.items():
      # An entropy is no mean of entropies of parts.
      if isinstance(value, float) and name not in ('seconds', 'time', 'pictures/hue_entropy'):
        self.assertAlmostEqual(
          several[name], value, delta=TOLERANCE * max(1.0, abs(value)), msg=name
        )

  def test_one_process_writes(self):
    self.assertEqual(*(found['files'] for found in self.files))
    self.assertIn('metrics.jsonl', self.files[0]['files'])
    for found in self.files:
      self.assertEqual((found['lines'], found['events']), (1, 1))  # One iteration, one writer.


class RowBlockTest(parameterized.TestCase):
  """Two processes of two devices; `tensor` spans both on the mesh (1, 1, 4)."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    address = f'localhost:{free_port()}'
    both = [
      start('tests.helpers.row_block_program', 2, address, 2, process) for process in range(2)
    ]
    for process in both:
      cls.addClassCleanup(process.kill)
    cls.found = [finish(process) for process in both]

  @parameterized.parameters(('tensor', 1), ('fsdp', 2), ('mixed', 2), ('data', 2))
  def test_every_row_is_drawn_once(self, mesh, count):
    parts = [found[mesh] for found in self.found]
    self.assertEqual(
      [part['block'] for part in parts], [[process % count, count] for process in range(2)]
    )
    rows = list(range(8))
    for process, part in enumerate(parts):
      self.assertEqual(part['drawn'], rows[process % count :: count])
      self.assertEqual(part['shape'], [8, 1])
      self.assertEqual(part['local'], part['drawn'])
      self.assertCountEqual(part['whole'], rows)
      self.assertEqual(part['whole'], parts[0]['whole'])
      for first, shard in part['shards'].items():
        self.assertEqual(shard, part['whole'][int(first) : int(first) + len(shard)])

  def test_processes_that_share_rows_agree(self):
    for process, found in enumerate(self.found):
      self.assertEqual(found['tensor']['agreed'], [0] * 8)
      self.assertEqual(found['fsdp']['agreed'], [process] * 4)


class AgreementTest(absltest.TestCase):
  def run_both(self, folder, *arguments):
    """What both of two processes print."""
    address = f'localhost:{free_port()}'
    both = [
      start('tests.helpers.two_processes_program', 1, folder, address, process, *arguments)
      for process in range(2)
    ]
    for process in both:
      self.addCleanup(process.kill)
    # Seconds are enough: processes that disagree wait for each other.
    mine, other = (finish(process, timeout=200) for process in both)
    self.assertEqual(mine, other)
    return mine

  def test_all_stop_after_the_same_step_also_where_a_resume_has_just_begun(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.assertEqual(self.run_both(folder, 'stop', 4), dict(start=500, last=504, refused=True))
    self.assertEqual(self.run_both(folder, 'stop', 1), dict(start=504, last=505, refused=True))

  def test_what_one_cannot_read_is_set_aside_by_all(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    out = self.run_both(folder, 'restore')
    self.assertEqual(out['record'], {'iteration': 1})
    self.assertEqual(out['found'], ['1', '2.unreadable0', '3.unreadable0'])
    self.assertRegex(out['problem'], f'none .* in {folder}/checkpoints can be read')

  def test_one_sees_for_all_what_is_there(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.assertEqual(self.run_both(folder, 'kept'), dict(values=[1.0, 1.0], made=[1.0]))

  def test_a_judge_that_fails_one_stops_all(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    out = self.run_both(folder, 'asked')
    self.assertGreaterEqual(out.pop('checks'), 2)
    self.assertEqual(out, dict(value=[[1.0]], failed=True))


if __name__ == '__main__':
  absltest.main()
