"""Frozen records that pass between rooms, and the axis legend.

Axis letters, the same in every file (`logits_BGLV`):

  B  prompts           G  samples of a prompt      R  rows, B * G
  L  query positions   S  cached positions         U  understanding tokens in memory
  N  image tokens      D  width                    H  query heads
  J  key/value heads   K  head width               F  feed-forward width
  V  vocabulary        T  denoising steps or generated tokens
  C  channels of a latent token                    P  values of a pixel patch
  Y  pixel rows        X  pixel columns            E  layers
  K  trained steps of a trajectory, or noised copies of a sample (beside B and G)

`M` stands for "rows of one prompt" where a pass is used both with groups (M = G) and without
(M = 1). Only the model flattens: row m = k * G + g of a prompt is step k of sample g.
"""

from __future__ import annotations

from typing import Any, cast

from flax import struct
import jax
import numpy as np

Array = jax.Array
Params = Any
"""A tree of parameters: nested dicts of arrays."""
Tree = Any
"""Any tree that `jax.tree` maps over."""
Config = Any
"""A `ConfigDict` or a section of one; attributes are the keys of `configs/base.py`."""
Json = Any
"""What `json.loads` returns."""


def on_host(x: np.ndarray) -> Array:
  """A NumPy array in the place of a device array, until its record is placed."""
  return cast(Array, x)


CAUSAL, FULL, NOISE = 0, 1, 2
"""Attention modes of a split: text; clean latents and ViT tokens; noised latents."""

PADDING = -1
"""`Layout.sample` of a place that holds nothing."""


class Layout(struct.PyTreeNode):
  """Where tokens stand in the logical sequence, whatever their place in memory.

  Attributes:
    sample_BL: which sample of the row a token belongs to; `PADDING` where there is none.
    order_BL: place in the logical sequence.
    split_BL: number of the split (segment); unique within a row.
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

  Text and ViT tokens form the understanding segment, latent tokens the generation segment.
  A segment may have length zero.

  Attributes:
    ids_BL: text and frame tokens.
    text: their layout.
    patches_BNP: pixel patches for the vision tower.
    patch_position_BN: rows of both ViT position tables.
    patch_image_BN: number of the image a patch belongs to; attention stays inside an image.
    vit: layout of the ViT tokens.
    latents_BNC: latent tokens, already noised to `time_BN`.
    latent_position_BN: rows of the latent position table.
    time_BN: flow time of every latent token, 0 for clean ones.
    gen: layout of the latent tokens.
    next_position_B: RoPE position of what comes after the sequence.
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
    k_EBSJK, v_EBSJK: per layer, after norm and RoPE.
    valid_BS: False on padding.
    next_position_B: RoPE position of what comes next.
  """

  k_EBSJK: Array
  v_EBSJK: Array
  valid_BS: Array
  next_position_B: Array


class TextTrajectory(struct.PyTreeNode):
  """Sampled answers. `logp_BGT` is the log-probability under the sampling distribution.

  `tokens_BGT` holds the answer and its end token; `mask_BGT` is True on both. The temperature
  that sampled is kept, so that scoring uses the same one. `drift` is the largest difference between
  the log-probabilities kept here and those of the decoding steps.
  """

  tokens_BGT: Array
  logp_BGT: Array
  mask_BGT: Array
  temperature: Array
  drift: Array


class ImageTrajectory(struct.PyTreeNode):
  """Trajectories of the flow.

  Attributes:
    x_TBGNC: latents before every step.
    noise_TBGNC: the standard normal draw of every step.
    mean_TBGNC: mean of every transition under the policy that sampled.
    time_T, next_time_T, std_T: times and deviations of the transitions (0: no noise).
    latents_BGNC: the final latents.
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
  """One component: a value and whether it is valid, for every sample of every group."""

  value_BG: Array
  valid_BG: Array


class TrainState(struct.PyTreeNode):
  """All that an optimizer step changes, and the frozen copies that it reads.

  Attributes:
    step: int32 number of optimizer steps taken.
    params: the policy, float32.
    opt_state: of the optimizer.
    ema: running mean of the parameters, or None.
    old: the old policy of DiffusionNFT, or None.
    reference: the frozen pretrained policy, or None.
  """

  step: Array
  params: Params
  opt_state: Any
  ema: Params = None
  old: Params = None
  reference: Params = None


class Prompts(struct.PyTreeNode):
  """Contexts of one task before any encoder has run: token ids, layouts and source images.

  Attributes:
    ids_BL, text, vit, gen, next_position_B: as in `Sequence`; `vit` and `gen` have length zero
      where the task shows no image, `gen` also where it is not edited.
    source_BYXC: uint8 pixels of the image shown, or of size zero.
    index_B: number of the prompt in its source; random draws of a row depend on it alone.
  """

  ids_BL: Array
  text: Layout
  vit: Layout
  gen: Layout
  next_position_B: Array
  source_BYXC: Array
  index_B: Array


class SupervisedBatch(struct.PyTreeNode):
  """Prompts with what should follow them, for supervised training.

  Attributes:
    target_BYXC: uint8 pixels of the image to draw, or of size zero.
    answer_BL: `[bos] answer [eos] padding`, or of size zero.
    answer_mask_BL: True where `answer_BL[:, 1:]` is a label, one shorter than `answer_BL`.
  """

  prompts: Prompts
  target_BYXC: Array
  answer_BL: Array
  answer_mask_BL: Array


class Transitions(struct.PyTreeNode):
  """K steps of the trajectories of every group.

  The sampled latents `next_BKGNC`, which the rollout went on from, are `mean + std * noise`.
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
  """Groups of texts with what is needed to score them again.

  Attributes:
    logp_BGT: log-probabilities under the policy that sampled, at `temperature_B`.
    mask_BGT: True on a text and its end token.
  """

  prompts: Prompts
  tokens_BGT: Array
  logp_BGT: Array
  mask_BGT: Array
  temperature_B: Array


class SampledImages(struct.PyTreeNode):
  """Groups of images with the steps of their trajectories that are scored again.

  Attributes:
    latents_BGNC: final latents.
    steps: replayed steps.
    scale_BKG: scale of classifier-free guidance of these steps; 1 for none.
  """

  prompts: Prompts
  latents_BGNC: Array
  steps: Transitions
  scale_BKG: Array


class TextQuery(struct.PyTreeNode):
  """Texts whose logits are asked for: `ids_BML` are the inputs, the start token first."""

  prompts: Prompts
  ids_BML: Array


class FlowQuery(struct.PyTreeNode):
  """Noised latents at whose times velocities are asked for."""

  prompts: Prompts
  x_BKGNC: Array
  time_BKG: Array


class GuidedFlowQuery(FlowQuery):
  """A query for velocities under classifier-free guidance."""

  scale_BKG: Array


Query = TextQuery | FlowQuery


class TextTrainBatch(struct.PyTreeNode):
  """Texts with their advantages, as the update reads them.

  Attributes:
    reference_BGT: log-probabilities of the tokens under the reference.
    valid_BG: samples that have an advantage.
  """

  sampled: SampledTexts
  advantage_BG: Array
  valid_BG: Array
  reference_BGT: Array


class ImageTrainBatch(struct.PyTreeNode):
  """Images with their advantages, as the update reads them.

  Attributes:
    query: where the update asks for velocities: the replayed steps, or freshly noised latents.
    old_BKGNC, reference_BKGNC: velocities of the old policy and of the reference there.
    valid_BG: samples that have an advantage.
  """

  sampled: SampledImages
  query: FlowQuery
  advantage_BG: Array
  valid_BG: Array
  old_BKGNC: Array
  reference_BKGNC: Array
