"""Tests of lvrpo_jax.rewards.mutual on channels whose information is known."""

from absl.testing import absltest
import numpy as np
from scipy import special

from lvrpo_jax.rewards import mutual


def log_q(logits, answer):
  return np.log(0.95 * special.softmax(logits)[answer] + 0.05 / len(logits))


class GainTest(absltest.TestCase):
  def test_by_hand(self):
    rng = np.random.default_rng(0)
    seen, blind = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 1, 5))
    answer = rng.integers(0, 5, (2, 3))
    want = np.array(
      [
        [log_q(seen[b, g], a) - log_q(blind[b, 0], a) for g, a in enumerate(row)]
        for b, row in enumerate(answer)
      ]
    )
    np.testing.assert_allclose(mutual.gain(seen, blind, answer), want, atol=1e-5)

  def test_sure_mistakes_and_missing_answers_are_bounded(self):
    seen, blind = np.array([[[90.0, 0.0], [-90.0, 0.0], [0.0, 0.0]]]), np.array([[[90.0, 0.0]]])
    got = np.asarray(mutual.gain(seen, blind, np.array([[0, 0, -1]])))
    np.testing.assert_allclose(
      got, [[0.0, np.log(0.025 / 0.975), np.log(0.025)]], rtol=1e-5, atol=1e-6
    )

  def test_q_is_a_distribution_over_answers(self):
    logits = np.random.default_rng(0).normal(size=6) * 9
    values = mutual.log_q(np.broadcast_to(logits, (6, 6)), np.arange(6))
    self.assertAlmostEqual(float(np.exp(values).sum()), 1.0, places=5)
    self.assertGreaterEqual(values.min(), np.log(0.05 / 6) - 1e-5)

  def test_the_mean_is_a_lower_bound_on_the_information(self):
    """T is a word, V a noisy picture of it; the posterior makes the bound tight, but for the share
    of guesses in q."""
    rng = np.random.default_rng(1)
    prior = np.array([0.5, 0.3, 0.2])
    channel = np.array([[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.2, 0.2, 0.6]])
    joint = prior[:, None] * channel
    information = np.sum(joint * np.log(joint / (prior[:, None] * joint.sum(0))))
    t, v = np.unravel_index(rng.choice(9, 40_000, p=joint.ravel()), (3, 3))
    entropy = -np.mean(np.log(prior)[t])

    def bound(q_VT):
      return float(np.mean(mutual.log_q(np.log(q_VT)[v], t))) + entropy

    self.assertBetween(bound((joint / joint.sum(0)).T), information - 0.03, information + 0.01)
    for sharp in (3.0, 0.01):  # Also of a judge that is sure and wrong.
      for _ in range(5):
        q_VT = np.maximum(rng.dirichlet(np.ones(3) * sharp, size=3), 1e-30)
        self.assertLess(bound(q_VT), information + 0.01)


class QuestionsTest(absltest.TestCase):
  def test_questions_that_tell_of_the_text_leave_a_bound(self):
    """T is a shape and a colour of two each, V a noisy picture of both. What is asked, the colour of
    a shape that the question names, gives the shape away."""
    rng = np.random.default_rng(2)
    count = 60_000
    shape, color = rng.integers(0, 2, (2, count))
    seen_shape, seen_color = (np.where(rng.random(count) < 0.9, x, 1 - x) for x in (shape, color))

    def entropy(p):
      return -np.sum(p * np.log(p))

    one = np.log(2) - entropy(np.array([0.9, 0.1]))  # Of each attribute: a symmetric channel.
    information = 2 * one
    posterior = np.where(np.arange(2) == seen_color[:, None], 0.9, 0.1)
    del shape, seen_shape
    gain = mutual.gain(
      np.log(posterior)[None, :, None], np.zeros((1, count, 1, 2)), color[None, :, None]
    )
    mean = float(np.mean(mutual.total(gain, np.ones((count, 1), bool), np.ones(count))))
    # Blind q is the entropy of the colour given the question here, so nothing is exceeded.
    self.assertBetween(mean, one - 0.03, one + 0.01)
    self.assertLess(mean, information)


class TotalTest(absltest.TestCase):
  GAIN = np.random.default_rng(0).normal(size=(4, 2, 3))
  NUMBER = np.array([3.0, 4.0])

  def test_all_questions_add_up(self):
    asked = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    found = mutual.total(self.GAIN, asked, self.NUMBER)
    np.testing.assert_allclose(found, [self.GAIN[:3, 0].sum(0), self.GAIN[:, 1].sum(0)], rtol=1e-5)

  def test_some_by_turns_have_that_mean(self):
    everything = mutual.total(self.GAIN, np.ones((2, 4), bool), np.array([4.0, 4.0]))
    single = [
      mutual.total(self.GAIN[q : q + 1], np.ones((2, 1), bool), np.array([4.0, 4.0]))
      for q in range(4)
    ]
    np.testing.assert_allclose(np.mean(single, axis=0), everything, rtol=1e-5)

  def test_a_prompt_without_questions_is_worth_nothing(self):
    found = mutual.total(self.GAIN[:1], np.array([[False], [True]]), np.array([0.0, 1.0]))
    np.testing.assert_allclose(found, [np.zeros(3), self.GAIN[0, 1]], rtol=1e-5)


if __name__ == '__main__':
  absltest.main()
