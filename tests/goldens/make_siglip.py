"""Writes tests/goldens/siglip: tiny SigLIP and SigLIP 2 models of Hugging Face and what they give.

  pip install -e '.[parity]'
  python tests/goldens/make_siglip.py

Weights are random, so nothing is downloaded. All draws come from fixed seeds: two runs with the
same versions of torch and transformers write the same bytes. Names of arrays end in their axes:
`B` images, and texts, `Y` `X` pixel rows and columns, `C` colours, `N` patches, `P` values of a
patch, `L` text tokens, `D` width.
"""

import argparse
import pathlib

import numpy as np
import torch
import transformers

WEIGHT = 0.3  # Standard deviation of every weight.
BATCH = 3  # Images, and texts, of a SigLIP case.
PATCHES = 18  # Length of the padded patch sequences of a SigLIP 2 case.
IGNORED_TOKENS = (0, 2, 4)  # Leading tokens of each text that its mask hides; repeats over a batch.


def widths(hidden: int, mlp: int, layers: int, heads: int, eps: float = 1e-6) -> dict:
  """The settings that both towers have, under their names in a Hugging Face configuration."""
  return {
    'hidden_size': hidden,
    'intermediate_size': mlp,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'layer_norm_eps': eps,
  }


# Sizes of (image tower, its image side and patch side, text tower). The epsilons of the second one
# are large enough to show in its outputs. As in the released model of 384 pixels and patches of
# 14, the patches of the third one do not cover its images.
SIZES = {
  'square': (widths(32, 48, 2, 4), (28, 7), widths(32, 64, 2, 2)),
  'other_widths': (widths(24, 80, 1, 3, eps=1e-2), (24, 8), widths(16, 40, 1, 4, eps=2e-2)),
  'cropped': (widths(16, 24, 1, 2), (20, 6), widths(16, 24, 1, 2)),
}
# The variable-size models of SigLIP 2 take patches, so they have no images to crop.
CASES = {
  'siglip_square': 'square',
  'siglip_other_widths': 'other_widths',
  'siglip_cropped': 'cropped',
  'siglip2_square': 'square',
  'siglip2_other_widths': 'other_widths',
}


def make_model(case: str) -> transformers.PreTrainedModel:
  """Builds the model of a case and draws its weights."""
  vision, (image_size, patch_size), text = SIZES[CASES[case]]
  if case.startswith('siglip2'):
    config_class, model_class = transformers.Siglip2Config, transformers.Siglip2Model
    extent = {'num_patches': (image_size // patch_size) ** 2}
  else:
    config_class, model_class = transformers.SiglipConfig, transformers.SiglipModel
    extent = {'image_size': image_size}
  config = config_class(
    vision_config={**vision, 'patch_size': patch_size, **extent},
    text_config={
      **text,
      'vocab_size': 50,
      'max_position_embeddings': 9,
      'projection_size': vision['hidden_size'],
      'bos_token_id': None,
      'eos_token_id': None,
    },
  )
  model = model_class(config).eval()
  rng = np.random.default_rng(0)
  with torch.no_grad():
    for parameter in model.parameters():
      values = WEIGHT * rng.standard_normal(parameter.shape)
      parameter.copy_(torch.from_numpy(values.astype(np.float32)))
  return model


def make_inputs(config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
  """Draws images, or padded patches of images of several sizes, and texts."""
  rng = np.random.default_rng(1)

  def uniform(*shape: int) -> np.ndarray:
    return rng.uniform(-1, 1, shape).astype(np.float32)

  vision, text = config.vision_config, config.text_config
  if isinstance(config, transformers.Siglip2Config):
    side = int(vision.num_patches**0.5)
    # The grid of the position table, then grids smaller and larger than it.
    grid_B2 = np.array([[side, side], [2, 7], [1, 3], [6, 3], [side, 2]], np.int32)
    inputs = {
      'grid_B2': grid_B2,
      'patches_BNP': uniform(len(grid_B2), PATCHES, 3 * vision.patch_size**2),
      'patch_mask_BN': np.arange(PATCHES) < grid_B2.prod(axis=1)[:, None],
    }
  else:
    inputs = {'image_BYXC': uniform(BATCH, vision.image_size, vision.image_size, 3)}
  batch, length = len(next(iter(inputs.values()))), text.max_position_embeddings
  return {
    **inputs,
    'ids_BL': rng.integers(0, text.vocab_size, (batch, length), np.int32),
    'text_mask_BL': np.arange(length) >= np.resize(IGNORED_TOKENS, batch)[:, None],
  }


@torch.no_grad()
def make_outputs(
  model: transformers.PreTrainedModel, inputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Embeddings, patch states, logits and loss of a model.

  The hidden states of padding patches are set to zero; they mean nothing.
  """
  tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
  ids_BL = tensors['ids_BL'].long()
  if 'image_BYXC' in inputs:
    images = {'pixel_values': tensors['image_BYXC'].permute(0, 3, 1, 2)}
  else:
    images = {
      'pixel_values': tensors['patches_BNP'],
      'pixel_attention_mask': tensors['patch_mask_BN'].long(),
      'spatial_shapes': tensors['grid_B2'].long(),
    }
  out = model(input_ids=ids_BL, **images, return_loss=True)
  masked_BD = model.text_model(ids_BL, attention_mask=tensors['text_mask_BL'].long()).pooler_output
  hidden_BND = out.vision_model_output.last_hidden_state.numpy()
  if 'patch_mask_BN' in inputs:
    hidden_BND = np.where(inputs['patch_mask_BN'][..., None], hidden_BND, np.float32(0))
  return {
    'image_BD': out.image_embeds.numpy(),
    'text_BD': out.text_embeds.numpy(),
    'logits_per_text_BB': out.logits_per_text.numpy(),
    'loss': out.loss.numpy(),
    'hidden_BND': hidden_BND,
    'masked_text_BD': (masked_BD / masked_BD.norm(dim=-1, keepdim=True)).numpy(),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description='Writes the golden arrays of SigLIP.')
  parser.add_argument(
    '--output',
    type=pathlib.Path,
    default=pathlib.Path(__file__).resolve().parent / 'siglip',
    help='the folder that gets one folder for each case (default: %(default)s)',
  )
  output = parser.parse_args().output
  for case in CASES:
    folder = output / case
    model = make_model(case)
    model.save_pretrained(folder)
    inputs = make_inputs(model.config)
    np.savez_compressed(folder / 'inputs.npz', **inputs)
    np.savez_compressed(folder / 'outputs.npz', **make_outputs(model, inputs))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f'{folder}: {size / 1024:.0f} KiB')


if __name__ == '__main__':
  main()
