"""The programs of an iteration with abstract arguments; nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import examples
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.rollouts import engine as engine_lib
from lvrpo_jax.rollouts import think
from lvrpo_jax.rollouts import trajectories
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import weights
from lvrpo_jax.training import losses
from lvrpo_jax.training import update as update_lib


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


def abstract_prompts(
  experiment: experiment_lib.Experiment, rows: dict[str, int], where: jax.sharding.Sharding
) -> dict[str, types.Prompts]:
  """Abstract prompts, so many rows of every task."""
  side = experiment.policy.image_size
  blank = np.zeros((side, side, 3), np.uint8)
  example = examples.Example(0, '', source=blank, target=blank, answer='')
  out = {}
  for task, count in rows.items():
    prompts = experiment.encoder(task, [example]).prompts
    out[task] = abstract(
      jax.tree.map(
        lambda x, count=count: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), prompts
      ),
      where,
    )
  return out


def abstract_batch(
  experiment: experiment_lib.Experiment, where: jax.sharding.Sharding
) -> update_lib.Batch:
  """What an update reads, abstract: the shapes of rollouts, and of what is made of them."""
  align, policy = experiment.config.align, experiment.policy
  engine = engine_lib.RolloutEngine(experiment, apart=False)
  prompts = abstract_prompts(experiment, tasks_lib.active(align.prompts), where)

  def batch(params, vae_params, prompts):
    rollouts = engine.sample((params,), vae_params, prompts, jnp.int32(1), engine.levels_T)
    out = {}
    for task, found in prompts.items():
      if task in rollouts.texts:
        out[task] = _text_batch(trajectories.sampled_texts(found, rollouts.texts[task]))
        continue
      rollout = rollouts.images[task]
      steps = trajectories.transitions(rollout, engine.kept_steps(1), engine.grid, engine.levels_T)
      image = trajectories.sampled_images(found, rollout, steps)
      if not tasks_lib.BY_NAME[task].plans:
        out[task] = _image_batch(image, align)
        continue
      plan = trajectories.sampled_texts(found, rollouts.texts[tasks_lib.PLAN])
      shape = image.latents_BGNC.shape[:2]
      halves = think.split_halves(
        think.SampledPlans(plan, image), policy.bos, jnp.zeros(shape), jnp.ones(shape, bool)
      )
      out[tasks_lib.PLAN] = _text_batch(halves[tasks_lib.PLAN][0])
      out[task] = _image_batch(halves[task][0], align)
    return out

  params, vae_params = (weights.template(experiment, name) for name in (weights.BASE, weights.VAE))
  return abstract(jax.eval_shape(batch, params, vae_params, prompts), where)


def _text_batch(texts: types.SampledTexts) -> types.TextTrainBatch:
  """A train batch of texts, with whatever numbers."""
  shape = texts.logp_BGT.shape[:2]
  return types.TextTrainBatch(texts, jnp.zeros(shape), jnp.ones(shape, bool), texts.logp_BGT)


def _image_batch(images: types.SampledImages, align: types.Config) -> types.ImageTrainBatch:
  """A train batch of images, with whatever numbers."""
  if flow_objectives.find(align.image.objective).coupled:
    query = trajectories.step_query(images, guided=align.rollout.guidance != 1)
  else:
    latents = images.latents_BGNC
    x_BKGNC = jnp.broadcast_to(
      latents[:, None], (latents.shape[0], align.image.draws, *latents.shape[1:])
    )
    query = types.FlowQuery(images.prompts, x_BKGNC, x_BKGNC[..., 0, 0])
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
  """The programs of an iteration with their abstract arguments."""

  def __init__(self, experiment: experiment_lib.Experiment):
    self.experiment = experiment
    self._params = weights.template(experiment, weights.BASE)
    optimizer, self._update = update_lib.build_update(experiment)
    state = jax.eval_shape(
      lambda params: update_lib.initial_state(experiment, params, optimizer), self._params
    )
    self._state = abstract(state, placement.tree_shardings(state, experiment.mesh))

  def by_name(self) -> dict[str, Callable[[], Traced]]:
    """Text and image rollouts, and the update."""
    sizes = tasks_lib.active(self.experiment.config.align.prompts)
    texts = {t: n for t, n in sizes.items() if not tasks_lib.draws_image(t)}
    images = {t: n for t, n in sizes.items() if tasks_lib.draws_image(t)}
    return {
      'text': lambda: self._rollout(texts),
      'image': lambda: self._rollout(images),
      'step': self._train,
    }

  def _vae(self, mesh: Mesh) -> types.Params:
    template = weights.template(self.experiment, weights.VAE)
    return abstract(template, placement.tree_shardings(template, mesh))

  def _rollout(self, sizes: dict[str, int]) -> Traced:
    experiment, mesh = self.experiment, self.experiment.rollout_mesh
    engine = engine_lib.RolloutEngine(experiment, apart=False)
    everywhere = NamedSharding(mesh, P())
    mine = abstract(
      self._params, placement.tree_shardings(self._params, mesh), experiment.rollout_dtype
    )
    held = {weights.BASE: mine, weights.VAE: self._vae(mesh)}
    arguments = (
      (mine,),
      held[weights.VAE],
      abstract_prompts(experiment, sizes, placement.rows_sharding(mesh)),
      jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
      abstract(engine.levels_T, everywhere),
    )
    # The copy of the other rollout, of texts or of images, is made before this one has ended.
    resident = bytes_of(self._state) + (bytes_of(mine) if experiment.copies_weights else 0.0)
    loop = experiment.config.data.answer_tokens + 1
    return Traced(jax.jit(engine.sample), arguments, mesh, held, resident, loop)

  def _train(self) -> Traced:
    mesh = self.experiment.mesh
    everywhere = NamedSharding(mesh, P())
    factors = {
      name: jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere) for name in losses.FACTORS
    }
    frozen = {'vae': self._vae(mesh), 'factors': factors}
    batch = abstract_batch(self.experiment, placement.rows_sharding(mesh))
    held = {'state': self._state, weights.VAE: frozen['vae']}
    function = mesh_lib.traceable(self._update)
    return Traced(function, (self._state, frozen, batch), mesh, held, 0.0, 1)


def programs(experiment: experiment_lib.Experiment) -> dict[str, Callable[[], Traced]]:
  """The programs by name: text and image rollouts, and the update."""
  return Programs(experiment).by_name()
