"""TFDS builder of the shapes world, readable by `tfds.data_source` and grain without TensorFlow.

Build with `ShapesWorld(config='generate', data_dir=..., file_format='array_record')` followed by
`download_and_prepare()`. TFDS shuffles examples when it writes; the field `index` is the index of
the item in the `World`. Texts are read back as bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import io
import json
from typing import cast

import numpy as np
from PIL import Image
import tensorflow_datasets as tfds

from lvrpo_jax.data.shapes import edits
from lvrpo_jax.data.shapes import questions
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import world as world_lib

Item = world_lib.GenerateItem | questions.QuestionItem | edits.EditItem
Fields = dict[str, int | str | bytes]

TASKS = ('generate', 'question', 'edit')
_TEXTS = {
  'generate': ('kind', 'caption', 'meaning'),
  'question': ('kind', 'question', 'answer', 'plan', 'meaning'),
  'edit': ('kind', 'instruction', 'meaning'),
}
_JSONS = {'generate': ('spec',), 'question': ('record',), 'edit': ('spec',)}


def encode_png(image_YXC: np.ndarray) -> bytes:
  """Encodes a uint8 image as PNG, which is lossless."""
  buffer = io.BytesIO()
  Image.fromarray(image_YXC).save(buffer, format='png')
  return buffer.getvalue()


def to_example(task: str, item: Item) -> Fields:
  """Converts an item of the world to a flat record of texts, JSON texts and PNG bytes.

  Args:
    task: one of TASKS.
    item: an item of the task.
  """
  fields = vars(item)
  example: Fields = {'index': item.index, 'image': encode_png(render.render(item.scene))}
  example.update({name: fields[name] for name in _TEXTS[task]})
  example.update({name: json.dumps(fields[name], sort_keys=True) for name in _JSONS[task]})
  if isinstance(item, edits.EditItem):
    example['target'] = encode_png(render.render(item.target))
  return example


@dataclasses.dataclass(kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
  """The task to write, the items of each split, and the seed of the world."""

  task: str
  train_items: int = 10_000
  eval_items: int = 1_000
  seed: int = 0


class ShapesWorld(tfds.core.GeneratorBasedBuilder):
  """Procedural shapes: captions, questions and edits with their images."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [
    ShapesConfig(name=task, task=task, description=f'{task} items') for task in TASKS
  ]

  @property
  def _config(self) -> ShapesConfig:
    return cast(ShapesConfig, self.builder_config)

  def _info(self) -> tfds.core.DatasetInfo:
    task = self._config.task
    shape = (render.SIZE, render.SIZE, 3)
    features = {
      'index': tfds.features.Scalar(np.int64),
      'image': tfds.features.Image(shape=shape, encoding_format='png'),
    }
    features.update({name: tfds.features.Text() for name in _TEXTS[task] + _JSONS[task]})
    if task == 'edit':
      features['target'] = tfds.features.Image(shape=shape, encoding_format='png')
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(features),
      description='Coloured shapes on a 2x2 grid.',
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, Fields]]]:
    del dl_manager
    config = self._config
    counts = {'train': config.train_items, 'eval': config.eval_items, 'unseen': config.eval_items}
    return {split: self._generate_examples(split, count) for split, count in counts.items()}

  def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, Fields]]:
    world = world_lib.World(seed=self._config.seed)
    task = self._config.task
    draw = {'generate': world.generate, 'question': world.question, 'edit': world.edit}[task]
    for index in range(count):
      yield index, to_example(task, draw(index, split))
