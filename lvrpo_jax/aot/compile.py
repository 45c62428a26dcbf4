"""Compiles the programs of alignment for TPUs that need not be present, and measures their cost.

    python -m lvrpo_jax.main --config=configs/bagel_7b.py --config.program=compile \
        --config.compile.topology=v5p:4x4x4

All arguments are abstract: no parameter is made. libtpu must be installed (`pip install libtpu`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import time

from absl import logging
import jax
from jax.experimental import topologies
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.aot import flops as flops_lib
from lvrpo_jax.aot import hlo
from lvrpo_jax.aot import programs as programs_lib
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of a TPU chip (cloud.google.com/tpu/docs/system-architecture-tpu-vm).

  Attributes:
    flops: bf16 operations a second.
    hbm: bytes of memory.
    bandwidth: bytes a second to memory.
    network: bytes a second between chips of a slice, all links, one direction.
  """

  flops: float
  hbm: float
  bandwidth: float
  network: float


CHIPS = {
  'v4': Chip(275e12, 32 * 2**30, 1.2288e12, 1.5e11),
  'v5e': Chip(197e12, 16 * 2**30, 8.1e11, 1e11),
  'v5p': Chip(459e12, 95 * 2**30, 2.765e12, 3e11),
  'v6e': Chip(918e12, 32 * 2**30, 1.638e12, 2.24e11),
}
"""Chips by name."""

MIN_FREE_FRACTION = 0.15
"""Share of a chip's memory that should stay free."""

MAX_REPLICATED_BYTES = 2**20
"""Largest size in bytes of an array of a program's state that is replicated on every chip."""

MAX_TRAFFIC_RATIO = 1.3
"""Largest traffic of a micro-batch of an update, in the unit of `passes`."""

Measures = dict[str, types.Json]
"""Measures of a program by name."""


class Exceeded(Exception):
  """Raised when a program is above a limit; the message names the program and the limit."""


# JAX declares `Device` as a variable, which is no type to pyright.
def devices(topology: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
  """Returns the devices of a topology such as 'v5p:4x4x4', one for each chip.

  Raises:
    ValueError: no such topology, libtpu is missing, or it describes other devices than chips.
  """
  kind, _, shape = topology.partition(':')
  chips = math.prod(int(side) for side in shape.split('x') if side.isdigit())
  # Without these settings libtpu asks the cloud's metadata server where it runs.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # The names of v4 and v5p count cores, two for each chip.
  os.environ.setdefault(
    'TPU_ACCELERATOR_TYPE', f'{kind}-{chips * (2 if kind in ("v4", "v5p") else 1)}'
  )
  # Nothing runs on a TPU here, so several compilations may go on at once.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # Programs see a v4 chip as one device, but libtpu describes its cores by default.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    found = list(topologies.get_topology_desc(topology, platform='tpu', **options).devices)
  except Exception as error:  # The plugin raises errors of many types.
    raise ValueError(
      f'config.compile.topology is {topology!r}, which cannot be described ({error}); '
      "expected a name such as 'v5p:4x4x4', and libtpu installed"
    ) from error
  if len(found) != chips:
    raise ValueError(
      f'config.compile.topology is {topology!r}, which libtpu describes as {len(found)} '
      f'devices; expected one for each of its {chips} chips'
    )
  return found


def build(config: types.Config, workdir: pathlib.Path) -> experiment_lib.Experiment:
  """Builds the experiment on the devices of the topology; `auto` attention is that of a TPU."""
  if config.model.attention == 'auto':
    config = config.copy_and_resolve_references()
    config.model.attention = 'splash'
  return experiment_lib.build(
    config, workdir, devices(config.compile.topology), config.compile.image_size
  )


def measure(
  name: str, program: programs_lib.Traced, chip: Chip, keep: pathlib.Path | None = None
) -> Measures:
  """Compiles a program and measures its cost on one chip.

  `flops` is the arithmetic of the whole program divided by the number of chips, and thus the work
  of a chip if none is repeated. Work that is not split over all axes of the mesh, such as the
  vision tower over `tensor`, is repeated by every chip of the axis, so a chip does no less. Bytes
  are counted in the program of one chip, with repetitions.

  Args:
    name: of the program.
    program: with its abstract arguments.
    chip: its peaks.
    keep: folder for the compiled program's text; None for no file.
  """
  chips = program.mesh.size
  with mesh_lib.scope(program.mesh):
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower(lowering_platforms=(program.mesh.devices.flat[0].platform,))
  start = time.monotonic()
  compiled = lowered.compile()
  seconds = time.monotonic() - start
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None and memory is not None, 'the backend describes no compiled programs'
  if keep:
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f'{name}.hlo.txt').write_text(text)
  hbm = {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'output': memory.output_size_in_bytes,
    'alias': memory.alias_size_in_bytes,
    'resident': program.resident,
  }
  peak = sum(hbm.values()) - 2 * hbm['alias']
  arithmetic = flops_lib.count(traced.jaxpr.jaxpr, program.loop) / chips
  moved = hlo.collectives(text, chips, program.loop)
  traffic = hlo.memory_traffic(text, program.loop)
  return {
    'program': name,
    'chips': chips,
    'mesh': list(program.mesh.shape.values()),
    'compile_seconds': round(seconds, 1),
    'hbm_bytes': {part: int(count) for part, count in hbm.items()},
    'hbm_peak_bytes': int(peak),
    'hbm_share': round(peak / chip.hbm, 3),
    'fits': bool(peak <= (1 - MIN_FREE_FRACTION) * chip.hbm),
    'flops': arithmetic,
    'collective_bytes': {kind: int(count) for kind, count in moved.items()},
    'unknown_loops': len(hlo.unknown_loops(text)),
    'replicated': large_replicated(program.held),
    'arithmetic_seconds': round(arithmetic / chip.flops, 3),
    'memory_seconds': round(traffic / chip.bandwidth, 3),
    'network_seconds': round(sum(moved.values()) / chip.network, 3),
  }


