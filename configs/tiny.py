"""A run of seconds, for tests: every stage, nothing learned.

python -m lvrpo_jax.main --config=configs/tiny.py
"""

from configs import base


def get_config():
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
  config.judge.update(width=8, depth=1, heads=2, ff_width=8, steps=4, batch=8)
  config.pretrain.update(steps=4, generate=4, understand=4, edit=4, draws=1, save_every=2)
  config.align.update(
    steps=4,
    group=2,
    generate=2,
    understand=2,
    edit=2,
    updates=1,
    draws=1,
    steps_per_image=4,
    save_every=2,
    gold_every=2,
    gold=1,
  )
  config.evaluate.update(generate=2, unseen=2, understand=2, edit=2, images=2, batch=2, guided=2)
  config.sampling.update(steps=2, guidance=(2.0,))
  return config
