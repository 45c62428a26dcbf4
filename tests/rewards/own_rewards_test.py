"""Rewards of a user's own by import path, and any number of rewards of a task."""

import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax.data import tasks
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.programs import train
from lvrpo_jax.rewards import base
from lvrpo_jax.training import align
from lvrpo_jax.training import reward_metrics
from tests.helpers import scene as scene_lib

ROWS, GROUP, Scene = scene_lib.ROWS, scene_lib.GROUP, scene_lib.Scene
SHAPE = ROWS, GROUP
GIVEN = {}
"""What `given` gives."""


def given(samples):
  """A function as a reward."""
  assert samples.shape == SHAPE
  assert len(samples.examples) == ROWS
  return GIVEN['value'], GIVEN['valid']


def brightness(samples):
  """A function that reads images."""
  value_BG = samples.images_BGYXC.mean(axis=(2, 3, 4)) / 255.0
  return value_BG, np.ones(value_BG.shape, bool)


class Bright:
  """A class on the host with a setting, which scores images alone and has a fact to log."""

  outputs = frozenset((tasks.IMAGE,))
  runs_on = base.HOST

  def __init__(self, task, settings, experiment):
    self._limit, self.task, self.experiment = settings.limit, task, experiment

  def __call__(self, samples):
    assert samples.task == self.task
    value_BG = samples.images_BGYXC.mean(axis=(2, 3, 4))
    return base.Scores(
      value_BG - self._limit, value_BG < 128, {f'bright/{self.task}': value_BG > self._limit}
    )


class Probe:
  """A class on devices: a linear probe with weights of its own on what the task samples."""

  outputs = frozenset((tasks.TEXT, tasks.IMAGE))
  runs_on = base.DEVICE
  loads = 0

  def __init__(self, task, settings, experiment):
    self._task, self._settings, self._vocabulary = task, settings, len(experiment.data.tokenizer)

  def weights(self):
    """One for every channel, or for every token."""
    size = self._vocabulary if self._task == tasks.UNDERSTAND else 3
    return np.random.default_rng(self._settings.seed).normal(size=size).astype(np.float32)

  def load(self, frozen):
    type(self).loads += 1
    return {'weight': jnp.asarray(self.weights()), 'bias': frozen.vae['scale'][0]}

  def prepare(self, samples):
    lengths_B = np.array([len(e.prompt.split()) for e in samples.examples], np.float32)
    facts = {f'lengths/{self._task}': np.repeat(lengths_B[:, None], GROUP, axis=1)}
    return base.Prepared({'length_B': lengths_B}, lengths_B > self._settings.least, facts)

  def __call__(self, params, frozen, samples, inputs):
    del frozen
    if self._task == tasks.UNDERSTAND:
      seen_BG = jnp.mean(params['weight'][samples.outputs], axis=2)
    else:
      assert samples.outputs.dtype == jnp.uint8
      seen_BG = jnp.mean(samples.outputs / 255.0, axis=(2, 3)) @ params['weight']
    return seen_BG + params['bias'] + inputs['length_B'][:, None]


class Misshapen(Probe):
  """A class on devices that gives another shape."""

  def __call__(self, params, frozen, samples, inputs):
    value_BG = super().__call__(params, frozen, samples, inputs)
    return {'row': value_BG[:, :1], 'prompts': value_BG[:, 0], 'deep': value_BG[..., None]}[
      self._settings.form
    ]


def entry(name, weight=1.0, **settings):
  """An entry of the config for something in this file."""
  return dict(kind=f'{__name__}:{name}', weight=weight, **settings)


