"""Entry point: parses flags and runs the program named by `config.program`.

python -m lvrpo_jax.main --config=configs/base.py [--workdir=DIR] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import re
import signal
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from configs import base
from lvrpo_jax import types
from lvrpo_jax.aot import compile as aot_compile
from lvrpo_jax.aot import describe
from lvrpo_jax.programs import convert
from lvrpo_jax.programs import sample
from lvrpo_jax.programs import study
from lvrpo_jax.programs import train
from lvrpo_jax.reports import report
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.runtime import platform
from lvrpo_jax.runtime import preemption
from lvrpo_jax.runtime import renamed
from lvrpo_jax.runtime import validate

CONFIG = config_flags.DEFINE_config_file(
  'config', 'configs/base.py', 'Configuration file.', lock_config=True
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; default runs/<config name>.')

COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'host:port of process 0, where several processes run and neither a TPU pod nor SLURM tells of '
  'them.',
)
PROCESSES = flags.DEFINE_integer('processes', 1, 'Number of processes.', lower_bound=1)
PROCESS = flags.DEFINE_integer('process', 0, 'Index of this process.', lower_bound=0)

Scores = dict[str, types.Json]
Program = Callable[[types.Config, pathlib.Path], Scores | None]

PROGRAMS: dict[str, Program] = {
  'train': train.run,
  'pretrain': train.run,
  'control': train.run,
  'study': study.run,
  'sample': sample.run,
  'convert': convert.run,
  'describe': describe.describe,
  'compile': aot_compile.run,
}
"""Functions of (config, workdir) by `config.program`."""


def parse(argv: list[str]) -> list[str]:
  """Parses flags; an unknown or wrong flag ends the process with a message and status 2."""
  try:
    return flags.FLAGS(argv)
  except (KeyError, AttributeError, flags.Error) as error:
    known = [key for key, _ in validate.leaves(base.get_config())]
    keys = [found[1] for arg in argv if (found := re.match(r'--?config\.([\w.]+)', arg))]
    wrong = [key for key in keys if key not in known]
    if isinstance(error, flags.Error):  # It names the flag; other errors may be about a section.
      wrong = [key for key in wrong if f'--config.{key}=' in str(error)]
    elif not wrong:
      raise
    print(renamed.explain(wrong[0], known) if wrong else error, file=sys.stderr)
    sys.exit(2)


def execute(config: types.Config, workdir: pathlib.Path) -> Scores | None:
  """Runs the program of a config.

  A program that stops early ends the process with an error message and a status: 1 where a compiled
  program is above a limit, 2 for wrong settings, `os.EX_UNAVAILABLE` for an unavailable judge, and
  128 + SIGTERM for a run that was asked to stop.
  """
  try:
    validate.validate(config)
    platform.prepare(config, workdir)
    if config.program not in ('compile', 'describe'):
      platform.start_processes(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    elif config.compile.topology and 'JAX_PLATFORMS' not in os.environ:
      jax.config.update('jax_platforms', 'cpu')  # Else libtpu searches for a TPU.
    return PROGRAMS[config.program](config, workdir)
  except aot_compile.Exceeded as error:
    logging.error('%s', error)
    sys.exit(1)
  except ValueError as error:
    logging.error('%s', error, exc_info=logging.vlog_is_on(1))
    sys.exit(2)
  except remote_client.JudgeUnavailable as error:
    logging.error('%s; what was done is saved, and the same command goes on from there', error)
    sys.exit(os.EX_UNAVAILABLE)
  except preemption.Preempted as stopped:
    logging.warning('%s and saved; the same command goes on from there', stopped)
    sys.exit(128 + signal.SIGTERM)


def main(argv: list[str]) -> None:
  """Runs the program of the flags; after a run it logs the main scores and writes the report."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.INFO)
  config = CONFIG.value
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
  workdir = pathlib.Path(WORKDIR.value or f'runs/{name}')
  scores = execute(config, workdir)
  if scores is None or config.program not in ('train', 'control') or jax.process_index():
    return
  for score, test in scores.get('paired', {}).items():
    if score.endswith(('overall', 'unseen', 'accuracy')):
      logging.info(
        '%s: %+.3f, standard error %.3f, p = %.2g', score, test['difference'], test['se'], test['p']
      )
  if config.report:
    logging.info('report: %s', report.write_report(workdir))


if __name__ == '__main__':
  platform.use_huge_pages()
  app.run(main, flags_parser=parse)
