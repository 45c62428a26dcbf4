"""Pallas splash attention (arXiv 2205.14135 on TPU) for our shapes: padding, masks, the mesh."""

from __future__ import annotations

import functools

import jax
from jax import numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from lvrpo_jax.parallel import activations

Array = jax.Array

LANES = 128
"""Head widths are padded to a multiple of this."""
BLOCK = 512
"""Queries and keys of a block; short sequences take `LANES`."""


def block(length: int) -> int:
  return BLOCK if length > BLOCK else LANES


def pad(x: Array, axis: int, multiple: int) -> Array:
  """Zeros at the end of an axis, up to a multiple."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


def attend(
  q_BMLHK: Array,
  k_BMSJK: Array,
  v_BMSJK: Array,
  dense_BLS: Array | None,
  valid_BS: Array | None,
  causal_from: int | None,
  interpret: bool = False,
) -> Array:
  """Softmax attention (B, M, L, H, K), grouped queries, float32 inside.

  Args:
    dense_BLS: any mask; the other two are then ignored.
    valid_BS: False on keys that nobody may see.
    causal_from: query i sees keys up to `causal_from + i`; None sees all.
    interpret: runs the kernel without a TPU, slowly, for tests.
  """
  run = functools.partial(_local, causal_from=causal_from, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(q_BMLHK, k_BMSJK, v_BMSJK, dense_BLS, valid_BS)
  rows, heads = activations.resolve('rows'), activations.resolve('heads')
  split = P(rows, None, None, heads)
  specs = [split] * 3 + [None if x is None else P(rows) for x in (dense_BLS, valid_BS)]
  # The kernel is opaque to the partitioner; rows and heads are independent.
  return jax.shard_map(run, in_specs=tuple(specs), out_specs=split, check_vma=False)(
    q_BMLHK, k_BMSJK, v_BMSJK, dense_BLS, valid_BS
  )


def _local(
  q_BMLHK: Array,
  k_BMSJK: Array,
  v_BMSJK: Array,
  dense_BLS: Array | None,
  valid_BS: Array | None,
  causal_from: int | None,
  interpret: bool,
) -> Array:
  B, M, L, H, K = q_BMLHK.shape
  S = k_BMSJK.shape[2]
  block_q, block_kv = block(L), block(S)

  def lay_out(x, step):
    x = pad(pad(x.reshape(B * M, *x.shape[2:]), 1, step), 3, LANES)
    return jnp.swapaxes(x, 1, 2)

  q = lay_out(q_BMLHK * (K**-0.5), block_q)
  k, v = lay_out(k_BMSJK, block_kv), lay_out(v_BMSJK, block_kv)
  shape = q.shape[2], k.shape[2]
  if dense_BLS is not None:
    mask = pad(pad(dense_BLS, 1, block_q), 2, block_kv)
    # Padded queries see the first key, so that nothing divides by zero.
    mask = mask.at[:, L:, 0].set(True)
    run = jax.vmap(lambda m, *x: _kernel(m[None], shape, interpret)(*x))
    out = run(jnp.repeat(mask, M, axis=0), q, k, v)
  else:
    kernel = _kernel(_static(shape, causal_from), shape, interpret)
    keys = jnp.ones((B, S), bool) if valid_BS is None else valid_BS
    if valid_BS is None and shape[1] == S:
      out = jax.vmap(kernel)(q, k, v)
    else:
      keys = jnp.repeat(pad(keys, 1, block_kv), M, axis=0).astype(jnp.int32)
      ones = jnp.ones((B * M, shape[0]), jnp.int32)
      out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(ones, keys))
  return jnp.swapaxes(out, 1, 2)[:, :L, :, :K].reshape(B, M, L, H, K)


def _static(shape: tuple[int, int], causal_from: int | None) -> masks.MultiHeadMask:
  # One head: the kernel uses it for all.
  return masks.MultiHeadMask(
    [masks.FullMask(shape) if causal_from is None else masks.CausalMask(shape, causal_from)]
  )


def _kernel(mask, shape: tuple[int, int], interpret: bool):
  q, kv = block(shape[0]), block(shape[1])
  sizes = kernels.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_kv_compute=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_kv_dkv_compute=kv,
    block_q_dq=q,
    block_kv_dq=kv,
  )
  kernel = kernels.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)
  for name in ('fwd_mask_info', 'dq_mask_info', 'dkv_mask_info'):
    # The library makes an array of this flag, and then asks for its value under a transformation.
    info = getattr(kernel, name)
    setattr(kernel, name, info._replace(is_dynamic_mask=isinstance(mask, jax.Array) or None))
  return kernel
