"""Whole runs under `pmap` give the numbers of `jit`, on one device and on eight, also where a run
goes on under the other runner."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.helpers import jax_settings

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
ITERATIONS = 3
ROWS = {
  f'config.{part}.{task}': 8
  for part in ('pretrain.rows', 'align.prompts')
  for task in ('generate', 'understand', 'edit')
}
CASES = {
  'nft': {},
  'thinking_adapters': {
    'config.align.image.objective': 'flow_grpo',
    'config.align.text.objective': 'grpo',
    'config.align.lora.rank': 2,
    'config.align.prompts.think_generate': 8,
    'config.pretrain.rows.think_generate': 8,
    'config.align.prompts.edit': 0,
    'config.align.dynamic_sampling.rounds': 1,
  },
}
"""Changes to the tiny config; between them both kinds of image objectives, adapters, plans and dynamic
sampling."""

CALM = {
  'config.pretrain.optimizer.kind': 'adamw',
  'config.pretrain.optimizer.eps': 1e-3,
  'config.align.optimizer.eps': 1e-3,
}
"""Updates that are continuous in the gradient: Adam with its usual eps divides gradients of pure
rounding by themselves."""


def numbers(line):
  """Metrics without times and counts of compiled programs."""
  return {k: v for k, v in line.items() if k not in ('seconds', 'compiled', 'stage')}


class RunnersTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.base = pathlib.Path(absltest.get_default_test_tmpdir()) / f'runners{os.getpid()}'

  def run_job(self, name, runner, devices, case, *program):
    """Runs the program by its command line; returns the workdir."""
    workdir = self.base / name
    changes = {
      **(ROWS if devices > 1 else {}),
      **CASES[case],
      **CALM,
      'config.parallel.runner': runner,
      'config.report': False,
      'config.align.evaluate.every': 0,
      'config.align.iterations': ITERATIONS,
      'config.evaluate.guided_prompts': 0,
    }
    cached = jax_settings.cached(self.base / 'cache')
    flags = f'{cached["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}'
    path = os.pathsep.join((str(ROOT), os.environ.get('PYTHONPATH', '')))
    done = subprocess.run(
      [
        sys.executable,
        *(program or ('-m', 'lvrpo_jax.main')),
        '--config=configs/tiny.py',
        f'--workdir={workdir}',
        *(f'--{key}={value}' for key, value in changes.items()),
      ],
      cwd=ROOT,
      env={**os.environ, **cached, 'XLA_FLAGS': flags, 'PYTHONPATH': path},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 143 if program else 0, done.stderr[-4000:])
    return workdir

  def assert_same_run(self, one, two):
    """Same parameters, moments, metrics and scores, up to the order of sums."""

    def state(workdir):
      folder = epath.Path(workdir) / 'checkpoints' / 'align' / str(ITERATIONS) / 'state'
      reader = ocp.PyTreeCheckpointHandler()
      # As NumPy arrays: the devices that wrote them are not here.
      where = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).tree
      )
      return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=where))

    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=TOLERANCE), state(one), state(two)
    )
    mine, theirs = (
      [json.loads(line) for line in (w / 'metrics.jsonl').read_text().splitlines()]
      for w in (one, two)
    )
    self.assertLen(mine, len(theirs))
    for a, b in zip(mine, theirs, strict=True):
      self.assertEqual(a['stage'], b['stage'])
      self.assertEqual(a.keys(), b.keys())
      for key, value in numbers(a).items():
        np.testing.assert_allclose(
          value,
          b[key],
          rtol=10 * TOLERANCE,
          atol=TOLERANCE,
          err_msg=f'{a["stage"]} {a["step"]} {key}',
        )
    scores = [json.loads((w / 'scores.json').read_text()) for w in (one, two)]
    self.assertEqual(scores[0]['after'].keys(), scores[1]['after'].keys())

  def assert_pmap_equals_jit(self, devices, case, goes_on_under):
    """Stops a run under pmap in the middle and lets it go on; compares it with a run under jit."""
    whole = self.run_job(f'jit{devices}', 'jit', devices, case)
    report = str(self.base / 'report')
    stop = ('-m', 'tests.helpers.interruptions', 'done', 'align', '2', '15', report)
    name = f'pmap{devices}'
    self.run_job(name, 'pmap', devices, case, *stop)
    self.assert_same_run(whole, self.run_job(name, goes_on_under, devices, case))

  def test_goes_on_under_the_other_runner(self):
    self.assert_pmap_equals_jit(1, 'nft', 'jit')

  @pytest.mark.long
  def test_adapters_and_plans_on_eight_devices(self):
    self.assert_pmap_equals_jit(8, 'thinking_adapters', 'pmap')


if __name__ == '__main__':
  absltest.main()
