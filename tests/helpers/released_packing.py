"""The arrays of BAGEL's released packer, computed from a row of `lvrpo_jax.data.packing`."""

import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import packing
from lvrpo_jax.data import token_rows


def reference_arrays(packed: packing.Packed) -> dict[str, np.ndarray]:
  """The arrays of the released packer, under its names, from a single row.

  `*_indexes` are places in the logical sequence; `split_lens` and `attn_modes` list the splits.

  Raises:
    ValueError: there is more than one row.
  """
  sequence = packed.sequence
  if len(sequence.ids_BL) != 1:
    raise ValueError(f'{len(sequence.ids_BL)} rows; the released packer makes one')
  segments = {'text': sequence.text, 'vit': sequence.vit, 'gen': sequence.gen}
  used = {kind: layout.sample_BL[0] != types.PADDING for kind, layout in segments.items()}

  def pick(kind, x_BL):
    """Values of the places that are not padding."""
    return x_BL[0][used[kind]]

  order = {kind: pick(kind, layout.order_BL) for kind, layout in segments.items()}
  places = np.concatenate(list(order.values()))

  def logical(name):
    """A field of the layouts in the order of the logical sequence."""
    values = [pick(kind, getattr(layout, name)) for kind, layout in segments.items()]
    return np.concatenate(values)[np.argsort(places)]

  split_L, labels = logical('split_BL'), pick('text', packed.label_BL)
  _, first, split_lens = np.unique(split_L, return_index=True, return_counts=True)
  _, vit_lens = np.unique(pick('vit', sequence.patch_image_BN), return_counts=True)
  has_label = labels != token_rows.NO_LABEL
  return {
    'sequence_length': np.int32(len(places)),
    'sample_lens': np.bincount(logical('sample_BL')).astype(np.int32),
    'packed_text_ids': pick('text', sequence.ids_BL),
    'packed_text_indexes': order['text'],
    'packed_position_ids': logical('position_BL'),
    'packed_vit_tokens': pick('vit', sequence.patches_BNP),
    'packed_vit_position_ids': pick('vit', sequence.patch_position_BN),
    'packed_vit_token_indexes': order['vit'],
    'vit_token_seqlens': vit_lens.astype(np.int32),
    'packed_latent_position_ids': pick('gen', sequence.latent_position_BN),
    'packed_vae_token_indexes': order['gen'],
    'mse_loss_indexes': order['gen'][pick('gen', packed.target_BN)],
    'ce_loss_indexes': order['text'][has_label],
    'packed_label_ids': labels[has_label],
    'ce_loss_weights': pick('text', packed.weight_BL)[has_label],
    'split_lens': split_lens.astype(np.int32),
    'attn_modes': logical('mode_BL')[first],
  }
