"""Parameters at random for tests: a fresh model's head of zeros would hide every difference."""

from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.runtime import experiment as experiment_lib


def parameters(experiment: experiment_lib.Experiment, scale: float = 0.3) -> tuple[Any, Any, Any]:
  """Policy, autoencoder and dual encoder with noise on every leaf, the same in every process."""
  policy, encoder, key = experiment.policy, experiment.dual_encoder, jax.random.key(0)

  def start():
    image, shown = (
      jnp.zeros((1, side, side, 3)) for side in (policy.image_size, encoder.image_size)
    )
    return (
      policy.init(key),
      policy.vae.init(key, image)['params'],
      encoder.module.init(key, shown, encoder.token_ids([''])[0])['params'],
    )

  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda s: (scale * rng.normal(size=s.shape)).astype(s.dtype), jax.eval_shape(start)
  )
