"""Compiles the programs of alignment for TPUs that need not be there, and says what they take.

    python -m lvrpo_jax.main --config=configs/bagel_7b.py --config.program=compile \
        --config.topology=v5p:4x4x4

Everything is abstract: no parameter is ever made. libtpu must be installed (`pip install libtpu`).
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

from absl import logging
import jax
from jax import numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.aot import flops as flops_lib
from lvrpo_jax.aot import hlo
from lvrpo_jax.data import examples
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from lvrpo_jax.training import experience
from lvrpo_jax.training import learner
from lvrpo_jax.training import losses
from lvrpo_jax.training import pretrain


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


MIN_FREE_FRACTION = 0.15
"""Share of a chip's memory that should stay free."""


MAX_REPLICATED_BYTES = 2**20
"""Bytes that an array of a program's state may take on every chip."""


MAX_TRAFFIC_RATIO = 1.3
"""What a micro-batch of an update may move, in the unit of `passes`."""


class Exceeded(Exception):
  """A program takes more than it should; the message says which and of what."""


class Traced(NamedTuple):
  """A program with its abstract arguments: all that is needed to compile it.

  Attributes:
    held: parameters and states among the arguments, by name.
    resident: bytes on a chip that stay while the program runs, though it does not read them.
    loop: passes of a loop whose number the program does not tell.
  """

  function: Any
  arguments: tuple[Any, ...]
  mesh: Mesh
  held: dict[str, Any]
  resident: float
  loop: int


def abstract(tree: Any, where: Any, dtype: Callable[[str, Any], Any] = lambda name, d: d) -> Any:
  """Shapes with shardings in place of arrays; `where` is a sharding or a tree of them."""
  where = (
    where if not isinstance(where, jax.sharding.Sharding) else jax.tree.map(lambda _: where, tree)
  )
  return jax.tree_util.tree_map_with_path(
    lambda path, x, s: jax.ShapeDtypeStruct(
      x.shape, dtype(placement.parameter_name(path), x.dtype), sharding=s
    ),
    tree,
    where,
  )


def bytes_of(tree: Any) -> float:
  """Bytes of a tree on one device, from its shardings."""
  return float(
    sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  )


def devices(topology: str) -> list[Any]:
  """The devices of a topology such as 'v5p:4x4x4', one a chip.

  Raises:
    ValueError: no such topology, libtpu is missing, or it describes other devices than chips.
  """
  kind, _, shape = topology.partition(':')
  chips = math.prod(int(side) for side in shape.split('x') if side.isdigit())
  # libtpu asks the cloud's metadata server where it runs unless it is told.
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  # These two are named by their cores, two a chip.
  os.environ.setdefault(
    'TPU_ACCELERATOR_TYPE', f'{kind}-{chips * (2 if kind in ("v4", "v5p") else 1)}'
  )
  # Nothing runs on a TPU here, so several compilations may go on at once.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # Programs see a v4 chip as one device; libtpu describes its cores unless it is asked for that.
  options = {'chip_config_name': 'megacore'} if kind == 'v4' else {}
  try:
    found = list(topologies.get_topology_desc(topology, platform='tpu', **options).devices)
  except Exception as error:  # The plugin raises whatever it likes.
    raise ValueError(
      f'config.topology is {topology!r}, which cannot be described ({error}); '
      "expected a name such as 'v5p:4x4x4', and libtpu installed"
    ) from error
  if len(found) != chips:
    raise ValueError(
      f'config.topology is {topology!r}, which libtpu describes as {len(found)} '
      f'devices; expected one for each of its {chips} chips'
    )
  return found


def build(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> experiment_lib.Experiment:
  """The job on the devices of the topology, with `auto` attention being that of a TPU."""
  if config.model.attention == 'auto':
    config = config.copy_and_resolve_references()
    config.model.attention = 'splash'
  return experiment_lib.build(config, workdir, devices(config.topology), config.compile.image_size)


def prompts(
  job: experiment_lib.Experiment, tasks: dict[str, int], where: Any
) -> dict[str, types.Prompts]:
  """Abstract prompts by task."""
  side = job.policy.image_size
  blank = np.zeros((side, side, 3), np.uint8)
  out = {}
  for task, rows in tasks.items():
    encoded = job.encoder(task, [examples.Example(0, '', source=blank, target=blank, answer='')])
    out[task] = abstract(
      jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), encoded.prompts),
      where,
    )
  return out


