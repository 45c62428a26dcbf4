"""Builds the fixed parts of a run from its config: data, policy, dual encoder, mesh."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import inspect
import pathlib
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from lvrpo_jax import symbols
from lvrpo_jax import types
from lvrpo_jax.data import encoding
from lvrpo_jax.data import examples
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models import family as family_lib
from lvrpo_jax.models import lora
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement
from lvrpo_jax.runtime import dual_encoder as dual_encoder_lib

DualEncoder = dual_encoder_lib.DualEncoder

SMALL_CHIPS = ('TPU v3', 'TPU v4', 'TPU v4 lite', 'TPU v5 lite', 'TPU v6 lite')
"""Kinds of devices of at most 32 GB."""

LARGE_CHIPS = ('TPU v5', 'TPU v5p')
"""Kinds of devices of more than 90 GB; both are names of v5p."""

Function = Callable[..., types.Tree]
"""A function of trees of arrays."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of a run; programs hold the parameters.

  Attributes:
    config: the frozen config.
    workdir: folder of the run.
    data: source of examples.
    encoder: from examples to prompts.
    family: builds policies, and reads and writes released folders.
    policy: static description of the model.
    dual_encoder: network of the semantic rewards.
    mesh: the devices.
    shared: objects that rewards of this experiment share, such as the client of a remote judge.
  """

  config: types.Config
  workdir: pathlib.Path
  data: examples.Source
  encoder: encoding.Encoder
  family: family_lib.ModelFamily
  policy: family_lib.Policy
  dual_encoder: DualEncoder
  mesh: Mesh
  shared: dict[str, Any] = dataclasses.field(default_factory=dict)

  def place(self, rows: types.Tree) -> types.Tree:
    """Places a batch, of which every process holds its own rows, on the mesh."""
    return placement.shard_rows(rows, self.mesh)

  def place_copies(self, rows: types.Tree) -> types.Tree:
    """Places a batch, of which every process holds all rows, on the mesh."""
    return placement.shard_copies(rows, self.mesh)

  @property
  def group_parts(self) -> int:
    """Number of parts into which an update splits the samples of a prompt.

    The context of a prompt is encoded once for each part. The parts are therefore as few as memory
    allows beside a state that is split over fsdp, as measured for a 7B model at 1024 pixels.
    """
    kind = self.mesh.devices.flat[0].device_kind
    group = self.config.align.rollout.group_size
    share = mesh_lib.MAX_AXIS_SIZE['fsdp'] / self.mesh.shape['fsdp']
    if self.config.parallel.group_parts:
      return self.config.parallel.group_parts
    if share <= 1 and kind not in SMALL_CHIPS:
      return 1
    return 2 if share <= 2 and kind in LARGE_CHIPS and group % 2 == 0 else group

  def compile(self, function: Function, mesh: Mesh | None = None) -> Function:
    """Compiles a function whose activations follow the experiment's mesh, or another."""
    return mesh_lib.scoped(jax.jit(function), mesh or self.mesh)

  @functools.cached_property
  def rollout_mesh(self) -> Mesh:
    """The mesh of rollouts: that of the experiment, or the same devices in another shape."""
    shape = tuple(self.config.parallel.rollout_mesh)
    return mesh_lib.reshape_mesh(self.mesh, shape) if shape else self.mesh

  def place_rows(self, rows: types.Tree) -> types.Tree:
    """Moves samples from any mesh of these devices to the rows of the experiment's mesh.

    Scalars are not moved.
    """
    if self.rollout_mesh is self.mesh:
      return rows
    where = placement.rows_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, rows)

  @property
  def copies_weights(self) -> bool:
    """Whether rollouts read copies of the weights: on another mesh, or in another dtype."""
    return self.rollout_mesh is not self.mesh or self.config.model.dtype != 'float32'

  def rollout_dtype(self, name: str, dtype: np.dtype) -> np.dtype:
    """Returns the dtype of a parameter in rollouts: for kernels the compute dtype, else `dtype`."""
    rounded = name.endswith(('kernel', 'embed_tokens')) and jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(self.config.model.dtype) if rounded else dtype

  def rounded(self, params: types.Params) -> types.Params:
    """Casts kernels to the compute dtype; results are unchanged, as every pass casts them anyway."""

    def cast(path: jax.tree_util.KeyPath, x: types.Array) -> types.Array:
      return jnp.array(x, self.rollout_dtype(placement.parameter_name(path), x.dtype))

    return jax.tree_util.tree_map_with_path(cast, params)

  def sampler(self, function: Function) -> Function:
    """Compiles `function(params, vae_params, prompts, ...)`, which samples, on the rollout mesh.

    Callers hold parameters (of one policy, or a tuple of several, with adapters or without) and
    prompts on the experiment's mesh. They are moved to the rollout mesh, and kernels are rounded.
    The results stay on the rollout mesh, see `place_rows`.
    """
    compiled = self.compile(function, self.rollout_mesh)
    elsewhere = self.rollout_mesh is not self.mesh
    if not self.copies_weights:
      return compiled

    def merge_and_round(params: types.Params | lora.AdaptedParams) -> types.Params:
      return self.rounded(lora.merge_adapters(params))

    shapes = jax.eval_shape(lambda: self.policy.init(jax.random.key(0)))
    move = jax.jit(
      merge_and_round, out_shardings=placement.tree_shardings(shapes, self.rollout_mesh)
    )

    def run(
      params: types.Tree, vae_params: types.Params, prompts: types.Tree, *rest: types.Tree
    ) -> types.Tree:
      if elsewhere:
        vae_params = placement.shard_state(vae_params, self.rollout_mesh)
        prompts = jax.device_put(prompts, placement.rows_sharding(self.rollout_mesh))
      moved = tuple(map(move, params)) if isinstance(params, tuple) else move(params)
      return compiled(moved, vae_params, prompts, *rest)

    return run

  def uses_reward(self, kind: str) -> bool:
    """Whether any task of the alignment has a reward of a kind with a weight other than 0."""
    align = self.config.align
    return any(
      settings.weight and settings.kind == kind
      for task, settings_by_name in align.rewards.items()
      if align.prompts[task]
      for settings in settings_by_name.values()
    )


