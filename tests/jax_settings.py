"""jax settings of one test module: other tests share the process."""

from collections.abc import Callable
from typing import Any

import jax


def of_module(**settings: Any) -> tuple[Callable[[], None], Callable[[], None]]:
  """`setUpModule` and `tearDownModule` that set jax's settings and put them back."""
  saved = {}

  def set_up():
    for name, value in settings.items():
      saved[name] = jax.config.values[name]
      jax.config.update(name, value)

  def tear_down():
    for name, value in saved.items():
      jax.config.update(name, value)
  return set_up, tear_down
