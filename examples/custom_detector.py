"""A detector of your own for the rules: it sees pixels alone.

    python -m lvrpo_jax.main --config=configs/tiny.py --workdir=runs/detected \
        --config.align.rewards.generate.rules.detector=examples.custom_detector:detect
"""

import numpy as np

from lvrpo_jax.data import detection

COLORS = {'red': (1, 0, 0), 'green': (0, 1, 0), 'blue': (0, 0, 1)}


def detect(images_RYXC: np.ndarray) -> list[list[detection.Detection]]:
  """One 'square' where the most colourful pixel of an image is, in the nearest of three colours."""
  names, axes = list(COLORS), np.array(list(COLORS.values()), np.float32)
  out = []
  for image_YXC in images_RYXC.astype(np.float32) / 255.0:
    chroma_YX = image_YXC.max(-1) - image_YXC.min(-1)
    y, x = np.unravel_index(chroma_YX.argmax(), chroma_YX.shape)
    color = names[int(np.argmax(axes @ image_YXC[y, x]))]
    box = float(x), float(y), float(x + 1), float(y + 1)
    out.append([detection.Detection('square', color, box, float(chroma_YX.max()))])
  return out
