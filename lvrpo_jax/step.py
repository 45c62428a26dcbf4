"""One pure optimizer step `(state, frozen, batch) -> (state, metrics)`; the loss is an argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from lvrpo_jax import ops
from lvrpo_jax import sharding
from lvrpo_jax import types

Array = jax.Array
Weighted = Mapping[str, tuple[Array, Array]]


class Loss(NamedTuple):
  """A loss as sums, so that it can be split over rows, micro-batches and devices exactly.

  Attributes:
    weights: `batch -> {term: weight}`: what each term is divided by, over the whole batch.
    sums: `(params, state, frozen, batch) -> ({term: sum}, {metric: (sum, weight)})`.
    coefficients: factor of every term in the total.
  """
  weights: Callable[[Any], dict[str, Array]]
  sums: Callable[[types.Params, types.TrainState, Any, Any], tuple[dict[str, Array], Weighted]]
  coefficients: Mapping[str, float]


def init(params: types.Params, optimizer: optax.GradientTransformation, *, ema: bool = False,
         old: bool = False, reference: bool = False) -> types.TrainState:
  """A state whose running mean, old policy and reference start as copies of `params`."""
  copy = lambda wanted: jax.tree.map(jnp.copy, params) if wanted else None
  return types.TrainState(jnp.int32(0), params, optimizer.init(params), copy(ema), copy(old),
                          copy(reference))


def make_step(loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float = 0.,
              micro_batches: int = 1, axis: str | None = None):
  """Builds the step.

  A step whose gradient is not finite changes nothing but the counter and reports `skipped`.

  Args:
    micro_batches: rows are split into so many parts, whose gradients are accumulated.
    axis: name of the mapped axis under `pmap`; None under `jit`, where the mesh does the sums.
  """
  total = lambda tree: jax.lax.psum(tree, axis) if axis else tree

  def gradients(state, frozen, batch, weights):
    def objective(params, part):
      sums, metrics = loss.sums(params, state, frozen, part)
      terms = {k: loss.coefficients[k] * ops.divide(v, weights[k]) for k, v in sums.items()}
      return sum(terms.values()), {**metrics, **{
          f'loss/{k}': (v, jnp.float32(0)) for k, v in terms.items()}}
    grad = jax.grad(objective, has_aux=True)
    if micro_batches == 1:
      return grad(state.params, batch)
    parts = sharding.split_rows(batch, micro_batches)
    add = lambda carry, part: (jax.tree.map(jnp.add, carry, grad(state.params, part)), None)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(
        grad, state.params, jax.tree.map(lambda x: x[0], parts)))
    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: types.TrainState, frozen: Any, batch: Any
           ) -> tuple[types.TrainState, dict[str, Array]]:
    weights = total(loss.weights(batch))
    grads, sums = total(gradients(state, frozen, batch, weights))
    norm = ops.global_norm(grads)
    finite = jnp.isfinite(norm)

    def update(_):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      return optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.lax.cond(finite, update, lambda _: (state.params, state.opt_state),
                                     None)
    ema = state.ema
    if ema is not None:
      mix = lambda e, p: jnp.where(finite, ema_decay * e + (1 - ema_decay) * p, e)
      ema = jax.tree.map(mix, ema, params)
    metrics = {k: s if k.startswith('loss/') else ops.divide(s, w) for k, (s, w) in sums.items()}
    metrics['loss'] = sum(metrics[k] for k in metrics if k.startswith('loss/'))
    metrics.update(grad_norm=norm, skipped=1. - finite)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state,
                         ema=ema), metrics
  return step


def compile_step(loss: Loss, optimizer: optax.GradientTransformation, mesh, *,
                 ema_decay: float = 0., micro_batches: int = 1, runner: str = 'jit'):
  """The step, compiled for a mesh ('jit') or for plain data parallelism ('pmap').

  Both take and return the same state and global batch; the state is donated.

  Raises:
    ValueError: unknown runner.
  """
  if runner == 'jit':
    return jax.jit(make_step(loss, optimizer, ema_decay, micro_batches), donate_argnums=0)
  if runner != 'pmap':
    raise ValueError(f"parallel.runner is {runner!r}; allowed: 'jit', 'pmap'")
  pure = make_step(loss, optimizer, ema_decay, micro_batches, axis='devices')
  mapped = jax.pmap(pure, 'devices', in_axes=(None, None, 0), out_axes=None,
                    devices=mesh.devices.reshape(-1).tolist())
  count = mesh.devices.size

  def run(state, frozen, batch):
    return mapped(state, frozen, sharding.split_rows(batch, count))
  return run