def run(config: types.Config, workdir: pathlib.Path) -> None:
  """Compiles the programs of `config.compile.programs`.

  The measures of each are printed as a JSON line and appended to `<workdir>/compile.jsonl`.

  Raises:
    ValueError: the topology is unknown, or sizes do not divide over it.
    Exceeded: a program is above a limit; raised after all programs.
  """
  kind = config.compile.topology.split(':')[0]
  if kind not in CHIPS:
    raise ValueError(
      f'config.compile.topology is {config.compile.topology!r}; allowed: {sorted(CHIPS)} with a '
      "shape, such as 'v5p:4x4x4'"
    )
  experiment = build(config, workdir)
  made, faults = programs_lib.programs(experiment), []
  workdir.mkdir(parents=True, exist_ok=True)
  for name in config.compile.programs:
    logging.info('compiling %s for %d chips', name, experiment.mesh.size)
    out = {
      'topology': config.compile.topology,
      **measure(name, made[name](), CHIPS[kind], workdir / 'hlo'),
    }
    if name == 'step':
      out['collective_ratio'] = round(passes(experiment, out), 3)
      out['objective'] = experiment.config.align.image.objective
    faults += exceeded(out)
    print(json.dumps(out), flush=True)
    with (workdir / 'compile.jsonl').open('a') as file:
      file.write(json.dumps(out) + '\n')
  if faults:
    raise Exceeded('; '.join(faults))


def exceeded(measured: Measures) -> list[str]:
  """Returns a message for every measure of a program that is above its limit."""
  out: list[str] = []
  name = measured['program']
  if not measured['fits']:
    out.append(
      f'{name}: fits is false, hbm_share is {measured["hbm_share"]}; allowed: at most '
      f'{1 - MIN_FREE_FRACTION}'
    )
  if measured.get('collective_ratio', 0.0) > MAX_TRAFFIC_RATIO:
    out.append(
      f'{name}: collective_ratio is {measured["collective_ratio"]}; allowed: at most '
      f'{MAX_TRAFFIC_RATIO}'
    )
  if measured['replicated']:
    out.append(
      f'{name}: replicated, above {MAX_REPLICATED_BYTES} bytes, are '
      f'{", ".join(sorted(measured["replicated"]))}; allowed: none'
    )
  return out


def passes(experiment: experiment_lib.Experiment, measured: Measures) -> float:
  """Counts bytes moved in a micro-batch, in units of three passes over the parameters in 16 bits."""
  parallel = experiment.config.parallel
  count = sum(np.prod(x.shape) for x in jax.tree.leaves(weights.template(experiment, weights.BASE)))
  turns = parallel.micro_batches * experiment.group_parts
  return sum(measured['collective_bytes'].values()) / turns / (3 * 2 * float(count))


def large_replicated(tree: types.Tree, limit: float = MAX_REPLICATED_BYTES) -> dict[str, int]:
  """Returns the bytes of the abstract arrays above `limit` that are replicated on all devices."""
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    if leaf.sharding.mesh.size > 1 and leaf.sharding.is_fully_replicated and size > limit:
      out[placement.parameter_name(path)] = size
  return out
