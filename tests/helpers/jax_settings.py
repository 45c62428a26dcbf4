"""Settings of jax and XLA in tests."""

from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK_COMPILE = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
"""XLA flags; tiny programs compile in a third of the time."""


def cached(folder: Any) -> dict[str, str]:
  """Environment of commands that share their compiled programs, also the quick ones."""
  return {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': QUICK_COMPILE,
    'JAX_COMPILATION_CACHE_DIR': str(folder),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'GLIBC_TUNABLES': '',
  }


def on_devices(program: str, count: int, timeout: float, flags: str = '') -> dict[str, Any]:
  """What a module prints as JSON in its last line, run on so many CPU devices.

  Raises:
    AssertionError: it failed; the message ends as its errors do.
  """
  path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
  flags = ' '.join(
    filter(None, (QUICK_COMPILE, flags, f'--xla_force_host_platform_device_count={count}'))
  )
  done = subprocess.run(
    [sys.executable, '-m', program],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags, 'PYTHONPATH': path},
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
  if done.returncode:
    raise AssertionError(f'the program failed:\n{done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def of_module(**settings: Any) -> tuple[Callable[[], None], Callable[[], None]]:
  """`setUpModule` and `tearDownModule` that set jax's settings and put them back.

  Other tests share the process.
  """
  saved = {}

  def set_up():
    for name, value in settings.items():
      saved[name] = jax.config.values[name]
      jax.config.update(name, value)

  def tear_down():
    for name, value in saved.items():
      jax.config.update(name, value)

  return set_up, tear_down
