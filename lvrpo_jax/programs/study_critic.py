"""The critic of a study, which measures how much texts say about images."""

from __future__ import annotations

from collections.abc import Callable
import pathlib

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import scores
from lvrpo_jax.evaluation import stats
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.runtime import weights
from lvrpo_jax.training import fit
from lvrpo_jax.training import pretrain

ROWS = 60
"""Images or texts in one pass of the critic."""


class Critic:
  """A dual encoder that bounds from below the information of texts about images, in nats.

  It pays no reward and has a seed, a world and batches of its own. The scale of its logits is set
  on true pairs that no variant has trained on. The bound holds for any critic that is chosen
  without the samples that it is evaluated on.
  """

  def __init__(self, config: types.Config, pairs: int, folder: pathlib.Path):
    """Trains the critic, or restores it from the folder.

    Args:
      config: of the run that trains the dual encoder.
      pairs: number of true pairs that set the scale of the logits.
      folder: workdir of the critic.
    """
    experiment = experiment_lib.build(config, folder)
    self._encoder = experiment.dual_encoder
    writer = metrics_lib.MetricWriter(folder)

    def train() -> types.Params:
      return fit.train_dual_encoder(experiment, writer)

    template = weights.template(experiment, weights.DUAL_ENCODER)
    self._params = weights.make_or_restore(folder, weights.DUAL_ENCODER, template, train)
    writer.close()
    self._embed_image = jax.jit(self._image_vectors)
    self._embed_text = jax.jit(self._text_vectors)
    true_pairs = [
      experiment.data.example(tasks.GENERATE, examples.PRETRAIN, pretrain.CONTROL_OFFSET + index)
      for index in range(pairs)
    ]
    similarity = self._similarity(
      np.stack([np.asarray(pair.target) for pair in true_pairs])[:, None],
      [pair.prompt for pair in true_pairs],
    )
    scales = np.geomspace(1.0, 200.0, 40)
    means = [stats.information_terms(scale * similarity).mean() for scale in scales]
    self._scale = float(scales[int(np.argmax(means))])

  def _image_vectors(self, params: types.Params, image_RYXC: types.Array) -> types.Array:
    return self._encoder.embed_image(params, image_RYXC)[0]

  def _text_vectors(self, params: types.Params, ids_RL: types.Array) -> types.Array:
    return self._encoder.embed_text(params, ids_RL)[0]

  def _embed(
    self, function: Callable[[types.Params, types.Array], types.Array], rows: np.ndarray
  ) -> np.ndarray:
    """Returns the vectors of rows, computed in parts of one size."""
    out = []
    for start in range(0, len(rows), ROWS):
      part = rows[start : start + ROWS]
      filled = np.concatenate([part, np.repeat(part[:1], ROWS - len(part), axis=0)])
      out.append(np.asarray(function(self._params, jnp.asarray(filled)))[: len(part)])
    return np.concatenate(out)

  def _similarity(self, images_KGYXC: np.ndarray, texts: list[str]) -> np.ndarray:
    """Returns cosines (G, K images, K texts)."""
    K, G = images_KGYXC.shape[:2]
    images = self._embed(self._embed_image, images_KGYXC.reshape(K * G, *images_KGYXC.shape[2:]))
    ids_KL = self._encoder.token_ids(texts)[0]
    return np.einsum('KGD,JD->GKJ', images.reshape(K, G, -1), self._embed(self._embed_text, ids_KL))

  def terms(self, folder: pathlib.Path, records: scores.Records) -> list[float]:
    """Returns, for every held-out caption of a measurement, the mean term of its images.

    See `stats.information_terms`.
    """
    images = np.stack(
      [[image_files.load_image(folder / name) for name in record['images']] for record in records]
    )
    similarity = self._similarity(images, [record['prompt'] for record in records])
    return stats.information_terms(self._scale * similarity).mean(axis=0).tolist()
