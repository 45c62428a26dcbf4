"""The TFDS form of the shapes world gives back the procedural items, by TFDS and by grain."""

import json
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import grain
import numpy as np
import tensorflow_datasets as tfds

from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import tfds as shapes_tfds
from lvrpo_jax.data.shapes import world as world_lib


class ShapesTfdsTest(parameterized.TestCase):
  @parameterized.parameters(*shapes_tfds.TASKS)
  def test_round_trip(self, task):
    directory = self.enter_context(tempfile.TemporaryDirectory())
    config = shapes_tfds.ShapesConfig(name=f'tiny_{task}', task=task, train_items=12, eval_items=3)
    builder = shapes_tfds.ShapesWorld(config=config, data_dir=directory, file_format='array_record')
    builder.download_and_prepare()
    world = world_lib.World()
    draw = {'generate': world.generate, 'question': world.question, 'edit': world.edit}[task]
    for split, count in (('train', 12), ('eval', 3), ('unseen', 3)):
      source = tfds.data_source(f'shapes_world/tiny_{task}', split=split, data_dir=directory)
      self.assertLen(source, count)
      self.assertEqual({int(source[i]['index']) for i in range(count)}, set(range(count)))
      for example in grain.MapDataset.source(source):
        item = draw(int(example['index']), split)
        np.testing.assert_array_equal(example['image'], render.render(item.scene))
        text = {'generate': 'caption', 'question': 'question', 'edit': 'instruction'}[task]
        self.assertEqual(example[text].decode(), vars(item)[text])
        self.assertEqual(example['meaning'].decode(), item.meaning)
        if task == 'question':
          self.assertEqual(example['answer'].decode(), item.answer)
          self.assertEqual(json.loads(example['record']), item.record)
        else:
          self.assertEqual(json.loads(example['spec']), item.spec)
        if task == 'edit':
          np.testing.assert_array_equal(example['target'], render.render(item.target))

  def test_grain_batches_shards_without_overlap(self):
    directory = self.enter_context(tempfile.TemporaryDirectory())
    config = shapes_tfds.ShapesConfig(name='tiny', task='question', train_items=16, eval_items=1)
    builder = shapes_tfds.ShapesWorld(config=config, data_dir=directory, file_format='array_record')
    builder.download_and_prepare()
    source = builder.as_data_source(split='train')
    seen = []
    for shard in range(2):
      dataset = grain.MapDataset.source(source).seed(1).shuffle()[shard::2].batch(4)
      for batch in dataset:
        self.assertEqual(batch['image'].shape, (4, render.SIZE, render.SIZE, 3))
        seen.extend(batch['index'].tolist())
    self.assertCountEqual(seen, range(16))


if __name__ == '__main__':
  absltest.main()
