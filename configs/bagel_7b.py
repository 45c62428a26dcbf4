"""BAGEL-7B-MoT (arXiv 2505.14683): samples from the released weights, and aligns them.

    python -m lvrpo_jax.main --config=configs/bagel_7b.py --config.checkpoint=DIR \
        --config.program=sample --config.sample.prompt='a red fox in the snow'

DIR holds the released files `llm_config.json`, `vit_config.json`, `ema.safetensors`,
`ae.safetensors` and those of the tokenizer. Alignment uses the shapes world unless
`config.data.source` names other data.
"""

from ml_collections import config_dict

from configs import base
from lvrpo_jax.models.bagel import config as bagel_config

LLM = dict(
  vocab_size=152064,
  hidden_size=3584,
  num_hidden_layers=28,
  num_attention_heads=28,
  num_key_value_heads=4,
  intermediate_size=18944,
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  hidden_act='silu',
  **bagel_config.SCRIPT_LLM,
)
"""Sizes of Qwen2.5-7B."""

VIT = dict(
  hidden_size=1152,
  num_hidden_layers=26,
  num_attention_heads=16,
  intermediate_size=4304,
  patch_size=14,
  image_size=980,
  num_channels=3,
  layer_norm_eps=1e-6,
  hidden_act='gelu_pytorch_tanh',
  rope=False,
)
"""Sizes of SigLIP so400m at 980 pixels, without its last layer."""

THINK = (
  'You should first think about the {} process in the mind and then {}. \nThe {} process is '
  'enclosed within <think> </think> tags, i.e. <think> {} process here </think> {} here'
)
"""The system prompt that the released model was trained with."""


def get_config() -> base.Config:
  """Returns the configuration of the released model."""
  config = base.get_config()
  config.architecture = config_dict.ConfigDict(
    {**bagel_config.SCRIPT, 'llm_config': LLM, 'vit_config': VIT}
  )
  config.model.update(dtype='bfloat16', unroll=1, remat='full')
  config.data.update(prompt_tokens=64, answer_tokens=64, uniform=False)
  config.parallel.update(mesh=(-1, 0, 1), rollout_mesh=(-1, 1, 0), joint=True, group_parts=0)
  config.compile.image_size = 1024

  config.sample.shift = 3.0
  config.sample.guidance.generate.update(text_scale=4.0, low=0.4)
  config.sample.guidance.edit.update(
    text_scale=4.0, image_scale=2.0, low=0.0, renorm='text_channel'
  )
  planning = THINK.format('planning', 'generate the image', 'planning', 'planning', 'image')
  config.sample.system.update(
    generate=planning,
    edit=planning,
    understand=THINK.format(
      'reasoning', 'provide the user with the answer', 'reasoning', 'reasoning', 'answer'
    ),
  )
  config.sample.max_tokens = 1000
  config.update(evaluate=dict(steps=49, shift=3.0, guided_scales=(4.0,)))

  config.align.update(
    iterations=1000,
    prompts=dict(generate=64, understand=64, edit=64),
    rollout=dict(steps=15, shift=3.0),
    image=dict(draws=1),
    # Gradients of 8B unified models have a root mean square of about 5e-9, below an eps of 1e-8.
    optimizer=dict(learning_rate=1e-5, eps=1e-12),
    # The measurement copies the state; turn it on where the memory suffices.
    checks=dict(gradients_every=0),
    checkpoints=dict(every=50),
    evaluate=dict(every=50),
  )
  return config
