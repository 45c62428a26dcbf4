"""Image files, sizes and values, against outputs of the BAGEL release and hand-worked cases."""

import io
import json
import os
import pathlib
import re
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
from PIL import Image

from lvrpo_jax.data import images as image_files

_DEFAULT_PARITY = pathlib.Path(__file__).resolve().parents[1] / 'goldens' / 'bagel'
PARITY_DIR = pathlib.Path(os.environ.get('LVRPO_PARITY_DIR', _DEFAULT_PARITY))


def _png_bytes(image: Image.Image, **kwargs) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format='PNG', **kwargs)
  return buffer.getvalue()


class ParityTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.inputs = np.load(PARITY_DIR / 'inputs.npz')
    cls.outputs = np.load(PARITY_DIR / 'outputs.npz')
    rules = json.loads((PARITY_DIR / 'config.json').read_text())['cases']['transform']
    cls.vae_rule = image_files.ResizeRule(*rules['vae'])
    cls.vit_rule = image_files.ResizeRule(*rules['vit'])

  def test_resize_rules(self):
    names = [n for n in self.outputs.files if re.fullmatch(r'misc/resize_[a-z]+_\d+_\d+_\d+', n)]
    self.assertLen(names, 4)
    for name in names:
      rule = image_files.ResizeRule(*map(int, name.split('_')[2:]))
      sizes = [
        image_files.resize_rule(w, h, *rule) for w, h in self.inputs['misc/sizes_wh'].tolist()
      ]
      np.testing.assert_array_equal(sizes, self.outputs[name], err_msg=name)

  def test_resize_rule_divides_pixels_by_number_of_images(self):
    pattern = r'misc/resize_vlm_(\d+)_(\d+)_(\d+)_px(\d+)_imgnum(\d+)_and_(\d+)'
    (match,) = filter(None, (re.fullmatch(pattern, name) for name in self.outputs.files))
    *rule, few, many = map(int, match.groups())
    sizes = [
      [image_files.resize_rule(w, h, *rule, img_num=n) for n in (few, many)]
      for w, h in self.inputs['misc/sizes_wh'].tolist()
    ]
    np.testing.assert_array_equal(sizes, self.outputs[match.group()])

  def test_transformed_pixels(self):
    got = image_files.transform(self.inputs['misc/pixels_u8'], self.vae_rule)
    golden = self.outputs['misc/pixels_transformed'].transpose(1, 2, 0)
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_allclose(got, golden, atol=1e-6)

  def test_both_towers_see_the_same_resized_picture(self):
    resized = image_files.resize(self.inputs['think/image_u8'], self.vae_rule)
    vae = image_files.transform(resized, self.vae_rule)
    vit = image_files.transform(resized, self.vit_rule)
    np.testing.assert_allclose(vae.transpose(2, 0, 1), self.outputs['think/vae_pixels'], atol=1e-6)
    np.testing.assert_allclose(vit.transpose(2, 0, 1), self.outputs['think/vit_pixels'], atol=1e-6)

  def test_decoded_image_to_bytes(self):
    for case in ('gen', 'edit'):
      decoded = self.outputs[f'{case}/cfg_decoded'].transpose(1, 2, 0)
      golden = self.outputs[f'{case}/cfg_image_u8'].astype(int)
      difference = np.abs(image_files.to_bytes(decoded).astype(int) - golden)
      self.assertLessEqual(difference.max(), 1)
      self.assertLess((difference > 0).mean(), 1e-3)


