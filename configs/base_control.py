"""The control of the default job: its alignment replaced by pretraining of the same wall time.

    python -m lvrpo_jax.main --config=configs/base_control.py

The first stages are those of `configs/base.py`, so the scores `before` are the same. The scores
`after` are those of the model after `control.steps` further steps of pretraining on fresh rows,
with a second learning-rate schedule that ends at 0.
"""

from configs import base


def get_config() -> base.Config:
  """Returns the configuration of the control."""
  config = base.get_config()
  config.program = 'control'
  return config
