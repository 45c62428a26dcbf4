"""What a run is made of, built from its config: data, policy, dual encoder, mesh."""

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
"""Kinds of devices of more than 90 GB; either name is that of v5p."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of a run. Parameters are held by the programs, not here.

  Attributes:
    shared: what rewards of this experiment share, such as the client of a remote judge.
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
    """Puts a batch, of which every process holds its own rows, on the devices of the mesh."""
    return placement.shard_rows(rows, self.mesh)

  def place_copies(self, rows: types.Tree) -> types.Tree:
    """Puts a batch, of which every process holds all rows, on the devices of the mesh."""
    return placement.shard_copies(rows, self.mesh)

  @property
  def group_parts(self) -> int:
    """Parts that the samples of a prompt are split into in an update.

    The context of a prompt is encoded once for each part, so there are as few as the memory holds
    beside a state that is split over fsdp, measured for a 7B model at 1024 pixels.
    """
    kind = self.mesh.devices.flat[0].device_kind
    group = self.config.align.rollout.group_size
    share = mesh_lib.MAX_AXIS_SIZE['fsdp'] / self.mesh.shape['fsdp']
    if self.config.parallel.group_parts:
      return self.config.parallel.group_parts
    if share <= 1 and kind not in SMALL_CHIPS:
      return 1
    return 2 if share <= 2 and kind in LARGE_CHIPS and group % 2 == 0 else group

  def compile(self, function: Callable[..., Any], mesh: Mesh | None = None) -> Callable[..., Any]:
    """Compiles a function whose activations follow the experiment's mesh, or another."""
    return mesh_lib.scoped(jax.jit(function), mesh or self.mesh)

  @functools.cached_property
  def rollout_mesh(self) -> Mesh:
    """The devices as rollouts see them."""
    shape = tuple(self.config.parallel.rollout_mesh)
    return mesh_lib.reshape_mesh(self.mesh, shape) if shape else self.mesh

  def place_rows(self, rows: types.Tree) -> types.Tree:
    """Moves samples from the rows of any mesh of these devices to those of the experiment's.

    Scalars stay where they are.
    """
    if self.rollout_mesh is self.mesh:
      return rows
    where = placement.rows_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, rows)

  @property
  def copies_weights(self) -> bool:
    """Whether rollouts read copies of the weights: on another mesh, or in other numbers."""
    return self.rollout_mesh is not self.mesh or self.config.model.dtype != 'float32'

  def rollout_dtype(self, name: str, dtype: Any) -> Any:
    """Dtype of a parameter in rollouts: kernels in the compute dtype, the others as they are."""
    rounded = name.endswith(('kernel', 'embed_tokens')) and jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(self.config.model.dtype) if rounded else dtype

  def rounded(self, params: types.Params) -> types.Params:
    """Casts kernels to the compute dtype; results are unchanged, as every pass casts them anyway."""
    return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.array(x, self.rollout_dtype(placement.parameter_name(path), x.dtype)),
      params,
    )

  def sampler(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function(params, vae_params, prompts, ...)`, which samples, as rollouts run.

    Callers hold parameters (of one policy, or a tuple of several, with adapters or without) and
    prompts on the experiment's mesh. They are moved to that of rollouts, and kernels are rounded;
    what comes back lies there, see `place_rows`.
    """
    compiled = self.compile(function, self.rollout_mesh)
    elsewhere = self.rollout_mesh is not self.mesh
    if not self.copies_weights:
      return compiled

    shapes = jax.eval_shape(lambda: self.policy.init(jax.random.key(0)))
    move = jax.jit(
      lambda x: self.rounded(lora.merge_adapters(x)),
      out_shardings=placement.tree_shardings(shapes, self.rollout_mesh),
    )

    def run(params, vae_params, prompts, *rest):
      if elsewhere:
        vae_params = placement.shard_state(vae_params, self.rollout_mesh)
        prompts = jax.device_put(prompts, placement.rows_sharding(self.rollout_mesh))
      moved = tuple(map(move, params)) if isinstance(params, tuple) else move(params)
      return compiled(moved, vae_params, prompts, *rest)

    return run

  def uses_reward(self, kind: str) -> bool:
    """Whether any task of the alignment has a weight for a reward of a kind."""
    align = self.config.align
    return any(
      settings.weight and settings.kind == kind
      for task, settings_by_name in align.rewards.items()
      if align.prompts[task]
      for settings in settings_by_name.values()
    )


def build_data(
  config: types.Config, tokenizer: tokenizer_lib.Tokenizer | None
) -> examples.Source:
  """The data source, with those of `config.data.options` that its constructor names.

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
  """The tokenizer of a released folder.

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
  devices: list[jax.Device] | None = None,
  image_size: int = 0,
) -> Experiment:
  """Builds all fixed parts; nothing is trained or loaded yet.

  Args:
    devices: of the mesh; default all there are.
    image_size: pixels a side, in place of those of the data.
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
    prompt_words=lengths.prompt_tokens,
    answer_words=lengths.answer_tokens,
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
