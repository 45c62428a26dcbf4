"""What tests share under pytest: XLA compiles quickly, not well; flags set outside are kept."""

import os

import jax_settings

os.environ.setdefault('XLA_FLAGS', jax_settings.QUICK_COMPILE)
