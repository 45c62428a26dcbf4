"""Pallas splash attention (arXiv 2205.14135 on TPU) with padding, masks and a mesh.

The kernel takes sequences and head widths that are multiples of its blocks; this module pads its
inputs, translates masks, and runs it on every device's own rows and heads.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import cast

import jax
from jax import numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from lvrpo_jax import types
from lvrpo_jax.parallel import activations

Array = types.Array

LANES = 128
"""Multiple to which head widths are padded."""
BLOCK = 512
"""Queries and keys in a block; sequences of at most `BLOCK` tokens use blocks of `LANES`."""


def block(length: int) -> int:
  """Returns the block size for a sequence of `length` tokens."""
  return BLOCK if length > BLOCK else LANES


def pad(x: Array, axis: int, multiple: int) -> Array:
  """Pads the end of an axis with zeros to a multiple."""
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
  """Computes grouped-query softmax attention (B, M, L, H, K), in float32 inside the kernel.

  Args:
    dense_BLS: any mask; `valid_BS` and `causal_from` are ignored if it is given.
    valid_BS: False on keys that no query may see; None if all are valid.
    causal_from: query i sees keys up to index `causal_from + i`; None lets it see all.
    interpret: interprets the kernel without a TPU, slowly, for tests.
  """
  run = functools.partial(_local, causal_from=causal_from, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(q_BMLHK, k_BMSJK, v_BMSJK, dense_BLS, valid_BS)
  rows, heads = activations.resolve('rows'), activations.resolve('heads')
  split = P(rows, None, None, heads)
  specs = [split] * 3 + [None if x is None else P(rows) for x in (dense_BLS, valid_BS)]
  # XLA's partitioner cannot split the kernel; rows and heads are independent, so devices can.
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
  """Runs the kernel on the rows and heads of one device; arguments as in `attend`."""
  B, M, L, H, K = q_BMLHK.shape
  S = k_BMSJK.shape[2]
  block_q, block_kv = block(L), block(S)

  def lay_out(x: Array, step: int) -> Array:
    x = pad(pad(x.reshape(B * M, *x.shape[2:]), 1, step), 3, LANES)
    return jnp.swapaxes(x, 1, 2)

  q = lay_out(q_BMLHK * (K**-0.5), block_q)
  k, v = lay_out(k_BMSJK, block_kv), lay_out(v_BMSJK, block_kv)
  shape = q.shape[2], k.shape[2]
  if dense_BLS is not None:
    mask = pad(pad(dense_BLS, 1, block_q), 2, block_kv)
    # A padded query sees the first key, which keeps its softmax from dividing by zero.
    mask = mask.at[:, L:, 0].set(True)

    def run_row(mask_LS: Array, q_HLK: Array, k_JSK: Array, v_JSK: Array) -> Array:
      return _kernel(mask_LS[None], shape, interpret)(q_HLK, k_JSK, v_JSK)

    out = jax.vmap(run_row)(jnp.repeat(mask, M, axis=0), q, k, v)
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
  """Builds a mask that is known at compile time; its single head serves all heads."""
  return masks.MultiHeadMask(
    [masks.FullMask(shape) if causal_from is None else masks.CausalMask(shape, causal_from)]
  )


def _kernel(
  mask: Array | masks.MultiHeadMask, shape: tuple[int, int], interpret: bool
) -> Callable[..., Array]:
  """Builds the kernel for queries and keys of `shape` (L, S) under a traced or a static mask."""
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
    # The library turns this flag into an array and then reads its value under a transformation,
    # which fails; True or None is read as it is.
    info = getattr(kernel, name)
    setattr(kernel, name, info._replace(is_dynamic_mask=isinstance(mask, jax.Array) or None))
  # Without `save_residuals` the kernel returns one array.
  return cast(Callable[..., Array], kernel)
