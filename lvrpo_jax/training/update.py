"""The update of an alignment: its loss, its optimizer, its state, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import struct
import jax
import optax

from lvrpo_jax import types
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models import lora
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import kl
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import diagnostics
from lvrpo_jax.training import losses
from lvrpo_jax.training import optimizer as optimizer_lib
from lvrpo_jax.training import step as step_lib

Batch = dict[str, types.TextTrainBatch | types.ImageTrainBatch]
"""What an update reads, by task; plans as `tasks.PLAN`."""


class CreditedSamples(struct.PyTreeNode):
  """Samples of a task with their advantages."""

  sampled: types.SampledTexts | types.SampledImages
  advantage_BG: jax.Array
  valid_BG: jax.Array


Credited = dict[str, CreditedSamples]
"""Samples with advantages by task; plans as `tasks.PLAN`."""


def by_modality(
  credited: Credited,
) -> tuple[dict[str, types.SampledTexts], dict[str, types.SampledImages]]:
  """Texts and images of samples by task."""
  texts, images = {}, {}
  for task, found in credited.items():
    (texts if isinstance(found.sampled, types.SampledTexts) else images)[task] = found.sampled
  return texts, images


def alignment_loss(experiment: experiment_lib.Experiment) -> step_lib.Loss:
  """The loss of the update; with adapters, as a function of these alone."""
  align = experiment.config.align
  loss = losses.alignment(experiment.policy, align)
  if not align.lora.rank:
    return loss

  def sums(adapters, state, frozen, batch):
    params = lora.merge(frozen['base'], adapters, align.lora.alpha / align.lora.rank)
    return loss.sums(params, state, frozen, batch)

  return loss._replace(sums=sums)


def build_update(
  experiment: experiment_lib.Experiment,
) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
  """The optimizer, and the compiled step."""
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
  """The state before the first update.

  The reference, which nothing changes, is kept in the numbers that passes read; with adapters it is
  the weights below them.
  """
  align = experiment.config.align
  keeps_old = not flow_objectives.find(align.image.objective).coupled
  state = step_lib.init(trained, optimizer, old=keeps_old)
  return state if align.lora.rank else state.replace(reference=experiment.rounded(trained))


def mix(old: types.Params, new: types.Params, decay: jax.Array) -> types.Params:
  """`decay old + (1 - decay) new`."""
  return jax.tree.map(lambda o, n: decay * o + (1 - decay) * n, old, new)


def advantage_settings(align: types.Config) -> dict[str, Any]:
  """Arguments of `advantage.combine` from the config."""
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
  """Moves the factors of the penalties towards their targets; returns the new ones as metrics.

  Args:
    factors: of `losses.FACTORS`; changed in place.
  """
  text, image = align.text, align.image
  drift = 'velocity_mse' if image.kl == 'velocity' else 'kl'
  out = {}
  for kind, settings, names in (
    ('answers', text, [f'{task}/kl_{text.kl}' for task in tasks_lib.TEXT_OUTPUTS]),
    ('images', image, [f'{task}/{drift}' for task in tasks_lib.TASKS]),
  ):
    found = [metrics[name] for name in names if name in metrics]
    if settings.kl_target and found:
      name = f'{kind}_penalty'
      mean = sum(map(float, found)) / len(found)
      factor = kl.adapted(factors[name], mean, settings.kl_target, settings.kl_adaptation)
      factors[name] = out[f'factor/{name}'] = factor
  return out
