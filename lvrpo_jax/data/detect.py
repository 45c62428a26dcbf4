"""Two detectors of coloured shapes, built on different principles; neither sees the scene.

`detect_components` is meant to pay a reward: it groups pixels of one colour and recognises shapes
by moments. `detect_by_rendering` is meant to report: it explains each blob by a rendered shape and
scores what remains unexplained, so that washed-out, smeared or doubled objects score low and
faint remains are listed as UNKNOWN. A policy that learns the blind spots of the first one is
caught by the second.

Both take images_RYXC of any height and width, uint8 or float in [0, 255].
"""

from lvrpo_jax.data.detect_common import UNKNOWN, Detection
from lvrpo_jax.data.detect_moments import detect_components
from lvrpo_jax.data.detect_rendering import detect_by_rendering, leftovers

__all__ = ('UNKNOWN', 'Detection', 'detect_by_rendering', 'detect_components', 'leftovers')
