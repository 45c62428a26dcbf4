"""Makes process-wide settings of JAX, XLA and the C library, and starts several processes."""

from __future__ import annotations

import importlib.util
import logging as python_logging
import os
import pathlib
import sys

from absl import logging
import jax

from lvrpo_jax import types

ACCELERATORS = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin', 'jax_rocm7_plugin')
"""Packages that drive an accelerator."""

NO_CLUSTER = 'coordinator_address should be defined'
"""Message of `jax.distributed.initialize` where no environment describes other processes."""

HUGE_PAGES = 'glibc.malloc.hugetlb=1'
"""Value of `GLIBC_TUNABLES` that turns huge pages on."""


def cpu_only() -> bool:
  """Whether none of the packages `ACCELERATORS` is installed."""
  return not any(importlib.util.find_spec(name) for name in ACCELERATORS)


def use_huge_pages() -> None:
  """Starts this process again with glibc's huge pages, which only its environment can turn on.

  XLA on CPU allocates and frees the same large blocks in every step. In pages of 4 kB that takes a
  fifth of the time of a step of the default config. If `GLIBC_TUNABLES` is set already, nothing is
  done. Other C libraries ignore it.
  """
  if sys.platform == 'linux' and cpu_only() and 'GLIBC_TUNABLES' not in os.environ:
    os.execve(sys.executable, sys.orig_argv, os.environ | {'GLIBC_TUNABLES': HUGE_PAGES})


def start_processes(coordinator: str | None, processes: int, process: int) -> None:
  """Joins the processes of a run: by the flags, under SLURM, or on the hosts of a TPU slice.

  Args:
    coordinator: host:port of process 0; None where the environment gives it.
    processes: number of processes.
    process: index of this one.

  Raises:
    ValueError: the flags contradict each other.
    RuntimeError: the other processes were not found in time.
  """
  if coordinator:
    if process >= processes:
      raise ValueError(f'--process is {process}; allowed: below --processes = {processes}')
    jax.distributed.initialize(coordinator, processes, process)
  elif processes > 1:
    raise ValueError(
      f'--processes is {processes} without --coordinator; expected host:port of process 0'
    )
  elif process:
    raise ValueError(
      f'--process is {process} without --processes and --coordinator; allowed: 0, or all three'
    )
  elif int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    jax.distributed.initialize()
  elif importlib.util.find_spec('libtpu') and os.environ.get('JAX_PLATFORMS', 'tpu') != 'cpu':
    try:
      jax.distributed.initialize()
    except ValueError as error:
      # libtpu is installed, but this is no TPU host. Any other error is raised, such as that of a
      # host that does not answer; else every process of a pod would run alone.
      if NO_CLUSTER not in str(error):
        raise
      logging.info('one process: %s', error)


def prepare(config: types.Config, workdir: pathlib.Path) -> None:
  """Makes process-wide settings; call it before the first computation."""
  if config.model.dtype == 'float32' and 'JAX_DEFAULT_MATMUL_PRECISION' not in os.environ:
    # Accelerators multiply float32 in fewer bits by default. Two passes would then differ by more
    # than `align.checks.mismatch` allows.
    jax.config.update('jax_default_matmul_precision', 'highest')
  if cpu_only():
    # This halves the compile time of LLVM on CPU. Steps are as fast, as libraries take their time.
    os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=1')
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str((workdir / 'compiled').resolve()))
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
  # Orbax logs every phase of every save at the level of the progress lines.
  logging.get_absl_handler().addFilter(_is_shown)


def _is_shown(record: python_logging.LogRecord) -> bool:
  """Whether a log record is not one of Orbax's progress messages."""
  return 'orbax' not in record.pathname or record.levelno > python_logging.INFO
