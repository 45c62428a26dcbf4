"""Settings of the tests: CPU, and absl flags that tests need parsed."""

import os

# Must be set before jax is imported. Optimised code is not worth its compile time here.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if os.environ['JAX_PLATFORMS'] == 'cpu':
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

from absl import flags


def pytest_configure(config):
  """Tests read absl's temporary folders, and grain its flags."""
  del config
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
