"""Tests of lvrpo_jax.main: what a program that stops says to the shell."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

from configs import tiny
from lvrpo_jax import ahead
from lvrpo_jax import main


class ExecuteTest(parameterized.TestCase):

  def execute(self, program, **settings):
    """Runs `program` in place of the config's own, with nothing set for the process."""
    config = tiny.get_config()
    config.update(settings)
    with mock.patch.dict(main.PROGRAMS, {config.program: program}), mock.patch.multiple(
        main, prepare=mock.DEFAULT, start_processes=mock.DEFAULT):
      return main.execute(config, pathlib.Path('unused'))

  def test_result(self):
    self.assertEqual(self.execute(lambda config, workdir: {'program': config.program}),
                     {'program': 'run'})

  @parameterized.parameters((ahead.Exceeded('step: fits is false'), 1), (ValueError('config.a'), 2))
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