class ResizeRuleTest(parameterized.TestCase):
  @parameterized.parameters(
    ((3000, 500), (1024, 512, 16), (1024, 176)),  # the longest side wins
    ((1000, 997), (1024, 512, 16), (992, 992)),  # sides are rounded one by one
    ((1024, 512), (1024, 512, 16), (1024, 512)),
    ((10, 10), (1024, 512, 16), (512, 512)),
    ((24, 40), (64, 8, 16), (32, 32)),  # 24 / 16 and 40 / 16 are ties, rounded to even
    ((250, 101), (100, 8, 16), (96, 32)),  # 40.4 becomes 40 before it is a tie in strides
  )
  def test_hand_worked(self, size, rule, expected):
    self.assertEqual(image_files.resize_rule(*size, *rule), expected)

  def test_area_ratio_is_a_linear_factor(self):
    self.assertEqual(image_files.resize_rule(100, 100, 200, 10, 10, max_pixels=5000), (50, 50))

  def test_multiples_of_the_stride_within_the_longest_side(self):
    rng = np.random.default_rng(0)
    for w, h in rng.integers(1, 3000, (200, 2)).tolist():
      size = image_files.resize_rule(w, h, 980, 224, 14)
      self.assertLessEqual(max(size), 980)
      self.assertFalse(size[0] % 14 or size[1] % 14 or min(size) < 14)
      self.assertEqual(image_files.resize_rule(h, w, 980, 224, 14), size[::-1])

  def test_empty_image(self):
    with self.assertRaisesRegex(ValueError, '0 x 5'):
      image_files.resize_rule(0, 5, 64, 32, 16)


class PixelsTest(parameterized.TestCase):
  def test_transform_of_the_final_size_only_maps_values(self):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    pixels = image_files.transform(image, image_files.ResizeRule(48, 32, 16))
    np.testing.assert_allclose(pixels, image / 127.5 - 1, atol=1e-6)

  def test_bytes_are_cut_off_and_clipped(self):
    values = np.array([-9.0, -1.0, -0.001, 0.0, 0.999, 1.0, 9.0], np.float32)
    got = image_files.to_bytes(values)
    self.assertEqual(got.dtype, np.uint8)
    np.testing.assert_array_equal(got, [0, 0, 127, 127, 254, 255, 255])

  def test_png_round_trip(self):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = os.path.join(self.enterContext(tempfile.TemporaryDirectory()), 'image.png')
    image_files.save_png(path, image)
    np.testing.assert_array_equal(image_files.load_image(path), image)
    np.testing.assert_array_equal(image_files.load_image(pathlib.Path(path).read_bytes()), image)

  def test_png_refuses_floats(self):
    with self.assertRaisesRegex(ValueError, 'float32'):
      image_files.save_png('unused.png', np.zeros((2, 2, 3), np.float32))


class LoadImageTest(parameterized.TestCase):
  def test_transparency_becomes_white(self):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 51, 255
    got = image_files.load_image(_png_bytes(Image.fromarray(rgba)))
    np.testing.assert_array_equal(got, [[[255] * 3, [204] * 3, [0] * 3]])

  def test_transparent_palette_entry_becomes_white(self):
    image = Image.new('P', (2, 1))
    image.putdata([0, 1])
    image.putpalette([10, 20, 30, 40, 50, 60])
    got = image_files.load_image(_png_bytes(image, transparency=0))
    np.testing.assert_array_equal(got, [[[255, 255, 255], [40, 50, 60]]])

  def test_grey_is_repeated(self):
    got = image_files.load_image(_png_bytes(Image.fromarray(np.array([[7, 9]], np.uint8))))
    np.testing.assert_array_equal(got, [[[7] * 3, [9] * 3]])

  def test_errors_name_the_file(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = _png_bytes(Image.fromarray(noise))
    files = {'text.png': b'no image', 'empty.png': b'', 'short.png': whole[: len(whole) // 2]}
    for name, content in files.items():
      path = os.path.join(folder, name)
      pathlib.Path(path).write_bytes(content)
      with self.assertRaisesRegex(ValueError, re.escape(path)):
        image_files.load_image(path)
    with self.assertRaisesRegex(ValueError, 'absent.png'):
      image_files.load_image(os.path.join(folder, 'absent.png'))
    with self.assertRaisesRegex(ValueError, '8 bytes in memory'):
      image_files.load_image(b'no image')


if __name__ == '__main__':
  absltest.main()
