"""Builds the programs of an iteration with abstract arguments; nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import NamedTuple, Protocol

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.rollouts import engine as engine_lib
from lvrpo_jax.rollouts import replay
from lvrpo_jax.rollouts import think
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from lvrpo_jax.training import losses
from lvrpo_jax.training import update as update_lib


class Compilable(Protocol):
  """A function under `jax.jit`."""

  def trace(self, *arguments: types.Tree) -> jax.stages.Traced:
    """Traces the function for abstract arguments."""
    ...


class Traced(NamedTuple):
  """A program with its abstract arguments, ready to be compiled.

  Attributes:
    function: the compiled function.
    arguments: abstract arguments.
    mesh: of the arguments.
    held: parameters and states among the arguments, by name.
    resident: bytes of arrays that the program does not read, but that stay on a chip while it runs.
    loop: passes of a loop whose count the program does not hold.
  """

  function: Compilable
  arguments: tuple[types.Tree, ...]
  mesh: Mesh
  held: dict[str, types.Tree]
  resident: float
  loop: int


def _same_dtype(name: str, dtype: np.dtype) -> np.dtype:
  del name
  return dtype


def abstract(
  tree: types.Tree,
  where: types.Tree,
  dtype: Callable[[str, np.dtype], np.dtype] = _same_dtype,
) -> types.Tree:
  """Replaces arrays by their shapes with shardings.

  Args:
    tree: arrays, or abstract arrays.
    where: a sharding, or a tree of them.
    dtype: gives the dtype of the abstract array from name and dtype of the array.
  """
  if isinstance(where, jax.sharding.Sharding):
    where = jax.tree.map(lambda _: where, tree)

  def shape(
    path: jax.tree_util.KeyPath, x: types.Array, sharding: jax.sharding.Sharding
  ) -> jax.ShapeDtypeStruct:
    name = placement.parameter_name(path)
    return jax.ShapeDtypeStruct(x.shape, dtype(name, x.dtype), sharding=sharding)

  return jax.tree_util.tree_map_with_path(shape, tree, where)


def bytes_of(tree: types.Tree) -> float:
  """Counts the bytes of a tree on one device, from its shardings."""
  return float(
    sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  )


def abstract_prompts(
  experiment: experiment_lib.Experiment, rows: dict[str, int], where: jax.sharding.Sharding
) -> dict[str, types.Prompts]:
  """Returns abstract prompts, `rows` of every task."""
  side = experiment.policy.image_size
  blank = np.zeros((side, side, 3), np.uint8)
  example = examples.Example(0, '', source=blank, target=blank, answer='')
  out = {}
  for task, count in rows.items():
    prompts = experiment.encoder(task, [example]).prompts
    out[task] = abstract(jax.tree.map(functools.partial(_with_rows, count), prompts), where)
  return out


def _with_rows(count: int, x: np.ndarray) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)


def abstract_batch(
  experiment: experiment_lib.Experiment, where: jax.sharding.Sharding
) -> update_lib.Batch:
  """Returns the abstract batch of an update, from the shapes of rollouts."""
  align, policy = experiment.config.align, experiment.policy
  engine = engine_lib.RolloutEngine(experiment, apart=False)
  prompts = abstract_prompts(experiment, tasks_lib.active(align.prompts), where)

  def batch(
    params: types.Params, vae_params: types.Params, prompts: dict[str, types.Prompts]
  ) -> update_lib.Batch:
    rollouts = engine.sample((params,), vae_params, prompts, jnp.int32(1), engine.levels_T)
    sampled: dict[str, types.SampledTexts | types.SampledImages] = {}
    for task, found in prompts.items():
      if task in rollouts.texts:
        sampled[task] = replay.sampled_texts(found, rollouts.texts[task])
        continue
      rollout = rollouts.images[task]
      steps = replay.transitions(rollout, engine.kept_steps(1), engine.grid, engine.levels_T)
      image = replay.sampled_images(found, rollout, steps)
      if not tasks_lib.BY_NAME[task].plans:
        sampled[task] = image
        continue
      plan = replay.sampled_texts(found, rollouts.texts[tasks_lib.PLAN])
      shape = image.latents_BGNC.shape[:2]
      halves = think.split_halves(
        think.SampledPlans(plan, image), policy.bos, jnp.zeros(shape), jnp.ones(shape, bool)
      )
      sampled.update({name: half for name, (half, _, _) in halves.items()})
    return {
      task: _text_batch(samples)
      if isinstance(samples, types.SampledTexts)
      else _image_batch(samples, align)
      for task, samples in sampled.items()
    }

  params, vae_params = (weights.template(experiment, name) for name in (weights.BASE, weights.VAE))
  return abstract(jax.eval_shape(batch, params, vae_params, prompts), where)


def _text_batch(texts: types.SampledTexts) -> types.TextTrainBatch:
  """Makes a batch of texts with the right shapes; its values mean nothing."""
  shape = texts.logp_BGT.shape[:2]
  return types.TextTrainBatch(
    sampled=texts,
    advantage_BG=jnp.zeros(shape),
    valid_BG=jnp.ones(shape, bool),
    reference_BGT=texts.logp_BGT,
  )


def _image_batch(images: types.SampledImages, align: types.Config) -> types.ImageTrainBatch:
  """Makes a batch of images with the right shapes; its values mean nothing."""
  if flow_objectives.find(align.image.objective).coupled:
    query = replay.step_query(images, guided=align.rollout.guidance != 1)
  else:
    latents = images.latents_BGNC
    x_BKGNC = jnp.broadcast_to(
      latents[:, None], (latents.shape[0], align.image.draws, *latents.shape[1:])
    )
    query = types.FlowQuery(prompts=images.prompts, x_BKGNC=x_BKGNC, time_BKG=x_BKGNC[..., 0, 0])
  shape = images.latents_BGNC.shape[:2]
  return types.ImageTrainBatch(
    sampled=images,
    query=query,
    advantage_BG=jnp.zeros(shape),
    valid_BG=jnp.ones(shape, bool),
    old_BKGNC=query.x_BKGNC,
    reference_BKGNC=query.x_BKGNC,
  )


class Programs:
  """Builds the programs of an iteration with their abstract arguments."""

  def __init__(self, experiment: experiment_lib.Experiment):
    """Traces the initial state of an update."""
    self.experiment = experiment
    self._params = weights.template(experiment, weights.BASE)
    optimizer, self._update = update_lib.build_update(experiment)
    self._lora = experiment.config.align.lora

    def initial(params: types.Params) -> types.TrainState:
      trained = params
      if self._lora.rank:
        trained = lora.init(params, self._lora.rank, self._lora.target, jax.random.key(0))
      return update_lib.initial_state(experiment, trained, optimizer)

    state = jax.eval_shape(initial, self._params)
    self._state = abstract(state, placement.tree_shardings(state, experiment.mesh))

  def by_name(self) -> dict[str, Callable[[], Traced]]:
    """Returns functions that build text and image rollouts, and the update."""
    sizes = tasks_lib.active(self.experiment.config.align.prompts)
    texts = {task: rows for task, rows in sizes.items() if not tasks_lib.draws_image(task)}
    images = {task: rows for task, rows in sizes.items() if tasks_lib.draws_image(task)}
    return {
      'text': functools.partial(self._rollout, texts),
      'image': functools.partial(self._rollout, images),
      'step': self._train,
    }

  def _vae(self, mesh: Mesh) -> types.Params:
    """Returns the abstract autoencoder on a mesh."""
    template = weights.template(self.experiment, weights.VAE)
    return abstract(template, placement.tree_shardings(template, mesh))

  def _rollout(self, sizes: dict[str, int]) -> Traced:
    """Builds the rollout of tasks with these rows."""
    experiment, mesh = self.experiment, self.experiment.rollout_mesh
    engine = engine_lib.RolloutEngine(experiment, apart=False)
    everywhere = NamedSharding(mesh, P())
    params = abstract(
      self._params, placement.tree_shardings(self._params, mesh), experiment.rollout_dtype
    )
    held = {weights.BASE: params, weights.VAE: self._vae(mesh)}
    arguments = (
      (params,),
      held[weights.VAE],
      abstract_prompts(experiment, sizes, placement.rows_sharding(mesh)),
      jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
      abstract(engine.levels_T, everywhere),
    )
    # The copy for the other rollout, of texts or of images, is made before this rollout has ended.
    copies = bytes_of(params) if experiment.copies_weights else 0.0
    return Traced(
      function=jax.jit(engine.sample),
      arguments=arguments,
      mesh=mesh,
      held=held,
      resident=bytes_of(self._state) + copies,
      loop=experiment.config.data.answer_tokens + 1,
    )

  def _train(self) -> Traced:
    """Builds the update."""
    mesh = self.experiment.mesh
    everywhere = NamedSharding(mesh, P())
    factors = {
      name: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere) for name in losses.FACTORS
    }
    frozen = {'vae': self._vae(mesh), 'factors': factors}
    held = {'state': self._state, weights.VAE: frozen['vae']}
    if self._lora.rank:
      frozen['base'] = held[weights.BASE] = self._params
    batch = abstract_batch(self.experiment, placement.rows_sharding(mesh))
    return Traced(
      function=mesh_lib.traceable(self._update),
      arguments=(self._state, frozen, batch),
      mesh=mesh,
      held=held,
      resident=0.0,
      loop=1,
    )


def programs(experiment: experiment_lib.Experiment) -> dict[str, Callable[[], Traced]]:
  """Returns functions that build the programs by name: text and image rollouts, and the update."""
  return Programs(experiment).by_name()
