"""Steps of a stage in one of two processes that are asked to stop; `multi_process_test` reads it.

    python tests/stop_program.py FOLDER ADDRESS PROCESS CALL

The first process gets SIGTERM right before the `CALL`-th time it would ask whether to stop. Prints
one JSON object: the step that was restored, the one after which it stopped (null: never), and
whether the next stage was refused.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils

from lvrpo_jax import checkpoint
from lvrpo_jax import run
from lvrpo_jax import sharding

FIRST = 500
STEPS = 8
NOTICE = 3.
"""Seconds in which the coordination service, which looks once a second, sees a signal."""


def loop(store, state, start, process, call):
  """Steps as the stages take them: work, ask, save; the number of the last, or None."""
  with checkpoint.StopSignal() as stop:
    for number in range(start + 1, start + 1 + STEPS):
      if number == start + call:
        multihost_utils.sync_global_devices('notice')
        if process == 0:
          os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(NOTICE)
      stopped = stop.asked()
      store.save(number, state, {'iteration': number})
      if stopped:
        return number
  return None


def refused(folder):
  """Whether a stage that follows does not begin."""
  try:
    return run.Clock(folder / 'seconds.json')('next', lambda: False)
  except checkpoint.Preempted:
    return True


def main():
  folder, address, process, call = (pathlib.Path(sys.argv[1]), sys.argv[2],
                                    *map(int, sys.argv[3:]))
  jax.distributed.initialize(address, 2, process)
  store = checkpoint.Checkpoints(folder / 'checkpoints')
  state = sharding.shard_state({'x': jnp.zeros(4)}, sharding.make_mesh((-1, 1, 1)))
  restored = store.restore(state)
  start = restored[1]['iteration'] if restored else FIRST
  last = loop(store, state, start, process, call)
  store.close()
  print(json.dumps(dict(start=start, last=last, refused=refused(folder))))


if __name__ == '__main__':
  main()
