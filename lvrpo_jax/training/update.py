"""Builds the update of an alignment: its loss, optimizer, initial state and inputs."""

from __future__ import annotations

from collections.abc import Mapping

from flax import struct
import jax
import optax

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import kl
from lvrpo_jax.rollouts import replay
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import losses
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib

Batch = dict[str, types.TextTrainBatch | types.ImageTrainBatch]
"""Batches of an update by task; plans as `tasks.PLAN`."""


class CreditedSamples(struct.PyTreeNode):
  """Samples of a task with their advantages.

  Attributes:
    sampled: texts or images.
    advantage_BG: of every sample.
    valid_BG: samples that have an advantage.
  """

  sampled: types.SampledTexts | types.SampledImages
  advantage_BG: jax.Array
  valid_BG: jax.Array


Credited = dict[str, CreditedSamples]
"""Samples with advantages by task; plans as `tasks.PLAN`."""


def by_modality(
  credited: Credited,
) -> tuple[dict[str, types.SampledTexts], dict[str, types.SampledImages]]:
  """Separates samples by task into texts and images."""
  texts: dict[str, types.SampledTexts] = {}
  images: dict[str, types.SampledImages] = {}
  for task, found in credited.items():
    if isinstance(found.sampled, types.SampledTexts):
      texts[task] = found.sampled
    else:
      images[task] = found.sampled
  return texts, images


def alignment_loss(experiment: experiment_lib.Experiment) -> step_lib.Loss:
  """Returns the loss of the update; with adapters, as a function of the adapters alone."""
  align = experiment.config.align
  loss = losses.alignment(experiment.policy, align)
  if not align.lora.rank:
    return loss

  def sums(
    adapters: types.Params, state: types.TrainState, frozen: types.Tree, batch: Batch
  ) -> step_lib.Sums:
    params = lora.merge(frozen['base'], adapters, align.lora.alpha / align.lora.rank)
    return loss.sums(params, state, frozen, batch)

  return loss._replace(sums=sums)


def build_update(
  experiment: experiment_lib.Experiment,
) -> tuple[optax.GradientTransformation, step_lib.Step]:
  """Builds the optimizer and the compiled step."""
  align, parallel = experiment.config.align, experiment.config.parallel
  optimizer = optimizer_lib.from_config(
    align.optimizer,
    align.iterations * align.updates_per_rollout,
    rules=((diagnostics.EXPERTS['understanding'], align.optimizer.understanding_rate),),
  )
  return optimizer, step_lib.compile_step(
    alignment_loss(experiment),
    optimizer,
    experiment.mesh,
    micro_batches=parallel.micro_batches,
    group_parts=experiment.group_parts,
    runner=parallel.runner,
  )


def initial_state(
  experiment: experiment_lib.Experiment,
  trained: types.Params,
  optimizer: optax.GradientTransformation,
) -> types.TrainState:
  """Returns the state before the first update.

  The reference, which no update changes, is kept in the compute dtype that passes read. With
  adapters the reference is their base, and the state holds none.
  """
  align = experiment.config.align
  keeps_old = not flow_objectives.find(align.image.objective).coupled
  state = step_lib.init(trained, optimizer, old=keeps_old)
  return state if align.lora.rank else state.replace(reference=experiment.rounded(trained))


def mix(old: types.Params, new: types.Params, decay: jax.Array) -> types.Params:
  """Returns `decay * old + (1 - decay) * new`."""
  return jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, old, new)


def noise_latents(
  config: types.Config, step: jax.Array, index_B: jax.Array, latents_BGNC: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Noises final latents afresh, for a decoupled objective; returns (x_BKGNC, time_BKG).

  The draws of a row depend on the seed, the step and the index of its prompt.
  """
  draws, group = config.align.image.draws, latents_BGNC.shape[1]
  root = jax.random.fold_in(jax.random.key(config.seed + 1), step)
  key_B = jax.vmap(lambda index: jax.random.fold_in(root, index))(index_B)
  key_BKG = jax.vmap(lambda key: ops.fold_rows(key, (draws, group)))(key_B)
  points = replay.noise_points(key_BKG, latents_BGNC[:, None], config.pretrain.shift)
  return points.x_t, points.t


def mean_metrics(metrics: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Averages the metrics of several updates."""
  return jax.tree.map(lambda *x: sum(x) / len(x), *metrics)


def advantage_settings(align: types.Config) -> dict[str, types.Json]:
  """Returns the arguments of `advantage.combine` that the config sets."""
  settings = align.advantage
  return dict(
    method=settings.method,
    floor=settings.floor,
    ddof=settings.ddof,
    scope=settings.scope,
    form=settings.floor_form,
    clip=settings.clip,
  )


def adapt_kl_factors(
  align: types.Config, factors: dict[str, float], metrics: Mapping[str, jax.Array]
) -> dict[str, float]:
  """Adapts the factors of the penalties to their targets; returns the new ones as metrics.

  Args:
    align: `config.align`.
    factors: of `losses.FACTORS`; changed in place.
    metrics: of the update.
  """
  text, image = align.text, align.image
  image_kl = 'velocity_mse' if image.kl == 'velocity' else 'kl'
  out = {}
  for kind, settings, names in (
    ('answers', text, [f'{task}/kl_{text.kl}' for task in tasks_lib.TEXT_OUTPUTS]),
    ('images', image, [f'{task}/{image_kl}' for task in tasks_lib.TASKS]),
  ):
    found = [metrics[name] for name in names if name in metrics]
    if settings.kl_target and found:
      name = f'{kind}_penalty'
      mean = sum(map(float, found)) / len(found)
      factor = kl.adapted(factors[name], mean, settings.kl_target, settings.kl_adaptation)
      factors[name] = out[f'factor/{name}'] = factor
  return out
