"""Parameters that were imported into a workdir, and the released folder that they came from."""

import pathlib
import types as python_types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from lvrpo_jax.models import safetensors
from lvrpo_jax.runtime import weights

DIGEST = f'{safetensors.DIGEST_VERSION}:0123'


class SourceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.workdir = pathlib.Path(self.create_tempdir().full_path)
    self.params = {'kernel': jax.numpy.arange(3.0)}
    self.enterContext(mock.patch.object(weights, 'template', lambda experiment, name: self.params))

  def imported_from(self, digest):
    """An experiment whose workdir holds parameters that were imported from weights of a digest."""
    weights.make_or_restore(
      self.workdir,
      weights.BASE,
      self.params,
      lambda: self.params,
      {'source': {'folder': 'former', 'digest': digest}},
    )
    return python_types.SimpleNamespace(
      workdir=self.workdir,
      config=python_types.SimpleNamespace(checkpoint='released'),
      family=python_types.SimpleNamespace(digest=lambda policy, folder, part: DIGEST),
      policy=None,
    )

  def test_the_same_weights(self):
    experiment = self.imported_from(DIGEST)
    with self.assertNoLogs('absl', 'WARNING'):
      restored = weights.restore(experiment, weights.BASE)
    np.testing.assert_array_equal(restored['kernel'], self.params['kernel'])

  def test_other_weights_are_refused(self):
    experiment = self.imported_from(f'{safetensors.DIGEST_VERSION}:4567')
    with self.assertRaisesRegex(
      ValueError, "config.checkpoint is 'released', .* imported from former, whose weights differ"
    ):
      weights.restore(experiment, weights.BASE)

  @parameterized.parameters('0123', '4567', 'v1:0123')
  def test_a_digest_of_a_former_version_is_not_compared(self, digest):
    experiment = self.imported_from(digest)
    with self.assertLogs('absl', 'WARNING') as logs:
      restored = weights.restore(experiment, weights.BASE)
    self.assertLen(logs.output, 1)
    self.assertIn('cannot be compared', logs.output[0])
    np.testing.assert_array_equal(restored['kernel'], self.params['kernel'])


if __name__ == '__main__':
  absltest.main()
