"""Reads the `config.json` of a run as a config: `--config=configs/from_json.py:FILE`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ml_collections import config_dict


def get_config(path: str) -> config_dict.ConfigDict:
  """Returns the configuration in a JSON file, with lists as tuples."""

  def tuples(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: tuples(part) for key, part in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value

  return config_dict.ConfigDict(tuples(json.loads(pathlib.Path(path).read_text())))
