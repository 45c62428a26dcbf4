"""Reads and writes parameters of whole models in workdirs and released folders."""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
import pathlib

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
"""Folders of checkpoints that hold parameters alone, in `<workdir>/checkpoints`."""

SHAPED_BY = ('architecture', 'checkpoint', 'data.source', 'model.', 'vae.')
"""Keys of the config on which the shapes of parameters depend."""


def template(experiment: experiment_lib.Experiment, name: str) -> types.Params:
  """Returns shapes, dtypes and shardings of the policy, the autoencoder or the dual encoder."""

  def init(key: types.Array) -> types.Params:
    if name == VAE:
      return experiment.policy.init_autoencoder(key)
    if name != DUAL_ENCODER:
      return experiment.policy.init(key)
    encoder = experiment.dual_encoder
    image_BYXC = jnp.zeros((1, encoder.image_size, encoder.image_size, 3))
    return encoder.module.init(key, image_BYXC, encoder.token_ids([''])[0])['params']

  def with_sharding(
    shape: jax.ShapeDtypeStruct, where: jax.sharding.Sharding
  ) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

  shapes = jax.eval_shape(init, jax.random.key(0))
  return jax.tree.map(with_sharding, shapes, placement.tree_shardings(shapes, experiment.mesh))


def _shardings(like: types.Params) -> types.Tree:
  return jax.tree.map(lambda leaf: leaf.sharding, like)


def read_dual_encoder(experiment: experiment_lib.Experiment) -> types.Params:
  """Reads the parameters of the folder `config.dual_encoder.path` into their shards.

  Raises:
    ValueError: its files cannot be read or hold another model.
  """
  path = experiment.config.dual_encoder.path
  shardings = _shardings(template(experiment, DUAL_ENCODER))
  try:
    return siglip_params.load(path, experiment.dual_encoder.module, shardings)
  except ValueError as error:
    raise ValueError(f'config.dual_encoder.path is {path!r}: {error}') from error


def make_or_restore(
  workdir: pathlib.Path,
  name: str,
  like: types.Params,
  make: Callable[[], types.Params],
  record: dict[str, types.Json] | None = None,
) -> types.Params:
  """Reads parameters from the workdir; if they are missing, makes and saves them.

  Args:
    workdir: folder of the run.
    name: folder of the checkpoint.
    like: shapes, dtypes and shardings of the parameters.
    make: makes the parameters.
    record: saved beside them.
  """
  folder = workdir / 'checkpoints' / name
  if multihost.path_exists(folder):
    restored = _restored(folder, like)
    if restored is not None:
      return restored
  # The parameters are made before the folder is, so that a failure leaves no folder.
  params = placement.put_tree(make(), _shardings(like))
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
  """Reads parameters from the workdir; returns None if there are none.

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
  """Compares the weights that a checkpoint was imported from with those of `config.checkpoint`.

  Digests of different versions cannot be compared; this logs a warning.

  Raises:
    ValueError: the weights differ.
  """
  store = checkpoint.Checkpoints(folder, keep=1)
  record = store.record() or {}
  store.close()
  recorded = record.get('source')
  if not recorded:
    return
  theirs, ours = recorded['digest'], source(experiment, name)['digest']
  if theirs == ours:
    return
  if _digest_version(theirs) != _digest_version(ours):
    logging.warning(
      '%s was imported from %s by another version, whose digest cannot be compared with that of '
      'config.checkpoint = %r; it is assumed that the weights are the same',
      folder,
      recorded['folder'],
      experiment.config.checkpoint,
    )
    return
  raise ValueError(
    f'config.checkpoint is {experiment.config.checkpoint!r}, but {folder} was imported '
    f'from {recorded["folder"]}, whose weights differ; use another --workdir'
  )


def _digest_version(digest: str) -> str:
  """Returns 'v2' for 'v2:<hex>', and '' for a digest without a version."""
  return digest.rpartition(':')[0]


def _part(name: str) -> str:
  """Returns the part of a released model that a checkpoint holds."""
  return family.AUTOENCODER if name == VAE else family.POLICY


def source(experiment: experiment_lib.Experiment, name: str) -> dict[str, str]:
  """Describes the released weights of the policy or the autoencoder: their folder and digest."""
  folder = pathlib.Path(experiment.config.checkpoint)
  return {
    'folder': str(folder.resolve()),
    'digest': experiment.family.digest(experiment.policy, folder, _part(name)),
  }


def read_released(experiment: experiment_lib.Experiment, name: str) -> types.Params:
  """Reads parameters of the released folder straight into their shards."""
  shardings = _shardings(template(experiment, name))
  folder = experiment.config.checkpoint
  return experiment.family.load(experiment.policy, folder, _part(name), shardings)


def base(experiment: experiment_lib.Experiment, name: str) -> types.Params:
  """Reads the parameters before alignment of an experiment with a released model."""
  found = restore(experiment, name)
  return read_released(experiment, name) if found is None else found


def load_newest(experiment: experiment_lib.Experiment) -> tuple[types.Params, types.Params]:
  """Reads policy and autoencoder: the aligned ones of the workdir, or else the released ones.

  Raises:
    ValueError: there are neither, or the workdir's model has other sizes than the config.
  """
  released = bool(experiment.config.checkpoint)
  if (experiment.workdir / 'config.json').exists():
    # This comes before any checkpoint is opened, because its message names keys of the config.
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

  Everything is read before anything is written.

  Raises:
    ValueError: `config.checkpoint` is not set, its files cannot be read, or the workdir holds
      another model.
  """
  if not experiment.config.checkpoint:
    raise ValueError("config.checkpoint is ''; allowed: the folder of a released model")
  read = {name: base(experiment, name) for name in (VAE, BASE)}
  for name in read:
    make_or_restore(
      experiment.workdir,
      name,
      template(experiment, name),
      functools.partial(read.get, name),
      {'source': source(experiment, name)},
    )
    logging.info('imported %s into %s', name, experiment.workdir / 'checkpoints' / name)


def export(experiment: experiment_lib.Experiment, target: str | os.PathLike, shards: int) -> None:
  """Writes the workdir's aligned model as a folder of the released form.

  The folder appears when it is complete.

  Args:
    experiment: with a workdir and `config.checkpoint`.
    target: the new folder.
    shards: number of files of the policy's weights.

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
