"""The program of `lvrpo_jax.main`, which sends itself a signal at a chosen moment.

    python -m tests.helpers.interruptions MOMENT STAGE NUMBER SIGNAL REPORT FLAGS...

`end_to_end_test` starts it. What is so at that moment goes to the file REPORT, as JSON. Moments of
a step or iteration of a stage:
  saving: all of its checkpoint is written, under a temporary name that is about to be changed;
  sampling: its rollouts have been dispatched and are not all done;
  rewarded: its samples have been scored, nothing has been updated;
  done: it has been dispatched to its end.
"""

import inspect
import json
import os
import pathlib
import sys

from absl import app
import jax
from jax import numpy as jnp

from lvrpo_jax import main
from lvrpo_jax.rollouts import engine
from lvrpo_jax.runtime import metrics as metrics_lib
from lvrpo_jax.training import learner


def after(owner, name, when, strike):
  """Lets a method strike with its result as it returns, `when` its arguments by name are so."""
  method = getattr(owner, name)
  signature = inspect.signature(method)

  def wrapped(*args, **kwargs):
    out = method(*args, **kwargs)
    if when(signature.bind(*args, **kwargs).arguments):
      strike(out)
    return out

  setattr(owner, name, wrapped)


def hold_back(number):
  """Lets the pictures of an iteration wait for a minute of work: those of a tiny model may be done
  before anyone can look."""
  rollout = engine.RolloutEngine.rollout
  work = jax.jit(lambda x: jax.lax.fori_loop(0, 20_000, lambda _, y: y @ y, x))

  def held(self, policies, vae_params, batch, iteration):
    if iteration == number:
      late = work(jnp.zeros((512, 512)))[0, 0]
      vae_params = jax.tree.map(lambda x: x + late, vae_params)
    return rollout(self, policies, vae_params, batch, iteration)

  engine.RolloutEngine.rollout = held


def prepare(moment, stage, number, signal, report):
  """Makes the moment come."""

  def strike(**seen):
    report.write_text(json.dumps(seen))
    os.kill(os.getpid(), signal)

  if moment == 'saving':
    rename = os.rename

    def renamed(source, target):
      folder = pathlib.Path(target).parent
      if (folder.name, pathlib.Path(target).name) == (stage, str(number)):
        strike(found=sorted(path.name for path in folder.iterdir()))
      rename(source, target)

    os.rename = renamed
  elif moment == 'sampling':
    hold_back(number)
    after(
      engine.RolloutEngine,
      'rollout',
      lambda given: given['iteration'] == number,
      lambda out: strike(ready=[x.is_ready() for x in jax.tree.leaves(out)]),
    )
  elif moment == 'rewarded':
    after(
      learner.Learner, 'collect', lambda given: given['iteration'] == number, lambda out: strike()
    )
  else:
    after(
      metrics_lib.Late,
      'push',
      lambda given: (given['self']._stage, given['step']) == (stage, number),
      lambda out: strike(),
    )


if __name__ == '__main__':
  chosen, sys.argv[1:] = sys.argv[1:6], sys.argv[6:]
  prepare(chosen[0], chosen[1], int(chosen[2]), int(chosen[3]), pathlib.Path(chosen[4]))
  app.run(main.main, flags_parser=main.parse)
