"""Tests of dynamic sampling: rounds of prompts whose numbers tell where they come from."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.training import dynamic_sampling

GROUP = 3


def sampled(first, varies, valid=None):
  """Prompts numbered from `first`; the groups of some vary."""
  B = len(varies)
  number = np.arange(first, first + B, dtype=np.float32)
  value = np.where(np.array(varies)[:, None], np.arange(GROUP, dtype=np.float32), 1.0)
  valid = np.ones((B, GROUP), bool) if valid is None else valid

  def put(x):
    return jax.device_put(x, jax.devices()[0])

  constant = types.Rewards(put(np.full((B, GROUP), 0.5, np.float32)), put(np.ones_like(valid)))
  return jax.tree.map(
    put,
    dynamic_sampling.ScoredTrajectory(
      {'number': number, 'none': np.zeros((B, 0))},
      {'rules': types.Rewards(value + number[:, None], valid), 'other': constant},
      {'correct': np.repeat(number[:, None], GROUP, axis=1)},
      None,
    ),
  )


class DynamicSamplingTest(parameterized.TestCase):
  def test_informative(self):
    valid = np.ones((3, GROUP), bool)
    valid[2, 1:] = False  # One sample is left, which varies from nobody.
    np.testing.assert_array_equal(
      dynamic_sampling.informative(sampled(0, [True, False, True], valid).rewards),
      [True, False, False],
    )

  def test_one_component_decides(self):
    rewards = sampled(0, [True, False]).rewards
    np.testing.assert_array_equal(dynamic_sampling.informative(rewards, 'rules'), [True, False])
    np.testing.assert_array_equal(dynamic_sampling.informative(rewards, 'other'), [False, False])
    np.testing.assert_array_equal(dynamic_sampling.informative(rewards, 'absent'), [True, False])

  @parameterized.parameters(
    ('0100', '1111', [0, 4, 2, 3]),
    ('1111', '0101', [5, 7, 2, 3]),
    ('0000', '1111', [0, 1, 2, 3]),
    ('1011', '1101', [4, 1, 5, 7]),
  )
  def test_places(self, dead, alive, want):
    def bits(text):
      return np.array([c == '1' for c in text])

    np.testing.assert_array_equal(dynamic_sampling.replacement_rows(bits(dead), bits(alive)), want)

  def test_rounds_until_nothing_is_dead(self):
    rounds = iter(
      [
        {'a': sampled(10, [False, True, False]), 'b': sampled(20, [True] * 3)},
        {'a': sampled(30, [False, False, True])},
      ]
    )
    asked = []

    def draw(names):
      asked.append(list(names))
      return next(rounds)

    found = {
      'a': sampled(0, [False, True, False]),
      'b': sampled(5, [True, True, False]),
      'c': sampled(8, [True] * 3),
    }
    got, metrics = dynamic_sampling.replace_constant_groups(found, 4, '', draw, lambda rows: rows)
    self.assertEqual(asked, [['a', 'b'], ['a']])  # No third round: nothing is dead.
    numbers = {task: s.trajectory['number'].tolist() for task, s in got.items()}
    self.assertEqual(
      numbers, {'a': [11.0, 1.0, 32.0], 'b': [5.0, 6.0, 20.0], 'c': [8.0, 9.0, 10.0]}
    )
    for task, s in got.items():
      np.testing.assert_array_equal(s.facts['correct'][:, 0], numbers[task])
      np.testing.assert_array_equal(s.rewards['rules'].value_BG[:, 0], numbers[task])
      self.assertEqual(s.trajectory['none'].shape, (3, 0))
    self.assertEqual(
      metrics,
      {
        'dynamic_sampling/a/rounds': 2.0,
        'dynamic_sampling/b/rounds': 1.0,
        'dynamic_sampling/c/rounds': 0.0,
        'dynamic_sampling/a/dead': 0.0,
        'dynamic_sampling/b/dead': 0.0,
        'dynamic_sampling/c/dead': 0.0,
      },
    )

  def test_rounds_are_bounded(self):
    def draw(names):
      return {'a': sampled(10, [False, False])}

    got, metrics = dynamic_sampling.replace_constant_groups(
      {'a': sampled(0, [True, False])}, 3, 'rules', draw, lambda rows: rows
    )
    self.assertEqual(got['a'].trajectory['number'].tolist(), [0.0, 1.0])
    self.assertEqual(metrics, {'dynamic_sampling/a/rounds': 3.0, 'dynamic_sampling/a/dead': 0.5})


if __name__ == '__main__':
  absltest.main()
