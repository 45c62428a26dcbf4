"""The door: flags, guards, dispatch.

    python -m lvrpo_jax.main --config=configs/base.py [--workdir=DIR] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import pathlib
import sys

from absl import app
from absl import flags
from absl import logging
import jax
from ml_collections import config_flags

from lvrpo_jax import config as config_lib
from lvrpo_jax import report
from lvrpo_jax import run

CONFIG = config_flags.DEFINE_config_file('config', 'configs/base.py', 'Configuration file.',
                                         lock_config=True)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; default runs/<config name>.')


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.INFO)
  config = CONFIG.value
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
  workdir = pathlib.Path(WORKDIR.value or f'runs/{name}')
  try:
    config_lib.validate(config)
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').resolve()))
    scores = run.run(config, workdir)
  except ValueError as error:
    if isinstance(error, UnicodeError):
      raise
    logging.error('%s', error)
    sys.exit(2)
  for score, test in scores['paired'].items():
    if score.endswith(('overall', 'unseen', 'accuracy')):
      logging.info('%s: %+.3f +- %.3f (p = %.2g)', score, test['difference'], test['se'],
                   test['p'])
  if config.report:
    logging.info('report: %s', report.write_report(workdir))


if __name__ == '__main__':
  app.run(main)
