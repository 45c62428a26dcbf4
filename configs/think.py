"""Alignment with plans: a text plan and the image after it form one trajectory with one reward.

    python -m lvrpo_jax.main --config=configs/think.py

Half of the captions of pretraining have a plan ('red circle , nothing , nothing , blue square')
between caption and image. Alignment samples images after sampled plans, and trains both halves of a
trajectory with the reward of the image (UniGRPO, arXiv 2603.23500). The same held-out captions are
evaluated without a plan ('generation') and with one ('thinking').
"""

from configs import base


def get_config() -> base.Config:
  """Returns the configuration."""
  config = base.get_config()
  config.pretrain.update(rows=dict(generate=24, think_generate=24))
  config.align.update(prompts=dict(generate=0, edit=0, think_generate=16))
  config.evaluate.prompts.think_generate = 60
  return config
