"""Table that pairs tensor names of BAGEL's checkpoints with paths of our parameter trees.

One ordered table per module is read in both directions. Layers are stacked on a leading axis in our
trees; a checkpoint has one tensor per layer.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import re
from typing import cast, NamedTuple

from flax import traverse_util
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import model as bagel

Config = bagel.ModelConfig | vae_lib.Autoencoder
"""Configuration of a module that has checkpoints: the model, or the autoencoder."""


class Rule(NamedTuple):
  """Templates of a tensor name and of the parameter path that it belongs to.

  `{field}` is a field of `_FIELDS` with the same text on both sides. `{layer}` occurs in the tensor
  name only; in the parameter it is the index on the leading axis.

  Attributes:
    axes: transposition of the tensor that gives the parameter; None for equal axes.
  """

  tensor: str
  path: str
  axes: tuple[int, ...] | None = None


_LINEAR, _CONV = (1, 0), (2, 3, 1, 0)
"""Axes of linear kernels, (out, in) in a file, and of convolutions, (out, in, y, x) in a file."""
_FIELDS = {
  'layer': r'\d+',
  'attn': '[qkvo]',
  'qk': '[qk]',
  'ff': 'gate|up|down',
  'n': r'\d+',
  'flat': 'vae2llm|llm2vae',
  'table': 'latent_pos_embed|vit_pos_embed',
  'proj': 'q|k|v|out',
  'side': 'encoder|decoder',
  'way': 'down|up',
  'sampler': 'downsample|upsample',
  'middle': 'block_1|attn_1|block_2',
  'level': r'\d+',
  'norm': r'norm\d?|norm_out',
  'conv': r'conv\d|conv_in|conv_out|nin_shortcut|[qkv]|proj_out',
}
"""Regular expressions of the fields in templates."""
_TEXT, _VIT = 'language_model.model.', 'vit_model.vision_model.'


def _expert_rules(expert: str, suffix: str) -> list[Rule]:
  """Returns the rules of one expert, whose tensor names carry `suffix`."""
  tensor, path = _TEXT + 'layers.{layer}.', f'trunk/layers/{expert}/'
  attention, mlp = f'{tensor}self_attn.', f'{tensor}mlp{suffix}.'
  return [
    Rule(attention + '{attn}_proj' + f'{suffix}.weight', path + '{attn}_proj/kernel', _LINEAR),
    Rule(attention + '{attn}_proj' + f'{suffix}.bias', path + '{attn}_proj/bias'),
    Rule(attention + '{qk}_norm' + f'{suffix}.weight', path + '{qk}_norm/scale'),
    Rule(mlp + '{ff}_proj.weight', path + '{ff}_proj/kernel', _LINEAR),
    Rule(f'{tensor}input_layernorm{suffix}.weight', path + 'input_norm/scale'),
    Rule(f'{tensor}post_attention_layernorm{suffix}.weight', path + 'post_norm/scale'),
    Rule(f'{_TEXT}norm{suffix}.weight', f'trunk/norm_{expert}/scale'),
  ]


def _norm_rules(tensor: str, path: str) -> list[Rule]:
  return [Rule(f'{tensor}.weight', f'{path}/scale'), Rule(f'{tensor}.bias', f'{path}/bias')]


def _linear_rules(tensor: str, path: str, axes: tuple[int, ...] = _LINEAR) -> list[Rule]:
  return [Rule(f'{tensor}.weight', f'{path}/kernel', axes), Rule(f'{tensor}.bias', f'{path}/bias')]


def _conv_rules(tensor: str, path: str) -> list[Rule]:
  return _linear_rules(tensor, path, _CONV)


_VIT_LAYER = _VIT + 'encoder.layers.{layer}.'
MODEL_RULES = (
  *_expert_rules('und', ''),
  *_expert_rules('gen', '_moe_gen'),
  Rule(_TEXT + 'embed_tokens.weight', 'embed_tokens'),
  Rule('language_model.lm_head.weight', 'lm_head/kernel', _LINEAR),
  Rule('{table}.pos_embed', '{table}'),
  *_linear_rules('time_embedder.mlp.{n}', 'time_embedder/mlp_{n}'),
  *_linear_rules('{flat}', '{flat}'),
  *_linear_rules('connector.fc{n}', 'connector_fc{n}'),
  *_linear_rules(_VIT + 'embeddings.patch_embedding', 'vit/patch_embedding'),
  Rule(_VIT + 'embeddings.position_embedding.weight', 'vit/position_embedding'),
  *_linear_rules(_VIT_LAYER + 'self_attn.{proj}_proj', 'vit/layers/{proj}_proj'),
  *_norm_rules(_VIT_LAYER + 'layer_norm{n}', 'vit/layers/layer_norm{n}'),
  *_linear_rules(_VIT_LAYER + 'mlp.fc{n}', 'vit/layers/fc{n}'),
  *_norm_rules(_VIT + 'post_layernorm', 'vit/post_layernorm'),
)

_BLOCKS = (
  ('{side}.', '{side}/'),
  ('{side}.mid.{middle}.', '{side}/mid_{middle}/'),
  ('{side}.{way}.{level}.block.{n}.', '{side}/{way}_{level}_block_{n}/'),
)
AUTOENCODER_RULES = (
  *(
    rule
    for tensor, path in _BLOCKS
    for rule in (
      *_norm_rules(tensor + '{norm}', path + '{norm}'),
      *_conv_rules(tensor + '{conv}', path + '{conv}'),
    )
  ),
  *_conv_rules('{side}.{way}.{level}.{sampler}.conv', '{side}/{way}_{level}_{sampler}/conv'),
)


def _match(template: str, text: str) -> dict[str, str] | None:
  """Returns the fields of `text` if it has the form of `template`."""

  def group(field: re.Match[str]) -> str:
    return f'(?P<{field[1]}>{_FIELDS[field[1]]})'

  found = re.fullmatch(re.sub(r'\\\{(\w+)\\\}', group, re.escape(template)), text)
  return None if found is None else found.groupdict()


def rules(config: Config) -> tuple[Rule, ...]:
  """Returns the rules of a configuration's module."""
  return MODEL_RULES if isinstance(config, bagel.ModelConfig) else AUTOENCODER_RULES


