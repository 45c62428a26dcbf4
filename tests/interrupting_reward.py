"""A user's reward that can kill its own process between a rollout and its update."""

import os
import signal

import numpy as np

VARIABLE = 'LVRPO_TEST_KILL'
_calls = 0


def reward(examples, images_BGYXC):
  """Brightness. At the second call, kills the process if the file named by `VARIABLE` is there."""
  global _calls
  _calls += 1
  path = os.environ.get(VARIABLE)
  if _calls == 2 and path and os.path.exists(path):
    os.remove(path)
    os.kill(os.getpid(), signal.SIGKILL)
  assert len(examples) == len(images_BGYXC)
  value_BG = images_BGYXC.mean(axis=(2, 3, 4)) / 255.
  return value_BG, np.ones(value_BG.shape, bool)
