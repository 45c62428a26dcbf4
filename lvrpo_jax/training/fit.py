"""Fits the small autoencoder and trains the small dual encoder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import loader
from lvrpo_jax.models import contexts
from lvrpo_jax.models.siglip import model as siglip
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib

Array = jax.Array

STAGE = 'dual_encoder'
"""Name of the stage that trains the dual encoder."""


def fit_autoencoder(experiment: experiment_lib.Experiment) -> types.Params:
  """Fits the small autoencoder in closed form; the result depends on the seed alone.

  The deviation of a latent channel is proportional to (its effect on pixels)^(1 - whiten), with mean
  square 1 over channels. whiten = 1 gives unit latents, whiten = 0 principal components as they are.
  """
  config = experiment.config
  images_BYXC = experiment.data.images(config.vae.images)
  params = experiment.policy.fit_autoencoder(images_BYXC, config.seed)
  pixels_C = np.linalg.norm(params['decoder']['kernel'] / params['scale'][:, None], axis=1)
  factor_C = pixels_C ** (1 - config.vae.whiten)
  return {**params, 'scale': params['scale'] * factor_C / np.sqrt(np.mean(factor_C**2))}


def _contrastive_loss(module: siglip.Siglip) -> step_lib.Loss:
  """Returns the sigmoid loss of a batch (images, token ids) of true pairs (arXiv 2303.15343)."""

  def weights(batch: tuple[Array, Array]) -> dict[str, Array]:
    return {STAGE: jnp.float32(batch[0].shape[0])}

  def sums(
    params: types.Params, state: types.TrainState, frozen: types.Tree, batch: tuple[Array, Array]
  ) -> step_lib.Sums:
    del state, frozen
    images, ids = batch
    # `apply` is declared to return a pair with changed variables where none are mutable.
    out: types.Tree = module.apply({'params': params}, contexts.to_unit(images), ids)
    return {STAGE: siglip.siglip_loss(*out) * images.shape[0]}, {}

  return step_lib.Loss(weights, sums, {STAGE: 1.0})


def train_dual_encoder(
  experiment: experiment_lib.Experiment, writer: metrics_lib.MetricWriter
) -> types.Params:
  """Trains the dual encoder on true pairs of the pretraining split."""
  settings, encoder = experiment.config.dual_encoder, experiment.dual_encoder
  steps = settings.steps

  def collate(pairs: Sequence[tuple[np.ndarray, str]]) -> tuple[np.ndarray, np.ndarray]:
    images, texts = zip(*pairs)
    return np.stack(images), encoder.token_ids(list(texts))[0]

  source = loader.IndexedSource(experiment.data.image_text_pair, loader.EPOCH_ROWS)
  data = loader.batches(source, settings.batch, collate)
  rate = optimizer_lib.schedule('linear', settings.learning_rate, steps, warmup=20)
  optimizer = optimizer_lib.build(
    'adamw', rate, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.0, clip_norm=1.0
  )
  step = jax.jit(step_lib.make_step(_contrastive_loss(encoder.module), optimizer), donate_argnums=0)
  images, ids = next(data)
  params = jax.jit(encoder.module.init)(
    jax.random.key(experiment.config.seed + 1), contexts.to_unit(images[:1]), ids[:1]
  )['params']
  # With this bias a fresh encoder predicts the share of true pairs; -10 is for batches of 32k.
  params['logit_bias'] = jnp.float32(-np.log(settings.batch - 1))
  state = step_lib.init(params, optimizer)
  writer.begin(STAGE)
  with metrics_lib.Progress(
    STAGE, steps, keys=('loss',), interval=experiment.config.log_every
  ) as progress:

    def consume(number: int, scalars: dict[str, float]) -> None:
      progress.update(number, scalars)
      if number % 20 == 0 or number == steps:
        writer.write(STAGE, number, scalars)

    late = metrics_lib.Late(STAGE, consume)
    for number in range(1, steps + 1):
      state, metrics = step(state, {}, (images, ids))
      late.push(number, metrics)
      images, ids = next(data)
    late.flush()
  return state.params
