"""Looks up objects that config values name: keys of a table, or import paths."""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import Any

FORMER = {
  'lvrpo_jax.data.mixture:ShapesData': 'lvrpo_jax.data.shapes.source:ShapesData',
  'lvrpo_jax.data.detect:detect_components': (
    'lvrpo_jax.data.shapes.detect_moments:detect_components'
  ),
  'lvrpo_jax.data.detect:detect_by_rendering': (
    'lvrpo_jax.data.shapes.detect_rendering:detect_by_rendering'
  ),
}
"""Former import paths, kept for one release, and the present ones."""


def find(name: str, key: str, table: Mapping[str, object]) -> Any:
  """Returns the object that a key of a table, or an import path 'module:name', names.

  Args:
    name: value of the config key.
    key: config key that holds the name, for the message.
    table: objects by name, or import paths of objects.

  Raises:
    ValueError: the name is not in the table and cannot be imported.
  """
  found = table.get(name, name)
  if not isinstance(found, str):
    return found
  module, _, attribute = FORMER.get(found, found).partition(':')
  try:
    return vars(importlib.import_module(module))[attribute]
  except (ImportError, KeyError, ValueError) as error:
    names = ''.join(f'{known!r}, ' for known in table)
    raise ValueError(
      f'{key} is {name!r}, which cannot be imported ({error!r}); expected '
      f"{names}or 'package.module:name'"
    ) from error
