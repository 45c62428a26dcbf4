"""A reward of a user's own, by import path."""

import numpy as np


def reward(examples, images_BGYXC):
  """Brightness."""
  assert len(examples) == len(images_BGYXC)
  value_BG = images_BGYXC.mean(axis=(2, 3, 4)) / 255.0
  return value_BG, np.ones(value_BG.shape, bool)
