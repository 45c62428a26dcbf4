"""Fits the small autoencoder and trains the small dual encoder."""

from __future__ import annotations

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import loader
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import policy
from lvrpo_jax.models.siglip import model as siglip
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib


def fit_autoencoder(job: experiment_lib.Experiment) -> types.Params:
  """The small autoencoder in closed form: the first stage, deterministic in the seed.

  A latent's deviation is proportional to (what it moves in pixels)^(1 - whiten), with mean square 1
  over channels: between unit latents (1) and principal components as they are (0).
  """
  images = job.data.images(job.config.vae.images)
  params = vae_lib.fit_patch_autoencoder(job.policy.vae, policy.to_unit(images), job.config.seed)
  pixels_C = np.linalg.norm(params['decoder']['kernel'] / params['scale'][:, None], axis=1)
  factor_C = pixels_C ** (1 - job.config.vae.whiten)
  return {**params, 'scale': params['scale'] * factor_C / np.sqrt(np.mean(factor_C**2))}


def train_dual_encoder(
  job: experiment_lib.Experiment, writer: metrics_lib.MetricWriter
) -> types.Params:
  """Trains the dual encoder on true pairs of the pretraining split (arXiv 2303.15343)."""
  j = job.config.judge

  def collate(pairs):
    images, texts = zip(*pairs)
    return np.stack(images), job.captions(list(texts))

  data = loader.batches(
    loader.IndexedSource(job.data.judge_pair, loader.EPOCH_ROWS), j.batch, collate
  )

  def weights(batch):
    return {'judge': jnp.float32(batch[0].shape[0])}

  def sums(params, state, frozen, batch):
    del state, frozen
    images, ids = batch
    out = job.judge.apply({'params': params}, policy.to_unit(images), ids)
    loss = siglip.siglip_loss(*out) * images.shape[0]
    return {'judge': loss}, {}

  optimizer = optimizer_lib.build(
    'adamw',
    optimizer_lib.schedule('linear', j.learning_rate, j.steps, 20),
    0.9,
    0.98,
    1e-8,
    0.0,
    1.0,
  )
  step = jax.jit(
    step_lib.make_step(step_lib.Loss(weights, sums, {'judge': 1.0}), optimizer), donate_argnums=0
  )
  images, ids = next(data)
  params = jax.jit(job.judge.init)(
    jax.random.key(job.config.seed + 1), policy.to_unit(images[:1]), ids[:1]
  )['params']
  # A fresh encoder then predicts the share of true pairs; -10 is meant for batches of 32k.
  params['logit_bias'] = jnp.float32(-np.log(j.batch - 1))
  state = step_lib.init(params, optimizer)
  writer.begin('judge')
  with metrics_lib.Progress(
    'judge', j.steps, keys=('loss',), interval=job.config.log_every
  ) as progress:

    def consume(number, scalars):
      progress.update(number, scalars)
      if number % 20 == 0 or number == j.steps:
        writer.write('judge', number, scalars)

    late = metrics_lib.Late('judge', consume)
    for number in range(1, j.steps + 1):
      state, metrics = step(state, {}, (images, ids))
      late.push(number, metrics)
      images, ids = next(data)
    late.flush()
  return state.params
