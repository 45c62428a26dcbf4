"""Builds the optimizer step `(state, frozen, batch) -> (state, metrics)` of a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

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
Metrics = dict[str, Array]
Weighted = Mapping[str, tuple[Array, Array]]
"""(sum, weight) of metrics by name."""
Sums = tuple[dict[str, Array], Weighted]
"""Sums of the terms of a loss, and metrics."""
Gradients = tuple[types.Params, dict[str, tuple[Array, Array]]]
"""Gradients, and (sum, weight) of metrics and of the terms of a loss."""
Step = Callable[[types.TrainState, types.Tree, types.Tree], tuple[types.TrainState, Metrics]]
"""`(state, frozen, batch) -> (state, metrics)`."""


class Loss(NamedTuple):
  """A loss as sums, so that it can be split over rows, micro-batches and devices exactly.

  Attributes:
    weights: `batch -> {term: weight}`; each term is divided by its weight over the whole batch.
    sums: `(params, state, frozen, batch) -> ({term: sum}, {metric: (sum, weight)})`.
    coefficients: factor of every term in the total.
    split_group: `(batch, parts) -> batch` with a leading axis, which splits the samples of every
      group; None where there are no groups.
  """

  weights: Callable[[types.Tree], dict[str, Array]]
  sums: Callable[[types.Params, types.TrainState, types.Tree, types.Tree], Sums]
  coefficients: Mapping[str, float]
  split_group: Callable[[types.Tree, int], types.Tree] | None = None


def _unplaced(tree: types.Tree) -> types.Tree:
  return tree


def init(
  params: types.Params,
  optimizer: optax.GradientTransformation,
  *,
  ema: bool = False,
  old: bool = False,
) -> types.TrainState:
  """Returns a state whose running mean and old policy, if any, are copies of `params`."""

  def copy() -> types.Params:
    return jax.tree.map(jnp.copy, params)

  return types.TrainState(
    step=jnp.int32(0),
    params=params,
    opt_state=optimizer.init(params),
    ema=copy() if ema else None,
    old=copy() if old else None,
  )


def _split(loss: Loss, batch: types.Tree, micro_batches: int, group_parts: int) -> types.Tree:
  """Adds a leading axis of the parts of a batch whose gradients are accumulated."""
  parts = placement.split_micro_batches(batch, micro_batches)
  if group_parts == 1:
    return parts
  split_group = loss.split_group
  assert split_group is not None, 'group_parts is above 1, but the loss has no groups'
  parts = jax.vmap(lambda part: split_group(part, group_parts))(parts)
  # The size is given instead of -1, because some arrays have size 0.
  return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)


def _gradient_function(
  loss: Loss,
  place: Callable[[types.Tree], types.Tree],
  micro_batches: int,
  group_parts: int,
) -> Callable[[types.TrainState, types.Tree, types.Tree, dict[str, Array]], Gradients]:
  """Returns `(state, frozen, batch, weights) -> gradients` of a loss; see `make_step`."""

  def gradients(
    state: types.TrainState, frozen: types.Tree, batch: types.Tree, weights: dict[str, Array]
  ) -> Gradients:
    def objective(params: types.Params, part: types.Tree) -> tuple[Array | int, Weighted]:
      sums, metrics = loss.sums(params, state, frozen, part)
      terms = {
        name: loss.coefficients[name] * ops.divide(term, weights[name])
        for name, term in sums.items()
      }
      return sum(terms.values()), {
        **metrics,
        **{f'loss/{name}': (term, jnp.float32(0)) for name, term in terms.items()},
      }

    def grad(params: types.Params, part: types.Tree) -> Gradients:
      grads, sums = jax.grad(objective, has_aux=True)(params, part)
      return place(grads), sums

    def add(carry: types.Tree, part: types.Tree) -> tuple[types.Tree, None]:
      return jax.tree.map(jnp.add, carry, grad(state.params, part)), None

    placement.check_rows(batch, micro_batches)
    if micro_batches * group_parts == 1:
      return grad(state.params, batch)
    parts = _split(loss, batch, micro_batches, group_parts)
    zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype),
      jax.eval_shape(grad, state.params, jax.tree.map(lambda x: x[0], parts)),
    )
    return jax.lax.scan(add, (place(zeros[0]), zeros[1]), parts)[0]

  return gradients


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  ema_decay: float = 0.0,
  micro_batches: int = 1,
  group_parts: int = 1,
  axis: str | None = None,
  place: Callable[[types.Tree], types.Tree] = _unplaced,
) -> Step:
  """Builds the step.

  A step whose gradient is not finite changes only the counter and reports `skipped`. Tracing it
  raises a ValueError where rows do not divide over the mesh, see `placement.check_rows`.

  Args:
    loss: the loss.
    optimizer: turns gradients into updates.
    ema_decay: decay of the running mean, where the state has one.
    micro_batches: rows are split into so many parts, whose gradients are accumulated.
    group_parts: the samples of every group are split into so many parts as well; their contexts
      are encoded once for each part.
    axis: name of the mapped axis under `pmap`; None under `jit`, where the mesh does the sums.
    place: lays out gradients and parameters on a mesh.
  """
  gradients = _gradient_function(loss, place, micro_batches, group_parts)

  def total(tree: types.Tree) -> types.Tree:
    return jax.lax.psum(tree, axis) if axis else tree

  def step(
    state: types.TrainState, frozen: types.Tree, batch: types.Tree
  ) -> tuple[types.TrainState, Metrics]:
    weights = total(loss.weights(batch))
    grads, sums = total(gradients(state, frozen, batch, weights))
    norm = ops.global_norm(grads)
    finite = jnp.isfinite(norm)

    def update(_: None) -> tuple[types.Params, types.Tree]:
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      return place(optax.apply_updates(state.params, updates)), place(opt_state)

    def keep(_: None) -> tuple[types.Params, types.Tree]:
      return state.params, state.opt_state

    def mix(mean: Array, param: Array) -> Array:
      return jnp.where(finite, ema_decay * mean + (1 - ema_decay) * param, mean)

    params, opt_state = jax.lax.cond(finite, update, keep, None)
    ema = None if state.ema is None else jax.tree.map(mix, state.ema, params)
    metrics = {
      name: value if name.startswith('loss/') else ops.divide(value, weight)
      for name, (value, weight) in sums.items()
    }
    metrics['loss'] = sum(metrics[name] for name in metrics if name.startswith('loss/'))
    metrics.update(grad_norm=norm, skipped=1.0 - finite)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

  return step


def compile_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  mesh: Mesh,
  *,
  ema_decay: float = 0.0,
  micro_batches: int = 1,
  group_parts: int = 1,
  runner: str = 'jit',
) -> Step:
  """Compiles the step for a mesh ('jit') or for plain data parallelism ('pmap').

  Both take and return the same state and global batch; the state is donated.

  Args:
    loss, optimizer, ema_decay, micro_batches, group_parts: see `make_step`.
    mesh: of the state and the batch.
    runner: 'jit' or 'pmap'.

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
    # Under pmap every device holds the whole state, which would be gathered for each step.
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

  def run(
    state: types.TrainState, frozen: types.Tree, batch: types.Tree
  ) -> tuple[types.TrainState, Metrics]:
    # pmap reads and returns arrays on its own mesh, and all other programs keep theirs on the mesh
    # of the config. Arguments and results are moved, and the state gets its former layout.
    before = placement.tree_shardings(state, mesh)
    state, frozen = jax.device_put((state, frozen), replicated)
    state, metrics = mapped(
      state, frozen, jax.device_put(placement.split_over_devices(batch, count), parts)
    )
    return jax.device_put(state, before), jax.device_put(metrics, NamedSharding(mesh, P()))

  return run
