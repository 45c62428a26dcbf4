"""Rows and heads that do not divide over four devices are refused; see `rows_program`."""

from absl.testing import absltest
from absl.testing import parameterized

from tests.helpers import jax_settings


class RowsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.out = jax_settings.on_devices('tests.helpers.rows_program', 4, timeout=300)

  @parameterized.parameters(
    ('rows_8', [2, 3]),
    ('rows_1', [1, 3]),
    ('heads_4', [1, 5, 2, 3]),
    ('together_4', [1, 2, 3, 5]),
    ('together_1', [1, 2, 2, 5]),
  )
  def test_parts_of_a_device(self, case, want):
    """A single row is whole everywhere."""
    self.assertEqual(self.out[case], want)

  @parameterized.parameters(
    ('rows_6', 'an axis of 6 rows', '4 devices', "'data': 4"),
    ('rows_6_fsdp', 'an axis of 6 rows', '4 devices', "'fsdp': 2"),
    ('heads_3', 'an axis of 3 heads', '2 devices', "'tensor'"),
    ('together_2', 'an axis of 2 rows', '4 devices', 'multiples of 4'),
    ('step_6', 'edit/mask: 6 rows in 1 parts', '(4, 1, 1)', 'multiples of 4 rows'),
    ('step_8_in_4', 'edit/mask: 8 rows in 4 parts', '(2, 2, 1)', 'parallel.micro_batches'),
    ('step_8_in_8', 'edit/mask: 8 rows in 8 parts', '4 devices', 'multiples of 32 rows'),
    ('step_8_in_3', 'edit/mask: 8 rows do not divide into 3 parts', 'parallel.micro_batches'),
    ('step_8_groups', 'edit/mask: 8 rows in 4 parts', 'parallel.group_parts'),
  )
  def test_what_does_not_divide_is_named(self, case, *parts):
    self.assertStartsWith(self.out[case], 'ValueError: ')
    for part in parts:
      self.assertIn(part, self.out[case])

  def test_steps_agree(self):
    self.assertAlmostEqual(self.out['step_8_parts'], self.out['step_8'], places=5)
    self.assertAlmostEqual(self.out['step_8_pmap'], self.out['step_8'], places=5)

  def test_runners_agree_on_a_state_that_is_split_over_data(self):
    jit, pmap = self.out['resting_jit'], self.out['resting_pmap']
    self.assertIsInstance(pmap, list, pmap)
    for a, b in zip(jit, pmap, strict=True):
      self.assertAlmostEqual(a, b, places=5)


if __name__ == '__main__':
  absltest.main()
