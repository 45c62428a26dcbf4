"""Type aliases, the records that packages exchange, and the axis legend.

Axis letters, the same in every file (`logits_BGLV`):

  B  prompts           G  samples of a prompt      R  rows, B * G
  L  query positions   S  cached positions         U  understanding tokens of a row
  N  image tokens      D  width                    H  query heads
  J  key/value heads   K  head width               F  feed-forward width
  V  vocabulary        T  denoising steps or generated tokens
  C  channels of a latent token                    P  values of a pixel patch
  Y  pixel rows        X  pixel columns            E  layers
  K  trained steps of a trajectory, or noised copies of a sample (beside B and G)

`M` counts the rows of one prompt where a pass serves groups (M = G) as well as single rows (M = 1).
Only the model flattens K and G: row m = k * G + g of a prompt is step k of sample g.
"""

from __future__ import annotations

from typing import Any, cast

from flax import struct
import jax
import numpy as np

Array = jax.Array
Tree = Any
"""A tree that `jax.tree` maps over."""
Params = Tree
"""A tree of parameters: nested dicts of arrays."""
Config = Any
"""A `ConfigDict` or a section of one; attributes are the keys of `configs/base.py`."""
Json = Any
"""What `json.loads` returns."""


def on_host(x: np.ndarray) -> Array:
  """Casts a NumPy array to the type of a record's field; nothing is copied or placed.

  Records are built on the host with NumPy arrays, and put on devices as a whole.
  """
  return cast(Array, x)


CAUSAL, FULL, NOISE = 0, 1, 2
"""Attention modes of a split: text (causal); clean latents and ViT tokens; noised latents."""

PADDING = -1
"""Value of `Layout.sample_BL` at a place that holds no token."""


class Layout(struct.PyTreeNode):
  """Places of tokens in the logical sequence, which differ from their places in memory.

  Attributes:
    sample_BL: index of the sample of the row that a token belongs to; `PADDING` for none.
    order_BL: place in the logical sequence.
    split_BL: index of the split (segment); unique within a row.
    mode_BL: `CAUSAL`, `FULL` or `NOISE`.
    position_BL: RoPE position.
  """

  sample_BL: Array
  order_BL: Array
  split_BL: Array
  mode_BL: Array
  position_BL: Array


class Sequence(struct.PyTreeNode):
  """Text, ViT and latent tokens of a row, as three static segments in memory.

  Text and ViT tokens form the understanding segment, latent tokens form the generation segment.
  A segment may have length zero.

  Attributes:
    ids_BL: ids of text and frame tokens.
    text: layout of the text and frame tokens.
    patches_BNP: pixel patches for the vision tower.
    patch_position_BN: rows of both ViT position tables.
    patch_image_BN: index of the image that a patch belongs to; attention stays inside an image.
    vit: layout of the ViT tokens.
    latents_BNC: latent tokens, already noised to `time_BN`.
    latent_position_BN: rows of the latent position table.
    time_BN: flow time of every latent token, 0 for clean ones.
    gen: layout of the latent tokens.
    next_position_B: RoPE position of the token after the sequence.
  """

  ids_BL: Array
  text: Layout
  patches_BNP: Array
  patch_position_BN: Array
  patch_image_BN: Array
  vit: Layout
  latents_BNC: Array
  latent_position_BN: Array
  time_BN: Array
  gen: Layout
  next_position_B: Array


class Cache(struct.PyTreeNode):
  """Keys and values of a context, shared by all rows of its prompt.

  Attributes:
    k_EBSJK, v_EBSJK: keys after norm and RoPE, and values, of every layer.
    valid_BS: False on padding.
    next_position_B: RoPE position of the token after the context.
  """

  k_EBSJK: Array
  v_EBSJK: Array
  valid_BS: Array
  next_position_B: Array


class TextTrajectory(struct.PyTreeNode):
  """Sampled texts.

  Attributes:
    tokens_BGT: ids of a text and its end token.
    logp_BGT: log-probabilities under the distribution that sampled.
    mask_BGT: True on a text and its end token.
    temperature: sampling temperature; texts are scored at the same one.
    drift: largest difference between `logp_BGT` and the log-probabilities of the decoding steps.
  """

  tokens_BGT: Array
  logp_BGT: Array
  mask_BGT: Array
  temperature: Array
  drift: Array


class ImageTrajectory(struct.PyTreeNode):
  """Sampled images with the trajectories of the flow that led to them.

  Attributes:
    x_TBGNC: latents before every step.
    noise_TBGNC: standard normal draw of every step.
    mean_TBGNC: mean of every transition under the policy that sampled.
    time_T, next_time_T: times at which every transition starts and ends.
    std_T: deviation of every transition; 0 without noise.
    latents_BGNC: final latents.
    guidance: scale of classifier-free guidance; 1 for none.
  """

  x_TBGNC: Array
  noise_TBGNC: Array
  mean_TBGNC: Array
  time_T: Array
  next_time_T: Array
  std_T: Array
  latents_BGNC: Array
  guidance: Array


class Rewards(struct.PyTreeNode):
  """Values of one reward.

  Attributes:
    value_BG: reward of every sample.
    valid_BG: False where a sample has no reward.
  """

  value_BG: Array
  valid_BG: Array


