"""Tests of the report, on a small made-up run."""

import html.parser
import json
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image

from lvrpo_jax.reports import charts
from lvrpo_jax.reports import files
from lvrpo_jax.reports import html as html_lib
from lvrpo_jax.reports import overview
from lvrpo_jax.reports import report
from lvrpo_jax.reports import samples
from lvrpo_jax.reports import sections

COLOURS = {
  'red': (220, 50, 47),
  'blue': (38, 97, 196),
  'green': (30, 150, 80),
  'yellow': (230, 190, 40),
}
KINDS = ('single_object', 'two_objects', 'counting', 'colors', 'position', 'attribution')
PROMPTS = {
  'single_object': 'a {} circle',
  'two_objects': 'a {} circle and a square',
  'counting': 'three {} triangles',
  'colors': 'one {} square & nothing else',
  'position': 'a {} circle left of a <b>blue</b> square',
  'attribution': 'a {} star and a green circle',
}
QUESTIONS = ('color', 'reasoning', 'counting')
HOSTILE = '<script>alert("no")</script>\x07'
SECTIONS = [
  'scores',
  'pictures',
  'edits',
  'answers',
  'curves',
  'over-optimisation',
  'timing',
  'config',
  'again',
]


def draw(rng, path, colour, right):
  """Writes a 16 by 16 picture with one square, noisy when it is meant to be wrong."""
  image_YXC = np.full((16, 16, 3), 245.0)
  top, left = rng.integers(1, 8, 2)
  image_YXC[top : top + 7, left : left + 7] = COLOURS[colour]
  image_YXC += rng.normal(size=image_YXC.shape) * (4 if right else 45)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image_YXC.clip(0, 255).astype(np.uint8)).save(path)


def score(value, n=120):
  return {'value': value, 'ci95': [max(0.0, value - 0.07), min(1.0, value + 0.06)], 'n': n}


def made_scores(after=True, alarms=()):
  def side(lift):
    return {
      'generation': {
        'overall': score(0.52 + lift),
        'unseen': score(0.4 + lift, 60),
        **{kind: score(0.35 + 0.09 * i + lift, 20) for i, kind in enumerate(KINDS)},
      },
      'understanding': {
        'accuracy': score(0.71 + lift / 4),
        'greedy': score(0.74 + lift / 4),
        'format': score(0.97),
        **{kind: score(0.6 + lift) for kind in QUESTIONS},
      },
      'editing': {'overall': score(0.44 - lift / 8), 'recolor': score(0.5), 'move': score(0.38)},
    }

  scores = {
    'seed': 0,
    'before': side(0.0),
    'seconds': {'vae': 41.2, 'dual_encoder': 28.0, 'pretrain': 402.5, 'align': 611.0},
    'panel': {
      'before': {
        'saturation': 0.41,
        'leftovers': 0.08,
        'scene_diversity': 2.31,
        'entropy_color': 1.38,
        'free_colors': {'red': 0.3, 'blue': 0.25, 'green': 0.25, 'yellow': 0.2},
        'free_shapes': {'circle': 0.4, 'square': 0.35, 'triangle': 0.25},
      }
    },
  }
  if after:
    scores['after'] = side(0.14)
    scores['before_guided'] = side(0.05)
    scores['paired'] = {
      'generation/overall': {'difference': 0.14, 'se': 0.016, 'p': 2.1e-18, 'n': 120},
      'generation/unseen': {'difference': 0.11, 'se': 0.03, 'p': 2.4e-4, 'n': 60},
      'understanding/accuracy': {'difference': 0.035, 'se': 0.02, 'p': 0.081, 'n': 120},
      'editing/overall': {'difference': -0.0175, 'se': 0.007, 'p': 0.012, 'n': 40},
    }
    scores['panel']['after'] = {
      'saturation': 0.55,
      'leftovers': 0.03,
      'scene_diversity': 1.87,
      'entropy_color': 0.93,
      'free_colors': {'red': 0.6, 'blue': 0.2, 'green': 0.15, 'purple': 0.05},
      'free_shapes': {'circle': 0.45, 'square': 0.35, 'triangle': 0.2},
    }
    scores['panel']['alarms'] = list(alarms)
  return scores


