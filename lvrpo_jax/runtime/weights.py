"""Where a policy's weights come from, and where they go: workdirs and released folders."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
from typing import Any

from absl import logging
import jax
from jax import numpy as jnp

from lvrpo_jax import types
from lvrpo_jax.models import family
from lvrpo_jax.models.siglip import params as siglip_params
from lvrpo_jax.parallel import multihost
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.runtime import workdir as workdir_lib

BASE, ALIGNED, VAE, DUAL_ENCODER = 'base', 'aligned', 'vae', 'dual_encoder'
"""Checkpoints of parameters alone, by their folder in `<workdir>/checkpoints`."""

SHAPED_BY = ('architecture', 'checkpoint', 'data.source', 'model.', 'vae.')
"""Keys of the config on which the shapes of parameters depend."""


def template(experiment: experiment_lib.Experiment, name: str) -> types.Params:
  """Shapes, dtypes and shardings of the parameters of the policy, autoencoder or dual encoder."""
  key = jax.random.key(0)

  def dual_encoder():
    side, encoder = experiment.dual_encoder.image_size, experiment.dual_encoder
    image_BYXC, ids_BL = jnp.zeros((1, side, side, 3)), encoder.token_ids([''])[0]
    return encoder.module.init(key, image_BYXC, ids_BL)['params']

  makers = {VAE: lambda: experiment.policy.init_autoencoder(key), DUAL_ENCODER: dual_encoder}
  shapes = jax.eval_shape(makers.get(name, lambda: experiment.policy.init(key)))
  return jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
    shapes,
    placement.tree_shardings(shapes, experiment.mesh),
  )


def read_dual_encoder(experiment: experiment_lib.Experiment) -> types.Params:
  """Parameters of the folder `config.dual_encoder.path`, read into their shards.

  Raises:
    ValueError: its files cannot be read or hold another model.
  """
  path = experiment.config.dual_encoder.path
  shardings = jax.tree.map(lambda leaf: leaf.sharding, template(experiment, DUAL_ENCODER))
  try:
    return siglip_params.load(path, experiment.dual_encoder.module, shardings)
  except ValueError as error:
    raise ValueError(f'config.dual_encoder.path is {path!r}: {error}') from error


def make_or_restore(
  workdir: pathlib.Path,
  name: str,
  like: types.Params,
  make: Callable[[], types.Params],
  record: dict[str, Any] | None = None,
) -> types.Params:
  """Parameters that are made once and then read back."""
  folder = workdir / 'checkpoints' / name
  if multihost.path_exists(folder):
    restored = _restored(folder, like)
    if restored is not None:
      return restored
  # Made first: what cannot be made leaves no folder.
  params = placement.put_tree(make(), jax.tree.map(lambda leaf: leaf.sharding, like))
  store = checkpoint.Checkpoints(folder, keep=1)
  store.save(0, params, record or {})
  store.close()
  return params


def _restored(folder: pathlib.Path, like: types.Params) -> types.Params | None:
  store = checkpoint.Checkpoints(folder, keep=1)
  restored = store.restore(like)
  store.close()
  return restored[0] if restored else None


def restore(experiment: experiment_lib.Experiment, name: str) -> types.Params | None:
  """Parameters kept in the workdir, or None.

  Raises:
    ValueError: they were imported from another model than that of `config.checkpoint`.
  """
  folder = experiment.workdir / 'checkpoints' / name
  if not multihost.path_exists(folder):
    return None
  if experiment.config.checkpoint and name in (BASE, VAE):
    _check_source(experiment, name, folder)
  return _restored(folder, template(experiment, name))


def _check_source(experiment: experiment_lib.Experiment, name: str, folder: pathlib.Path) -> None:
  store = checkpoint.Checkpoints(folder, keep=1)
  record = store.record() or {}
  store.close()
  mine, here = source(experiment, name), record.get('source', {})
  if here and here['digest'] != mine['digest']:
    raise ValueError(
      f'config.checkpoint is {experiment.config.checkpoint!r}, but {folder} was imported '
      f'from {here["folder"]}, whose weights differ; use another --workdir'
    )


def _part(name: str) -> str:
  """The part of a released model that a checkpoint holds."""
  return family.AUTOENCODER if name == VAE else family.POLICY


def source(experiment: experiment_lib.Experiment, name: str) -> dict[str, str]:
  """Where the released weights of the policy or the autoencoder come from."""
  folder = pathlib.Path(experiment.config.checkpoint)
  return {
    'folder': str(folder.resolve()),
    'digest': experiment.family.digest(experiment.policy, folder, _part(name)),
  }


def read_released(experiment: experiment_lib.Experiment, name: str) -> types.Params:
  """Parameters of the released folder, read straight into their shards."""
  shardings = jax.tree.map(lambda leaf: leaf.sharding, template(experiment, name))
  folder = experiment.config.checkpoint
  return experiment.family.load(experiment.policy, folder, _part(name), shardings)


def base(experiment: experiment_lib.Experiment, name: str) -> types.Params:
  """The parameters before alignment of an experiment with a released model."""
  found = restore(experiment, name)
  return read_released(experiment, name) if found is None else found


def load_newest(experiment: experiment_lib.Experiment) -> tuple[types.Params, types.Params]:
  """Policy and autoencoder: aligned in the workdir if there is such, else the released ones.

  Raises:
    ValueError: there are none, or the workdir's model has other sizes than the config.
  """
  released = bool(experiment.config.checkpoint)
  if (experiment.workdir / 'config.json').exists():
    # Before any checkpoint is opened: keys of the config say more than names of arrays.
    workdir_lib.compare_config(experiment.workdir, experiment.config, SHAPED_BY)
  params, vae_params = restore(experiment, ALIGNED), restore(experiment, VAE)
  logging.info(
    'policy: %s',
    f'aligned, from {experiment.workdir}' if params else experiment.config.checkpoint or 'missing',
  )
  if params is None and released:
    params = base(experiment, BASE)
  if vae_params is None and released:
    vae_params = read_released(experiment, VAE)
  if params is None or vae_params is None:
    raise ValueError(
      f'{experiment.workdir} holds no aligned model; run the job with this --workdir '
      'first, or set config.checkpoint to the folder of a released model'
    )
  return params, vae_params


def import_released(experiment: experiment_lib.Experiment) -> None:
  """Writes a released model into the workdir as Orbax checkpoints, sharded over the mesh.

  Nothing is written before all of it has been read.

  Raises:
    ValueError: `config.checkpoint` is not set, its files cannot be read, or the workdir holds
      another model.
  """
  if not experiment.config.checkpoint:
    raise ValueError("config.checkpoint is ''; allowed: the folder of a released model")
  for name, params in {name: base(experiment, name) for name in (VAE, BASE)}.items():
    make_or_restore(
      experiment.workdir,
      name,
      template(experiment, name),
      lambda params=params: params,
      {'source': source(experiment, name)},
    )
    logging.info('imported %s into %s', name, experiment.workdir / 'checkpoints' / name)


def export(experiment: experiment_lib.Experiment, target: str | os.PathLike, shards: int) -> None:
  """Writes the workdir's aligned model as a folder of the released form.

  The folder appears when it is complete.

  Raises:
    ValueError: the target exists, or the workdir has no aligned model of a released family.
  """
  if not target:
    raise ValueError("config.convert.target is ''; allowed: a folder that does not exist yet")
  target = pathlib.Path(target)
  if target.exists():
    raise ValueError(
      f'config.convert.target is {str(target)!r}, which exists; allowed: a new folder'
    )
  folder = experiment.config.checkpoint
  if not folder:
    raise ValueError(
      "config.checkpoint is ''; allowed: the folder of the released model that was "
      'aligned, whose configuration and tokenizer are copied'
    )
  params, vae_params = load_newest(experiment)
  try:
    experiment.family.save(experiment.policy, params, vae_params, folder, target, shards)
  except OSError as error:
    raise ValueError(
      f'config.convert.target is {str(target)!r}, which cannot be written: {error}'
    ) from error
  logging.info('exported to %s', target)
