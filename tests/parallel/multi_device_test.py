"""Updates and rollouts on eight devices equal those on one; see `multi_device_program`."""

from absl.testing import absltest
from absl.testing import parameterized

from tests.helpers import jax_settings

TOLERANCE = 1e-5
ALL = ('generate', 'understand', 'edit', 'plan', 'think_generate')


class MultiDeviceTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.out = jax_settings.on_devices(
      'tests.helpers.multi_device_program',
      8,
      timeout=900,
      flags='--xla_cpu_multi_thread_eigen=false',
    )

  @parameterized.product(
    mesh=('data', 'fsdp', 'mixed', 'pmap'), batch=('mixed', 'text', 'image', 'edit', 'thinking')
  )
  def test_update_equals_one_device(self, mesh, batch):
    one, got = self.out['one'][batch], self.out[mesh][batch]
    self.assertLess(got['gradients'], TOLERANCE * max(1.0, one['gradient']))
    self.assertLess(got['params'], TOLERANCE)
    self.assertEqual(got['metrics'].keys(), one['metrics'].keys())
    for name, value in one['metrics'].items():
      self.assertAlmostEqual(
        got['metrics'][name], value, delta=TOLERANCE * max(1.0, abs(value)), msg=name
      )

  def test_parts_in_one_pass_equal_the_whole(self):
    self.assertLess(self.out['parts']['gradients'], TOLERANCE)
    self.assertLess(self.out['parts']['params'], TOLERANCE)

  def test_parts_under_pmap_equal_the_whole(self):
    self.assertLess(self.out['linear']['difference'], TOLERANCE)
    self.assertTrue(self.out['linear']['donated'])

  @parameterized.parameters(
    ('mixed', ALL),
    ('text', ('understand',)),
    ('image', ('generate',)),
    ('edit', ('edit',)),
    ('thinking', ('plan', 'think_generate')),
  )
  def test_update_moves(self, batch, counted):
    one = self.out['one'][batch]
    self.assertEqual(one['metrics']['skipped'], 0.0)
    self.assertGreater(one['moved'], 1e-3)
    for task in ALL:
      for name in (f'align/{task}', f'align/{task}_penalty'):
        value = abs(one['metrics'][f'loss/{name}'])
        if task in counted:
          self.assertGreater(value, 1e-4, name)
        else:
          self.assertEqual(value, 0.0, name)
    for task in ('generate', 'plan', 'think_generate'):
      self.assertGreater(one['metrics'][f'loss/pretrain/{task}'], 1e-4)

  # 'apart' rolls out on another mesh of the same devices.
  @parameterized.parameters('data', 'fsdp', 'mixed', 'apart')
  def test_rollouts_equal_one_device(self, mesh):
    got = self.out['rollout'][mesh]
    self.assertEqual(got['tokens'], 0)
    self.assertLess(got['logp'], TOLERANCE)
    self.assertLess(got['latents'], 1e-4)  # Rounding grows along a trajectory.
    self.assertLessEqual(got['pixels'], 1)

  @parameterized.parameters('causal', 'dense')
  def test_splash_attention_on_a_mesh_equals_plain_attention(self, masked):
    got = self.out['kernels'][masked]
    self.assertLess(got['output'], TOLERANCE)
    self.assertLess(got['gradients'], TOLERANCE)
    self.assertGreater(got['largest'], 1.0)

  def test_samples_differ(self):
    self.assertGreater(self.out['samples']['distinct_texts'], 4)
    self.assertGreater(self.out['samples']['deviation'], 0.01)


if __name__ == '__main__':
  absltest.main()
