"""An iteration of alignment in one process of several; `multi_process_test` reads its output.

    python -m tests.helpers.multi_process_program FOLDER ADDRESS PROCESSES PROCESS

One process with all devices, started last, compares its own state with the checkpoint that the
several have left, and prints one JSON object.
"""

import dataclasses
import json
import os
import pathlib
import sys
from unittest import mock

import jax
import numpy as np

from configs import tiny
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import learner as learner_lib
from tests.helpers import noise

ROWS = 8
SEVERAL = dict(mesh=(2, 2, 2), rollout_mesh=(4, 1, 2), joint=True)
"""Of the several processes; the one has another mesh."""


def make_experiment(folder, several):
  config = tiny.get_config()
  config.model.depth = 1
  config.align.update(
    iterations=1,
    prompts=dict(generate=ROWS, understand=ROWS, edit=0),
    rollout=dict(steps=3, window=1),
    checkpoints=dict(every=1),
    optimizer=dict(learning_rate=3e-3),
  )
  config.data.update(answer_tokens=4, options=dict(chatty=0.0, plan=0.0, describe=0.0))
  config.parallel.update(SEVERAL if several else dict(mesh=(8, 1, 1)))
  return experiment_lib.build(config, folder / ('several' if several else 'one'))


def iteration(experiment):
  """Runs the production loop for one iteration and returns its metrics."""
  experiment.workdir.mkdir(parents=True, exist_ok=True)
  writer = metrics_lib.MetricWriter(experiment.workdir, jax.process_index())
  with mock.patch.object(align, 'PICTURES_EVERY', 1):
    align.run(experiment, *noise.parameters(experiment, 0.2), writer)
  writer.close()


def lines(folder):
  return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def restored(experiment):
  """The checkpoint of a workdir, laid out for the devices of this process."""
  learner = learner_lib.Learner(experiment, *noise.parameters(experiment, 0.2))
  store = checkpoint.Checkpoints(experiment.workdir / 'checkpoints' / 'align')
  state, record = store.restore(learner.state)
  store.close()
  return learner.state, state, record


def compare(folder):
  """What the one process finds."""
  one = make_experiment(folder, several=False)
  iteration(one)
  start, mine, record = restored(one)
  # The same devices as before, which now belong to one process, and another mesh.
  _, theirs, their_record = restored(dataclasses.replace(one, workdir=folder / 'several'))

  def params(state):
    return jax.tree.leaves(jax.tree.map(np.asarray, state.params))

  def distance(a, b):
    return max(float(np.max(np.abs(x - y))) for x, y in zip(params(a), params(b), strict=True))

  return dict(
    moved=distance(start, mine),
    difference=distance(mine, theirs),
    step=int(theirs.step),
    iterations=[record['iteration'], their_record['iteration']],
    reference=distance(*(s.replace(params=s.reference) for s in (mine, theirs))),
    old=distance(*(s.replace(params=s.old) for s in (mine, theirs))),
    optimizer=distance(*(s.replace(params=s.opt_state) for s in (mine, theirs))),
    metrics=[lines(folder / name)[-1] for name in ('one', 'several')],
  )


def main():
  folder, address, processes, process = (
    pathlib.Path(sys.argv[1]),
    sys.argv[2],
    *map(int, sys.argv[3:]),
  )
  if processes > 1:
    jax.distributed.initialize(address, processes, process)
  assert len(jax.devices()) == 8 and jax.process_count() == processes, jax.devices()
  if processes > 1:
    iteration(make_experiment(folder, several=True))
    several = folder / 'several'
    print(
      json.dumps(
        dict(
          files=sorted(os.listdir(several)),
          lines=len(lines(several)),
          events=len(list(several.rglob('*tfevents*'))),
        )
      )
    )
  else:
    print(json.dumps(compare(folder)))


if __name__ == '__main__':
  main()