def build_data(config: types.Config, tokenizer: tokenizer_lib.Tokenizer | None) -> examples.Source:
  """Builds the data source with those of `config.data.options` that its constructor names.

  Raises:
    ValueError: it cannot be imported.
  """
  source = symbols.find(config.data.source, 'config.data.source', examples.TABLE)
  taken = inspect.signature(source).parameters
  options = {
    name: value.to_dict() if hasattr(value, 'to_dict') else value
    for name, value in config.data.options.items()
    if name in taken
  }
  return source(seed=config.seed, tokenizer=tokenizer, **options)


def released_tokenizer(folder: str) -> tokenizer_lib.Tokenizer:
  """Reads the tokenizer of a released folder.

  Raises:
    ValueError: there is none.
  """
  try:
    return tokenizer_lib.from_path(folder)
  except FileNotFoundError as error:
    raise ValueError(f'config.checkpoint: {error}') from error


def build(
  config: types.Config,
  workdir: pathlib.Path,
  # JAX declares `Device` as a variable, which is no type to pyright.
  devices: list[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
  image_size: int = 0,
) -> Experiment:
  """Builds all fixed parts; trains and loads nothing.

  Args:
    config: of the run.
    workdir: folder of the run.
    devices: of the mesh; default all.
    image_size: pixels along each side that replace those of the data; 0 keeps them.
  """
  lengths = config.data
  model_family = symbols.find(config.model.family, 'config.model.family', family_lib.FAMILIES)
  tokenizer = released_tokenizer(config.checkpoint) if config.checkpoint else None
  data = build_data(config, tokenizer)
  policy = model_family.build(config, data.tokenizer, data.image_size)
  policy = dataclasses.replace(
    policy, joint=config.parallel.joint, image_size=image_size or policy.image_size
  )
  template = encoding.Template(
    prompt_tokens=lengths.prompt_tokens,
    answer_tokens=lengths.answer_tokens,
    vit_tokens=policy.vit_tokens,
    latent_tokens=policy.latent_shape[0],
    uniform=lengths.uniform,
    image_size=policy.image_size,
  )
  if config.dual_encoder.path:
    dual_encoder = dual_encoder_lib.released(pathlib.Path(config.dual_encoder.path))
  else:
    dual_encoder = dual_encoder_lib.small(
      config.dual_encoder, data.tokenizer, data.image_size, lengths.prompt_tokens
    )
  return Experiment(
    config=ml_collections.FrozenConfigDict(config),
    workdir=workdir,
    data=data,
    encoder=encoding.Encoder(data.tokenizer, template),
    family=model_family,
    policy=policy,
    dual_encoder=dual_encoder,
    mesh=mesh_lib.make_mesh(config.parallel.mesh, devices, config.parallel.slices),
  )
