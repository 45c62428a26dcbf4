"""How the processes of a run find each other: `platform.start_processes` on made-up machines."""

import importlib.util
import os
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax

from lvrpo_jax.runtime import platform

ALONE = ValueError(f'{platform.NO_CLUSTER}.')
TIMEOUT = jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED: Barrier timed out.')


class StartProcessesTest(parameterized.TestCase):
  def start(self, environment=(), libtpu=False, error=None, **flags):
    """The arguments of every call of `initialize`."""
    kept = {
      k: v for k, v in os.environ.items() if not k.startswith('SLURM') and k != 'JAX_PLATFORMS'
    }

    def find(name):
      return object() if libtpu and name == 'libtpu' else None

    with (
      mock.patch.dict(os.environ, {**kept, **dict(environment)}, clear=True),
      mock.patch.object(importlib.util, 'find_spec', find),
      mock.patch.object(jax.distributed, 'initialize', side_effect=error) as initialize,
    ):
      platform.start_processes(**{'coordinator': None, 'processes': 1, 'process': 0, **flags})
    return [call.args for call in initialize.call_args_list]

  def test_flags(self):
    self.assertEqual(self.start(coordinator='host:1', processes=4, process=3), [('host:1', 4, 3)])

  @parameterized.parameters(
    ({'coordinator': 'host:1', 'processes': 2, 'process': 2}, '--process is 2; allowed: below'),
    ({'processes': 2}, '--processes is 2 without --coordinator'),
    ({'process': 3}, '--process is 3 without --processes and --coordinator'),
  )
  def test_flags_that_do_not_fit(self, flags, message):
    with self.assertRaisesRegex(ValueError, message):
      self.start(**flags)

  def test_slurm(self):
    self.assertEqual(self.start({'SLURM_STEP_NUM_TASKS': '4'}), [()])
    self.assertEqual(self.start({'SLURM_STEP_NUM_TASKS': '1'}), [])

  @parameterized.parameters(ALONE, TIMEOUT)
  def test_slurm_needs_the_others(self, error):
    with self.assertRaisesRegex(type(error), str(error)):
      self.start({'SLURM_STEP_NUM_TASKS': '4'}, error=error)

  def test_tpu_host(self):
    self.assertEqual(self.start(libtpu=True), [()])
    self.assertEqual(self.start({'JAX_PLATFORMS': 'cpu'}, libtpu=True), [])

  def test_laptop(self):
    self.assertEqual(self.start(), [])
    with self.assertLogs(level='INFO') as logged:
      self.assertEqual(self.start(libtpu=True, error=ALONE), [()])
    self.assertIn('one process', logged.output[0])

  def test_jax_says_so_where_there_is_no_cluster(self):
    """The words that tell a laptop from a pod are those of the installed jax."""
    state = jax._src.distributed.State()
    detect = 'jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params'
    with (
      mock.patch(detect, lambda *args: (None,) * 4),
      self.assertRaisesRegex(ValueError, platform.NO_CLUSTER),
    ):
      state.initialize()

  @parameterized.parameters(
    TIMEOUT,
    RuntimeError('distributed.initialize should only be called once.'),
    ValueError('Number of processes must be defined.'),
  )
  def test_pod_whose_hosts_do_not_answer(self, error):
    with self.assertRaisesRegex(type(error), str(error)):
      self.start(libtpu=True, error=error)


if __name__ == '__main__':
  absltest.main()
