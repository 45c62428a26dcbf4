"""A reward of a user's own, by import path."""

import numpy as np


def reward(samples):
  """Brightness."""
  assert len(samples.examples) == len(samples.images_BGYXC)
  value_BG = samples.images_BGYXC.mean(axis=(2, 3, 4)) / 255.0
  return value_BG, np.ones(value_BG.shape, bool)
