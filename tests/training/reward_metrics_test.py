"""Metrics of rewards and advantages by hand."""

from absl.testing import absltest
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.objectives import advantage as advantage_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import reward_metrics


class MetricsTest(absltest.TestCase):
  def test_valid_samples_alone_count(self):
    reward = types.Rewards(
      np.array([[1.0, 3.0, 99.0], [2.0, np.nan, -99.0], [99.0, 99.0, 99.0]], np.float32),
      np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0]], bool),
    )
    failed = types.Rewards(np.full((3, 3), 7.0, np.float32), np.zeros((3, 3), bool))
    credit = advantage_lib.Advantages(None, None, {'a': 0.25, 'b': 0.75}, {'a': 0.5, 'b': 1.0})
    facts = {'correct': np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])}
    metrics = reward_metrics.reward_metrics('edit', {'a': reward, 'b': failed}, facts, credit)
    want = {
      'accuracy/edit/correct': 3 / 9,
      'reward/edit/a': (1 + 3 + 2) / 3,
      'deviation/edit/a': (1.0 + 0.0) / 2,  # Of the two groups that have valid samples.
      'invalid/edit/a': 6 / 9,
      'share/edit/a': 0.25,
      'dead/edit/a': 0.5,
      'reward/edit/b': 0.0,
      'deviation/edit/b': 0.0,
      'invalid/edit/b': 1.0,
      'share/edit/b': 0.75,
      'dead/edit/b': 1.0,
    }
    self.assertEqual(metrics.keys(), want.keys())
    for name, value in want.items():
      self.assertAlmostEqual(float(metrics[name]), value, places=6, msg=name)

  def test_no_facts_no_accuracy(self):
    reward = types.Rewards(np.ones((2, 3), np.float32), np.ones((2, 3), bool))
    credit = advantage_lib.combine(
      {'semantic': reward}, {'semantic': 1.0}, 'normalize_then_sum', 0.1
    )
    metrics = reward_metrics.reward_metrics('generate', {'semantic': reward}, {}, credit)
    self.assertIn('reward/generate/semantic', metrics)
    self.assertFalse([name for name in metrics if name.startswith('accuracy/')])
    self.assertTrue(np.isnan(align.score(metrics, '')))


class TruncatedTest(absltest.TestCase):
  def test_answers_without_an_end_are_counted(self):
    rows, group, length, word, eos = 3, 4, 15, 7, 1
    tokens = np.full((rows, group, length), eos, np.int32)
    tokens[:, :, 0] = word
    tokens[0, 1] = tokens[2, :2] = word  # Without an end token,
    tokens[1, 0, : length - 1] = word  # and with one in the last place.
    found = reward_metrics.truncated(tokens, eos)
    want = np.zeros((rows, group))
    want[0, 1] = want[2, :2] = 1
    np.testing.assert_array_equal(found, want)
    self.assertEqual(found.dtype, np.float32)
    credit = advantage_lib.Advantages(None, None, {}, {})
    facts = {'truncated/understand': found, 'correct': 1 - found}
    metrics = reward_metrics.reward_metrics('understand', {}, facts, credit)
    self.assertAlmostEqual(metrics['truncated/understand'], 3 / (rows * group))
    self.assertIn('accuracy/understand/correct', metrics)


if __name__ == '__main__':
  absltest.main()
