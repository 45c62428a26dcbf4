"""Tests of lvrpo_jax.rewards.mutual on channels whose information is known."""

from absl.testing import absltest
import numpy as np
from scipy import special

from lvrpo_jax.rewards import mutual


class GainTest(absltest.TestCase):

  def test_by_hand(self):
    rng = np.random.default_rng(0)
    seen, blind = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 1, 5))
    token = rng.integers(0, 5, (2, 3))
    want = np.array([[special.log_softmax(seen[b, g])[t] - special.log_softmax(blind[b, 0])[t]
                      for g, t in enumerate(row)] for b, row in enumerate(token)])
    np.testing.assert_allclose(mutual.gain(seen, blind, token), want, atol=1e-5)

  def test_bounds_and_missing_answers(self):
    seen, blind = np.array([[[90., 0.], [-90., 0.], [0., 0.]]]), np.zeros((1, 1, 2))
    got = np.asarray(mutual.gain(seen, blind, np.array([[0, 0, -1]])))
    np.testing.assert_allclose(got, [[np.log(2), -mutual.BOUND, -mutual.BOUND]], rtol=1e-6)

  def test_the_mean_is_a_lower_bound_on_the_information(self):
    """T is a word, V a noisy picture of it; the posterior makes the bound tight."""
    rng = np.random.default_rng(1)
    prior = np.array([.5, .3, .2])
    channel = np.array([[.8, .1, .1], [.1, .7, .2], [.2, .2, .6]])
    joint = prior[:, None] * channel
    information = np.sum(joint * np.log(joint / (prior[:, None] * joint.sum(0))))
    t, v = np.unravel_index(rng.choice(9, 40_000, p=joint.ravel()), (3, 3))
    mean = lambda q_VT: float(np.mean(mutual.gain(np.log(q_VT)[v], np.log(prior), t)))
    self.assertAlmostEqual(mean((joint / joint.sum(0)).T), information, delta=.01)
    for _ in range(5):
      self.assertLess(mean(rng.dirichlet(np.ones(3) * 3, size=3)), information + .01)


if __name__ == '__main__':
  absltest.main()