def parameter_path(tensor: str, rules: tuple[Rule, ...]) -> tuple[str, int | None]:
  """Returns the path of a tensor in our tree, and its layer if it is one of a stack.

  Raises:
    ValueError: no rule matches the name.
  """
  for rule in rules:
    fields = _match(rule.tensor, tensor)
    if fields is not None:
      layer = fields.pop('layer', None)
      return rule.path.format(**fields), None if layer is None else int(layer)
  raise ValueError(f'tensor {tensor} has no place in the model')


class Place(NamedTuple):
  """A tensor's name and shape in a file, and its place in our tree.

  Attributes:
    path: of the parameter.
    layer: index on the leading axis of the parameter; None if it has no layer axis.
    axes: as in `Rule`.
  """

  tensor: str
  shape: tuple[int, ...]
  path: str
  layer: int | None
  axes: tuple[int, ...] | None


def places(config: Config) -> dict[str, Place]:
  """Returns the place of every tensor in a checkpoint of this configuration, sorted by name."""
  found = {}
  for path, leaf in parameter_shapes(config).items():
    rule, fields = next(
      (rule, fields) for rule in rules(config) if (fields := _match(rule.path, path)) is not None
    )
    stacked = '{layer}' in rule.tensor
    shape = leaf.shape[1:] if stacked else leaf.shape
    if rule.axes is not None:
      shape = tuple(shape[i] for i in np.argsort(rule.axes))
    for layer in range(leaf.shape[0]) if stacked else (None,):
      tensor = rule.tensor.format(**fields, layer=layer)
      found[tensor] = Place(tensor=tensor, shape=shape, path=path, layer=layer, axes=rule.axes)
  return dict(sorted(found.items()))


def _parameter_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shapes of our parameters by path, without computing any parameter."""
  if isinstance(config, bagel.ModelConfig):
    tree = jax.eval_shape(lambda: bagel.init(config, jax.random.key(0)))
  else:
    image = jnp.zeros((1, config.downsample, config.downsample, config.in_channels))
    tree = jax.eval_shape(lambda: config.init(jax.random.key(0), image))['params']
  return cast(dict[str, jax.ShapeDtypeStruct], traverse_util.flatten_dict(tree, sep='/'))


# Flax modules are hashable, but their type stubs lack `__hash__`.
parameter_shapes = cast(
  Callable[[Config], dict[str, jax.ShapeDtypeStruct]], functools.cache(_parameter_shapes)
)