def made_predictions(rng, folder, share):
  """Writes predictions of one side, right with probability `share`."""
  lines = []

  def four(task, colour):
    right = [int(rng.random() < share) for _ in range(4)]
    paths = [f'{task}/{colour}_{n}_{good}.png' for n, good in enumerate(right)]
    for path, good in zip(paths, right, strict=True):
      if not (folder / path).exists():
        draw(rng, folder / path, colour, good)
    return {'images': paths, 'correct': right}

  for split, count in (('eval', 6), ('unseen', 2)):
    for kind in KINDS:
      for n, colour in enumerate(([*COLOURS] * 2)[:count]):
        lines.append(
          {
            'task': 'generate',
            'id': f'generate/{split}/{kind}/{n:03d}',
            'split': split,
            'kind': kind,
            'prompt': PROMPTS[kind].format(colour),
            'spec': {},
            **four('generate', colour),
          }
        )
  for kind in ('recolor', 'move'):
    for n, colour in enumerate(list(COLOURS)[:3]):
      for name in ('source', 'target'):
        draw(rng, folder / f'edit/{kind}_{n}_{name}.png', colour, True)
      lines.append(
        {
          'task': 'edit',
          'id': f'edit/{kind}/{n}',
          'split': 'eval',
          'kind': kind,
          'prompt': f'make the square {colour}',
          'source': f'edit/{kind}_{n}_source.png',
          'target': f'edit/{kind}_{n}_target.png',
          **four('edit', colour),
        }
      )
  for kind in QUESTIONS:
    for n, colour in enumerate(COLOURS):
      draw(rng, folder / f'understand/{kind}_{n}.png', colour, True)
      right = [int(rng.random() < share) for _ in range(4)]
      samples = [colour if good else HOSTILE for good in right]
      if kind == 'reasoning':
        samples = [
          f'the square is at the left and it is {text} so the answer is {text}' for text in samples
        ]
      lines.append(
        {
          'task': 'understand',
          'id': f'understand/{kind}/{n}',
          'split': 'eval',
          'kind': kind,
          'prompt': 'what color is the square?',
          'answer': colour,
          'image': f'understand/{kind}_{n}.png',
          'samples': samples,
          'correct': right,
          'greedy': '' if n == 2 else colour,
          'greedy_correct': int(n != 2),
        }
      )
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'predictions.jsonl').write_text(text)


def made_metrics(rng, steps=150):
  lines = []
  for stage, scale in (('vae', 0.4), ('dual_encoder', 1.5), ('pretrain', 6.0)):
    for step in range(0, 10 * steps, 10):
      decay = math.exp(-step / 200)
      loss = scale * (0.05 + decay) * math.exp(0.08 * rng.normal())
      lines.append(
        {
          'stage': stage,
          'step': step,
          'seconds': step * 0.2,
          'loss': loss,
          'loss/text': 0.6 * loss,
          'loss/image': 0.4 * loss,
          'learning_rate': 0.001 * decay,
        }
      )
  for step in range(steps):
    rise = 1 - math.exp(-step / 60)
    line = {
      'stage': 'align',
      'step': step,
      'seconds': step * 3.0,
      'loss': 0.01 * rng.normal(),
      'grad_norm': 1.2 + 0.2 * rng.random(),
      'velocity_mse': 2e-4 * rise,
      'kl_k3': 0.02 * rise,
      'entropy': 0.9 - 0.3 * rise,
      'mismatch/understand': 4e-7,
      'mismatch/generate': 6e-7 * rng.random(),
      'learning_rate': 1e-4,
    }
    for task in ('generate', 'edit', 'understand'):
      line[f'reward/{task}/rules'] = 0.5 + 0.2 * rise + 0.04 * rng.normal()
      line[f'reward/{task}/mutual'] = 3.1 + rise + 0.3 * rng.normal()
      line[f'share/{task}/rules'] = 0.6 + 0.1 * rise
      line[f'share/{task}/mutual'] = 0.4 - 0.1 * rise
      line[f'dead/{task}/rules'] = None if step == 5 else 0.2 + 0.1 * rng.random()
    lines.append(line)
  return ''.join(json.dumps(line) + '\n' for line in lines)


