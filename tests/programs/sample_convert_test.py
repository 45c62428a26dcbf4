"""The programs `convert` and `sample`, and alignment, on a tiny model in the released form.

Everything goes through the command line, as a user would.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image
from safetensors import numpy as safetensors

from tests.helpers import jax_settings
from tests.helpers import released_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLE = ('--config.program=sample', '--config.sample.steps=2', '--config.sample.max_tokens=4')
CAPTION = ('--config.sample.prompt=a photo of a red circle', '--config.sample.size=(48,24)')
EXPERTS = ('', '_moe_gen')


def changed(before, after):
  """Names of the tensors that differ between two folders."""
  old, new = (
    {
      name: value
      for path in folder.glob('ema*.safetensors')
      for name, value in safetensors.load_file(path).items()
    }
    for folder in (before, after)
  )
  assert old.keys() == new.keys()
  return {name for name in old if not np.array_equal(old[name], new[name])}


class ProgramsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.base = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    cls.released = released_folder.write(cls.base / 'released')
    cls.picture = cls.base / 'picture.png'
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (30, 41, 3), np.uint8)).save(cls.picture)

  def call(self, workdir, *args, checkpoint=None):
    environment = {
      **os.environ,
      **jax_settings.cached(self.base / 'cache'),
      'PYTHONPATH': str(ROOT),
    }
    return subprocess.run(
      [
        sys.executable,
        '-m',
        'lvrpo_jax.main',
        '--config=configs/tiny.py',
        f'--workdir={workdir}',
        f'--config.checkpoint={checkpoint or self.released}',
        *args,
      ],
      cwd=ROOT,
      capture_output=True,
      text=True,
      env=environment,
    )

  def succeed(self, workdir, *args, **kwargs):
    run = self.call(workdir, *args, **kwargs)
    self.assertEqual(run.returncode, 0, run.stderr[-3000:])
    return run

  def sampled(self, workdir, **kwargs):
    """An answer, a picture, an edit and a picture after a thought, as texts and arrays."""
    question = (
      '--config.sample.prompt=how many circles are there ?',
      '--config.sample.task=understand',
      f'--config.sample.image={self.picture}',
    )
    edit = (
      '--config.sample.prompt=remove the circle',
      '--config.sample.task=edit',
      f'--config.sample.image={self.picture}',
      '--config.sample.guidance.edit.text_scale=3',
      '--config.sample.guidance.edit.image_scale=2',
    )
    thought = (
      *CAPTION,
      '--config.sample.think',
      '--config.sample.temperature=1',
      '--config.sample.top_p=.9',
      '--config.sample.system.generate=think',
      '--config.sample.guidance.generate.text_scale=4',
    )
    for args in (question, CAPTION, edit, thought):
      self.succeed(workdir, *SAMPLE, *args, **kwargs)
    folder = workdir / 'samples'
    self.assertEqual(
      sorted(path.name for path in folder.iterdir()),
      ['0000.txt', '0001.png', '0002.png', '0003.png', '0003.txt'],
    )
    return [
      path.read_text() if path.suffix == '.txt' else np.asarray(Image.open(path))
      for path in sorted(folder.iterdir())
    ]

  def test_in_aligned_out_and_in_again(self):
    workdir, exported = self.base / 'work', self.base / 'exported'
    self.succeed(workdir, '--config.program=convert')
    self.succeed(workdir, *SAMPLE, *CAPTION)
    first = np.asarray(Image.open(workdir / 'samples' / '0000.png'))
    self.succeed(
      workdir,
      '--config.align.iterations=1',
      '--config.report=False',
      '--config.align.lora.rank=2',
      '--config.align.optimizer.learning_rate=1',
    )
    shutil.rmtree(workdir / 'samples')
    aligned = self.sampled(workdir)
    self.assertEqual(
      [x.shape for x in aligned if not isinstance(x, str)], [(24, 48, 3), (32, 48, 3), (24, 48, 3)]
    )
    self.assertFalse(np.array_equal(first, aligned[1]))
    self.succeed(
      workdir,
      '--config.program=convert',
      '--config.convert.direction=export',
      f'--config.convert.target={exported}',
      '--config.convert.shards=2',
    )
    self.assertLen(list(exported.glob('ema-0000*-of-00002.safetensors')), 2)
    self.assertEqual(
      (exported / 'ae.safetensors').read_bytes(), (self.released / 'ae.safetensors').read_bytes()
    )
    self.assertEqual(
      changed(self.released, exported),
      {
        f'language_model.model.layers.{layer}.{name}.weight'
        for layer in range(2)
        for name in (
          *(f'self_attn.{p}_proj{expert}' for p in 'qkvo' for expert in EXPERTS),
          *(f'mlp{expert}.{p}_proj' for p in ('gate', 'up', 'down') for expert in EXPERTS),
        )
      },
    )
    again = self.sampled(self.base / 'elsewhere', checkpoint=exported)
    for before, after in zip(aligned, again, strict=True):
      np.testing.assert_array_equal(before, after)
    self.assertEqual(released_folder.vocabulary(exported), released_folder.rows(exported))
    # Weights that were imported from elsewhere are not taken for those of the folder.
    imported = self.base / 'imported'
    self.succeed(imported, '--config.program=convert')
    kept = sorted(imported.rglob('*'))
    for args in (('--config.program=convert',), (*SAMPLE, '--config.sample.prompt=a circle')):
      other = self.call(imported, *args, checkpoint=exported)
      self.assertEqual(other.returncode, 2, other.stderr[-2000:])
      self.assertIn(f'was imported from {self.released.resolve()}', other.stderr)
    self.assertEqual(
      sorted(p for p in imported.rglob('*') if 'compiled' not in str(p)),
      [p for p in kept if 'compiled' not in str(p)],
    )
    other = self.call(
      workdir, *SAMPLE, '--config.sample.prompt=a circle', '--config.model.width=32'
    )
    self.assertEqual(other.returncode, 2)
    self.assertIn('model.width: 16 there, 32 here', other.stderr)

  @parameterized.named_parameters(
    ('truncated', 'truncated'),
    ('import', 'truncated'),
    ('dtype', 'I32'),
    ('missing', 'is missing from'),
    ('contradiction', 'expected [16, 40]'),
    ('image', 'cannot read image'),
    ('tokenizer', 'no tokenizer at'),
  )
  def test_bad_input_is_named_and_nothing_is_written(self, message):
    case = self._testMethodName.rpartition('_')[2]
    folder, workdir = self.base / f'bad_{case}', self.base / f'work_{case}'
    shutil.copytree(self.released, folder)
    shard = folder / 'ema-00001-of-00002.safetensors'
    args = [*SAMPLE, '--config.sample.prompt=a circle']
    if case == 'import':
      args = ['--config.program=convert']
    if case in ('truncated', 'import'):
      shard.write_bytes(shard.read_bytes()[:-100])
    elif case in ('dtype', 'missing'):
      tensors = safetensors.load_file(shard)
      name = sorted(tensors)[0]
      value = tensors.pop(name)
      if case == 'dtype':
        tensors[name] = value.astype(np.int32)
      safetensors.save_file(tensors, shard)
    elif case == 'contradiction':
      config = json.loads((folder / 'llm_config.json').read_text())
      (folder / 'llm_config.json').write_text(json.dumps({**config, 'intermediate_size': 40}))
    elif case == 'tokenizer':
      (folder / 'tokenizer.json').unlink()
    else:
      broken = self.base / 'broken.png'
      broken.write_bytes(self.picture.read_bytes()[:60])
      args += ['--config.sample.task=edit', f'--config.sample.image={broken}']
    run = self.call(workdir, *args, checkpoint=folder)
    self.assertEqual(run.returncode, 2, run.stderr[-2000:])
    self.assertIn(message, run.stderr)
    self.assertNotIn('Traceback', run.stderr)
    self.assertFalse(workdir.exists())


if __name__ == '__main__':
  absltest.main()