def batch(job: experiment_lib.Experiment, where: Any) -> dict[str, Any]:
  """What an update reads, abstract."""
  a, (N, C) = job.config.align, job.policy.latent_shape
  T = job.config.data.answer_words + 1
  sizes = pretrain.sizes(a)
  if tasks_lib.THINK_GENERATE in sizes:
    raise ValueError(
      f'config.align.think_generate is {sizes[tasks_lib.THINK_GENERATE]}; allowed with '
      "config.program 'compile': 0"
    )
  asked = prompts(job, sizes, where)
  guided = a.guidance != 1 and a.objective in flow_objectives.COUPLED

  def floats(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  out = {}
  for task, B in sizes.items():
    G = a.group
    advantage = floats(B, G), floats(B, G, dtype=bool)
    if task == tasks_lib.UNDERSTAND:
      out[task] = types.TextTrainBatch(
        asked[task],
        floats(B, G, T, dtype=jnp.int32),
        floats(B, G, T),
        floats(B, G, T, dtype=bool),
        floats(B),
        floats(B, G, T),
        *advantage,
      )
      continue
    K = experience.Collector(job).window * G
    M = a.draws * G if a.objective in flow_objectives.DECOUPLED else K
    x, time_BM = floats(B, K, N, C), floats(B, K)
    steps = types.Transitions(x, x, time_BM, time_BM, time_BM, time_BM, x, x, time_BM)
    points = floats(B, M, N, C)
    out[task] = types.ImageTrainBatch(
      asked[task],
      floats(B, G, N, C),
      steps,
      points,
      floats(B, M),
      points,
      points,
      *advantage,
      floats(B, M) if guided else None,
    )
  return out


def programs(job: experiment_lib.Experiment) -> dict[str, Callable[[], Traced]]:
  """The programs by name: text and image rollouts, and the update."""
  sizes = pretrain.sizes(job.config.align)
  params = weights.template(job, weights.BASE)
  optimizer, update = learner.build_update(job)
  state = jax.eval_shape(lambda p: learner.initial_state(job, p, optimizer), params)
  state = abstract(state, placement.tree_shardings(state, job.mesh))
  vae = lambda mesh: abstract(
    weights.template(job, weights.VAE),
    placement.tree_shardings(weights.template(job, weights.VAE), mesh),
  )

  def rollout(tasks: tuple[str, ...]) -> Traced:
    mesh = job.rollout_mesh
    collector = experience.Collector(job)
    rows = placement.rows_sharding(mesh)
    mine = abstract(params, placement.tree_shardings(params, mesh), job.rollout_dtype)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    asked = prompts(job, {t: n for t, n in sizes.items() if t in tasks}, rows)
    scales = abstract(collector.eta_T, NamedSharding(mesh, P()))
    held = {weights.BASE: mine, weights.VAE: vae(mesh)}
    arguments = (mine,), held[weights.VAE], asked, step, scales
    # The copy of the other rollout, of texts or of images, is made before this one has ended.
    resident = bytes_of(state) + (bytes_of(mine) if job.copies_weights else 0.0)
    return Traced(
      jax.jit(collector.sample), arguments, mesh, held, resident, job.config.data.answer_words + 1
    )

  def train() -> Traced:
    factors = {
      name: jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(job.mesh, P()))
      for name in losses.FACTORS
    }
    frozen = {'vae': vae(job.mesh), 'factors': factors}
    arguments = state, frozen, batch(job, placement.rows_sharding(job.mesh))
    held = {'state': state, weights.VAE: frozen['vae']}
    return Traced(mesh_lib.traceable(update), arguments, job.mesh, held, 0.0, 1)

  return {
    'text': lambda: rollout((tasks_lib.UNDERSTAND,)),
    'image': lambda: rollout((tasks_lib.GENERATE, tasks_lib.EDIT)),
    'step': train,
  }


