"""The smaller model of the paper: BAGEL's architecture with the sizes of Qwen2.5-1.5B.

No weights of this size are released; `config.checkpoint` names a folder of your own.
"""

from ml_collections import config_dict

from configs import bagel_7b
from configs import base

LLM = dict(
  bagel_7b.LLM,
  vocab_size=151936,
  hidden_size=1536,
  num_attention_heads=12,
  num_key_value_heads=2,
  intermediate_size=8960,
)


def get_config() -> base.Config:
  """Returns the configuration of the small model."""
  config = bagel_7b.get_config()
  config.architecture.llm_config = config_dict.ConfigDict(LLM)
  config.parallel.rollout_mesh = (-1, 1, 2)  # Two key/value heads.
  return config