def make_workdir(folder, after=True, alarms=()):
  """Writes a made-up run and returns its folder."""
  rng = np.random.default_rng(0)
  folder = pathlib.Path(folder)
  for side, share in (('before', 0.5), ('after', 0.75))[: 1 + after]:
    (folder / 'eval' / side).mkdir(parents=True)
    made_predictions(rng, folder / 'eval' / side, share)
  (folder / 'metrics.jsonl').write_text(made_metrics(rng))
  (folder / 'scores.json').write_text(json.dumps(made_scores(after, alarms)))
  (folder / 'config.json').write_text(json.dumps({'seed': 0, 'model': {'name': '<&>'}}))
  return folder


class Page(html.parser.HTMLParser):
  """Parses a page strictly: every element is closed, in order."""

  def __init__(self, text):
    super().__init__()
    self.open, self.sections, self.links, self.images, self.tags = [], [], [], [], []
    self.text = ''
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    assert len(attributes) == len(attrs), attrs
    if tag not in html_lib.VOID_TAGS:
      self.open.append(tag)
    if tag == 'section':
      self.sections.append(attributes['id'])
    if tag == 'img':
      self.images.append(attributes)
    self.links += [value for key, value in attrs if key in ('src', 'href')]
    self.tags.append((tag, attributes.get('class', '')))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1] == tag, (tag, self.open)
    self.open.pop()

  def handle_data(self, data):
    if 'style' not in self.open:
      self.text += data

  def count(self, tag, class_):
    return sum(name == tag and class_ in classes.split() for name, classes in self.tags)


class ReportTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(cls.folder.cleanup)
    cls.whole = make_workdir(pathlib.Path(cls.folder.name) / 'whole', alarms=['colours <narrowed>'])
    cls.page_text = report.write_report(cls.whole).read_text()
    cls.page = Page(cls.page_text)

  def without(self, *names):
    """Returns a copy of the whole run without some files."""
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    copy = pathlib.Path(folder.name) / 'copy'
    shutil.copytree(self.whole, copy)
    for name in names:
      (shutil.rmtree if (copy / name).is_dir() else pathlib.Path.unlink)(copy / name)
    return copy

  def test_all_sections_in_order_and_linked(self):
    self.assertEqual(self.page.sections, SECTIONS)
    self.assertContainsSubset({f'#{name}' for name in SECTIONS}, self.page.links)

  def test_needs_nothing_from_outside(self):
    for link in self.page.links:
      self.assertTrue(link.startswith(('#', 'data:image/png;base64,')), link[:60])
    self.assertNotIn('http', self.page_text)
    self.assertNotIn('@import', self.page_text)
    self.assertNotIn('url(', self.page_text)
    self.assertEqual(self.page.count('script', ''), 0)

  def test_text_is_escaped(self):
    self.assertIn('left of a <b>blue</b> square', self.page.text)
    self.assertIn('<script>alert("no")</script>\ufffd', self.page.text)
    self.assertIn('colours <narrowed>', self.page.text)
    self.assertNotIn('<script', self.page_text)
    self.assertNotIn('\x07', self.page_text)

  def test_summary_tells_rises_falls_and_no_change(self):
    text = Page(overview.summary(made_scores())).text.replace('\xa0', ' ')
    self.assertIn(
      'Alignment raised generation from 52.0% to 66.0% (+14.0 points, p = 2 × 10−18)'
      ' and generation (unseen)',
      text,
    )
    self.assertIn('It lowered editing from 44.0% to 42.2% (−1.8 points, p = 0.012).', text)
    self.assertIn('No measurable change in understanding (+3.5 points, p = 0.081).', text)
    self.assertIn('No sign of over-optimisation', text)

  def test_selection_is_the_first_of_each_kind(self):
    pictures = self.page_text.split('<section id="pictures"')[1].split('</section>')[0]
    kinds = len(KINDS) + 1
    self.assertEqual(
      Page('<section id="x"' + pictures + '</section>').count('article', 'card'),
      samples.GENERATE_PROMPTS * kinds,
    )
    first = (self.whole / 'eval/before/predictions.jsonl').read_text().splitlines()[0]
    self.assertIn(json.loads(first)['prompt'], pictures)

  def test_frames_agree_with_the_verdicts(self):
    shown = [image for image in self.page.images if ', sample ' in image['alt']]
    self.assertNotEmpty(shown)
    right = sum(image['alt'].endswith(', right') for image in shown)
    self.assertEqual(self.page.count('figure', 'ok'), right)
    self.assertEqual(self.page.count('figure', 'no'), len(shown) - right)

  def test_significance_marks(self):
    self.assertEqual(self.page.count('td', 'up'), 2)
    self.assertEqual(self.page.count('td', 'down'), 1)

  def test_alarms(self):
    self.assertEqual(self.page.count('div', 'alarm'), 1)
    calm = Page(sections.over_optimization_section(made_scores()['panel']))
    self.assertEqual((calm.count('div', 'alarm'), calm.count('div', 'calm')), (0, 1))

  def test_curves_group_by_prefix_and_task(self):
    for title in (
      'Reward · generate · rules',
      'Reward · understand · mutual',
      'Share of variance · edit',
      'Rollout-training mismatch, log-ratio before an update',
      'Gradient norm',
      'KL to the reference (k3)',
    ):
      self.assertIn(title, self.page.text)

  def test_former_names_give_the_same_page(self):
    workdir = self.without()
    for name in ('metrics.jsonl', 'scores.json'):
      text = (workdir / name).read_text()
      former = text.replace('"mismatch/', '"gap/').replace('"dual_encoder"', '"judge"')
      self.assertNotEqual(former, text)
      (workdir / name).write_text(former)
    page_text = report.write_report(workdir).read_text()
    self.assertEqual(page_text.replace('LVRPO run copy', 'LVRPO run whole'), self.page_text)

  @parameterized.parameters(
    ('gap/decode', 'mismatch/decode'),
    ('refill/edit/rounds', 'dynamic_sampling/edit/rounds'),
    ('held_out/gold', 'held_out/reward'),
    ('held_out/gold_rate', 'held_out/gold_rate'),
    ('loss/judge', 'loss/dual_encoder'),
    ('gap', 'gap'),
    ('mismatch/decode', 'mismatch/decode'),
    ('share/gap/', 'share/gap/'),
  )
  def test_present_names(self, name, present):
    self.assertEqual(files.present_name(name), present)

  @parameterized.parameters(
    ((), False),
    (('eval/after',), True),
    (('scores.json',), True),
    (('metrics.jsonl',), True),
    (('config.json',), True),
    (('eval',), True),
    (('eval', 'scores.json', 'metrics.jsonl', 'config.json'), True),
  )
  def test_parts_of_a_run(self, names, says_so):
    page = Page(report.write_report(self.without(*names)).read_text())
    self.assertEqual(page.sections, SECTIONS)
    self.assertEqual(page.count('p', 'missing') > 0, says_so)

  def test_a_run_that_stopped_before_alignment(self):
    workdir = make_workdir(pathlib.Path(self.folder.name) / 'half', after=False)
    page = Page(report.write_report(workdir).read_text())
    self.assertIn('Only the model before alignment has been scored', page.text)
    self.assertIn('The model after alignment has not been scored yet', page.text)
    self.assertEqual(page.count('p', 'missing'), 5)

  def test_a_missing_picture_leaves_an_empty_place(self):
    workdir = self.without('eval/before/understand/color_1.png')
    page = Page(report.write_report(workdir).read_text())
    self.assertLen(page.images, len(self.page.images) - 1)
    self.assertEqual(page.count('div', 'px'), 1)

  def test_a_line_still_being_written_is_left_out(self):
    workdir = self.without()
    with (workdir / 'metrics.jsonl').open('a') as file:
      file.write('{"stage": "ali')
    report.write_report(workdir)

  def test_refuses(self):
    with self.assertRaises(FileNotFoundError):
      report.write_report(self.whole / 'nowhere')
    workdir = self.without()
    (workdir / 'scores.json').write_text('{')
    with self.assertRaisesRegex(ValueError, 'scores.json'):
      report.write_report(workdir)
    (workdir / 'scores.json').write_text('[]')
    with self.assertRaisesRegex(ValueError, 'scores.json: expected a JSON object, got list'):
      report.write_report(workdir)

  def test_command_line_starts_no_jax(self):
    code = (
      'import sys, runpy; runpy.run_module("lvrpo_jax.reports.report", run_name="__main__"); '
      'assert "jax" not in sys.modules'
    )
    done = subprocess.run(
      [sys.executable, '-c', code, str(self.without())],
      text=True,
      capture_output=True,
      check=True,
      cwd=pathlib.Path(__file__).parent.parent,
    )
    self.assertTrue(done.stdout.strip().endswith('report.html'))


class AssetsTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 1.0), (-0.3, 7.2), (1e-7, 6e-7), (980.0, 1500.0))
  def test_ticks_are_round_inside_and_few(self, low, high):
    values = charts.ticks(low, high)
    self.assertBetween(len(values), 2, 6)
    self.assertTrue(all(low - 1e-9 <= value <= high + 1e-9 for value in values))
    np.testing.assert_allclose(np.diff(values), values[1] - values[0])

  @parameterized.parameters((0.01, 3.0), (0.9, 40.0), (1e-8, 1.0))
  def test_log_ticks(self, low, high):
    values = charts.log_ticks(low, high)
    self.assertBetween(len(values), 2, 9)
    self.assertTrue(all(low <= value <= high for value in values))

  def test_thinning_keeps_the_mean_and_the_limit(self):
    series = [(float(n), float(n % 7)) for n in range(960)]
    few = charts.thinned(series, 240)
    self.assertLen(few, 240)
    np.testing.assert_allclose(np.mean(few, 0), np.mean(series, 0))

  def test_running_mean(self):
    series = [(0.0, 0.0), (1.0, 3.0), (2.0, 6.0), (3.0, 0.0)]
    self.assertEqual(charts.smoothed(series, 1), [(0.0, 1.5), (1.0, 3.0), (2.0, 3.0), (3.0, 3.0)])
    self.assertEqual(charts.smoothed(series, 0), series)

  @parameterized.parameters(
    ([(0, 1.0)],), ([(0, 0.0), (5, 0.0)],), ([(3, -2.0), (3, -2.0)],), ([(0, 1e-9), (1, 1e9)],)
  )
  def test_charts_of_odd_series_stay_inside(self, series):
    text = charts.line_chart('odd', {'a': series}, 'step')
    self.assertEqual(Page(text).count('figure', 'chart'), 1)
    self.assertNotIn('nan', text)

  def test_lines_of_different_size_are_parted(self):
    parts = charts.by_scale(
      {'big': [(0, 9.0)], 'small': [(0, 0.1)], 'near': [(0, 0.35)], 'zero': [(0, 0.0)]}
    )
    self.assertEqual([list(part) for part in parts], [['small', 'near', 'zero'], ['big']])

  @parameterized.parameters(
    (0.5, '0.50'),
    (0.0123, '0.012'),
    (3.2e-9, '3\xa0×\xa010<sup>−9</sup>'),
    (0.0, '&lt; 10<sup>−300</sup>'),
    (None, '–'),
    (math.nan, '–'),
  )
  def test_p_values(self, p, text):
    self.assertEqual(html_lib.p_value(p), text)

  @parameterized.parameters(
    (8.24, '8.2 s'), (59.97, '1 min 0 s'), (252, '4 min 12 s'), (11100, '3 h 5 min')
  )
  def test_durations(self, seconds, text):
    self.assertEqual(html_lib.duration(seconds), text)

  def test_elements_escape_children_and_attributes(self):
    self.assertEqual(
      html_lib.el('p', '<&', html_lib.el('b', 1), None, class_='"x"', title=None),
      '<p class="&quot;x&quot;">&lt;&amp;<b>1</b></p>',
    )


if __name__ == '__main__':
  absltest.main()
