"""Tests of the metric writer, the progress line and the delayed fetch."""

import itertools
import json
import logging as python_logging
import math
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from tensorboardX.proto import event_pb2

from lvrpo_jax.runtime import metrics as metrics_lib


def events_of(folder):
  """Returns (step, tag, kind) of every TensorBoard event in a folder, and its session starts."""
  values, starts = [], []
  for path in sorted(pathlib.Path(folder).rglob('events*')):
    data, offset = path.read_bytes(), 0
    while offset < len(data):
      size = int.from_bytes(data[offset : offset + 8], 'little')
      event = event_pb2.Event.FromString(data[offset + 12 : offset + 12 + size])
      offset += 16 + size
      values += [
        (event.step, value.tag, value.WhichOneof('value')) for value in event.summary.value
      ]
      if event.HasField('session_log'):
        starts.append(event.step)
  return values, starts


class MetricWriterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.workdir = pathlib.Path(folder.name)
    self.path = self.workdir / 'metrics.jsonl'

  def writer(self, **kwargs):
    # Each reading of the clock is one second later than the last.
    return metrics_lib.MetricWriter(self.workdir, clock=itertools.count().__next__, **kwargs)

  def lines(self):
    return [json.loads(line) for line in self.path.read_text().splitlines()]

  def test_one_object_a_line(self):
    writer = self.writer()
    writer.begin('align')
    writer.write('align', 1, {'loss': jnp.float32(0.5), 'reward/generate/rules': np.array([0.25])})
    writer.write('align', 2, {'loss': 1})
    self.assertEqual(
      self.lines(),
      [
        {'stage': 'align', 'step': 1, 'seconds': 1.0, 'loss': 0.5, 'reward/generate/rules': 0.25},
        {'stage': 'align', 'step': 2, 'seconds': 2.0, 'loss': 1.0},
      ],
    )

  def test_values_that_are_not_finite_are_null_and_counted(self):
    writer = self.writer()
    writer.begin('vae')
    with self.assertLogs(level='WARNING'):
      writer.write('vae', 0, {'a': math.nan, 'b': jnp.inf, 'c': 1.0})
    self.assertEqual(
      self.lines(),
      [{'stage': 'vae', 'step': 0, 'seconds': 1.0, 'a': None, 'b': None, 'c': 1.0, 'nonfinite': 2}],
    )
    self.assertEqual(writer.nonfinite_count, 2)
    self.assertNotIn('NaN', self.path.read_text())
    writer.close()
    values, _ = events_of(self.workdir / 'tensorboard')
    self.assertEqual([value[1] for value in values], ['c'])

  def test_a_resumed_file_equals_an_uninterrupted_one(self):
    def run(writer, stage, steps, restored):
      writer.begin(stage, restored)
      for step in steps:
        writer.write(stage, step, {'loss': step / 7})

    uninterrupted = self.writer()
    run(uninterrupted, 'pretrain', range(1, 4), -1)
    run(uninterrupted, 'align', range(1, 11), -1)
    expected = self.path.read_text()
    self.path.unlink()
    first = self.writer()
    run(first, 'pretrain', range(1, 4), -1)
    run(first, 'align', range(1, 8), -1)
    with self.path.open('a') as file:
      file.write('{"stage": "align", "st')
    run(self.writer(), 'align', range(5, 11), 4)
    self.assertEqual(self.path.read_text(), expected)

  def test_a_fresh_start_drops_the_stage_and_no_other(self):
    writer = self.writer()
    for stage in ('vae', 'align'):
      writer.begin(stage)
      writer.write(stage, 0, {'loss': 1.0})
    writer.begin('vae')
    self.assertEqual([line['stage'] for line in self.lines()], ['align'])

  def test_a_broken_line_inside_is_an_error(self):
    self.path.write_text('{"stage": "vae"\n{"stage": "vae", "step": 1, "seconds": 0}\n')
    with self.assertRaisesRegex(ValueError, 'line 1'):
      self.writer().begin('vae')

  def test_events_and_their_purge_on_resume(self):
    writer = self.writer()
    writer.begin('align')
    writer.write('align', 1, {'loss': 1.0})
    writer.images('samples', 1, np.zeros((3, 4, 4, 3), np.uint8))
    writer.begin('align', 1)
    writer.write('align', 2, {'loss': 1.0})
    writer.close()
    values, starts = events_of(self.workdir / 'tensorboard' / 'align')
    self.assertCountEqual(
      values, [(1, 'loss', 'simple_value'), (1, 'samples', 'image'), (2, 'loss', 'simple_value')]
    )
    self.assertIn(2, starts)

  def test_other_processes_write_nothing(self):
    writer = self.writer(process_index=1)
    writer.begin('align')
    writer.write('align', 0, {'loss': 1.0})
    writer.images('samples', 0, np.zeros((1, 4, 4, 3), np.uint8))
    writer.close()
    self.assertEmpty(list(self.workdir.iterdir()))

  def test_refuses(self):
    writer = self.writer()
    with self.assertRaises(KeyError):
      writer.write('align', 0, {'loss': 1.0})
    writer.begin('align')
    with self.assertRaisesRegex(ValueError, 'loss'):
      writer.write('align', 0, {'loss': np.zeros(2)})
    with self.assertRaisesRegex(ValueError, 'seconds'):
      writer.write('align', 0, {'seconds': 1.0})


