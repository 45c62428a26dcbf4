"""A short job for tests: it runs every stage and learns nothing.

python -m lvrpo_jax.main --config=configs/tiny.py
"""

from configs import base


def get_config() -> base.Config:
  """Returns the configuration of the tests."""
  config = base.get_config()
  config.model.update(
    width=16,
    depth=2,
    heads=2,
    kv_heads=1,
    ff_width=16,
    unroll=1,
    vit_width=8,
    vit_heads=2,
    vit_ff_width=8,
  )
  config.vae.update(channels=4, images=200)
  config.dual_encoder.update(width=8, depth=1, heads=2, ff_width=8, steps=4, batch=8)
  config.pretrain.update(
    steps=4, rows=dict(generate=4, understand=4, edit=4), draws=1, save_every=2
  )
  config.align.update(
    iterations=4,
    rollout=dict(group_size=2, steps=4),
    prompts=dict(generate=2, understand=2, edit=2),
    updates_per_rollout=1,
    image=dict(draws=1),
    checkpoints=dict(every=2),
    evaluate=dict(every=2, prompts=1),
  )
  config.evaluate.update(
    prompts=dict(generate=2, unseen=2, understand=2, edit=2),
    samples=2,
    batch=2,
    guided_prompts=2,
    steps=2,
    guided_scales=(2.0,),
  )
  return config
