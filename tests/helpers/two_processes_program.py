"""What one of two processes does where they have to agree; `multi_process_test` reads its output.

python -m tests.helpers.two_processes_program FOLDER ADDRESS PROCESS TASK [ARGUMENT]
"""

from concurrent import futures
import json
import os
import pathlib
import signal
import sys
import threading
import time
from unittest import mock

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from lvrpo_jax.parallel import mesh
from lvrpo_jax.parallel import placement
from lvrpo_jax.programs import train
from lvrpo_jax.rewards.remote import client as remote_client
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import preemption
from lvrpo_jax.runtime import weights

FIRST = 500
STEPS = 8
NOTICE = 3.0
"""Seconds in which the coordination service, which looks once a second, sees a signal."""


def make_state():
  return placement.shard_state({'x': jnp.arange(4.0)}, mesh.make_mesh((-1, 1, 1)))


def loop(store, start, call):
  """Steps as the stages take them: work, ask, save; the number of the last, or None."""
  state = make_state()
  with preemption.StopSignal() as stop:
    for number in range(start + 1, start + 1 + STEPS):
      if number == start + call:
        multihost_utils.sync_global_devices('notice')
        if jax.process_index() == 0:
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
    return train.Clock(folder / 'seconds.json')('next', lambda: False)
  except preemption.Preempted:
    return True


def stop(folder, call):
  """The first process gets SIGTERM right before the `call`-th time it would ask whether to stop.

  Returns the step that was restored, the one after which it stopped (None: never), and whether the
  next stage was refused.
  """
  store = checkpoint.Checkpoints(folder / 'checkpoints')
  restored = store.restore(make_state())
  start = restored[1]['iteration'] if restored else FIRST
  last = loop(store, start, int(call))
  store.close()
  return dict(start=start, last=last, refused=refused(folder))


def blind(steps):
  """In the second process: no array of these steps can be read."""
  read = ocp.StandardCheckpointHandler.restore

  def restore(self, directory, *args, **kwargs):
    if jax.process_index() and int(directory.parent.name) in steps:
      raise OSError('stale file handle')
    return read(self, directory, *args, **kwargs)

  return mock.patch.object(ocp.StandardCheckpointHandler, 'restore', restore)


def restore(folder):
  """Saves three steps, the last two of which one process cannot read; what both restore, then what
  there is, and why nothing is restored where that process reads none."""
  folder = folder / 'checkpoints'
  store = checkpoint.Checkpoints(folder, keep=3)
  for step in (1, 2, 3):
    store.save(step, make_state(), {'iteration': step})
  store.close()
  store = checkpoint.Checkpoints(folder, keep=3)
  with blind((2, 3)):
    _, record = store.restore(make_state())
  found = sorted(path.name for path in folder.iterdir())
  try:
    with blind((1,)):
      problem = store.restore(make_state())
  except ValueError as error:
    problem = str(error)
  store.close()
  return dict(record=record, found=found, problem=problem)


def kept(folder):
  """Values that both keep under a name: the first, then others in their place where the second
  process does not see the folder yet, or sees one that is none to the first process."""
  out, see, made = [], pathlib.Path.exists, []

  def keep(value):
    def make():
      made.append(value)
      return {'x': value + jnp.zeros(4)}

    params = weights.make_or_restore(folder, 'kept', make_state(), make)
    out.append(float(np.asarray(params['x'].addressable_data(0))[0]))

  def blind(first, second):
    return mock.patch.object(
      pathlib.Path,
      'exists',
      lambda path, **k: (
        (second if jax.process_index() else first) if path.name == 'kept' else see(path, **k)
      ),
    )

  with blind(False, True):
    keep(1.0)
  with blind(True, False):
    keep(2.0)
  return dict(values=out, made=made)


def asked(folder):
  """How both leave waits for judges: one that is slow to answer the first process, and one that
  fails the second."""
  del folder
  slow, failing, checks = futures.Future(), futures.Future(), []
  first = jax.process_index() == 0
  scored = remote_client.Scored(np.ones((1, 1), np.float32), np.ones((1, 1), bool), {})
  threading.Timer(2.5 if first else 0.0, slow.set_result, [scored]).start()
  if first:
    failing.set_result(scored)
  else:
    threading.Timer(
      1.5, failing.set_exception, [remote_client.JudgeUnavailable('no server')]
    ).start()
  waits = pending.PendingRewards(
    {('generate', 'remote'): slow, ('edit', 'remote'): failing}, lambda: checks.append(1)
  )
  value = waits.result('generate', 'remote').value_BG.tolist()
  try:
    waits.result('edit', 'remote')
  except remote_client.JudgeUnavailable as error:
    assert ('another process' if first else 'no server') in str(error), error
    return dict(value=value, checks=len(checks), failed=True)


def main():
  folder, address, process, task, *arguments = sys.argv[1:]
  jax.distributed.initialize(address, 2, int(process))
  tasks = {'stop': stop, 'restore': restore, 'kept': kept, 'asked': asked}
  out = tasks[task](pathlib.Path(folder), *arguments)
  print(json.dumps(out))


if __name__ == '__main__':
  main()