class ProgressTest(parameterized.TestCase):
  def test_log_lines(self):
    now = [0.0]
    with mock.patch('sys.stderr.isatty', return_value=False):
      progress = metrics_lib.Progress(
        'align', 20, start=10, keys=('loss',), interval=5, clock=lambda: now[0]
      )
    with self.assertLogs('absl', level=python_logging.INFO) as logs:
      for step in range(11, 21):
        now[0] += 2.0
        progress.update(step, {'loss': 0.123456, 'other': 1.0})
    self.assertEqual(
      [record.getMessage() for record in logs.records],
      [
        'align 13/20, 0.5 steps/s, 0:14 left, loss 0.1235',
        'align 16/20, 0.5 steps/s, 0:08 left, loss 0.1235',
        'align 19/20, 0.5 steps/s, 0:02 left, loss 0.1235',
        'align 20/20, 0.5 steps/s, 0:00 left, loss 0.1235',
      ],
    )

  def test_bar_on_a_terminal(self):
    with mock.patch('sys.stderr.isatty', return_value=True), mock.patch('tqdm.tqdm') as tqdm_class:
      bar = tqdm_class.return_value
      bar.n = 3
      with metrics_lib.Progress('vae', 9, start=3, keys=('loss',)) as progress:
        progress.update(5, {'loss': 2.0})
    bar.update.assert_called_once_with(2)
    bar.set_postfix.assert_called_once_with({'loss': '2'}, refresh=False)
    bar.close.assert_called_once()

  def test_silent_on_other_processes(self):
    with mock.patch('sys.stderr.isatty', return_value=True), mock.patch('tqdm.tqdm') as bar:
      progress = metrics_lib.Progress('vae', 1, process_index=3)
      with self.assertNoLogs('absl'):
        progress.update(1, {})
    bar.assert_not_called()


class LateTest(parameterized.TestCase):
  def test_each_step_once_in_order_one_late(self):
    seen = []
    late = metrics_lib.Late('align', lambda step, scalars: seen.append((step, scalars)))
    late.push(1, {'loss': jnp.float32(1.0)})
    self.assertEmpty(seen)
    late.push(2, {'loss': jnp.float32(2.0)})
    self.assertEqual(seen, [(1, {'loss': 1.0, 'compiled': 0})])
    late.flush()
    late.flush()
    self.assertEqual(seen, [(1, {'loss': 1.0, 'compiled': 0}), (2, {'loss': 2.0, 'compiled': 0})])

  def test_programs_compiled_after_the_first_step_are_counted(self):
    seen = []
    late = metrics_lib.Late('align', lambda step, scalars: seen.append(scalars['compiled']))
    step = jax.jit(lambda x: {'loss': jnp.sum(x * 3.0)})
    one, two = np.ones(3, np.float32), np.ones(5, np.float32)
    for index, x in enumerate((one, one, two, two), 1):
      late.push(index, step(x))
    late.flush()
    self.assertEqual(seen[:2], [0, 0])
    self.assertGreater(seen[2], 0)
    self.assertEqual(seen[3], seen[2])

  @parameterized.parameters('loss', 'understand/loss', 'loss/text')
  def test_a_loss_that_is_not_finite_stops_the_run_after_it_was_recorded(self, key):
    seen = []
    late = metrics_lib.Late('align', lambda step, scalars: seen.append(step))
    late.push(7, {'closs': jnp.nan, key: jnp.nan})
    with self.assertRaisesRegex(FloatingPointError, f'align step 7: {key} is nan'):
      late.push(8, {key: 1.0})
    self.assertEqual(seen, [7])

  def test_other_values_may_be_infinite(self):
    late = metrics_lib.Late('align', lambda step, scalars: None)
    late.push(1, {'loss_ratio': jnp.inf, 'loss': 1.0})
    late.flush()


class PictureGridTest(parameterized.TestCase):
  def test_places(self):
    images_RYXC = np.repeat(np.arange(5, dtype=np.uint8), 2 * 3 * 3).reshape(5, 2, 3, 3)
    grid = metrics_lib.picture_grid(images_RYXC, 3)
    self.assertEqual(grid.shape, (5, 11, 3))
    for index in range(5):
      top, left = index // 3 * 3, index % 3 * 4
      np.testing.assert_array_equal(grid[top : top + 2, left : left + 3], index)
    self.assertEqual(int((grid == 255).all(-1).sum()), 5 * 11 - 5 * 6)

  def test_fewer_images_than_columns(self):
    self.assertEqual(metrics_lib.picture_grid(np.zeros((2, 4, 4, 1), np.uint8), 8).shape, (4, 9, 1))

  @parameterized.parameters(
    ((1, 2, 2, 3), np.float32, 2),
    ((2, 2, 3), np.uint8, 2),
    ((0, 2, 2, 3), np.uint8, 2),
    ((1, 2, 2, 3), np.uint8, 0),
  )
  def test_refuses(self, shape, dtype, columns):
    with self.assertRaises(ValueError):
      metrics_lib.picture_grid(np.zeros(shape, dtype), columns)


if __name__ == '__main__':
  absltest.main()
