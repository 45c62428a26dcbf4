"""The released model of a folder of golden numbers: weights, inputs, and compiled calls.

The folder is tests/goldens/bagel, or what the environment variable LVRPO_PARITY_DIR names.
"""

import collections
import dataclasses
import functools
import os
import pathlib

import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import flow
from lvrpo_jax import ops
from lvrpo_jax.data import images as image_files
from lvrpo_jax.data import packing
from lvrpo_jax.models import layers
from lvrpo_jax.models import vae as vae_lib
from lvrpo_jax.models.bagel import config as bagel_config
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.models.bagel import params as bagel_params
from lvrpo_jax.objectives import sft
from lvrpo_jax.rollouts import guidance as guidance_lib
from lvrpo_jax.rollouts import text as text_rollout
from tests.helpers import guided_walk

DEFAULT_DIR = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'bagel'
PARITY_DIR = pathlib.Path(os.environ.get('LVRPO_PARITY_DIR', DEFAULT_DIR))


def to_last(image_CYX):
  return np.moveaxis(image_CYX, -3, -1)


def to_first(image_YXC):
  return np.moveaxis(np.asarray(image_YXC), -1, -3)


class World:
  """Configuration, weights, inputs and golden outputs, and compiled calls of the model."""

  def __init__(self, folder: pathlib.Path):
    self.config = bagel_config.read_config(folder)
    self.model_config = bagel_config.model_config(self.config)
    self.model = bagel.Unified(self.model_config)
    self.vae = bagel_config.autoencoder(self.config)
    self.params = bagel_params.load(folder, self.model_config)
    self.vae_params = bagel_params.load(folder, self.vae)
    self.inputs = dict(np.load(folder / 'inputs.npz'))
    self.outputs = dict(np.load(folder / 'outputs.npz'))
    special, self.patch = self.config['special_tokens'], self.config['latent_patch_size']
    self.special = special
    self.form = packing.Format(
      bos=special['bos_token_id'],
      eos=special['eos_token_id'],
      start_of_image=special['start_of_image'],
      end_of_image=special['end_of_image'],
      patch_values=self.model_config.vit.patch**2 * 3,
      latent_channels=self.model_config.latent_channels,
    )

    self.prefill = jax.jit(self._prefill)
    self.velocity = jax.jit(
      lambda params, cache, x, t, position: self.apply(
        params, cache, x[None, None], t[None, None], position[None], method='velocity'
      )[0, 0]
    )
    self.read = jax.jit(functools.partial(self.apply, method='read'))
    self.encode = jax.jit(
      lambda image, eps: self.vae.apply({'params': self.vae_params}, image, eps, method='encode')
    )
    self.moments = jax.jit(
      lambda image: self.vae.apply({'params': self.vae_params}, image, method='moments')
    )
    self.decode_image = jax.jit(
      lambda latent: self.vae.apply({'params': self.vae_params}, latent, method='decode')
    )

  def apply(self, params, *args, method):
    return self.model.apply({'params': params}, *args, method=method)

  def _prefill(self, params, seq):
    h_und, h_gen, _ = self.apply(params, seq, method='forward')
    return self.apply(params, seq, method='prefill'), jnp.concatenate([h_und, h_gen], axis=1)

  def text(self, name, **kwargs) -> packing.Text:
    return packing.Text(self.inputs[name], **kwargs)

  def vit(self, image_CYX, **kwargs) -> packing.Vit:
    """A ViT segment of a pixel image (3, Y, X)."""
    patch = self.model_config.vit.patch
    patches = vae_lib.patchify(to_last(image_CYX)[None], patch)[0]
    rows, columns = (side // patch for side in image_CYX.shape[-2:])
    return packing.Vit(
      patches, layers.grid_positions(rows, columns, self.model_config.vit.side), **kwargs
    )

  def grid(self, image_hw) -> tuple[int, int]:
    """Latent tokens (rows, columns) of an image."""
    return tuple(int(side) // (self.vae.downsample * self.patch) for side in image_hw)

  def latent_position(self, image_hw):
    return layers.grid_positions(*self.grid(image_hw), self.model_config.latent_side)

  def tokens(self, latent_YXC, image_hw):
    """Latent tokens (N, C) of the image at the top left of a latent."""
    rows, columns = (n * self.patch for n in self.grid(image_hw))
    return np.asarray(vae_lib.patchify(latent_YXC[None, :rows, :columns], self.patch)[0])

  def clean(self, image_CYX, eps) -> packing.Latent:
    """A clean condition from a pixel image (3, Y, X) and its draw (1, C, Y', X')."""
    latent = self.encode(to_last(image_CYX)[None], to_last(eps))[0]
    hw = image_CYX.shape[-2:]
    return packing.Latent(self.latent_position(hw), tokens=self.tokens(latent, hw))

  @functools.cached_property
  def lengths(self) -> packing.Lengths:
    """Room for any context of the inference cases, so that they share compiled calls."""
    und = [
      [self.text('und2/system_ids'), *self.vits('und2'), self.text('und2/prompt_ids')],
      [*self.vits('und'), self.text('und/prompt_ids')],
    ]
    prompts = [
      [self.text(name)]
      for name in self.inputs
      if '/prompt_ids' in name or '/batch_prompt_ids' in name
    ]
    thought = packing.Text(self.outputs['think/thought_ids'])
    edits = [segments['main'] for segments in (self.edit_segments, self.think_segments)]
    return packing.Lengths(
      *np.max(
        [
          [array.shape[1] for array in (s.ids_BL, s.patches_BNP, s.latents_BNC)]
          for s in (
            packing.pack([[*segments, thought]], self.form).sequence
            for segments in und + prompts + edits
          )
        ],
        axis=0,
      )
    )

  def vits(self, case: str) -> list[packing.Vit]:
    names = sorted(name for name in self.inputs if name.startswith(f'{case}/image_'))
    return [self.vit(self.inputs[name]) for name in names]

  @functools.cached_property
  def edit_segments(self) -> dict[str, list[packing.Segment]]:
    clean = self.clean(self.inputs['edit/image_vae'], self.inputs['edit/vae_eps'])
    vit, prompt = self.vit(self.inputs['edit/image_vit']), self.text('edit/prompt_ids')
    return dict(main=[clean, vit, prompt], without_text=[clean, vit], without_images=[prompt])

  @functools.cached_property
  def think_pixels(self) -> tuple[np.ndarray, np.ndarray]:
    """The source for the autoencoder and, from the resized bytes, for the tower; (3, Y, X)."""
    rules = self.config['cases']['transform']
    vae_rule, vit_rule = (image_files.ResizeRule(*rules[name]) for name in ('vae', 'vit'))
    source = self.inputs['think/image_u8']
    return (
      to_first(image_files.transform(source, vae_rule)),
      to_first(image_files.transform(image_files.resize(source, vae_rule), vit_rule)),
    )

  @functools.cached_property
  def think_segments(self) -> dict[str, list[packing.Segment]]:
    vae_pixels, vit_pixels = self.think_pixels
    system, prompt = self.text('think/system_ids'), self.text('think/prompt_ids')
    picture = [self.clean(vae_pixels, self.inputs['think/vae_eps']), self.vit(vit_pixels)]
    return dict(
      main=[system, *picture, prompt],
      without_text=[system, *picture],
      without_images=[system, prompt],
    )

  def context(self, segments):
    """Cache, hidden states and the places of the tokens in logical order."""
    packed = packing.pack([segments], self.form, lengths=self.lengths)
    seq = packed.sequence
    cache, hidden = self.prefill(self.params, seq)
    order = np.concatenate([seq.text.order_BL, seq.vit.order_BL, seq.gen.order_BL], axis=1)[0]
    places = np.flatnonzero(np.asarray(cache.valid_BS[0]))
    return cache, hidden[0], places[np.argsort(order[places])]

  def contexts(self, segments: dict[str, list[packing.Segment]]) -> dict:
    return {name: self.context(value)[0] for name, value in segments.items()}

  @functools.cached_property
  def answer(self):
    """Compiled greedy decoding; the length is static."""

    def run(params, cache, eos, length):
      def decode(row, index, token):
        return self.apply(params, cache, row, index, token, method='decode')

      row = bagel.empty_row(self.model_config, (1, 1), length)
      keys = jax.random.split(jax.random.key(0), (1, 1))
      return text_rollout.sample(decode, row, keys, self.form.bos, eos, length, 0.0)

    return jax.jit(run, static_argnames='length')

  def greedy(self, cache, length: int, eos: int) -> np.ndarray:
    """Most likely tokens; without the end token."""
    out = self.answer(self.params, cache, eos, length=length)
    tokens = np.asarray(out.tokens_BGT[0, 0])[np.asarray(out.mask_BGT[0, 0])]
    return tokens[tokens != eos]

  @functools.cached_property
  def walk(self):
    """Compiled guided sampling from noise (N, C); the renormalisation type is static."""

    def run(params, caches, guidance, noise, position, grid):
      def branch(cache):
        return lambda x, time: self.apply(params, cache, x, time, position[None], method='velocity')

      branches = guidance_lib.Branches(**{name: branch(cache) for name, cache in caches.items()})
      return guided_walk.sample_guided(branches, guidance, noise[None, None], grid)

    return jax.jit(run)


@functools.cache
def world() -> World:
  return World(PARITY_DIR)


@dataclasses.dataclass(frozen=True)
class Train:
  """The packed training sequence, built from the raw texts and images of the plan."""

  samples: list
  packed: packing.Packed
  padded_YXC: np.ndarray
  latent_YXC: np.ndarray
  noise: np.ndarray
  time: np.ndarray

  @property
  def clean(self):
    return self.packed.sequence.latents_BNC[0]

  @property
  def x_t(self):
    return flow.interpolate(self.clean, self.noise, self.time[:, None])

  @property
  def sequence(self):
    return self.packed.sequence.replace(
      latents_BNC=np.asarray(self.x_t)[None], time_BN=self.time[None]
    )

  @property
  def batch(self):
    """What `train_losses` takes, arrays only."""
    (places,) = np.nonzero(self.packed.label_BL[0] >= 0)
    (target,) = np.nonzero(self.packed.target_BN[0])
    return dict(
      seq=self.sequence,
      places=places,
      labels=self.packed.label_BL[0][places],
      weights=self.packed.weight_BL[0][places],
      target=target,
      v_target=flow.velocity_target(self.clean, self.noise)[target],
    )

  @property
  def order(self):
    """Logical places of the tokens in memory order."""
    s = self.packed.sequence
    return np.concatenate([s.text.order_BL, s.vit.order_BL, s.gen.order_BL], axis=1)[0]

  def logical(self, x):
    """Puts memory order into logical order along the next to last axis."""
    return np.asarray(x)[..., np.argsort(self.order), :]


def train_samples(w: World, latents=None) -> list:
  """Segments of the training plan; `latents` are tokens by number of the latent image."""
  samples, count = collections.defaultdict(list), 0
  for sample, kind, index, loss, end_loss, end_label, droppable in w.inputs['train/plan'].tolist():
    if kind == 0:
      segment = w.text(
        f'train/raw_text_{index}',
        loss=bool(loss),
        droppable=bool(droppable),
        end_label=end_label if end_loss else None,
      )
    elif kind == 1:
      segment = w.vit(w.inputs[f'train/raw_image_{index}'], droppable=bool(droppable))
    else:
      hw = w.inputs[f'train/raw_image_{index}'].shape[-2:]
      segment = packing.Latent(
        w.latent_position(hw),
        target=bool(loss),
        droppable=bool(droppable),
        tokens=None if latents is None else w.tokens(latents[count], hw),
      )
      count += 1
    samples[sample].append(segment)
  return [samples[i] for i in sorted(samples)]


def build_train(w: World) -> Train:
  plan = w.inputs['train/plan'].tolist()
  raw = [w.inputs[f'train/raw_image_{row[2]}'] for row in plan if row[1] == 2]
  height, width = np.max([image.shape[-2:] for image in raw], axis=0)
  padded = np.stack(
    [
      np.pad(image, ((0, 0), (0, height - image.shape[1]), (0, width - image.shape[2])))
      for image in raw
    ]
  )
  latent = np.asarray(w.encode(to_last(padded), to_last(w.inputs['train/vae_eps'])))
  samples = train_samples(w, latent)
  time = flow.logit_normal_time(
    jnp.asarray(w.inputs['train/packed_timesteps']), w.config['timestep_shift']
  )
  return Train(
    samples,
    packing.pack(samples, w.form),
    to_last(padded),
    latent,
    w.inputs['train/noise'],
    np.asarray(time),
  )


@functools.cache
def train() -> Train:
  return build_train(world())


def train_losses(w: World, params, batch):
  """Total loss, and everything on the way to it."""

  def both(model, seq):
    h_und, h_gen, out = model.forward(seq)
    hidden = jnp.concatenate([h_und, h_gen], axis=1)
    return hidden, model.lm_head(hidden)[0], model.llm2vae(h_gen)[0], out['hidden']

  hidden, logits, v, inner = w.apply(params, batch['seq'], method=both)
  logits_at_loss, labels = logits[batch['places']], batch['labels']
  v, v_target = v[batch['target']], batch['v_target']
  ce = -ops.token_logp(logits_at_loss, labels)
  loss_ce = ops.divide(*sft.next_token(logits_at_loss, labels, jnp.ones(len(labels))))
  loss_mse = ops.divide(*sft.flow_matching(v, v_target))
  total = w.config['ce_weight'] * loss_ce + w.config['mse_weight'] * loss_mse
  return total, {
    'last_hidden': hidden[0],
    'text_logits_all': logits,
    'layer_outputs': jnp.concatenate([x[:, 0, 0] for x in inner], axis=1),
    'text_logits_at_loss': logits_at_loss,
    'ce_per_token': ce,
    'velocity_pred': v,
    'velocity_target': v_target,
    'mse_elementwise': jnp.square(v - v_target),
    'loss_ce': loss_ce,
    'loss_mse': loss_mse,
    'loss_ce_reweighted': ops.masked_mean(ce, batch['weights']),
  }


@functools.cache
def train_results():
  """((total, details), gradients) of the training loss."""
  run = jax.jit(jax.value_and_grad(functools.partial(train_losses, world()), has_aux=True))
  return run(world().params, train().batch)


def guidance_results(w: World) -> np.ndarray:
  """All combinations of the guidance case."""
  fields = [w.inputs[f'cfgmix/v_{name}'] for name in ('main', 'cfg_text', 'cfg_img')]
  settings = (
    w.outputs[f'cfgmix/{name}'].tolist()
    for name in ('text_scale', 'img_scale', 'renorm_type', 'renorm_min')
  )
  return np.stack([flow.guide(*fields, *setting) for setting in zip(*settings)])
