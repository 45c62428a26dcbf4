"""One pure optimizer step `(state, frozen, batch) -> (state, metrics)`; the loss is an argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement

Array = jax.Array
Weighted = Mapping[str, tuple[Array, Array]]


class Loss(NamedTuple):
  """A loss as sums, so that it can be split over rows, micro-batches and devices exactly.

  Attributes:
    weights: `batch -> {term: weight}`: what each term is divided by, over the whole batch.
    sums: `(params, state, frozen, batch) -> ({term: sum}, {metric: (sum, weight)})`.
    coefficients: factor of every term in the total.
    split_group: `(batch, parts) -> batch` with a leading axis, which splits the samples of every
      group; None where there are no groups.
  """

  weights: Callable[[Any], dict[str, Array]]
  sums: Callable[[types.Params, types.TrainState, Any, Any], tuple[dict[str, Array], Weighted]]
  coefficients: Mapping[str, float]
  split_group: Callable[[Any, int], Any] | None = None


def init(
  params: types.Params,
  optimizer: optax.GradientTransformation,
  *,
  ema: bool = False,
  old: bool = False,
) -> types.TrainState:
  """A state whose running mean and old policy start as copies of `params`."""
  copy = lambda wanted: jax.tree.map(jnp.copy, params) if wanted else None
  return types.TrainState(jnp.int32(0), params, optimizer.init(params), copy(ema), copy(old))


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
  micro_batches: int = 1,
  group_parts: int = 1,
  axis: str | None = None,
  place: Callable[[Any], Any] = lambda tree: tree,
):
  """Builds the step.

  A step whose gradient is not finite changes nothing but the counter and reports `skipped`. Tracing
  it raises a ValueError where rows do not divide over the mesh, see `placement.check_rows`.

  Args:
    micro_batches: rows are split into so many parts, whose gradients are accumulated.
    group_parts: the samples of every group are split into so many parts as well; their contexts
      are encoded once for each part.
    axis: name of the mapped axis under `pmap`; None under `jit`, where the mesh does the sums.
    place: lays out gradients and parameters on a mesh.
  """
  total = lambda tree: jax.lax.psum(tree, axis) if axis else tree

  def gradients(state, frozen, batch, weights):
    def objective(params, part):
      sums, metrics = loss.sums(params, state, frozen, part)
      terms = {k: loss.coefficients[k] * ops.divide(v, weights[k]) for k, v in sums.items()}
      return sum(terms.values()), {
        **metrics,
        **{f'loss/{k}': (v, jnp.float32(0)) for k, v in terms.items()},
      }

    def grad(params, part):
      grads, sums = jax.grad(objective, has_aux=True)(params, part)
      return place(grads), sums

    placement.check_rows(batch, micro_batches)
    if micro_batches * group_parts == 1:
      return grad(state.params, batch)
    parts = placement.split_micro_batches(batch, micro_batches)
    if group_parts > 1:
      parts = jax.vmap(lambda part: loss.split_group(part, group_parts))(parts)
      # Not -1: some arrays have no values.
      parts = jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)
    add = lambda carry, part: (jax.tree.map(jnp.add, carry, grad(state.params, part)), None)
    zeros = jax.tree.map(
      lambda s: jnp.zeros(s.shape, s.dtype),
      jax.eval_shape(grad, state.params, jax.tree.map(lambda x: x[0], parts)),
    )
    return jax.lax.scan(add, (place(zeros[0]), zeros[1]), parts)[0]

  def step(
    state: types.TrainState, frozen: Any, batch: Any
  ) -> tuple[types.TrainState, dict[str, Array]]:
    weights = total(loss.weights(batch))
    grads, sums = total(gradients(state, frozen, batch, weights))
    norm = ops.global_norm(grads)
    finite = jnp.isfinite(norm)

    def update(_):
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      return place(optax.apply_updates(state.params, updates)), place(opt_state)

    params, opt_state = jax.lax.cond(
      finite, update, lambda _: (state.params, state.opt_state), None
    )
    ema = state.ema
    if ema is not None:
      mix = lambda e, p: jnp.where(finite, ema_decay * e + (1 - ema_decay) * p, e)
      ema = jax.tree.map(mix, ema, params)
    metrics = {k: s if k.startswith('loss/') else ops.divide(s, w) for k, (s, w) in sums.items()}
    metrics['loss'] = sum(metrics[k] for k in metrics if k.startswith('loss/'))
    metrics.update(grad_norm=norm, skipped=1.0 - finite)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

  return step


def compile_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  mesh,
  *,
  ema_decay: float = 0.0,
  micro_batches: int = 1,
  group_parts: int = 1,
  runner: str = 'jit',
):
  """The step, compiled for a mesh ('jit') or for plain data parallelism ('pmap').

  Both take and return the same state and global batch; the state is donated.

  Raises:
    ValueError: unknown runner; or 'pmap' with several processes, or on a mesh that splits
      parameters.
  """
  if runner == 'jit':
    pure = make_step(
      loss,
      optimizer,
      ema_decay,
      micro_batches,
      group_parts,
      place=lambda tree: placement.constrain(tree, mesh),
    )
    return mesh_lib.scoped(jax.jit(pure, donate_argnums=0), mesh)
  if runner != 'pmap':
    raise ValueError(f"parallel.runner is {runner!r}; allowed: 'jit', 'pmap'")
  if jax.process_count() > 1:
    raise ValueError(
      f"parallel.runner is 'pmap' with {jax.process_count()} processes; allowed: "
      "'jit', or one process"
    )
  if mesh.shape['fsdp'] * mesh.shape['tensor'] > 1:
    # Every device holds the whole state, which would be gathered for each step.
    raise ValueError(
      "parallel.runner is 'pmap' and parallel.mesh is "
      f"{tuple(mesh.shape.values())}; allowed: 'jit', or a mesh with devices along "
      'data alone'
    )
  pure = make_step(loss, optimizer, ema_decay, micro_batches, group_parts, axis='devices')
  mapped = jax.pmap(
    pure,
    'devices',
    in_axes=(None, None, 0),
    out_axes=None,
    donate_argnums=0,
    devices=mesh.devices.reshape(-1).tolist(),
  )
  count = mesh.devices.size
  line = Mesh(mesh.devices.reshape(-1), ('devices',))
  replicated, parts = NamedSharding(line, P()), NamedSharding(line, P('devices'))

  def run(state, frozen, batch):
    # pmap reads and returns arrays on a mesh of its own, while all other programs keep theirs on
    # the mesh of the config: both sides are moved, and the layout of the state is that of before.
    before = placement.tree_shardings(state, mesh)
    state, frozen = jax.device_put((state, frozen), replicated)
    state, metrics = mapped(
      state, frozen, jax.device_put(placement.split_over_devices(batch, count), parts)
    )
    return jax.device_put(state, before), jax.device_put(metrics, NamedSharding(mesh, P()))

  return run
