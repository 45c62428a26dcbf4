"""Waits for the scores of a remote judge."""

from concurrent import futures
import threading
import time

from absl.testing import absltest
import numpy as np

from lvrpo_jax import asking
from lvrpo_jax import checkpoint
from lvrpo_jax.rewards import remote

SCORED = remote.Scored(np.ones((1, 1), np.float32), np.ones((1, 1), bool),
                       {'asked': 1., 'failed': 0.})


class AskedTest(absltest.TestCase):

  def future(self, delay, **outcome):
    """Done after so many seconds, with a `result` or an `exception`."""
    future, (name, value) = futures.Future(), next(iter(outcome.items()))
    timer = threading.Timer(delay, getattr(future, f'set_{name}'), [value])
    timer.start()
    self.addCleanup(timer.join)
    return future

  def test_scores_and_counts(self):
    asked = asking.Asked({'edit': self.future(.1, result=SCORED)}, self.fail)
    self.assertIn('edit', asked)
    self.assertNotIn('generate', asked)
    self.assertIs(asked.result('edit'), SCORED)
    self.assertEqual(asked.metrics(), {'judge/edit/asked': 1., 'judge/edit/failed': 0.})

  def test_a_wait_asks_whether_to_stop(self):
    checks = []
    asked = asking.Asked({'edit': self.future(2.3, result=SCORED)}, lambda: checks.append(1))
    asked.result('edit')
    self.assertLen(checks, 2)

  def test_a_stop_leaves_the_wait(self):
    def stop():
      raise checkpoint.Preempted('asked to stop')
    asked = asking.Asked({'edit': self.future(4., result=SCORED)}, stop)
    start = time.monotonic()
    with self.assertRaises(checkpoint.Preempted):
      asked.result('edit')
    self.assertLess(time.monotonic() - start, 3.)

  def test_failures_are_those_of_the_judge(self):
    for error in (remote.JudgeUnavailable('no server'), RuntimeError('closed')):
      asked = asking.Asked({'edit': self.future(0., exception=error)}, self.fail)
      with self.assertRaises(type(error)) as caught:
        asked.result('edit')
      self.assertIs(caught.exception, error)


if __name__ == '__main__':
  absltest.main()
