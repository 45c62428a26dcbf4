"""What a run is made of, built from its config: data, policy, judge, mesh."""

from __future__ import annotations

import collections
from collections.abc import Callable
import dataclasses
import functools
import importlib
import os
import pathlib
from typing import Any

from absl import logging
import jax
from jax import numpy as jnp
from jax.sharding import Mesh
import ml_collections
import numpy as np

from lvrpo_jax.data import encoding
from lvrpo_jax.data import tasks
from lvrpo_jax.data import tokenizer as tokenizer_lib
from lvrpo_jax.models import lora
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import policy as policy_lib
from lvrpo_jax.models.siglip import model as siglip
from lvrpo_jax.parallel import mesh as mesh_lib
from lvrpo_jax.parallel import placement

Array = jax.Array

SMALL_CHIPS = ('TPU v3', 'TPU v4', 'TPU v4 lite', 'TPU v5 lite', 'TPU v6 lite')
"""Kinds of devices of at most 32 GB."""

LARGE_CHIPS = ('TPU v5', 'TPU v5p')
"""Kinds of devices of more than 90 GB; either name is that of v5p."""

WORDS_AT_ONCE = 256
"""Key words in one pass of the judge's text tower."""


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The fixed parts of a run. Parameters are held by the programs, not here."""

  config: ml_collections.FrozenConfigDict
  workdir: pathlib.Path
  data: Any
  encoder: encoding.Encoder
  policy: policy_lib.Policy
  judge: siglip.Siglip
  mesh: Mesh

  @property
  def answer_ids(self) -> np.ndarray:
    """First token of every possible answer, in the order of `data.answers`."""
    encode = self.data.tokenizer.encode
    return np.array([encode(word)[0] for word in self.data.answers], np.int32)

  def place(self, rows: Any) -> Any:
    """Puts a batch, of which every process holds its own rows, on the devices of the mesh."""
    return placement.shard_rows(rows, self.mesh)

  def place_copies(self, rows: Any) -> Any:
    """Puts a batch, of which every process holds all rows, on the devices of the mesh."""
    return placement.shard_copies(rows, self.mesh)

  @property
  def group_parts(self) -> int:
    """Parts that the samples of a prompt are split into in an update.

    The context of a prompt is encoded once for each part, so there are as few as the memory holds
    beside a state that is split over fsdp, measured for a 7B model at 1024 pixels.
    """
    kind, group = self.mesh.devices.flat[0].device_kind, self.config.align.group
    share = mesh_lib.MAX_AXIS_SIZE['fsdp'] / self.mesh.shape['fsdp']
    if self.config.parallel.group_parts:
      return self.config.parallel.group_parts
    if share <= 1 and kind not in SMALL_CHIPS:
      return 1
    return 2 if share <= 2 and kind in LARGE_CHIPS and group % 2 == 0 else group

  def compile(self, function: Callable[..., Any], mesh: Mesh | None = None) -> Callable[..., Any]:
    """A function under `jit` whose activations follow the job's mesh, or another."""
    return mesh_lib.scoped(jax.jit(function), mesh or self.mesh)

  @functools.cached_property
  def rollout_mesh(self) -> Mesh:
    """The devices as rollouts see them."""
    shape = tuple(self.config.parallel.rollout_mesh)
    return mesh_lib.reshape_mesh(self.mesh, shape) if shape else self.mesh

  def place_rows(self, rows: Any) -> Any:
    """Moves samples from the rows of any mesh of these devices to those of the job's; numbers that
    belong to no row stay."""
    if self.rollout_mesh is self.mesh:
      return rows
    where = placement.rows_sharding(self.mesh)
    return jax.tree.map(lambda x: jax.device_put(x, where) if x.ndim else x, rows)

  @property
  def copies_weights(self) -> bool:
    """Whether rollouts read copies of the weights: on another mesh, or in other numbers."""
    return self.rollout_mesh is not self.mesh or self.config.model.dtype != 'float32'

  def rollout_dtype(self, name: str, dtype: Any) -> Any:
    """Of a parameter in rollouts: kernels, which every pass rounds anyway, in the compute dtype."""
    rounded = name.endswith(('kernel', 'embed_tokens')) and jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(self.config.model.dtype) if rounded else dtype

  def rounded(self, params: Any) -> Any:
    """A copy of parameters as `rollout_dtype` says; no pass gives other numbers with it."""
    return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.array(x, self.rollout_dtype(placement.parameter_name(path), x.dtype)),
      params,
    )

  def sampler(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `function(params, vae_params, prompts, ...)`, which samples, as rollouts run.

    Callers hold parameters (of one policy, or a tuple of several, with adapters or without) and
    prompts on the job's mesh. They are moved to that of rollouts, and kernels are rounded; what
    comes back lies there, see `place_rows`.
    """
    compiled = self.compile(function, self.rollout_mesh)
    elsewhere = self.rollout_mesh is not self.mesh
    if not self.copies_weights:
      return compiled

    shapes = jax.eval_shape(lambda: bagel.init(self.policy.config, jax.random.key(0)))
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

  def pays(self, component: str) -> bool:
    """Whether any task of the alignment has a weight for a component of the rewards."""
    a = self.config.align
    return any(
      weight
      for task in tasks.TASKS
      if a[task]
      for name, weight in a.rewards[task].items()
      if name == component
    )

  def captions(self, texts: list[str]) -> np.ndarray:
    """Token ids (R, L) for the judge's text tower, whose last position is pooled."""
    return self.captions_and_cut(texts)[0]

  def captions_and_cut(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """`captions`, and which texts (R,) are cut because the tower holds no more tokens.

    The first of these is logged.
    """
    length = self.judge.text_config.max_positions
    ids = np.full((len(texts), length), self.data.tokenizer.eos, np.int32)
    cut = np.zeros(len(texts), bool)
    for r, text in enumerate(texts):
      tokens = self.data.tokenizer.encode(text)
      cut[r] = len(tokens) >= length
      if cut[r] and not self._logged_cuts:
        self._logged_cuts.append(text)
        logging.warning(
          '%r has %d tokens, of which the judge reads %d (config.data.prompt_words); '
          'further such texts are not logged',
          text,
          len(tokens),
          length - 1,
        )
      tokens = tokens[: length - 1]
      ids[r, : len(tokens)] = tokens
    return ids, cut

  @functools.cached_property
  def _logged_cuts(self) -> list[str]:
    return []


def load_symbol(path: str, key: str) -> Any:
  """The object at 'module:name'.

  Raises:
    ValueError: it cannot be imported; the message names the config key.
  """
  module, _, name = path.partition(':')
  try:
    return importlib.import_module(module).__dict__[name]
  except (ImportError, KeyError, ValueError) as error:
    raise ValueError(
      f"{key} is {path!r}, which cannot be imported ({error!r}); expected 'package.module:name'"
    ) from error


def build(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  devices: list[jax.Device] | None = None,
  image_size: int = 0,
) -> Experiment:
  """Builds all fixed parts; nothing is trained or loaded yet.

  Args:
    devices: of the mesh; default all there are.
    image_size: pixels a side, in place of those of the data.
  """
  d = config.data
  tokenizer = released_tokenizer(config.checkpoint) if config.checkpoint else None
  data = load_symbol(d.source, 'data.source')(
    seed=config.seed,
    generate_kinds=d.generate_kinds.to_dict(),
    question_kinds=d.question_kinds.to_dict(),
    wrong=d.wrong,
    chatty=d.chatty,
    plan=d.plan,
    describe=d.describe,
    drop=d.drop,
    tokenizer=tokenizer,
  )
  architecture = find_architecture(config)
  policy = (
    released_policy(config, data, architecture) if architecture else small_policy(config, data)
  )
  policy = dataclasses.replace(
    policy, joint=config.parallel.joint, image_size=image_size or policy.image_size
  )
  template = encoding.Template(
    d.prompt_words,
    d.answer_words,
    policy.vit_tokens,
    policy.latent_shape[0],
    d.uniform,
    policy.image_size,
  )
  return Experiment(
    config=ml_collections.FrozenConfigDict(config),
    workdir=workdir,
    data=data,
    encoder=encoding.Encoder(data.tokenizer, template),
    policy=policy,
    judge=build_dual_encoder(config, data),
    mesh=mesh_lib.make_mesh(config.parallel.mesh, devices, config.parallel.slices),
  )


def find_architecture(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Sizes of a released model in its own format, from its folder or the config; {} for neither.

  Raises:
    ValueError: the folder holds another model than the config describes.
  """
  mine = config.architecture.to_dict()
  if not config.checkpoint:
    return mine
  theirs = bagel_config.read_config(config.checkpoint)
  if mine:
    sizes = lambda a: {
      **dataclasses.asdict(bagel_config.model_config(a)),
      **{
        f'vae_config.{key}': value
        for key, value in bagel_config.autoencoder(a).__dict__.items()
        if key in a['vae_config']
      },
    }
    here, there = sizes(mine), sizes(theirs)
    for key, value in here.items():
      if value != there[key]:
        raise ValueError(
          f'config.architecture gives {key} = {value!r}, but the model in '
          f'config.checkpoint = {config.checkpoint!r} has {there[key]!r}'
        )
  return theirs


def released_tokenizer(folder: str | os.PathLike) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a released folder.

  Raises:
    ValueError: there is none.
  """
  try:
    return tokenizer_lib.from_path(folder)
  except FileNotFoundError as error:
    raise ValueError(f'config.checkpoint: {error}') from error


def released_policy(
  config: ml_collections.ConfigDict, data: Any, architecture: dict[str, Any]
) -> policy_lib.Policy:
  """A model of the released architecture.

  Where a tokenizer is given (`config.checkpoint`) its special tokens hold; one that lacked them
  has them behind its last word, and the embedding table grows if it must.
  """
  m, tokens = config.model, data.tokenizer
  model = dataclasses.replace(
    bagel_config.model_config(architecture),
    dtype=m.dtype,
    unroll=m.unroll,
    remat=m.remat,
    attention=m.attention,
  )
  vae, patch = bagel_config.autoencoder(architecture), architecture['latent_patch_size']
  if config.checkpoint:
    mine = dict(
      bos_token_id=tokens.bos,
      eos_token_id=tokens.eos,
      start_of_image=tokens.start_of_image,
      end_of_image=tokens.end_of_image,
    )
    if not tokens.added and mine != architecture['special_tokens']:
      logging.warning(
        'special tokens of the tokenizer in %s are %s, its configuration says %s; '
        "the tokenizer's hold",
        config.checkpoint,
        mine,
        architecture['special_tokens'],
      )
    model = dataclasses.replace(
      model,
      vocab=max(model.vocab, len(tokens)),
      start_of_image=tokens.start_of_image,
      end_of_image=tokens.end_of_image,
    )
  if data.image_size % (vae.downsample * patch):
    raise ValueError(
      f'config.data.source {config.data.source!r} has images of {data.image_size} '
      f'pixels a side; allowed: multiples of {vae.downsample * patch}'
    )
  policy = policy_lib.Policy(model, vae, data.image_size, patch, bos=tokens.bos, eos=tokens.eos)
  if policy.latent_grid > model.latent_side:
    raise ValueError(
      f'config.data.source {config.data.source!r} has images of {data.image_size} '
      f'pixels a side; allowed: at most {model.latent_side * vae.downsample * patch}'
      ', the position table of the model'
    )
  return policy


def small_policy(config: ml_collections.ConfigDict, data: Any) -> policy_lib.Policy:
  """The unified model of `config.model` with the small autoencoder."""
  m, tokens = config.model, data.tokenizer
  for key, patch in (
    ('vae.patch', config.vae.patch),
    ('model.vit_patch', m.vit_patch),
    ('judge.patch', config.judge.patch),
  ):
    if data.image_size % patch:
      raise ValueError(
        f'config.{key} is {patch}; allowed: a divisor of the {data.image_size} '
        'pixels along a side of an image'
      )
  tokens_a_side = data.image_size // min(config.vae.patch, m.vit_patch)
  if m.position_side < tokens_a_side:
    raise ValueError(
      f'config.model.position_side is {m.position_side}; allowed: at least the '
      f'{tokens_a_side} tokens along a side of an image'
    )
  vae = vae_lib.PatchAutoencoder(patch=config.vae.patch, z_channels=config.vae.channels)
  vit = bagel.VitConfig(
    width=m.vit_width,
    depth=m.vit_depth,
    heads=m.vit_heads,
    ff_width=m.vit_ff_width,
    patch=m.vit_patch,
    side=m.position_side,
  )
  model = bagel.ModelConfig(
    vocab=len(tokens),
    width=m.width,
    depth=m.depth,
    heads=m.heads,
    kv_heads=m.kv_heads,
    ff_width=m.ff_width,
    latent_channels=config.vae.channels,
    latent_side=m.position_side,
    interpolate_pos=True,
    vit=vit,
    start_of_image=tokens.start_of_image,
    end_of_image=tokens.end_of_image,
    eps=m.eps,
    rope_theta=m.rope_theta,
    dtype=m.dtype,
    unroll=m.unroll,
    remat=m.remat,
    attention=m.attention,
  )
  return policy_lib.Policy(
    model, vae, data.image_size, latent_patch=1, bos=tokens.bos, eos=tokens.eos
  )


def build_dual_encoder(config: ml_collections.ConfigDict, data: Any) -> siglip.Siglip:
  """The dual encoder of the semantic reward."""
  j = config.judge
  tower = dict(hidden=j.width, mlp=j.ff_width, layers=j.depth, heads=j.heads)
  return siglip.Siglip(
    siglip.SiglipVisionConfig(image_size=data.image_size, patch=j.patch, **tower),
    siglip.SiglipTextConfig(
      vocab=len(data.tokenizer),
      projection=j.width,
      max_positions=config.data.prompt_words + 1,
      **tower,
    ),
  )


def key_words(job: Experiment, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
  """Key words of texts: rows of `word_table`, and how often each counts, both int32 (B, K).

  K is the most tokens that a prompt may have, so that all batches of all processes have one shape;
  places behind a text's last key word count 0 times.
  """
  rows = {word: row for row, word in enumerate(sorted(job.data.key_words))}
  row_BK, count_BK = np.zeros((2, len(texts), job.config.data.prompt_words), np.int32)
  for b, text in enumerate(texts):
    found = collections.Counter(word for word in text.split() if word in rows)
    row_BK[b, : len(found)] = [rows[word] for word in found]
    count_BK[b, : len(found)] = list(found.values())
  return row_BK, count_BK


def word_table(job: Experiment, judge_params: Any) -> Array:
  """Unit vectors (W, D) of the data's key words, sorted, in the judge's joint space.

  There are no rows where no task is paid for matching them.
  """
  words = sorted(job.data.key_words) if job.pays('dense') else []
  ids_WL = job.captions(words)
  embed = lambda ids_L: job.judge.apply({'params': judge_params}, ids_L[None], method='embed_text')[
    0
  ][0]
  # In parts: a data class may know the nouns of a language.
  return (
    jax.lax.map(embed, jnp.asarray(ids_WL), batch_size=WORDS_AT_ONCE)
    if words
    else jnp.zeros((0, job.judge.text_config.projection))
  )
