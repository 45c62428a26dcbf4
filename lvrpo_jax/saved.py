"""Former place of `configs/from_json.py`, kept for one release."""

from configs import from_json

get_config = from_json.get_config
