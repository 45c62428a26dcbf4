"""Parameters at random for tests: a fresh model's head of zeros would hide every difference."""

from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.runtime import experiment as experiment_lib


def parameters(experiment: experiment_lib.Experiment, scale: float = 0.3) -> tuple[Any, Any, Any]:
  """Policy, autoencoder and judge with noise on every leaf, the same in every process."""
  image = jnp.zeros((1, experiment.policy.image_size, experiment.policy.image_size, 3))
  shapes = jax.eval_shape(
    lambda: (
      bagel.init(experiment.policy.config, jax.random.key(0)),
      experiment.policy.vae.init(jax.random.key(0), image)['params'],
      experiment.dual_encoder.module.init(jax.random.key(0), image, experiment.dual_encoder.token_ids([''])[0])['params'],
    )
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: (scale * rng.normal(size=s.shape)).astype(s.dtype), shapes)