class FunctionTest(parameterized.TestCase):
  def scene(self, *names, reward='given'):
    return Scene(rewards={task: {'taste': entry(reward)} for task in names})

  @parameterized.parameters(
    (SHAPE, (ROWS, 1)),
    ((ROWS, 1), SHAPE),
    ((GROUP,), SHAPE),
    (SHAPE, ()),
    ((ROWS * GROUP,), (ROWS * GROUP,)),
  )
  def test_other_shapes_are_refused(self, value, valid):
    scene = self.scene('generate', 'understand')
    for task in ('generate', 'understand'):
      with (
        mock.patch.dict(GIVEN, value=np.zeros(value), valid=np.ones(valid, bool)),
        self.assertRaises(ValueError) as caught,
      ):
        scene.score(task)
      self.assertIn(
        f'config.align.rewards.{task}.taste.kind names a reward that gave arrays of '
        f'shapes {[value, valid]}; expected',
        str(caught.exception),
      )
      self.assertIn(f'shape (B, G) = {SHAPE}', str(caught.exception))

  def test_right_shapes_pass(self):
    value = np.arange(ROWS * GROUP, dtype=np.float32).reshape(SHAPE)
    value[0, 1] = np.nan
    with mock.patch.dict(GIVEN, value=value, valid=(value != 2).astype(int)):
      taste = self.scene('generate').score('generate').rewards['taste']
    np.testing.assert_array_equal(taste.value_BG, np.nan_to_num(value))
    np.testing.assert_array_equal(taste.valid_BG, np.isfinite(value) & (value != 2))
    self.assertEqual(taste.valid_BG.dtype, bool)

  def test_none_is_no_value(self):
    value = [[0.5, None, 1.0, 2.0], [None] * GROUP, [0.0, 0.0, 1.0, float('inf')]]
    with mock.patch.dict(GIVEN, value=value, valid=np.ones(SHAPE, bool)):
      rewards, facts = self.scene('understand').score('understand')
    taste = rewards['taste']
    np.testing.assert_array_equal(taste.value_BG, [[0.5, 0, 1, 2], [0] * 4, [0, 0, 1, 0]])
    np.testing.assert_array_equal(
      taste.valid_BG, [[True, False, True, True], [False] * 4, [True, True, True, False]]
    )
    credit = advantage_lib.combine(rewards, {'taste': 1.0}, 'normalize_then_sum', 0.1)
    np.testing.assert_array_equal(credit.valid_BG, taste.valid_BG)
    np.testing.assert_array_equal(np.asarray(credit.value_BG)[~np.asarray(credit.valid_BG)], 0.0)
    metrics = reward_metrics.reward_metrics('understand', rewards, facts, credit)
    self.assertAlmostEqual(float(metrics['invalid/understand/taste']), 6 / 12)
    self.assertAlmostEqual(float(metrics['reward/understand/taste']), (3.5 + 1) / 6)

  def test_it_sees_the_samples(self):
    scene = self.scene('generate', reward='brightness')
    np.testing.assert_allclose(
      scene.values('generate')['taste'],
      np.asarray(scene.pixels, np.float64).mean(axis=(2, 3, 4)) / 255.0,
      rtol=1e-5,
    )

  def test_a_function_of_images_names_a_task_of_texts(self):
    with self.assertRaisesRegex(ValueError, "outputs of the task 'understand' are texts"):
      self.scene('understand', reward='brightness').score('understand')


class ClassTest(parameterized.TestCase):
  def test_on_the_host(self):
    scene = Scene(rewards={'edit': {'bright': entry('Bright', limit=100.0)}})
    rewards, facts = scene.score('edit')
    mean = np.asarray(scene.pixels, np.float64).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(rewards['bright'].value_BG, mean - 100.0, rtol=1e-4)
    np.testing.assert_array_equal(rewards['bright'].valid_BG, mean < 128)
    self.assertBetween((mean < 128).mean(), 0.1, 0.9)
    np.testing.assert_array_equal(facts['bright/edit'], mean > 100.0)

  @parameterized.parameters('generate', 'understand', 'edit')
  def test_on_devices_with_weights(self, task):
    settings = dict(seed=7, least=4.0)
    Probe.loads = 0
    # Beside others, which share the compiled function.
    scene = Scene(dict(semantic=1.0, rules=1.0), {task: {'probe': entry('Probe', **settings)}})
    examples = [scene.data.example(task, 'align', i) for i in range(40)]

    def length(e):
      return len(e.prompt.split())

    short = min(examples, key=length)
    examples = [short, *[e for e in examples if length(e) > 4][: ROWS - 1]]
    found, facts = scene.score(task, examples)
    scene.score(task, examples, iteration=2)
    self.assertEqual(Probe.loads, 1)
    self.assertEqual(found.keys(), {'semantic', 'rules', 'probe'})
    lengths_B = np.array([length(e) for e in examples], np.float64)
    weights = Probe(task, scene.experiment.config.align.rewards[task].probe, scene.experiment)
    weights = np.float64(weights.weights())
    if task == 'understand':
      seen_BG = weights[np.asarray(scene.tokens)].mean(axis=2)
    else:
      seen_BG = (np.asarray(scene.pixels, np.float64) / 255.0).mean(axis=(2, 3)) @ weights
    want = seen_BG + scene.frozen.vae['scale'][0] + lengths_B[:, None]
    self.assertGreater(want.std(axis=1).min(), 1e-3)
    np.testing.assert_allclose(found['probe'].value_BG, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found['probe'].valid_BG[:, 0], lengths_B > 4)
    np.testing.assert_array_equal(facts[f'lengths/{task}'][:, 1], lengths_B)
    self.assertLess(lengths_B[0], 5)
    self.assertIn('correct', facts)

  @parameterized.parameters(('row', (ROWS, 1)), ('prompts', (ROWS,)), ('deep', (*SHAPE, 1)))
  def test_other_shapes_of_devices_are_refused(self, form, shape):
    scene = Scene(rewards={'generate': {'odd': entry('Misshapen', seed=0, least=0, form=form)}})
    with self.assertRaises(ValueError) as caught:
      scene.score('generate')
    self.assertIn(
      'config.align.rewards.generate.odd.kind names a reward that gave arrays of shapes '
      f'{[shape, SHAPE]}; expected',
      str(caught.exception),
    )


