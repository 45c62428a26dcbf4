"""Tests of the table of several runs."""

import contextlib
import io
import json
import pathlib
import tempfile

from absl.testing import absltest
import numpy as np
from PIL import Image

from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import world
from lvrpo_jax.reports import summary


def scores(before, after, p):
  return {
    'before': {'generation': {'overall': {'value': before}}},
    'after': {'generation': {'overall': {'value': after}}},
    'seconds': {'pretrain': 60.0, 'align': 30.0},
    'guidance': {'1': {'value': 0.4}, '3': {'value': 0.5}},
    'before_guided': {'generation': {'overall': {'value': 0.5}}, 'scale': 3.0},
    'paired': {'generation/overall': {'difference': after - before, 'p': p}},
    'panel': {'alarms': []},
  }


class SummaryTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

  def write(self, name, content, guided='guided_prompts'):
    (self.folder / name).mkdir()
    (self.folder / name / 'scores.json').write_text(json.dumps(content))
    (self.folder / name / 'config.json').write_text(json.dumps({'evaluate': {guided: 1}}))
    include = [
      {'class': 'circle', 'count': 1},
      {'class': 'cross', 'count': 1, 'color': 'blue', 'position': ['left of', 0]},
    ]
    for moment, number in (('before', 1), ('after', 2)):
      folder = self.folder / name / 'eval' / moment
      folder.mkdir(parents=True)
      # Cells of circle and cross, and the verdict.
      images = [((3, 0), 0), ((0, 3), 0), ((0, 1), number - 1)]
      for i, ((circle, cross), _) in enumerate(images):
        rng = np.random.default_rng(i)
        objects = [
          render.draw_object(rng, 'circle', 'red', circle),
          render.draw_object(rng, 'cross', 'blue', cross),
        ]
        if i == 0:
          objects.append(render.draw_object(rng, 'circle', 'red', 1))
        Image.fromarray(render.render(render.Scene(tuple(objects)))).save(folder / f'{i}.png')
      (folder / 'predictions.jsonl').write_text(
        ''.join(
          json.dumps(
            {
              'task': 'generate',
              'split': 'eval',
              'kind': 'position',
              'id': f'generate/eval/position/{row:03d}',
              'spec': {'tag': 'position', 'include': include},
              'images': [f'{i}.png' for i in range(3)],
              'correct': [verdict for _, verdict in images],
            }
          )
          + '\n'
          for row in range(2)
        )
      )
    return self.folder / name

  def test_table(self):
    runs = [
      self.write('one', scores(0.5, 0.7, 1e-9)),
      self.write('two', scores(0.4, 0.5, 2e-3), guided='guided'),  # The former name of the key.
    ]
    with contextlib.redirect_stdout(io.StringIO()) as out:
      self.assertEqual(summary.main([str(run) for run in runs]), 0)
    lines = out.getvalue().splitlines()
    self.assertEqual(lines[0], '| held-out score | one | two | mean difference | largest p |')
    self.assertEqual(
      lines[2], '| generation, overall | 0.500 → 0.700 | 0.400 → 0.500 | +0.150 | 0.002 |'
    )
    self.assertIn('0.500 (scale 3), unguided 0.400', out.getvalue())
    self.assertIn('minutes: 1.5; 1.5', out.getvalue())
    # The first picture of each prompt has an object too many and is left out.
    self.assertIn(
      'one: relation holds, given just the two objects: 0 of 4 before, 2 of 4 after\n'
      'one: unguided after alignment, on the prompts of the guided baseline: 0.333\n',
      out.getvalue(),
    )

  def test_a_run_without_the_guided_baseline(self):
    content = scores(0.5, 0.7, 0.1) | {'guidance': {}}
    del content['before_guided']
    run = self.write('plain', content)
    with contextlib.redirect_stdout(io.StringIO()) as out:
      summary.main([str(run)])
    self.assertIn('guided before alignment: not measured', out.getvalue())
    self.assertNotIn('nan', out.getvalue())

  def test_a_run_that_is_not_finished_is_named(self):
    unfinished = scores(0.5, 0.7, 0.1)
    del unfinished['paired']
    for folder, words in (
      (self.folder / 'none', 'is missing'),
      (self.write('half', unfinished), 'not finished'),
    ):
      with contextlib.redirect_stderr(io.StringIO()) as err, self.assertRaises(SystemExit) as stop:
        summary.main([str(folder)])
      self.assertEqual(stop.exception.code, 2)
      self.assertIn(str(folder), err.getvalue())
      self.assertIn(words, err.getvalue())

  def test_picture(self):
    run = self.write('run', scores(0.5, 0.7, 0.1))
    for moment, shade in (('before', 10), ('after', 200)):
      for kind in world.GENERATE_KINDS:
        folder = run / 'eval' / moment / 'generate' / 'eval' / kind
        folder.mkdir(parents=True)
        for number in range(2):
          Image.fromarray(np.full((4, 4, 3), shade + number, np.uint8)).save(
            folder / f'{number:03d}_0.png'
          )
    image = summary.picture(run)
    self.assertEqual(image.shape, (2 * 6 * summary.SCALE, 12 * 6 * summary.SCALE, 3))
    middles = image[
      3 * summary.SCALE :: 6 * summary.SCALE, 3 * summary.SCALE :: 6 * summary.SCALE, 0
    ]
    self.assertEqual(middles.shape, (2, 12))
    self.assertEqual(middles[[0, 0, 1, 1], [0, 1, 0, 11]].tolist(), [10, 11, 200, 201])


if __name__ == '__main__':
  absltest.main()
