"""Tests of the comparison of two runs."""

import contextlib
import io
import json
import math
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized

from lvrpo_jax.reports import compare

SCORES = {
  'seed': 0,
  'seconds': {'vae': 1.5},
  'before': {'generation': {'overall': {'value': 0.5, 'ci95': [0.25, 0.75], 'n': 4}}},
  'panel': {'alarms': [], 'before': {'colors': {'red': 1.0}}},
}
LINES = [
  {'stage': 'vae', 'step': 1, 'seconds': 0.5, 'loss': 0.25},
  {'stage': 'align', 'step': 1, 'seconds': 1.0, 'loss': 0.5, 'mismatch/edit': 1e-7, 'bad': None},
  {
    'stage': 'align',
    'step': 2,
    'seconds': 2.0,
    'loss': 0.75,
    'compiled': 3.0,
    'judge/edit/seconds': 0.5,
    'time/rollout_s': 0.125,
    'images_per_s': 8.0,
  },
]
EQUAL = 7 + 3 + 5 + 3
"""Leaves of `SCORES` and `LINES` without times."""


class CompareTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def write(self, name, scores=None, lines=None):
    """Writes a workdir."""
    workdir = self.folder / name
    workdir.mkdir()
    (workdir / 'scores.json').write_text(json.dumps(SCORES if scores is None else scores))
    text = ''.join(json.dumps(line) + '\n' for line in (LINES if lines is None else lines))
    (workdir / 'metrics.jsonl').write_text(text)
    return workdir

  def run_command(self, *arguments):
    """Returns the exit status, and what was printed to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        status = compare.main([str(argument) for argument in arguments])
      except SystemExit as stop:
        status = stop.code
    return status, out.getvalue(), err.getvalue()

  def test_equal_runs(self):
    status, out, err = self.run_command(self.write('a'), self.write('b'))
    self.assertEqual((status, err), (0, ''))
    self.assertEqual(out, f'leaves: {EQUAL} equal, 0 different\nlargest absolute difference: 0.0\n')

  def test_times_are_left_out(self):
    lines = json.loads(json.dumps(LINES))
    lines[0]['seconds'] = 7.0
    lines[2].update(
      {'compiled': 0.0, 'judge/edit/seconds': 9.0, 'time/rollout_s': 9.0, 'images_per_s': 9.0}
    )
    other = self.write('b', {**SCORES, 'seconds': {'vae': 9.0, 'align': 1.0}}, lines)
    self.assertEqual(self.run_command(self.write('a'), other)[0], 0)

  def test_differences_are_named_with_both_values(self):
    scores = json.loads(json.dumps(SCORES))
    scores['before']['generation']['overall']['ci95'][1] = math.nextafter(0.75, 1.0)
    scores['panel']['alarms'] = ['narrow']
    lines = json.loads(json.dumps(LINES))
    lines[1]['loss'], lines[1]['bad'] = 0.25, 0.5
    status, out, _ = self.run_command(self.write('a'), self.write('b', scores, lines))
    self.assertEqual(status, 1)
    self.assertEqual(
      out.splitlines(),
      [
        f'leaves: {EQUAL - 4} equal, 5 different',
        'largest absolute difference: 0.25 (metrics.jsonl align line 1 loss)',
        'first 5 different leaves:',
        '  scores.json before/generation/overall/ci95/1: 0.75 | 0.7500000000000001',
        '  scores.json panel/alarms: [] | absent',
        '  scores.json panel/alarms/0: absent | "narrow"',
        '  metrics.jsonl align line 1 loss: 0.5 | 0.25',
        '  metrics.jsonl align line 1 bad: null | 0.5',
      ],
    )

  def test_ten_differences_are_shown(self):
    lines = [{'stage': 'vae', 'step': step, 'loss': 0.0} for step in range(30)]
    others = [{**line, 'loss': 1.0} for line in lines]
    _, out, _ = self.run_command(self.write('a', lines=lines), self.write('b', lines=others))
    self.assertIn('67 equal, 30 different', out)
    self.assertLen(out.splitlines(), 3 + compare.SHOWN)
    self.assertIn('vae line 10 loss', out)
    self.assertNotIn('vae line 11 loss', out)

  def test_former_names_are_equal_to_the_present_ones(self):
    former, present = json.loads(json.dumps(LINES)), json.loads(json.dumps(LINES))
    former[1]['gap/edit'] = former[1].pop('mismatch/edit')
    former[0].update({'stage': 'judge', 'loss/judge': 0.5})
    present[0].update({'stage': 'dual_encoder', 'loss/dual_encoder': 0.5})
    first, second = self.write('a', lines=former), self.write('b', lines=present)
    self.assertEqual(self.run_command(first, second)[0], 0)

  def test_stages_may_stand_in_another_order(self):
    lines = [LINES[1], LINES[0], LINES[2]]
    self.assertEqual(self.run_command(self.write('a'), self.write('b', lines=lines))[0], 0)

  def test_the_first_lines_of_each_stage(self):
    lines = [*LINES[:2], {**LINES[2], 'loss': 0.0}, {**LINES[2], 'step': 3}]
    first, second = self.write('a'), self.write('b', lines=lines)
    self.assertEqual(self.run_command(first, second)[0], 1)
    self.assertEqual(self.run_command(first, second, '--first=2')[0], 1)
    status, out, _ = self.run_command(first, second, '--first=1')
    self.assertEqual((status, f'leaves: {EQUAL - 3} equal' in out), (0, True))

  def test_a_line_less_is_a_difference(self):
    status, out, _ = self.run_command(self.write('a'), self.write('b', lines=LINES[:2]))
    self.assertEqual(status, 1)
    self.assertIn('metrics.jsonl align line 2 loss: 0.75 | absent', out)

  def test_tolerance(self):
    lines = [*LINES[:2], {**LINES[2], 'loss': 0.875}]
    first, second = self.write('a'), self.write('b', lines=lines)
    self.assertEqual(self.run_command(first, second, '--tolerance=0.1')[0], 1)
    status, out, _ = self.run_command(first, second, '--tolerance=0.125')
    self.assertEqual(status, 0)
    self.assertIn('largest absolute difference: 0.125 (metrics.jsonl align line 2 loss)', out)

  @parameterized.parameters(
    (math.nan, math.nan, True),
    (math.inf, math.inf, True),
    (1, 1.0, True),
    (0.0, -0.0, True),
    ('x', 'x', True),
    (None, None, True),
    (math.nan, 0.0, False),
    (math.inf, 0.0, False),
    (math.inf, -math.inf, False),
    (None, 0.0, False),
    (True, 1, False),
    (False, None, False),
    ('1', 1, False),
    ([], [], True),
    ({}, [], False),
  )
  def test_values(self, one, two, equal):
    first, second = self.write('a', {'x': one}), self.write('b', {'x': two})
    status, out, _ = self.run_command(first, second)
    self.assertEqual(status, 0 if equal else 1)
    self.assertIn('largest absolute difference: 0.0\n', out)

  def test_files(self):
    first, second = self.write('a'), self.write('b', {**SCORES, 'seed': 1})
    self.assertEqual(self.run_command(first / 'scores.json', second / 'scores.json')[0], 1)
    self.assertEqual(self.run_command(first / 'metrics.jsonl', second / 'metrics.jsonl')[0], 0)

  @parameterized.parameters(
    ('scores.json', None, 'is missing'),
    ('scores.json', '{', 'Expecting'),
    ('scores.json', '[1]', 'expected a JSON object, got list'),
    ('scores.json', '{"seconds": {"vae": 1.0}}', 'holds nothing to compare'),
    ('metrics.jsonl', None, 'is missing'),
    ('metrics.jsonl', '', 'holds nothing to compare'),
    ('metrics.jsonl', '{"stage": "vae"}\n{"stage": "al', 'Unterminated'),
    ('metrics.jsonl', '{"step": 1}\n', "line 1 has no 'stage'"),
    ('metrics.jsonl', b'\xff\n', 'utf-8'),
  )
  def test_missing_and_invalid_files(self, name, content, message):
    first, second = self.write('a'), self.write('b')
    (second / name).unlink()
    if content is not None:
      (second / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for arguments in ((first, second), (second, first)):
      status, out, err = self.run_command(*arguments)
      self.assertEqual((status, out), (2, ''))
      self.assertLen(err.splitlines(), 1)
      self.assertIn(str(second / name), err)
      self.assertIn(message, err)

  def test_paths_that_do_not_go_together(self):
    workdir = self.write('a')
    for other, message in (
      (workdir / 'scores.json', 'different kinds'),
      (self.folder / 'nowhere', 'nowhere is missing'),
    ):
      status, _, err = self.run_command(workdir, other)
      self.assertEqual((status, len(err.splitlines())), (2, 1))
      self.assertIn(message, err)
    status, _, err = self.run_command(workdir / 'scores.json', workdir / 'metrics.jsonl')
    self.assertEqual(status, 2)
    self.assertIn('different kinds', err)

  @parameterized.parameters('--first=0', '--first=x', '--tolerance=-1', '--tolerance=nan')
  def test_wrong_options(self, option):
    workdir = self.write('a')
    status, _, err = self.run_command(workdir, workdir, option)
    self.assertEqual(status, 2)
    self.assertIn('allowed:', err)

  def test_command_line_starts_no_jax(self):
    code = (
      'import runpy, sys\n'
      'try:\n'
      '  runpy.run_module("lvrpo_jax.reports.compare", run_name="__main__")\n'
      'finally:\n'
      '  assert "jax" not in sys.modules\n'
    )
    for scores, status in ((SCORES, 0), ({}, 2), ({**SCORES, 'seed': 1}, 1)):
      first, second = self.write(f'a{status}'), self.write(f'b{status}', scores)
      done = subprocess.run(
        [sys.executable, '-c', code, str(first), str(second)],
        text=True,
        capture_output=True,
        cwd=pathlib.Path(__file__).resolve().parents[2],
      )
      self.assertEqual(done.returncode, status, done.stderr)


if __name__ == '__main__':
  absltest.main()
