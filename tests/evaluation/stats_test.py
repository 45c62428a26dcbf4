"""Tests of intervals and paired tests."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from scipy import stats as scipy_stats

from lvrpo_jax.evaluation import stats


def clustered(rng, clusters, size, shift=0.0):
  """Values whose clusters share an offset, and their labels."""
  label_N = np.repeat(np.arange(clusters), size)
  return shift + rng.normal(size=clusters)[label_N] + 0.3 * rng.normal(size=label_N.size), label_N


class BootstrapTest(parameterized.TestCase):
  def test_mean_and_width_of_independent_items_match_the_normal_interval(self):
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = stats.bootstrap_ci(values, range(400), seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    self.assertAlmostEqual(mean, values.mean(), places=12)
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.1 * half)

  @parameterized.parameters(True, False)
  def test_coverage_holds_with_cluster_labels_and_fails_without(self, labelled):
    rng = np.random.default_rng(2)
    hits = []
    for trial in range(300):
      values, label_N = clustered(rng, clusters=40, size=5)
      labels = label_N if labelled else np.arange(values.size)
      _, low, high = stats.bootstrap_ci(values, labels, seed=trial, draws=300)
      hits.append(low <= 0 <= high)
    if labelled:
      self.assertBetween(np.mean(hits), 0.90, 0.985)
    else:
      self.assertLess(np.mean(hits), 0.8)

  def test_a_cluster_is_drawn_whole(self):
    # Two clusters of unequal size: the only resampled means are 0, 1 and 3/4.
    _, low, high = stats.bootstrap_ci([0, 1, 1, 1], ['a', 'b', 'b', 'b'], seed=0, level=0.4)
    self.assertEqual((low, high), (0.75, 0.75))
    _, low, high = stats.bootstrap_ci([0, 1, 1, 1], ['a', 'b', 'b', 'b'], seed=0)
    self.assertEqual((low, high), (0.0, 1.0))

  def test_seed_and_level(self):
    values = np.random.default_rng(3).random(60)
    first, again, other = (stats.bootstrap_ci(values, range(60), seed=s) for s in (4, 4, 5))
    narrow = stats.bootstrap_ci(values, range(60), seed=4, level=0.5)
    self.assertEqual(first, again)
    self.assertNotEqual(first, other)
    self.assertLess(narrow[2] - narrow[1], first[2] - first[1])

  def test_labels_of_any_hashable_kind_and_any_order(self):
    rng = np.random.default_rng(6)
    values, label_N = clustered(rng, 20, 3)
    names = [('meaning', int(label)) for label in label_N]
    self.assertEqual(
      stats.bootstrap_ci(values, names, seed=0), stats.bootstrap_ci(values, label_N, seed=0)
    )

  @parameterized.parameters(([], []), ([1.0, 2.0], [0]), ([math.nan], [0]), ([[1.0]], [0]))
  def test_refuses(self, values, clusters):
    with self.assertRaises(ValueError):
      stats.bootstrap_ci(values, clusters, seed=0)

  def test_refuses_level(self):
    with self.assertRaises(ValueError):
      stats.bootstrap_ci([1.0, 2.0], [0, 1], seed=0, level=95)


class PairedTest(parameterized.TestCase):
  def test_without_clusters_it_is_the_textbook_test(self):
    rng = np.random.default_rng(0)
    before, after = rng.random(80), rng.random(80) + 0.1
    result = stats.paired_test(before, after, range(80))
    d = after - before
    self.assertAlmostEqual(result['difference'], d.mean(), places=12)
    self.assertAlmostEqual(result['se'], d.std(ddof=1) / math.sqrt(80), places=12)
    z = result['difference'] / result['se']
    self.assertAlmostEqual(result['p'], 2 * scipy_stats.norm.sf(abs(z)), places=12)
    self.assertEqual(result['n'], 80)

  def test_equal_clusters_are_a_test_of_cluster_means(self):
    rng = np.random.default_rng(1)
    d, label_N = clustered(rng, 30, 4, shift=0.2)
    result = stats.paired_test(np.zeros(120), d, label_N)
    mean_K = d.reshape(30, 4).mean(1)
    self.assertAlmostEqual(result['difference'], mean_K.mean(), places=12)
    self.assertAlmostEqual(result['se'], mean_K.std(ddof=1) / math.sqrt(30), places=12)

  def test_false_alarms_are_at_the_nominal_rate(self):
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(1000):
      d, label_N = clustered(rng, 60, 3)
      p_values.append(stats.paired_test(np.zeros(180), d, label_N)['p'])
    self.assertBetween(np.mean(np.array(p_values) < 0.05), 0.03, 0.075)

  def test_swapping_changes_the_sign_only(self):
    rng = np.random.default_rng(3)
    before, after, label_N = rng.random(40), rng.random(40), np.repeat(range(10), 4)
    forth, back = (stats.paired_test(x, y, label_N) for x, y in ((before, after), (after, before)))
    self.assertAlmostEqual(forth['difference'], -back['difference'], places=14)
    self.assertAlmostEqual(forth['se'], back['se'], places=14)
    self.assertAlmostEqual(forth['p'], back['p'], places=12)

  def test_tiny_p_does_not_round_to_zero(self):
    rng = np.random.default_rng(4)
    result = stats.paired_test(np.zeros(400), 1 + rng.normal(size=400), range(400))
    z = result['difference'] / result['se']
    self.assertGreater(z, 15)
    self.assertGreater(result['p'], 0)
    self.assertAlmostEqual(
      math.log(result['p']) / (math.log(2) + scipy_stats.norm.logsf(z)), 1.0, 9
    )

  def test_few_clusters_cannot_give_a_small_p(self):
    self.assertEqual(stats.paired_test([0] * 6, [1] * 6, [0, 0, 0, 1, 1, 1])['p'], 0.5)
    one = stats.paired_test([0, 0], [1, 1], ['a', 'a'])
    self.assertEqual((one['difference'], one['se'], one['p']), (1.0, math.inf, 1.0))

  def test_no_change_is_no_evidence(self):
    self.assertEqual(
      stats.paired_test([0, 1, 1], [0, 1, 1], range(3)),
      {'difference': 0.0, 'se': 0.0, 'p': 1.0, 'n': 3},
    )

  def test_refuses_unequal_lengths(self):
    with self.assertRaises(ValueError):
      stats.paired_test([0.0, 1.0], [1.0], [0, 1])


class MacroTest(parameterized.TestCase):
  def test_categories_weigh_the_same(self):
    mean, low, high = stats.macro_average(
      {'many': ([1.0] * 90, range(90)), 'few': ([0.0] * 3, range(3))}, seed=0
    )
    self.assertEqual((mean, low, high), (0.5, 0.5, 0.5))

  def test_interval_width_is_stratified(self):
    rng = np.random.default_rng(0)
    # The spread between categories is large and must not enter the interval.
    groups = {str(c): (10 * c + rng.normal(size=100), range(100)) for c in range(4)}
    mean, low, high = stats.macro_average(groups, seed=1)
    half = 1.96 * math.sqrt(sum(v.var(ddof=1) / 100 for v, _ in groups.values())) / 4
    self.assertAlmostEqual(mean, np.mean([v.mean() for v, _ in groups.values()]), places=12)
    self.assertAlmostEqual((high - low) / 2, half, delta=0.1 * half)

  def test_order_of_categories_does_not_matter(self):
    rng = np.random.default_rng(1)
    groups = {name: (rng.random(20), range(20)) for name in 'abc'}
    self.assertEqual(
      stats.macro_average(groups, seed=2),
      stats.macro_average(dict(reversed(groups.items())), seed=2),
    )

  def test_paired_closed_form(self):
    rng = np.random.default_rng(2)
    groups = {
      name: (rng.random(n), rng.random(n), np.arange(n) // 2)
      for name, n in (('a', 20), ('b', 60), ('c', 40))
    }
    alone = [stats.paired_test(*group) for group in groups.values()]
    result = stats.macro_paired_test(groups)
    self.assertAlmostEqual(result['difference'], np.mean([r['difference'] for r in alone]))
    self.assertAlmostEqual(result['se'], math.sqrt(sum(r['se'] ** 2 for r in alone)) / 3)
    self.assertEqual(result['n'], 120)

  def test_one_category_is_the_plain_test(self):
    rng = np.random.default_rng(3)
    group = (rng.random(30), rng.random(30), np.arange(30) // 3)
    self.assertEqual(stats.macro_paired_test({'a': group}), stats.paired_test(*group))

  def test_refuses_no_category(self):
    with self.assertRaises(ValueError):
      stats.macro_average({}, seed=0)
    with self.assertRaises(ValueError):
      stats.macro_paired_test({})


class EntropyTest(parameterized.TestCase):
  @parameterized.parameters(
    ([3, 3, 3, 3], math.log(4)),
    ([7, 0, 0], 0.0),
    ([], 0.0),
    ([0, 0], 0.0),
    ({'red': 2, 'blue': 2}, math.log(2)),
  )
  def test_closed_forms(self, counts, expected):
    self.assertAlmostEqual(stats.entropy(counts), expected, places=12)

  def test_against_scipy_and_scale(self):
    counts = np.random.default_rng(0).integers(0, 9, 12)
    self.assertAlmostEqual(stats.entropy(counts), scipy_stats.entropy(counts), places=12)
    self.assertAlmostEqual(stats.entropy(counts / counts.sum()), stats.entropy(counts), places=12)

  def test_refuses_negative(self):
    with self.assertRaises(ValueError):
      stats.entropy([1, -1])


class InformationTest(absltest.TestCase):
  def test_terms_against_loops(self):
    logits = np.random.default_rng(0).normal(size=(2, 5, 5)) * 3
    expected = [
      [np.log(np.exp(row[k]) / np.mean(np.exp(row))) for k, row in enumerate(one)] for one in logits
    ]
    np.testing.assert_allclose(stats.information_terms(logits), expected, atol=1e-12)

  def test_bounds(self):
    perfect = stats.information_terms(1e4 * np.eye(7)[None])
    np.testing.assert_allclose(perfect, np.log(7), atol=1e-9)
    np.testing.assert_allclose(stats.information_terms(np.ones((3, 7, 7))), 0.0, atol=1e-12)

  def test_never_above_the_information_of_a_gaussian_channel(self):
    # V = T + noise in 1 dimension has I(T;V) = log(1 + s^2) / 2 with signal s over unit noise.
    rng = np.random.default_rng(1)
    for signal in (0.3, 1.0, 3.0):
      text = rng.normal(size=(200, 64)) * signal
      image = text + rng.normal(size=text.shape)
      best = -0.5 * (image[:, :, None] - text[:, None, :]) ** 2
      exact = 0.5 * np.log(1 + signal**2)
      self.assertLess(stats.information_terms(best).mean(), exact + 0.02)
      self.assertGreater(stats.information_terms(best).mean(), 0.8 * exact)
      worse = stats.information_terms(0.3 * best).mean()
      self.assertLess(worse, stats.information_terms(best).mean())

  def test_shared_shifts_change_nothing(self):
    logits = np.random.default_rng(2).normal(size=(1, 4, 4))
    np.testing.assert_allclose(
      stats.information_terms(logits + 1e3), stats.information_terms(logits), atol=1e-9
    )

  def test_refuses_what_is_not_square_or_finite(self):
    for bad in (np.zeros((4, 4)), np.zeros((1, 4, 3)), np.full((1, 2, 2), np.nan)):
      with self.assertRaises(ValueError):
        stats.information_terms(bad)


if __name__ == '__main__':
  absltest.main()
