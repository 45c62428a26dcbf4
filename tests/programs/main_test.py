"""Tests of lvrpo_jax.main: where programs run, and what one that stops says to the shell."""

import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import flagsaver
from absl.testing import parameterized

from configs import tiny
from lvrpo_jax import main
from lvrpo_jax.aot import compile as aot_compile
from lvrpo_jax.runtime import platform


class ExecuteTest(parameterized.TestCase):
  def execute(self, function, **settings):
    """Runs a function in place of the config's program, with nothing set for the process."""
    config = tiny.get_config()
    config.update(settings)
    with (
      mock.patch.dict(main.PROGRAMS, {config.program: function}),
      mock.patch.object(platform, 'prepare'),
      mock.patch.object(platform, 'start_processes') as start,
    ):
      out = main.execute(config, pathlib.Path('unused'))
    self.started = [call.args for call in start.call_args_list]
    return out

  def test_result(self):
    self.assertEqual(
      self.execute(lambda config, workdir: {'program': config.program}), {'program': 'train'}
    )

  @parameterized.parameters(
    ('describe', '', '', []),
    ('compile', '', '', []),
    ('train', 'v5p:2x2x1', '', []),
    ('describe', 'v5p:2x2x1', '', [('jax_platforms', 'cpu')]),
    ('compile', 'v5p:2x2x1', '', [('jax_platforms', 'cpu')]),
    ('compile', 'v5p:2x2x1', 'cuda', []),
  )
  def test_absent_devices_leave_those_of_this_machine_alone(self, name, topology, asked, wanted):
    with mock.patch.dict(os.environ), mock.patch.object(main, 'jax') as jax:
      os.environ.pop('JAX_PLATFORMS', None)
      if asked:
        os.environ['JAX_PLATFORMS'] = asked
      self.execute(lambda config, workdir: None, program=name, compile={'topology': topology})
    self.assertEqual([call.args for call in jax.config.update.call_args_list], wanted)

  def test_flags_tell_of_the_other_processes(self):
    self.execute(lambda config, workdir: None)
    self.assertEqual(self.started, [(None, 1, 0)])
    with flagsaver.flagsaver(coordinator='host:1', processes=4, process=3):
      self.execute(lambda config, workdir: None)
      self.assertEqual(self.started, [('host:1', 4, 3)])
      self.execute(lambda config, workdir: None, program='describe')
      self.assertEmpty(self.started)

  @parameterized.parameters(
    (aot_compile.Exceeded('step: fits is false'), 1), (ValueError('config.a'), 2)
  )
  def test_status(self, error, status):
    def fail(config, workdir):
      raise error

    with self.assertLogs(level='ERROR') as logged, self.assertRaises(SystemExit) as stopped:
      self.execute(fail)
    self.assertEqual(stopped.exception.code, status)
    self.assertIn(str(error), logged.output[0])
    self.assertNotIn('Traceback', logged.output[0])


if __name__ == '__main__':
  absltest.main()
