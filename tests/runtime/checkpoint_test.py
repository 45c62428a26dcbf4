"""Tests of checkpoints, and of the config that a workdir keeps."""

import json
import pathlib
import shutil
import tempfile
import time
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import ml_collections
import numpy as np
import optax

from configs import base
from lvrpo_jax.data import loader
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import workdir as workdir_lib
from lvrpo_jax.training import step as step_lib

OPTIMIZER = optax.adam(1e-3)


def make_state(number):
  """Returns a state with every optional copy, all values depending on `number`."""
  params = {
    'layer': {'kernel': number + jnp.arange(600.0).reshape(30, 20)},
    'bias': jnp.full(3, number / 3),
  }
  state = step_lib.init(params, OPTIMIZER, ema=True)
  return state.replace(step=jnp.int32(number), reference=jax.tree.map(jnp.copy, params))


def data():
  return loader.batches(loader.IndexedSource(lambda i: i, 100), 3, np.array)


class CheckpointsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def save(self, *numbers, **kwargs):
    store = checkpoint.Checkpoints(self.folder, **kwargs)
    for number in numbers:
      store.save(number, make_state(number), {'iteration': number})
    store.close()

  def test_the_best_stay(self):
    store = checkpoint.Checkpoints(self.folder, keep=2, best=1)
    self.assertIsNone(store.best())
    for number, score in ((1, 0.5), (2, 0.9), (3, 0.9), (4, np.nan), (5, 0.1), (6, 0.2)):
      store.save(number, make_state(number), {'iteration': number}, score)
    self.assertEqual(store.best(), 3)
    store.close()
    self.assertEqual({p.name for p in self.folder.iterdir()}, {'3', '5', '6'})
    store = checkpoint.Checkpoints(self.folder, best=1)
    self.assertEqual(store.best(), 3)
    self.assertEqual(int(store.restore(make_state(0), store.best())[0].step), 3)
    self.assertEqual(int(store.restore(make_state(0))[0].step), 6)
    store.close()

  def restore(self, target=None):
    store = checkpoint.Checkpoints(self.folder)
    out = store.restore(make_state(0) if target is None else target)
    store.close()
    return out

  def damage(self, step, name, truncate):
    """Deletes or halves all files of a checkpoint whose path matches `name`."""
    files = [path for path in (self.folder / str(step)).glob(name) if path.is_file()]
    self.assertNotEmpty(files)
    for path in files:
      content = path.read_bytes()
      path.unlink()
      if truncate:
        path.write_bytes(content[: len(content) // 2])

  def test_round_trip_with_data_iterator(self):
    iterator = data()
    for _ in range(5):
      next(iterator)
    store = checkpoint.Checkpoints(self.folder)
    store.save(7, make_state(7), {'iteration': 7, 'data': {'generate': iterator.get_state()}})
    self.assertEqual(store.latest(), 7)
    store.close()
    state, record = self.restore()
    jax.tree.map(np.testing.assert_array_equal, state, make_state(7))
    self.assertEqual(jax.tree.structure(state), jax.tree.structure(make_state(7)))
    self.assertEqual(record['iteration'], 7)
    resumed = data()
    resumed.set_state(record['data']['generate'])
    for _ in range(4):
      np.testing.assert_array_equal(next(resumed), next(iterator))

  def test_a_record_is_saved_as_it_was(self):
    record = {'factors': {'images': 1.0}, 'first': [0]}
    dumps = json.dumps

    def late(*args, **kwargs):
      time.sleep(0.3)
      return dumps(*args, **kwargs)

    store = checkpoint.Checkpoints(self.folder)
    with mock.patch.object(json, 'dumps', late):  # Orbax calls it in another thread.
      store.save(1, make_state(1), record)
      record['factors']['images'] = 2.0
      record['first'].append(1)
      store.close()
    self.assertEqual(self.restore()[1], {'factors': {'images': 1.0}, 'first': [0]})

  def test_nothing_there(self):
    self.assertIsNone(self.restore())

  def test_newest_is_used_and_old_ones_go(self):
    self.save(1, 2, 3)
    self.assertEqual(self.restore()[1], {'iteration': 3})
    self.assertFalse((self.folder / '1').exists())

  def test_half_written_checkpoint_is_no_checkpoint(self):
    self.save(1)
    shutil.copytree(self.folder / '1', self.folder / '2.orbax-checkpoint-tmp-0')
    with self.assertLogs(level='WARNING') as logged:
      self.assertEqual(self.restore()[1], {'iteration': 1})
    self.assertIn('a save was cut off and is skipped: 2.orbax-checkpoint-tmp-0', logged.output[0])
    with self.assertNoLogs(level='WARNING'):
      self.save(2)
      self.assertEqual(self.restore()[1], {'iteration': 2})

  @parameterized.product(
    name=(
      'state/ocdbt.process_0/d/*',
      'state/manifest.ocdbt',
      'state/_METADATA',
      'record/metadata',
      'state/**/*',
    ),
    truncate=(False, True),
  )
  def test_damaged_newest_is_skipped(self, name, truncate):
    self.save(1, 2)
    self.damage(2, name, truncate)
    with self.assertLogs(level='WARNING') as logged:
      state, record = self.restore()
    self.assertIn('checkpoint of step 2 cannot be read', ' '.join(logged.output))
    self.assertEqual(record, {'iteration': 1})
    jax.tree.map(np.testing.assert_array_equal, state, make_state(1))

  @parameterized.parameters('state', 'record', 'state/d')
  def test_lost_folder_is_skipped(self, name):
    self.save(1, 2)
    shutil.rmtree(self.folder / '2' / name)
    self.assertEqual(self.restore()[1], {'iteration': 1})

  def test_damaged_step_can_be_saved_again(self):
    for number in range(2):
      self.save(1, 2)
      self.damage(2, 'state/ocdbt.process_0/d/*', False)
      self.assertEqual(self.restore()[1], {'iteration': 1})
      self.assertTrue((self.folder / f'2.unreadable{number}').exists())
    self.save(2)
    self.assertEqual(self.restore()[1], {'iteration': 2})

  def test_all_damaged(self):
    self.save(1, 2)
    for step in (1, 2):
      self.damage(step, 'state/_METADATA', True)
    for _ in range(2):  # The next start does not begin anew either.
      with self.assertRaisesRegex(ValueError, f'none .* in {self.folder} can be read.*delete the'):
        self.restore()
      self.assertEqual({p.name for p in self.folder.iterdir()}, {'1', '2'})

  @parameterized.named_parameters(
    ('fewer', lambda s: s.replace(ema=None), [r'ema/bias: \(3,\) there, absent here']),
    (
      'more',
      lambda s: s.replace(old=s.params),
      [r'old/bias: absent there, \(3,\) here', r'old/layer/kernel: absent there'],
    ),
    (
      'shape',
      lambda s: s.replace(params=jax.tree.map(lambda x: x[:2], s.params)),
      [r'params/bias: \(3,\) there, \(2,\) here', r'params/layer/kernel: \(30, 20\) there'],
    ),
  )
  def test_other_arrays_are_named_and_nothing_is_set_aside(self, change, messages):
    self.save(1, 2)
    with self.assertRaisesRegex(ValueError, f'{self.folder}/2 .*\n.*' + '.*\n.*'.join(messages)):
      self.restore(change(make_state(0)))
    self.assertEqual({p.name for p in self.folder.iterdir()}, {'1', '2'})
    self.assertEqual(self.restore()[1], {'iteration': 2})

  def test_many_other_arrays_are_counted(self):
    self.save(1)
    state = make_state(0).replace(params={str(i): jnp.zeros(1) for i in range(20)})
    with self.assertRaisesRegex(ValueError, r'params/17: absent there.*\n  and 12 more$'):
      self.restore(state)

  def test_nothing_is_set_aside_before_one_is_read(self):
    self.save(1, 2)
    self.damage(2, 'state/_METADATA', True)
    with self.assertRaisesRegex(ValueError, '/1 holds other arrays'):
      self.restore(make_state(0).replace(ema=None))
    self.assertEqual({p.name for p in self.folder.iterdir()}, {'1', '2'})


class ConfigTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / 'run'
    self.config = ml_collections.ConfigDict(
      {'seed': 0, 'model': {'width': 8, 'mesh': (1, 2)}, 'rate': 0.1}
    )
    workdir_lib.check_config(self.workdir, self.config)

  def test_same_config_passes(self):
    self.assertEqual(
      json.loads((self.workdir / 'config.json').read_text()),
      {'seed': 0, 'model': {'width': 8, 'mesh': [1, 2]}, 'rate': 0.1},
    )
    workdir_lib.check_config(self.workdir, self.config)

  def test_differing_keys_are_listed(self):
    other = ml_collections.ConfigDict(
      {'seed': 1, 'model': {'width': 16, 'mesh': (1, 2)}, 'new': True}
    )
    with self.assertRaises(ValueError) as caught:
      workdir_lib.check_config(self.workdir, other)
    message = str(caught.exception)
    for part in (
      str(self.workdir),
      'seed: 0 there, 1 here',
      'model.width: 8 there, 16 here',
      "rate: 0.1 there, 'absent' here",
      "new: 'absent' there, True here",
    ):
      self.assertIn(part, message)
    self.assertNotIn('mesh', message)

  def test_keys_that_change_no_result_may_differ(self):
    config = base.get_config()
    workdir = self.workdir / 'base'
    workdir_lib.check_config(workdir, config)
    config.parallel.update(
      mesh=(2, 4, 1), rollout_mesh=(8, 1, 1), micro_batches=2, group_parts=4, joint=True
    )
    config.update(log_every=60, report=False)
    config.study.workers, config.compile.topology = 2, 'v5p:4x4x4'
    config.align.checks.mismatch.image_max = 0.5
    config.sample.prompt, config.convert.shards, config.compile.image_size = 'a dog', 3, 64
    workdir_lib.check_config(workdir, config)
    found = json.loads((workdir / 'config.json').read_text())
    self.assertEqual((found['parallel']['mesh'], found['study']['workers']), ([2, 4, 1], 2))
    config.evaluate.steps += 1
    with self.assertRaisesRegex(ValueError, r'same values:\n  evaluate.steps: 10 there, 11 here$'):
      workdir_lib.check_config(workdir, config)
    self.assertEqual(json.loads((workdir / 'config.json').read_text()), found)

  def test_an_older_workdir_goes_on_with_the_defaults_of_new_keys(self):
    path = self.workdir / 'config.json'
    config = base.get_config()
    old = json.loads(config.to_json())
    del old['align']['dynamic_sampling']['rounds'], old['vae']
    path.write_text(json.dumps(old))
    config.align.dynamic_sampling.rounds = 1
    with self.assertRaisesRegex(
      ValueError, "values:\n  align.dynamic_sampling.rounds: 'absent' there, 1 here$"
    ):
      workdir_lib.check_config(self.workdir, config)
    config.align.dynamic_sampling.rounds = 0
    with self.assertLogs(level='WARNING') as logs:
      workdir_lib.check_config(self.workdir, config)
    self.assertIn(
      'defaults align.dynamic_sampling.rounds = 0, vae.channels = 40, vae.images = 3000',
      logs.output[0],
    )
    with self.assertNoLogs(level='WARNING'):  # The defaults are in the file now.
      workdir_lib.check_config(self.workdir, config)
    del old['align']['checkpoints']['keep_best']
    old['align']['gone'] = 1
    path.write_text(json.dumps(old))
    with self.assertRaisesRegex(ValueError, "values:\n  align.gone: 1 there, 'absent' here$"):
      workdir_lib.check_config(self.workdir, config)

  def test_written_file_replaces_the_old_one(self):
    path = self.workdir / 'x.json'
    for value in ({'a': 1}, [2]):
      workdir_lib.write_json(path, value)
      self.assertEqual(json.loads(path.read_text()), value)
    self.assertEqual({p.name for p in self.workdir.iterdir()}, {'config.json', 'x.json'})

  def test_flatten(self):
    self.assertEqual(
      workdir_lib.flatten({'a': {'b': {'c': 1}, 'd': 2}, 'e': 3}), {'a.b.c': 1, 'a.d': 2, 'e': 3}
    )


if __name__ == '__main__':
  absltest.main()
