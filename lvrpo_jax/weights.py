"""Where a policy's weights come from, and where they go: workdirs and released folders."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import shutil
from typing import Any

from absl import logging
import jax
from jax import numpy as jnp

from lvrpo_jax import checkpoint
from lvrpo_jax import hf
from lvrpo_jax import job as job_lib
from lvrpo_jax import sharding
from lvrpo_jax import types
from lvrpo_jax.models import unified

BASE, ALIGNED, VAE, JUDGE = 'base', 'aligned', 'vae', 'judge'
"""Checkpoints of parameters alone, by their folder in `<workdir>/checkpoints`."""

COPIED = ('config.json', 'llm_config.json', 'vit_config.json', 'generation_config.json',
          'tokenizer.json', 'tokenizer_config.json', 'vocab.json', 'merges.txt',
          'special_tokens_map.json', 'added_tokens.json')
"""Files of a released folder that alignment does not change."""


SHAPED_BY = ('architecture', 'checkpoint', 'data.source', 'model.', 'vae.')
"""Keys of the config on which the shapes of parameters depend."""


def template(job: job_lib.Job, name: str) -> types.Params:
  """Shapes, dtypes and shardings of the parameters of the policy, autoencoder or judge."""
  def make():
    if name == JUDGE:
      side = job.judge.vision_config.image_size
      return job.judge.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), job.captions(['']))[
          'params']
    if name != VAE:
      return unified.init(job.policy.config, jax.random.key(0))
    side = job.policy.image_size
    return job.policy.vae.init(jax.random.key(0), jnp.zeros((1, side, side, 3)))['params']
  shapes = jax.eval_shape(make)
  return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                      shapes, sharding.tree_shardings(shapes, job.mesh))


def kept(workdir: pathlib.Path, name: str, like: types.Params,
         make: Callable[[], types.Params]) -> types.Params:
  """Parameters that are made once and then read back."""
  store = checkpoint.Checkpoints(workdir / 'checkpoints' / name, keep=1)
  restored = store.restore(like)
  params = restored[0] if restored else sharding.put(
      make(), jax.tree.map(lambda leaf: leaf.sharding, like))
  if not restored:
    store.save(0, params, {})
  store.close()
  return params


def stored(job: job_lib.Job, name: str) -> types.Params | None:
  """Parameters kept in the workdir, or None."""
  folder = job.workdir / 'checkpoints' / name
  if not folder.is_dir():
    return None
  store = checkpoint.Checkpoints(folder, keep=1)
  restored = store.restore(template(job, name))
  store.close()
  return restored[0] if restored else None


def read_released(job: job_lib.Job, name: str) -> types.Params:
  """Parameters of the released folder, read straight into their shards."""
  config = job.policy.vae if name == VAE else job.policy.config
  shardings = jax.tree.map(lambda leaf: leaf.sharding, template(job, name))
  return hf.load(job.config.checkpoint, config, shardings)


def base(job: job_lib.Job, name: str) -> types.Params:
  """The parameters before alignment of a job with a released model."""
  found = stored(job, name)
  return read_released(job, name) if found is None else found


def newest(job: job_lib.Job) -> tuple[types.Params, types.Params]:
  """Policy and autoencoder: aligned in the workdir if there is such, else the released ones.

  Raises:
    ValueError: there are none, or the workdir's model has other sizes than the config.
  """
  released = bool(job.config.checkpoint)
  if (job.workdir / 'config.json').exists():
    # Before any checkpoint is opened: one of other shapes would count as unreadable.
    checkpoint.compare_config(job.workdir, job.config, SHAPED_BY)
  params, vae_params = stored(job, ALIGNED), stored(job, VAE)
  logging.info('policy: %s', f'aligned, from {job.workdir}' if params else
               job.config.checkpoint or 'missing')
  if params is None and released:
    params = base(job, BASE)
  if vae_params is None and released:
    vae_params = read_released(job, VAE)
  if params is None or vae_params is None:
    raise ValueError(f'{job.workdir} holds no aligned model; run the job with this --workdir '
                     'first, or set config.checkpoint to the folder of a released model')
  return params, vae_params


def import_released(job: job_lib.Job) -> None:
  """Writes a released model into the workdir as Orbax checkpoints, sharded over the mesh.

  Raises:
    ValueError: `config.checkpoint` is not set.
  """
  if not job.config.checkpoint:
    raise ValueError("config.checkpoint is ''; allowed: the folder of a released model")
  for name in (VAE, BASE):
    kept(job.workdir, name, template(job, name), lambda name=name: read_released(job, name))
    logging.info('imported %s into %s', name, job.workdir / 'checkpoints' / name)


def export(job: job_lib.Job, target: str | os.PathLike, shards: int) -> None:
  """Writes the workdir's aligned model as a folder of the released form.

  The folder appears when it is complete.

  Raises:
    ValueError: the target exists, or the workdir has no aligned model of a released family.
  """
  if not target:
    raise ValueError("config.convert.target is ''; allowed: a folder that does not exist yet")
  target = pathlib.Path(target)
  if target.exists():
    raise ValueError(f'config.convert.target is {str(target)!r}, which exists; allowed: a new '
                     'folder')
  source: Any = job.config.checkpoint
  if not source:
    raise ValueError("config.checkpoint is ''; allowed: the folder of the released model that was "
                     'aligned, whose configuration and tokenizer are copied')
  params, vae_params = newest(job)
  partial = target.with_name(target.name + '.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir(parents=True)
  try:
    hf.save(params, partial / 'ema.safetensors', job.policy.config, shards)
    hf.save(vae_params, partial / 'ae.safetensors', job.policy.vae)
    for name in COPIED:
      if (pathlib.Path(source) / name).is_file():
        shutil.copy(pathlib.Path(source) / name, partial / name)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  logging.info('exported to %s', target)