def measure(
  name: str, program: Traced, chip: Chip, keep: pathlib.Path | None = None
) -> dict[str, Any]:
  """Compiles a program and counts what it takes, on one chip unless said otherwise.

  `flops` is the arithmetic of the whole program over the number of chips: what each does where none
  is done twice. What is not split over all axes of the mesh, such as the vision tower over
  `tensor`, every chip of the axis repeats, so chips do no less than that. Bytes are counted in the
  program of one chip, repetitions included.
  """
  chips = program.mesh.size
  with mesh_lib.scope(program.mesh):
    traced = program.function.trace(*program.arguments)
    lowered = traced.lower(lowering_platforms=(program.mesh.devices.flat[0].platform,))
  start = time.monotonic()
  compiled = lowered.compile()
  seconds = time.monotonic() - start
  text = compiled.as_text()
  if keep:
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f'{name}.hlo.txt').write_text(text)
  memory = compiled.memory_analysis()
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
    'hbm_bytes': {k: int(v) for k, v in hbm.items()},
    'hbm_peak_bytes': int(peak),
    'hbm_share': round(peak / chip.hbm, 3),
    'fits': bool(peak <= (1 - MIN_FREE_FRACTION) * chip.hbm),
    'flops': arithmetic,
    'collective_bytes': {k: int(v) for k, v in moved.items()},
    'unknown_loops': len(hlo.unknown_loops(text)),
    'replicated': large_replicated(program.held),
    'arithmetic_seconds': round(arithmetic / chip.flops, 3),
    'memory_seconds': round(traffic / chip.bandwidth, 3),
    'network_seconds': round(sum(moved.values()) / chip.network, 3),
  }


def run(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
  """Prints a JSON line for every program of `config.compile.programs`; writes `compile.jsonl`.

  Raises:
    ValueError: the topology is unknown, or sizes do not divide over it.
    Exceeded: after all programs, that one is above a limit.
  """
  kind = config.topology.split(':')[0]
  if kind not in CHIPS:
    raise ValueError(
      f'config.topology is {config.topology!r}; allowed: {sorted(CHIPS)} with a '
      "shape, such as 'v5p:4x4x4'"
    )
  job = build(config, workdir)
  made, faults = programs(job), []
  workdir.mkdir(parents=True, exist_ok=True)
  for name in config.compile.programs:
    logging.info('compiling %s for %d chips', name, job.mesh.size)
    out = {'topology': config.topology, **measure(name, made[name](), CHIPS[kind], workdir / 'hlo')}
    if name == 'step':
      out['collective_ratio'] = round(passes(job, out), 3)
      out['objective'] = job.config.align.objective
    faults += exceeded(out)
    print(json.dumps(out), flush=True)
    with (workdir / 'compile.jsonl').open('a') as file:
      file.write(json.dumps(out) + '\n')
  if faults:
    raise Exceeded('; '.join(faults))


def exceeded(measured: dict[str, Any]) -> list[str]:
  """What of a program's measures is above its limit."""
  out, name = [], measured['program']
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


def passes(job: experiment_lib.Experiment, measured: dict[str, Any]) -> float:
  """Bytes moved in a micro-batch, in units of three passes over the parameters in 16 bits."""
  parallel = job.config.parallel
  count = sum(np.prod(x.shape) for x in jax.tree.leaves(weights.template(job, weights.BASE)))
  turns = parallel.micro_batches * job.group_parts
  return sum(measured['collective_bytes'].values()) / turns / (3 * 2 * float(count))


def large_replicated(tree: Any, limit: float = MAX_REPLICATED_BYTES) -> dict[str, int]:
  """Bytes, by name, of the abstract arrays above `limit` that each of several devices holds whole."""
  out = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
    if leaf.sharding.mesh.size > 1 and leaf.sharding.is_fully_replicated and size > limit:
      out[placement.parameter_name(path)] = size
  return out
