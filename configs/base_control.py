"""The control of the default job: its alignment replaced by pretraining of the same wall time.

    python -m lvrpo_jax.main --config=configs/base_control.py

The first stages are those of `configs/base.py`, so `before` is the same; `after` is the model that
was pretrained on for `control.steps` more steps, on fresh rows, with the learning rate falling
to 0 once more.
"""

from configs import base


def get_config():
  """Returns the configuration of the control."""
  config = base.get_config()
  config.program = 'control'
  return config
