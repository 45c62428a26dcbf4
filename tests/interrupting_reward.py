"""A user's reward that can interrupt its own process between a rollout and its update."""

import os

import numpy as np

VARIABLE = 'LVRPO_TEST_KILL'
_calls = 0


def reward(examples, images_BGYXC):
  """Brightness. The file named by `VARIABLE` holds the number of a call and the signal to send."""
  global _calls
  _calls += 1
  path = os.environ.get(VARIABLE)
  if path and os.path.exists(path):
    with open(path) as file:
      call, number = map(int, file.read().split())
    if _calls == call:
      os.remove(path)
      os.kill(os.getpid(), number)
  assert len(examples) == len(images_BGYXC)
  value_BG = images_BGYXC.mean(axis=(2, 3, 4)) / 255.
  return value_BG, np.ones(value_BG.shape, bool)
