"""Layouts of packed segments, against hand-worked arrays and a mask written with loops."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from lvrpo_jax import types
from lvrpo_jax.data import packing
from lvrpo_jax.models import attention
from tests.helpers import released_packing

FORM = packing.Format(
  bos=90, eos=91, start_of_image=92, end_of_image=93, patch_values=2, latent_channels=3
)


def vit(count, **kwargs):
  return packing.Vit(np.full((count, 2), count), np.arange(count) + 7, **kwargs)


def latent(count, **kwargs):
  return packing.Latent(np.arange(count) + 3, **kwargs)


def arrays(*samples, **kwargs):
  """The released packer's arrays as lists."""
  packed = packing.pack(samples, FORM, **kwargs)
  return {name: value.tolist() for name, value in released_packing.reference_arrays(packed).items()}


def random_samples(rng, count):
  """Samples of random segments, among them frame groups."""

  def segment():
    kind, size = rng.integers(4), int(rng.integers(1, 5))
    if kind == 0:
      return [packing.Text(rng.integers(0, 80, size), loss=bool(rng.integers(2)))]
    if kind == 1:
      return [vit(size)]
    if kind == 2:
      return [latent(size, target=bool(rng.integers(2)))]
    return [latent(size, target=True, frame_delta=2), latent(size, target=True)]

  return [sum((segment() for _ in range(rng.integers(1, 6))), []) for _ in range(count)]


class PackTest(parameterized.TestCase):
  def test_edit_by_hand(self):
    got = arrays([latent(2), vit(1), packing.Text([5, 6]), latent(3, target=True)])
    want = {
      'sequence_length': 16,
      'sample_lens': [16],
      'packed_text_ids': [92, 93, 92, 93, 90, 5, 6, 91, 92, 93],
      'packed_text_indexes': [0, 3, 4, 6, 7, 8, 9, 10, 11, 15],
      'packed_position_ids': [0] * 4 + [1] * 3 + [2, 3, 4, 5] + [6] * 5,
      'packed_vit_tokens': [[1.0, 1.0]],
      'packed_vit_position_ids': [7],
      'packed_vit_token_indexes': [5],
      'vit_token_seqlens': [1],
      'packed_latent_position_ids': [3, 4, 3, 4, 5],
      'packed_vae_token_indexes': [1, 2, 12, 13, 14],
      'mse_loss_indexes': [12, 13, 14],
      'ce_loss_indexes': [],
      'packed_label_ids': [],
      'ce_loss_weights': [],
      'split_lens': [4, 3, 4, 5],
      'attn_modes': [1, 1, 0, 2],
    }
    self.assertEqual(got, want)

  def test_samples_start_anew(self):
    got = arrays([packing.Text([5])], [packing.Text([6, 7]), vit(2)])
    self.assertEqual(got['sample_lens'], [3, 8])
    self.assertEqual(got['packed_position_ids'], [0, 1, 2, 0, 1, 2, 3, 4, 4, 4, 4])
    self.assertEqual(got['split_lens'], [3, 4, 4])

  def test_labels(self):
    got = arrays(
      [
        packing.Text([5, 6, 7], loss=True),
        packing.Text([8]),
        packing.Text([], loss=True, end_label=92),
      ]
    )
    self.assertEqual(got['ce_loss_indexes'], [0, 1, 2, 3, 8, 9])
    self.assertEqual(got['packed_label_ids'], [5, 6, 7, 91, 91, 92])
    np.testing.assert_allclose(got['ce_loss_weights'], [0.5] * 4 + [1.0, 1.0])

  def test_a_target_does_not_advance(self):
    got = arrays([latent(1, target=True), latent(1), vit(1), packing.Text([])])
    self.assertEqual(got['packed_position_ids'], [0] * 6 + [1] * 3 + [2, 3])

  def test_frames_share_one_split(self):
    frames = [
      latent(1, target=True, frame_delta=4),
      latent(1, target=True, frame_delta=2),
      latent(1, target=True),
    ]
    got = arrays([packing.Text([]), *frames, packing.Text([])])
    self.assertEqual(got['split_lens'], [2, 9, 2])
    self.assertEqual(got['attn_modes'], [types.CAUSAL, types.FULL, types.CAUSAL])
    self.assertEqual(got['packed_position_ids'], [0, 1] + [2] * 3 + [6] * 3 + [8] * 3 + [8, 9])

  def test_dropped_image_advances_and_text_does_not(self):
    sample = [packing.Text([5], droppable=True), vit(2, droppable=True), latent(1, target=True)]
    self.assertEqual(
      arrays(sample, drops=[[True, False, False]])['packed_position_ids'], [0] * 4 + [1] * 3
    )
    self.assertEqual(
      arrays(sample, drops=[[False, True, False]])['packed_position_ids'], [0, 1, 2] + [4] * 3
    )
    self.assertEqual(arrays(sample, drops=[[True, True, False]])['split_lens'], [3])

  def test_tokens_are_numbered_and_filled(self):
    tokens = np.arange(6.0).reshape(2, 3)
    packed = packing.pack(
      [[vit(2), latent(2, tokens=tokens), vit(1), latent(1)]],
      FORM,
      lengths=packing.Lengths(9, 4, 4),
    )
    np.testing.assert_array_equal(packed.image_BN[0], [0, 0, 1, -1])
    np.testing.assert_array_equal(packed.sequence.latents_BNC[0, :2], tokens)
    np.testing.assert_array_equal(packed.sequence.latents_BNC[0, 2:], 0.0)
    first, _, second, padding = packed.sequence.patch_image_BN[0]
    self.assertNotEqual(first, second)
    self.assertEqual(padding, -1)

  def test_mask_of_packed_samples(self):
    """`attention.keep_mask` of the layout against the rule, written with loops."""
    samples = random_samples(np.random.default_rng(0), 6)
    packed = packing.pack(samples, FORM)
    ref = released_packing.reference_arrays(packed)
    sample = np.repeat(np.arange(len(samples)), ref['sample_lens'])
    split = np.repeat(np.arange(len(ref['split_lens'])), ref['split_lens'])
    mode = np.repeat(ref['attn_modes'], ref['split_lens'])
    length = int(ref['sequence_length'])
    want = np.zeros((length, length), bool)
    for i in range(length):
      for j in range(length):
        same_split = split[i] == split[j]
        seen = j <= i or (same_split and mode[j] != types.CAUSAL)
        want[i, j] = (
          sample[i] == sample[j] and seen and not (mode[j] == types.NOISE and not same_split)
        )
    seq = packed.sequence
    layout = attention.join(seq.text, seq.vit, seq.gen)
    places = np.argsort(layout.order_BL[0])
    got = np.asarray(attention.keep_mask(layout, layout)[0])[places][:, places]
    np.testing.assert_array_equal(got, want)

  @parameterized.parameters(
    ([latent(1, frame_delta=1)], 'last frame'),
    ([latent(1, frame_delta=1), packing.Text([1])], 'followed by'),
    ([packing.Vit(np.zeros((2, 5)), np.arange(2))], r'\(2, 5\); expected \(2, 2\)'),
    ([latent(2, tokens=np.zeros((1, 3)))], r'\(1, 3\); expected \(2, 3\)'),
  )
  def test_malformed(self, sample, message):
    with self.assertRaisesRegex(ValueError, message):
      packing.pack([sample], FORM)

  def test_only_droppable_segments_are_dropped(self):
    with self.assertRaisesRegex(ValueError, 'not droppable'):
      packing.pack([[packing.Text([1])]], FORM, [[True]])


