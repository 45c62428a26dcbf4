"""Objects that config values name: keys of a table, or import paths."""

from __future__ import annotations

from collections.abc import Mapping
import importlib
from typing import Any


def find(name: str, key: str, table: Mapping[str, Any]) -> Any:
  """The object that a table or an import path 'module:name' names.

  Args:
    key: config key that holds the name, for the message.
    table: objects by name, or import paths of objects.

  Raises:
    ValueError: there is no such thing.
  """
  found = table.get(name, name)
  if not isinstance(found, str):
    return found
  module, _, attribute = found.partition(':')
  try:
    return vars(importlib.import_module(module))[attribute]
  except (ImportError, KeyError, ValueError) as error:
    names = ''.join(f'{known!r}, ' for known in table)
    raise ValueError(
      f'{key} is {name!r}, which cannot be imported ({error!r}); expected '
      f"{names}or 'package.module:name'"
    ) from error
