"""A run moves from eight devices to four; see `restore_program`."""

from absl.testing import absltest

from tests.helpers import jax_settings


class RestoreTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.out = jax_settings.on_devices('tests.helpers.restore_program', 8, timeout=300)

  def test_four_devices_hold_what_eight_held(self):
    self.assertEqual(self.out['restored'], 0.0)
    self.assertEqual(self.out['devices'], [4])

  def test_they_go_on_alike(self):
    self.assertLess(self.out['continued'], 1e-6)
    self.assertGreater(self.out['moved'], 1e-2)

  def test_no_array_is_gathered(self):
    self.assertEqual(self.out['gathered_by_save'], [])
    self.assertEqual(self.out['gathered_by_restore'], [])
    # Looking at the parameters does gather those that are split.
    self.assertEqual(self.out['gathered_by_looking'], self.out['split'])
    self.assertGreater(self.out['split'], 20)


if __name__ == '__main__':
  absltest.main()
