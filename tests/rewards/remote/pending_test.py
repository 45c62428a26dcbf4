"""Waits for the scores of a remote judge."""

from concurrent import futures
import threading
import time
from unittest import mock

from absl.testing import absltest
import numpy as np

from lvrpo_jax.parallel import multihost
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.runtime import preemption

SCORED = remote_client.Scored(
  np.ones((1, 1), np.float32), np.ones((1, 1), bool), {'asked': 1.0, 'failed': 0.0}
)


class ReadyTest(absltest.TestCase):
  def samples(self, looks):
    """Ready at the last of so many looks."""
    array = mock.Mock()
    array.is_ready.side_effect = [False] * (looks - 1) + [True]
    return array

  def test_devices_are_waited_for(self):
    checks, array = [], self.samples(4)
    pending.until_ready(array, lambda: checks.append(1))
    self.assertLen(checks, 3)
    pending.until_ready(self.samples(1), self.fail)

  def test_a_stop_does_not_wait_for_them(self):
    def stop():
      raise preemption.Preempted('asked to stop')

    array = self.samples(100)
    with self.assertRaises(preemption.Preempted):
      pending.PendingRewards({}, stop).until_ready(array)
    array.is_ready.assert_called_once()

  def test_processes_do_not_look_by_themselves(self):
    array = self.samples(4)
    with mock.patch.object(pending.jax, 'process_count', return_value=2):
      pending.until_ready(array, self.fail)
    array.is_ready.assert_not_called()


class PendingTest(absltest.TestCase):
  def future(self, delay, **outcome):
    """Done after so many seconds, with a `result` or an `exception`."""
    future, (name, value) = futures.Future(), next(iter(outcome.items()))
    timer = threading.Timer(delay, getattr(future, f'set_{name}'), [value])
    timer.start()
    self.addCleanup(timer.join)
    return future

  def test_scores_and_counts(self):
    asked = pending.PendingRewards({('edit', 'taste'): self.future(0.1, result=SCORED)}, self.fail)
    for task, name in (('generate', 'taste'), ('edit', 'remote')):
      with self.assertRaises(KeyError):
        asked.result(task, name)
    self.assertIs(asked.result('edit', 'taste'), SCORED)
    self.assertEqual(asked.metrics(), {'judge/edit/asked': 1.0, 'judge/edit/failed': 0.0})

  def test_counts_of_two_rewards_of_a_task_stay_apart(self):
    done = futures.Future()
    done.set_result(SCORED)
    scores = {('edit', 'taste'): done, ('edit', 'truth'): done, ('generate', 'taste'): done}
    self.assertEqual(
      pending.PendingRewards(scores, self.fail).metrics(),
      {
        f'judge/{name}/{count}': value
        for name in ('edit/taste', 'edit/truth', 'generate')
        for count, value in SCORED.stats.items()
      },
    )

  def test_a_wait_asks_whether_to_stop(self):
    checks = []
    asked = pending.PendingRewards(
      {('edit', 'taste'): self.future(2.3, result=SCORED)}, lambda: checks.append(1)
    )
    asked.result('edit', 'taste')
    self.assertLen(checks, 2)

  def test_a_stop_leaves_the_wait(self):
    def stop():
      raise preemption.Preempted('asked to stop')

    asked = pending.PendingRewards({('edit', 'taste'): self.future(4.0, result=SCORED)}, stop)
    start = time.monotonic()
    with self.assertRaises(preemption.Preempted):
      asked.result('edit', 'taste')
    self.assertLess(time.monotonic() - start, 3.0)

  def test_a_judge_that_is_away_and_other_errors(self):
    away, other = remote_client.JudgeUnavailable('no server'), KeyError('score')
    for error in (away, other):
      asked = pending.PendingRewards(
        {('edit', 'taste'): self.future(0.0, exception=error)}, self.fail
      )
      with self.assertRaises(RuntimeError) as caught:
        asked.result('edit', 'taste')
      self.assertIs(caught.exception if error is away else caught.exception.__cause__, error)

  def test_processes_agree_on_what_has_failed(self):
    """What all processes raise, by what each of them has met."""
    away, other = remote_client.JudgeUnavailable('no server'), KeyError('score')
    for errors, kind in (
      ((None, away), remote_client.JudgeUnavailable),
      ((None, other), RuntimeError),
      ((away, other), RuntimeError),
      ((away, away), remote_client.JudgeUnavailable),
    ):
      raised, questions = [], []

      def of_all(mine, errors=errors, questions=questions):
        # Asked in turn: whether anyone waits, has another error, has no judge.
        questions.append(mine)
        others = [error for error in errors if error is not None and error is not away]
        return (False, bool(others), away in errors)[len(questions) - 1]

      for error in errors:
        questions.clear()
        outcome = {'result': SCORED} if error is None else {'exception': error}
        asked = pending.PendingRewards({('edit', 'taste'): self.future(0.0, **outcome)}, self.fail)
        with (
          mock.patch.object(multihost, 'any_process', of_all),
          self.assertRaises(RuntimeError) as caught,
        ):
          time.sleep(0.05)
          asked.result('edit', 'taste')
        raised.append(type(caught.exception))
        self.assertEqual(questions, [False, error is other, error is away][: len(questions)])
      self.assertEqual(raised, [kind, kind], errors)


if __name__ == '__main__':
  absltest.main()
