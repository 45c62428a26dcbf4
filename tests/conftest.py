"""What tests share under pytest: CPU unless told, quick compilation, absl's flags parsed."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # Read as jax is imported.

from absl import flags

from tests.helpers import jax_settings

if os.environ['JAX_PLATFORMS'] == 'cpu':
  os.environ.setdefault('XLA_FLAGS', jax_settings.QUICK_COMPILE)


def pytest_configure(config):
  """Tests read absl's temporary folders, and grain its flags."""
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
