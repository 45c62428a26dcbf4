"""Tests of lvrpo_jax.models.safetensors."""

import json
import pathlib
import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

from lvrpo_jax.models import safetensors as safetensors_lib


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

  def write(self, name='ema.safetensors', **tensors):
    path = self.folder / name
    safetensors_numpy.save_file(tensors, path)
    return path


class ReadTest(FolderTest):
  def test_tensors_of_several_files(self):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.float16([1.5, -2])
    files = [self.write('1.safetensors', a=a), self.write('2.safetensors', b=b)]
    found = safetensors_lib.open_tensors(files)
    self.assertEqual({name: x.file for name, x in found.items()}, {'a': files[0], 'b': files[1]})
    self.assertEqual((found['a'].shape, found['a'].dtype), ((2, 3), 'F32'))
    self.assertEqual((found['b'].shape, found['b'].dtype), ((2,), 'F16'))
    np.testing.assert_array_equal(found['a'].read(), a)
    np.testing.assert_array_equal(found['a'].read((slice(1, 2), slice(0, 2))), a[1:2, :2])

  @parameterized.parameters(np.float16, ml_dtypes.bfloat16, np.float32)
  def test_floats_become_float32(self, dtype):
    value = np.linspace(-1, 1, 6).reshape(2, 3).astype(dtype)
    found = safetensors_lib.open_tensors([self.write(a=value, scalar=np.array(3, dtype))])
    for got in (found['a'].read(), found['a'].read((slice(None),))):
      np.testing.assert_array_equal(got, value.astype(np.float32), strict=True)
    np.testing.assert_array_equal(found['scalar'].read(), np.float32(3))

  def test_unreadable_files_are_named(self):
    path = self.write(a=np.zeros(3, np.float32))
    with self.assertRaisesRegex(ValueError, f'tensor a is in {path} and in {path}'):
      safetensors_lib.open_tensors([path, path])
    path.write_bytes(path.read_bytes()[:-1])
    for bad in (path, self.folder / 'absent'):
      with self.assertRaisesRegex(ValueError, f'{bad} cannot be read'):
        safetensors_lib.open_tensors([bad])

  def test_index(self):
    index = self.folder / 'ema.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {'b': '2', 'a': '1', 'c': '1'}}))
    self.assertEqual(safetensors_lib.indexed(index), [self.folder / '1', self.folder / '2'])
    with self.assertRaisesRegex(ValueError, 'none.index.json cannot be read'):
      safetensors_lib.indexed(self.folder / 'none.index.json')
    for content in ('{}', '[]', '{"weight_map": 3}', 'no JSON'):
      index.write_text(content)
      with self.assertRaisesRegex(ValueError, f'{index} is no index'):
        safetensors_lib.indexed(index)

  def test_check_names(self):
    path = self.write(a=np.zeros(3, np.float32))
    stored = safetensors_lib.open_tensors([path])
    safetensors_lib.check_names(stored, {'a': [(3,)]}, self.folder)
    with self.assertRaisesRegex(ValueError, f'tensor a in {path} is not of this configuration'):
      safetensors_lib.check_names(stored, {}, self.folder)
    with self.assertRaisesRegex(
      ValueError, rf'tensor b of shape \[1\] or \[\] is missing from {self.folder}'
    ):
      safetensors_lib.check_names(stored, {'a': [(3,)], 'b': [(1,), ()]}, self.folder)

  def test_check_tensor(self):
    stored = safetensors_lib.open_tensors(
      [self.write(a=np.zeros((3, 2), np.float32), b=np.zeros(3, np.int32))]
    )
    safetensors_lib.check_tensor(stored['a'], [(2, 3), (3, 2)])
    safetensors_lib.check_tensor(stored['b'], [(3,)], ['I32'])
    with self.assertRaisesRegex(ValueError, r'tensor a in .* has shape \[3, 2\]; expected \[6\]'):
      safetensors_lib.check_tensor(stored['a'], [(6,)])
    with self.assertRaisesRegex(ValueError, r"tensor b in .* I32; .*'F32'\], shape \[3\]"):
      safetensors_lib.check_tensor(stored['b'], [(3,)])

  def test_written_files_are_read(self):
    values = {'b': np.float32([[1, 2]]), 'a': np.float32([3]), 'rest': np.float32([4])}
    path, left = self.folder / 'x.safetensors', iter(values.items())
    safetensors_lib.write_float32(path, {'b': (1, 2), 'a': (1,)}, left)
    self.assertEqual([name for name, _ in left], ['rest'])
    got = safetensors_numpy.load_file(path)
    self.assertEqual(got.keys(), {'a', 'b'})
    for name, value in got.items():
      np.testing.assert_array_equal(value, values[name])

  @parameterized.parameters(True, False)
  def test_make_array(self, sharded):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if sharded else None
    got = safetensors_lib.make_array(value.__getitem__, (2, 3), where)
    np.testing.assert_array_equal(got, value)


