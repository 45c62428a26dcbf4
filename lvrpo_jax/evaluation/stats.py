"""Intervals and tests for scores of clustered items, such as prompts that share a meaning."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
import math

import numpy as np

Values = Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray


def bootstrap_ci(
  values: Values, clusters: Clusters, seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
  """Returns the mean of `values` and its percentile interval from a cluster bootstrap.

  Whole clusters are drawn with replacement, so items that share a meaning enter a resample
  together (Efron and Tibshirani, An Introduction to the Bootstrap, 1993).

  Args:
    values: scores, any unit, [items].
    clusters: a label for each item, [items]; labels that all differ mean independent items.
    seed: of the draws; the same seed gives the same interval.
    draws: number of bootstrap resamples.
    level: nominal coverage, in (0, 1).

  Returns:
    (mean, low, high) in the unit of `values`.

  Raises:
    ValueError: empty, not finite or unequal inputs, or a level outside (0, 1).
  """
  total_K, size_K = _cluster_sums(_checked(values, clusters), clusters)
  drawn = _resampled_means(np.random.default_rng(seed), total_K, size_K, draws)
  return float(total_K.sum() / size_K.sum()), *_percentiles(drawn, level)


def macro_average(
  groups: Mapping[str, tuple[Values, Clusters]], seed: int, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
  """Returns the mean of the category means, with an interval that resamples within categories.

  Args:
    groups: category -> (values, clusters), as in `bootstrap_ci`.
    seed: of the draws; each category draws from its own stream, in the order of its name.
    draws: number of bootstrap resamples.
    level: nominal coverage, in (0, 1).

  Returns:
    (mean, low, high) in the unit of the values.

  Raises:
    ValueError: no category, or a category that `bootstrap_ci` refuses.
  """
  if not groups:
    raise ValueError('a macro average needs at least one category')
  names = sorted(groups)
  means, drawn = [], np.zeros(draws)
  for name, stream in zip(names, np.random.SeedSequence(seed).spawn(len(names)), strict=True):
    values, clusters = groups[name]
    total_K, size_K = _cluster_sums(_checked(values, clusters), clusters)
    means.append(total_K.sum() / size_K.sum())
    drawn += _resampled_means(np.random.default_rng(stream), total_K, size_K, draws)
  return float(np.mean(means)), *_percentiles(drawn / len(names), level)


def paired_test(before: Values, after: Values, clusters: Clusters) -> dict[str, float]:
  """Tests a mean paired difference, two-sided and robust to clusters.

  With d = after - before, K clusters and n items, the variance of mean(d) is
  K / (K - 1) * sum_k (sum_{i in k} (d_i - mean(d)))^2 / n^2 (Liang and Zeger 1986; Miller 2024,
  arXiv 2411.00640), and p = erfc(|z| / sqrt(2)). A normal p is far too small when a few clusters
  have similar differences, so p is never below 2^(1 - K), the least that a sign-flip test over K
  clusters can return. One cluster gives an infinite error and p = 1.

  Args:
    before: scores before, [items].
    after: scores of the same items after, [items].
    clusters: a label for each item, [items].

  Returns:
    {'difference', 'se', 'p', 'n'}; the first two in the unit of the scores, n items.

  Raises:
    ValueError: empty, not finite or unequal inputs.
  """
  difference, variance, clusters_count, items = _paired_moments(before, after, clusters)
  return _normal_test(difference, variance, clusters_count, items)


def macro_paired_test(groups: Mapping[str, tuple[Values, Values, Clusters]]) -> dict[str, float]:
  """Runs `paired_test` for a macro average: categories weigh the same and are independent.

  The variance is the sum of the categories' cluster variances over the square of their number.

  Args:
    groups: category -> (before, after, clusters), as in `paired_test`.

  Returns:
    {'difference', 'se', 'p', 'n'}, n items of all categories.

  Raises:
    ValueError: no category, or a category that `paired_test` refuses.
  """
  if not groups:
    raise ValueError('a macro average needs at least one category')
  moments = [_paired_moments(*groups[name]) for name in sorted(groups)]
  differences, variances, cluster_counts, items = zip(*moments, strict=True)
  return _normal_test(
    float(np.mean(differences)), sum(variances) / len(groups) ** 2, sum(cluster_counts), sum(items)
  )


def entropy(counts: Values | Mapping[Hashable, float]) -> float:
  """Returns the entropy in nats of counts or weights, which need not sum to one.

  It is 0 when all are 0.

  Raises:
    ValueError: a count is negative or not finite.
  """
  counts_N = np.asarray(list(counts.values()) if isinstance(counts, Mapping) else counts, float)
  if not np.all(np.isfinite(counts_N)) or np.any(counts_N < 0):
    raise ValueError('counts must be finite and not negative')
  share_N = counts_N[counts_N > 0] / max(counts_N.sum(), np.finfo(float).tiny)
  return float(max(0.0, -np.sum(share_N * np.log(share_N))))


def information_terms(logits_GKK: np.ndarray) -> np.ndarray:
  """Returns terms in nats, one an image, whose mean bounds I(T;V) from below.

  term[g, k] = log K + logits[g, k, k] - log sum_j exp(logits[g, k, j]) (InfoNCE, arXiv 1807.03748;
  arXiv 1905.06922, eq. 10). The bound holds for any critic that was not trained on these pairs, and
  no term exceeds log K.

  Args:
    logits_GKK: a critic's logits of image (g, k) and text j; text k is the image's own. Every g is
      a set with one image for each text.

  Returns:
    terms_GK.

  Raises:
    ValueError: logits are not finite, or the numbers of images and texts differ.
  """
  logits_GKK = np.asarray(logits_GKK, np.float64)
  if logits_GKK.ndim != 3 or logits_GKK.shape[1] != logits_GKK.shape[2]:
    raise ValueError(f'expected logits of shape (sets, K images, K texts), got {logits_GKK.shape}')
  if not np.all(np.isfinite(logits_GKK)):
    raise ValueError('logits must be finite')
  most_GK = logits_GKK.max(axis=-1)
  total_GK = most_GK + np.log(np.exp(logits_GKK - most_GK[..., None]).sum(axis=-1))
  own_GK = np.diagonal(logits_GKK, axis1=1, axis2=2)
  return math.log(logits_GKK.shape[-1]) + own_GK - total_GK


def _checked(values: Values, clusters: Clusters) -> np.ndarray:
  """Returns the values as float64.

  Raises:
    ValueError: they are empty or not finite, or there is not one label a value.
  """
  values_N = np.asarray(values, np.float64)
  if values_N.ndim != 1 or not values_N.size or len(clusters) != values_N.size:
    raise ValueError(
      f'expected one label a value and at least one value, got values of shape '
      f'{values_N.shape} and {len(clusters)} labels'
    )
  if not np.all(np.isfinite(values_N)):
    raise ValueError('values must be finite')
  return values_N


def _cluster_sums(values_N: np.ndarray, clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
  """Returns sum and number of the values in each cluster, in order of first appearance."""
  index: dict[Hashable, int] = {}
  label_N = [index.setdefault(label, len(index)) for label in clusters]
  return (
    np.bincount(label_N, weights=values_N, minlength=len(index)),
    np.bincount(label_N, minlength=len(index)).astype(np.float64),
  )


def _resampled_means(
  rng: np.random.Generator, total_K: np.ndarray, size_K: np.ndarray, draws: int
) -> np.ndarray:
  """Returns the means of `draws` resamples of the K clusters with replacement."""
  clusters = len(total_K)
  times_SK = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=draws)
  return (times_SK @ total_K) / (times_SK @ size_K)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
  """Returns the ends of the central interval of this coverage."""
  if not 0 < level < 1:
    raise ValueError(f'level must lie in (0, 1), got {level}')
  low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def _paired_moments(
  before: Values, after: Values, clusters: Clusters
) -> tuple[float, float, int, int]:
  """Returns the mean difference, its cluster variance, and the numbers of clusters and items.

  The variance is infinite for one cluster.
  """
  difference_N = _checked(after, clusters) - _checked(before, clusters)
  mean = float(difference_N.mean())
  residual_K, _ = _cluster_sums(difference_N - mean, clusters)
  count = len(residual_K)
  if count == 1:
    return mean, math.inf, count, difference_N.size
  variance = count / (count - 1) * float(np.sum(residual_K**2)) / difference_N.size**2
  return mean, variance, count, difference_N.size


def _normal_test(difference: float, variance: float, clusters: int, items: int) -> dict[str, float]:
  """Returns the test of a difference whose estimate is normal, see `paired_test`."""
  se = math.sqrt(variance)
  if difference == 0 or math.isinf(se):
    p = 1.0
  else:
    z = abs(difference) / se if se else math.inf
    p = max(math.erfc(z / math.sqrt(2)), 2.0 ** (1 - clusters))
  return {'difference': difference, 'se': se, 'p': p, 'n': items}