class ModalityTest(parameterized.TestCase):
  @parameterized.parameters(
    ('understand', dict(kind='dense', weight=1.0, top=2), 'text'),
    ('understand', dict(kind='dense', weight=1.0), 'text'),
    ('understand', entry('Bright', limit=1.0), 'text'),
  )
  def test_a_reward_of_another_modality_stops_before_any_work(self, task, settings, output):
    experiment = scene_lib.build(dict(rules=1.0), {task: {'looks': settings}})
    with self.assertRaises(ValueError) as caught:
      align.check(experiment)
    self.assertEqual(
      str(caught.exception),
      f"config.align.rewards.{task}.looks.kind is {settings['kind']!r}, which scores ['image']; "
      f'the task {task!r} samples {output!r}',
    )

  def test_nothing_is_written_by_a_run_that_is_refused(self):
    config = tiny.get_config()
    config.align.rewards.understand.looks = entry('Bright', limit=1.0)
    workdir = pathlib.Path(self.create_tempdir().full_path)
    with self.assertRaisesRegex(ValueError, 'config.align.rewards.understand.looks.kind'):
      train.run(config, workdir)
    self.assertEmpty(list(workdir.iterdir()))


class ManyTest(parameterized.TestCase):
  def test_two_of_a_kind_with_settings_of_their_own(self):
    entries = dict(
      strict=dict(kind='rules', weight=0.5, graded=False, detector='components'),
      soft=dict(kind='rules', weight=2.0, graded=True, detector='rendering'),
      one=dict(kind='knowledge', weight=1.0, questions=1),
      both=dict(kind='knowledge', weight=0.25, questions=2),
      hot=dict(kind='dense', weight=1.0, top=1),
      wide=dict(kind='dense', weight=1.0, top=3),
      first=entry('Probe', seed=1, least=0),
      second=entry('Probe', seed=2, least=0),
      bright=entry('brightness', weight=3.0),
    )
    scene = Scene(rewards={'generate': entries})
    # Right pictures, those of other prompts, and inverted ones, so that the rules vary.
    examples = scene.examples('generate', first=4)
    pictures = [e.target for e in examples]
    scene.pixels = jnp.asarray(
      [[pictures[b], pictures[0], pictures[1], 255 - pictures[b]] for b in range(ROWS)]
    )
    found, _ = scene.score('generate', examples)
    self.assertEqual(found.keys(), entries.keys())
    self.assertEqual(
      scene.scorer.weights['generate'], {name: x['weight'] for name, x in entries.items()}
    )
    for a, b in (('strict', 'soft'), ('one', 'both'), ('hot', 'wide'), ('first', 'second')):
      self.assertGreater(np.abs(found[a].value_BG - found[b].value_BG).max(), 1e-4, (a, b))
    for name, settings in entries.items():
      alone = Scene(rewards={'generate': {'alone': settings}})
      alone.pixels = scene.pixels
      want = alone.score('generate', examples).rewards['alone']
      np.testing.assert_allclose(
        found[name].value_BG, want.value_BG, rtol=1e-5, atol=1e-6, err_msg=name
      )
      np.testing.assert_array_equal(found[name].valid_BG, want.valid_BG)

  def test_their_weights_and_metrics_are_by_name(self):
    names = ('a', 'b', 'c')
    rewards = {'understand': {name: entry('given') for name in names}}
    for weight, name in enumerate(names, 1):
      rewards['understand'][name]['weight'] = float(weight)
    scene = Scene(rewards=rewards)
    value = np.random.default_rng(0).random(SHAPE)
    with mock.patch.dict(GIVEN, value=value, valid=np.ones(SHAPE, bool)):
      found, facts = scene.score('understand')
    weights = scene.scorer.weights['understand']
    self.assertEqual(weights, {'a': 1.0, 'b': 2.0, 'c': 3.0})
    credit = advantage_lib.combine(found, weights, 'normalize_then_sum', 1e-6)
    metrics = reward_metrics.reward_metrics('understand', found, facts, credit)
    for name in names:
      self.assertAlmostEqual(
        float(metrics[f'reward/understand/{name}']), float(np.mean(value)), places=5
      )
      self.assertAlmostEqual(
        float(metrics[f'share/understand/{name}']), weights[name] / 6, places=5
      )

  @parameterized.parameters(
    ('generate', 'mine', dict(kind='dense', top=5), 'mine.top is 5'),
    ('edit', 'mine', dict(kind='rules', graded=True, detector='none'), "mine.detector is 'none'"),
  )
  def test_messages_name_the_entry_and_not_the_kind(self, task, name, settings, message):
    with self.assertRaisesRegex(ValueError, f'config.align.rewards.{task}.{message}'):
      align.check(
        scene_lib.build(
          rewards={task: {name: dict(settings, weight=1.0)}},
          prompts={t: 2 * (t == task) for t in ('generate', 'understand', 'edit')},
        )
      )


if __name__ == '__main__':
  absltest.main()