class DigestTest(FolderTest):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    self.tensors = {name: rng.normal(size=(40, 30)).astype(np.float32) for name in 'abcde'}
    self.path = self.write(**self.tensors)
    self.digest = safetensors_lib.digest([self.path])

  def overwrite(self, offset, content):
    with self.path.open('r+b') as handle:
      handle.seek(offset)
      handle.write(content)

  def test_copies_are_equal(self):
    """The digest does not depend on the folder or on the modification time."""
    copy = self.folder / 'elsewhere' / self.path.name
    copy.parent.mkdir()
    shutil.copyfile(self.path, copy)
    self.assertEqual(safetensors_lib.digest([copy]), self.digest)
    self.assertStartsWith(self.digest, f'{safetensors_lib.DIGEST_VERSION}:')

  @parameterized.parameters(*'abcde')
  def test_a_tensor_overwritten_in_place(self, name):
    size = self.path.stat().st_size
    self.write(**{**self.tensors, name: self.tensors[name] + 1})
    self.assertEqual(self.path.stat().st_size, size)
    self.assertNotEqual(safetensors_lib.digest([self.path]), self.digest)

  def test_every_byte_of_small_tensors(self):
    content = self.path.read_bytes()
    header = 8 + int.from_bytes(content[:8], 'little')
    for offset in (header, header + 4801, (header + len(content)) // 2, len(content) - 1):
      self.overwrite(offset, bytes([content[offset] ^ 1]))
      self.assertNotEqual(safetensors_lib.digest([self.path]), self.digest, offset)
      self.overwrite(offset, content[offset : offset + 1])
    self.assertEqual(safetensors_lib.digest([self.path]), self.digest)

  def test_metadata_names_and_size(self):
    digests = {self.digest}
    safetensors_numpy.save_file(self.tensors, self.path, {'made': 'twice'})
    digests.add(safetensors_lib.digest([self.path]))
    self.write(**{{'a': 'z'}.get(name, name): x for name, x in self.tensors.items()})
    digests.add(safetensors_lib.digest([self.path]))
    self.write(**self.tensors)
    other = self.path.rename(self.folder / 'other.safetensors')
    digests.add(safetensors_lib.digest([other]))
    digests.add(safetensors_lib.digest([other, other]))
    self.assertLen(digests, 5)

  def test_large_tensors_are_sampled(self):
    """A digest reads 1 MiB of a large tensor and finds changes of more than 1/15 of it."""
    tensor = np.zeros(6 << 20, np.uint8)
    self.write(before=np.zeros(7, np.uint8), large=tensor)
    path = self.path
    plain = safetensors_lib.digest([path])
    for start in range(0, tensor.size, tensor.size // 40):
      changed = tensor.copy()
      changed[start : start + tensor.size // 15] = 1
      self.write(before=np.zeros(7, np.uint8), large=changed)
      self.assertNotEqual(safetensors_lib.digest([path]), plain, start)
    ranges = safetensors_lib._sampled(100, 100 + tensor.size)
    self.assertEqual(sum(stop - start for start, stop in ranges), 1 << 20)
    self.assertEqual((ranges[0][0], ranges[-1][1]), (100, 100 + tensor.size))

  @parameterized.parameters(
    (b'', 'a header of 0 bytes in a file of 0 bytes'),
    (b'no safetensors file', 'a header of .* bytes in a file of 19 bytes'),
    (b'\2' + bytes(7) + b'[]', 'no JSON object of tensors'),
    (b'\2' + bytes(7) + b'\xff\xfe', 'no JSON object of tensors'),
    (b'\x08' + bytes(7) + b'{"a": 1}', 'no JSON object of tensors'),
  )
  def test_files_that_are_none(self, content, message):
    self.path.write_bytes(content)
    with self.assertRaisesRegex(ValueError, f'{self.path} cannot be read.*{message}'):
      safetensors_lib.digest([self.path])

  def test_truncated_and_absent_files(self):
    size = self.path.stat().st_size
    self.path.write_bytes(self.path.read_bytes()[:-1])
    with self.assertRaisesRegex(ValueError, f'truncated.*end at byte {size} of {size - 1}'):
      safetensors_lib.digest([self.path])
    self.path.unlink()
    with self.assertRaisesRegex(ValueError, f'{self.path} cannot be read'):
      safetensors_lib.digest([self.path])


if __name__ == '__main__':
  absltest.main()
