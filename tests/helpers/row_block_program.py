"""Rows on meshes over several processes; `multi_process_test` reads its output.

    python -m tests.helpers.row_block_program ADDRESS PROCESSES PROCESS

Prints one JSON object: by mesh, the block of this process, the rows that it has drawn and placed,
all rows, and what the processes that share rows have agreed on.
"""

import json
import sys
import types as python_types

import jax
import numpy as np

from lvrpo_jax.parallel import mesh
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import placement
from lvrpo_jax.training import prompts

ROWS = 8
MESHES = {'tensor': (1, 1, 4), 'fsdp': (1, 4, 1), 'mixed': (1, 2, 2), 'data': (2, 1, 2)}


def make_experiment(shape):
  """The parts of an experiment that drawing and placing rows read."""
  config = python_types.SimpleNamespace(data=python_types.SimpleNamespace(prefetch=1))
  source = python_types.SimpleNamespace(
    example=lambda task, split, index: index, size=lambda task, split: 1 << 20
  )
  return python_types.SimpleNamespace(mesh=mesh.make_mesh(shape), config=config, data=source)


def measure(shape):
  experiment = make_experiment(shape)
  data = prompts.task_batches(
    experiment,
    'align',
    {'generate': ROWS},
    lambda task: lambda rows: np.array(rows)[:, None],
  )
  drawn = next(data['generate'])
  placed = placement.shard_rows(drawn, experiment.mesh)
  # On a device the rows are what its process believes them to be: copies must not differ.
  shards = {
    str(shard.index[0].start or 0): np.asarray(shard.data).ravel().tolist()
    for shard in placed.addressable_shards
  }
  found = np.full(len(drawn), jax.process_index())
  return dict(
    block=multihost.row_block(experiment.mesh),
    drawn=drawn.ravel().tolist(),
    shards=shards,
    shape=placed.shape,
    local=multihost.local_rows(placed).ravel().tolist(),
    whole=multihost.gather_rows(placed).ravel().tolist(),
    agreed=multihost.agree_on_rows({'x': found}, experiment.mesh)['x'].tolist(),
  )


def main():
  address, processes, process = sys.argv[1], *map(int, sys.argv[2:])
  jax.distributed.initialize(address, processes, process)
  assert len(jax.devices()) == 4, jax.devices()
  print(json.dumps({name: measure(shape) for name, shape in MESHES.items()}))


if __name__ == '__main__':
  main()
