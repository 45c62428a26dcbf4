"""Settings of jax and XLA in tests."""

from collections.abc import Callable
from typing import Any

import jax

QUICK_COMPILE = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
"""XLA flags; tiny programs compile in a third of the time."""


def cached(folder: Any) -> dict[str, str]:
  """Environment of commands that share their compiled programs, also the quick ones."""
  return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': QUICK_COMPILE,
          'JAX_COMPILATION_CACHE_DIR': str(folder),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'GLIBC_TUNABLES': ''}


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
