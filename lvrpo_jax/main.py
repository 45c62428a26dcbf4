"""The door: flags, guards, dispatch.

python -m lvrpo_jax.main --config=configs/base.py [--workdir=DIR] [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import signal
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging
import jax
import ml_collections
from ml_collections import config_flags

from lvrpo_jax.aot import compile as aot_compile
from lvrpo_jax.aot import describe
from lvrpo_jax.programs import sample
from lvrpo_jax.programs import study
from lvrpo_jax.programs import train
from lvrpo_jax.reports import report
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import preemption
from lvrpo_jax.runtime import validate
from lvrpo_jax.runtime import weights

CONFIG = config_flags.DEFINE_config_file(
  'config', 'configs/base.py', 'Configuration file.', lock_config=True
)
WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; default runs/<config name>.')

COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'host:port of process 0, where several '
  'processes run and neither a TPU pod nor SLURM tells of them.',
)
PROCESSES = flags.DEFINE_integer('processes', 1, 'Number of processes.', lower_bound=1)
PROCESS = flags.DEFINE_integer('process', 0, 'Number of this process.', lower_bound=0)


ACCELERATORS = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
NO_CLUSTER = 'coordinator_address should be defined'
"""What `jax.distributed.initialize` says where no environment tells of other processes."""
HUGE_PAGES = 'glibc.malloc.hugetlb=1'


def cpu_only() -> bool:
  """Whether no package is installed that drives an accelerator."""
  return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def use_huge_pages() -> None:
  """Starts this process again with glibc's huge pages, which only its environment can ask for.

  XLA on CPU allocates and frees the same large blocks in every step. In pages of 4 kB that costs a
  fifth of a step of the default job. A `GLIBC_TUNABLES` that is set already is left alone; other C
  libraries ignore it.
  """
  if sys.platform == 'linux' and cpu_only() and 'GLIBC_TUNABLES' not in os.environ:
    os.execve(sys.executable, sys.orig_argv, os.environ | {'GLIBC_TUNABLES': HUGE_PAGES})


def start_processes() -> None:
  """Joins the processes of a job: from the flags, under SLURM, or on the hosts of a TPU slice.

  Raises:
    ValueError: the flags do not fit.
    RuntimeError: the other processes were not found in time.
  """
  if COORDINATOR.value:
    if PROCESS.value >= PROCESSES.value:
      raise ValueError(
        f'--process is {PROCESS.value}; allowed: below --processes = {PROCESSES.value}'
      )
    jax.distributed.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
  elif PROCESSES.value > 1:
    raise ValueError(
      f'--processes is {PROCESSES.value} without --coordinator; expected host:port of process 0'
    )
  elif int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    jax.distributed.initialize()
  elif importlib.util.find_spec('libtpu') and os.environ.get('JAX_PLATFORMS', 'tpu') != 'cpu':
    try:
      jax.distributed.initialize()
    except ValueError as error:
      # libtpu is installed, but this is no TPU host. Anything else, such as a host that does not
      # answer, would leave every process of a pod to work by itself.
      if NO_CLUSTER not in str(error):
        raise
      logging.info('one process: %s', error)


def prepare(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Process-wide settings, before the first computation."""
  if config.model.dtype == 'float32' and 'JAX_DEFAULT_MATMUL_PRECISION' not in os.environ:
    # Accelerators else take fewer bits for products of float32, and no two passes would agree to
    # `align.gap_limit`.
    jax.config.update('jax_default_matmul_precision', 'highest')
  if cpu_only():
    # Halves the compile time of LLVM on CPU; steps are as fast, for their time is in libraries.
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=1')
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').resolve()))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  # Orbax reports every phase of every save at the level of our progress lines.
  logging.get_absl_handler().addFilter(
    lambda record: (
      'orbax' not in record.pathname
      or record.levelno > logging.converter.ABSL_TO_STANDARD[logging.INFO]
    )
  )


def convert(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Imports a released model into the workdir, or exports the aligned one."""
  job = experiment_lib.build(config, workdir)
  if config.convert.direction == 'import':
    weights.import_released(job)
  else:
    weights.export(job, config.convert.target, config.convert.shards)


PROGRAMS = {
  'run': train.run,
  'pretrain': train.run,
  'control': train.run,
  'study': study.run,
  'sample': sample.run,
  'convert': convert,
  'describe': describe.describe,
  'compile': aot_compile.run,
}
"""What `config.program` names; each takes (config, workdir)."""


def execute(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Any:
  """Runs the program of a config; one that stops early ends the process, its status says why."""
  try:
    validate.validate(config)
    prepare(config, workdir)
    if config.program not in ('compile', 'describe'):
      start_processes()
    elif config.topology and 'JAX_PLATFORMS' not in os.environ:
      jax.config.update('jax_platforms', 'cpu')  # libtpu without a TPU looks for one.
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
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.INFO)
  config = CONFIG.value
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
  workdir = pathlib.Path(WORKDIR.value or f'runs/{name}')
  scores = execute(config, workdir)
  if config.program not in ('run', 'control') or jax.process_index():
    return
  for score, test in scores.get('paired', {}).items():
    if score.endswith(('overall', 'unseen', 'accuracy')):
      logging.info(
        '%s: %+.3f, standard error %.3f, p = %.2g', score, test['difference'], test['se'], test['p']
      )
  if config.report:
    logging.info('report: %s', report.write_report(workdir))


if __name__ == '__main__':
  use_huge_pages()
  app.run(main)
