"""Reads the `config.json` of a run as a config: `--config=configs/from_json.py:FILE`.

A file of a former version is read under the present names.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ml_collections import config_dict

from configs import base
from lvrpo_jax.runtime import renamed
from lvrpo_jax.runtime import workdir


def get_config(path: str) -> config_dict.ConfigDict:
  """Returns the configuration in a JSON file, with lists as tuples."""
  found = json.loads(pathlib.Path(path).read_text())
  flat = workdir.flatten(found)
  present = renamed.translate(flat)
  if present == flat:
    return config_dict.ConfigDict(_tuples(found))
  config = base.get_config()
  with config.unlocked():
    config.update_from_flattened_dict({key: _tuples(value) for key, value in present.items()})
  return config


def _tuples(value: Any) -> Any:
  """Returns a JSON value with tuples for lists."""
  if isinstance(value, dict):
    return {key: _tuples(part) for key, part in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