def one_row(tree, row):
  """A sequence or layout of one row of it."""
  return jax.tree.map(lambda x: x[row : row + 1], tree)


class RowsTest(absltest.TestCase):
  def test_rows_are_samples_packed_alone(self):
    samples = random_samples(np.random.default_rng(1), 5)
    lengths = packing.Lengths(40, 25, 30)
    got = packing.rows(samples, FORM, lengths)
    self.assertEqual(got.sequence.ids_BL.shape, (5, 40))
    self.assertEqual(got.sequence.latents_BNC.shape, (5, 30, 3))
    for row, sample in enumerate(samples):
      alone = packing.pack([sample], FORM)
      want = released_packing.reference_arrays(alone)
      self.assertEqual(got.sequence.next_position_B[row], alone.sequence.next_position_B[0])
      padded = packing.Packed(
        sequence=one_row(got.sequence, row),
        label_BL=got.label_BL[[row]],
        weight_BL=got.weight_BL[[row]],
        target_BN=got.target_BN[[row]],
        image_BN=got.image_BN[[row]],
      )
      for name, value in released_packing.reference_arrays(padded).items():
        np.testing.assert_array_equal(value, want[name], name)

  def test_padding_is_marked(self):
    got = packing.rows([[vit(1)], [packing.Text([1], loss=True)]], FORM, packing.Lengths(4, 2, 1))
    np.testing.assert_array_equal(got.sequence.text.sample_BL, [[0, 0, -1, -1], [0, 0, 0, -1]])
    np.testing.assert_array_equal(got.sequence.vit.sample_BL, [[0, -1], [-1, -1]])
    np.testing.assert_array_equal(got.sequence.patch_image_BN, [[0, -1], [-1, -1]])
    np.testing.assert_array_equal(got.label_BL, [[-1] * 4, [1, 91, -1, -1]])
    self.assertFalse(got.target_BN.any())

  def test_a_row_that_does_not_fit(self):
    with self.assertRaisesRegex(
      ValueError, r'row 1 needs Lengths\(text=5, .*fit into Lengths\(text=4,'
    ):
      packing.rows([[packing.Text([1])], [packing.Text([1, 2, 3])]], FORM, packing.Lengths(4, 0, 0))

  def test_the_released_arrays_are_of_one_row(self):
    packed = packing.rows([[vit(1)], [vit(1)]], FORM, packing.Lengths(2, 1, 0))
    with self.assertRaisesRegex(ValueError, '2 rows'):
      released_packing.reference_arrays(packed)


class DropTest(absltest.TestCase):
  def test_probabilities_by_kind(self):
    sample = [
      packing.Text([1], droppable=True),
      vit(1, droppable=True),
      latent(1, droppable=True),
      packing.Text([1]),
    ]
    drops = packing.draw_drops([sample] * 4000, np.random.default_rng(0), 0.1, 0.5, 0.3)
    # Four standard errors of a share of 4000 draws are at most 0.032.
    np.testing.assert_allclose(np.mean(drops, axis=0), [0.1, 0.5, 0.3, 0.0], atol=0.032)

  def test_same_seed_same_drops(self):
    sample = [packing.Text([1], droppable=True)] * 20
    one, two = (
      packing.draw_drops([sample], np.random.default_rng(3), 0.5, 0.5, 0.5) for _ in range(2)
    )
    self.assertEqual(one, two)


if __name__ == '__main__':
  absltest.main()