class TrainState(struct.PyTreeNode):
  """The state that an optimizer step changes, and the frozen copies that it reads.

  Attributes:
    step: int32, count of optimizer steps taken.
    params: parameters of the policy, float32.
    opt_state: state of the optimizer.
    ema: running mean of the parameters, or None.
    old: parameters of DiffusionNFT's old policy, or None.
    reference: frozen parameters of the pretrained policy, or None.
  """

  step: Array
  params: Params
  opt_state: Tree
  ema: Params = None
  old: Params = None
  reference: Params = None


class Prompts(struct.PyTreeNode):
  """Contexts of one task before an encoder has run: token ids, layouts and source images.

  Attributes:
    ids_BL, text, vit, gen, next_position_B: as in `Sequence`; `vit` and `gen` have length zero
      where the task shows no image, `gen` also where the image is not edited.
    source_BYXC: uint8 pixels of the image shown, or of size zero.
    index_B: index of the prompt in its source; random draws of a row depend on it alone.
  """

  ids_BL: Array
  text: Layout
  vit: Layout
  gen: Layout
  next_position_B: Array
  source_BYXC: Array
  index_B: Array


class SupervisedBatch(struct.PyTreeNode):
  """Prompts with the images and answers that supervised training fits.

  Attributes:
    prompts: the contexts.
    target_BYXC: uint8 pixels of the image to generate, or of size zero.
    answer_BL: `[bos] answer [eos] padding`, or of size zero.
    answer_mask_BL: True where `answer_BL[:, 1:]` is a label, one shorter than `answer_BL`.
  """

  prompts: Prompts
  target_BYXC: Array
  answer_BL: Array
  answer_mask_BL: Array


class Transitions(struct.PyTreeNode):
  """K steps of the trajectories of every group.

  Attributes:
    x_BKGNC: latents before a step.
    next_BKGNC: latents from which the rollout continued; equal to `mean + std * noise`.
    time_BKG, next_time_BKG: times at which a step starts and ends.
    first_time_BKG: second point of the rollout's time grid, see `flow.sde_step`.
    eta_BKG: noise level of a step.
    noise_BKGNC: standard normal draw of a step.
    mean_BKGNC, std_BKG: mean and deviation of a transition under the policy that sampled.
  """

  x_BKGNC: Array
  next_BKGNC: Array
  time_BKG: Array
  next_time_BKG: Array
  first_time_BKG: Array
  eta_BKG: Array
  noise_BKGNC: Array
  mean_BKGNC: Array
  std_BKG: Array


class SampledTexts(struct.PyTreeNode):
  """Groups of sampled texts, with the quantities that are needed to score them again.

  Attributes:
    prompts: the contexts.
    tokens_BGT: ids of a text and its end token.
    logp_BGT: log-probabilities under the policy that sampled, at `temperature_B`.
    mask_BGT: True on a text and its end token.
    temperature_B: sampling temperature.
  """

  prompts: Prompts
  tokens_BGT: Array
  logp_BGT: Array
  mask_BGT: Array
  temperature_B: Array


class SampledImages(struct.PyTreeNode):
  """Groups of sampled images, with the steps of their trajectories that are scored again.

  Attributes:
    prompts: the contexts.
    latents_BGNC: final latents.
    steps: replayed steps.
    scale_BKG: scale of classifier-free guidance at these steps; 1 for none.
  """

  prompts: Prompts
  latents_BGNC: Array
  steps: Transitions
  scale_BKG: Array


class TextQuery(struct.PyTreeNode):
  """Texts whose logits a policy computes.

  Attributes:
    prompts: the contexts.
    ids_BML: inputs of the model, the start token first.
  """

  prompts: Prompts
  ids_BML: Array


class FlowQuery(struct.PyTreeNode):
  """Noised latents at which a policy computes velocities.

  Attributes:
    prompts: the contexts.
    x_BKGNC: noised latents.
    time_BKG: their flow times.
  """

  prompts: Prompts
  x_BKGNC: Array
  time_BKG: Array


class GuidedFlowQuery(FlowQuery):
  """Noised latents at which a policy computes velocities under classifier-free guidance.

  Attributes:
    scale_BKG: scale of the guidance.
  """

  scale_BKG: Array


Query = TextQuery | FlowQuery


class TextTrainBatch(struct.PyTreeNode):
  """Texts with their advantages, as an update reads them.

  Attributes:
    sampled: the texts.
    advantage_BG: advantage of every sample.
    valid_BG: True for samples that have an advantage.
    reference_BGT: log-probabilities of the tokens under the reference.
  """

  sampled: SampledTexts
  advantage_BG: Array
  valid_BG: Array
  reference_BGT: Array


class ImageTrainBatch(struct.PyTreeNode):
  """Images with their advantages, as an update reads them.

  Attributes:
    sampled: the images.
    query: points at which the update computes velocities: replayed steps, or noised latents.
    advantage_BG: advantage of every sample.
    valid_BG: True for samples that have an advantage.
    old_BKGNC, reference_BKGNC: velocities of the old policy and of the reference at `query`.
  """

  sampled: SampledImages
  query: FlowQuery
  advantage_BG: Array
  valid_BG: Array
  old_BKGNC: Array
  reference_BKGNC: Array
