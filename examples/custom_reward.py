"""Rewards of your own: a function on the host, and a class with weights on devices.

    python -m lvrpo_jax.main --config=configs/tiny.py --workdir=runs/bright \
        --config.align.rewards.generate.custom.kind=examples.custom_reward:brightness \
        --config.align.rewards.generate.custom.weight=0.5
"""

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.data import tasks
from lvrpo_jax.rewards import base


def brightness(samples: base.Samples) -> tuple[np.ndarray, np.ndarray]:
  """Mean brightness of images, valid for all of them: value and validity, both (B, G)."""
  value_BG = samples.images_BGYXC.mean(axis=(2, 3, 4)) / 255.0
  return value_BG, np.ones(value_BG.shape, bool)


class Taste:
  """A linear probe on the mean colour of an image, inside the compiled rewards of its task.

  The entry of the config may hold settings: `dict(kind='examples.custom_reward:Taste', weight=1.,
  scale=2.)`.
  """

  outputs = frozenset((tasks.IMAGE,))
  runs_on = base.DEVICE

  def __init__(self, task, settings, experiment):
    del task, experiment
    self._scale = settings.get('scale', 1.0)

  def load(self, frozen):
    """Frozen weights: made here, read from a file in earnest."""
    del frozen
    return {'weight_C': jax.random.normal(jax.random.key(0), (3,))}

  def prepare(self, samples):
    """What the host knows: the length of every caption."""
    lengths_B = np.array([len(example.prompt) for example in samples.examples], np.float32)
    return base.Prepared(lengths_B)

  def __call__(self, params, frozen, samples, inputs):
    """Values (B, G)."""
    del frozen
    colour_BGC = jnp.mean(samples.outputs, axis=(2, 3)) / 255.0
    return self._scale * colour_BGC @ params['weight_C'] - 0.01 * inputs[:, None]
