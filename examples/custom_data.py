"""A data source of your own: captions of squares in three colours.

    python -m lvrpo_jax.main --config=configs/tiny.py --workdir=runs/squares \
        --config.data.source=examples.custom_data:Squares \
        --config.pretrain.rows.understand=0 --config.pretrain.rows.edit=0 \
        --config.align.prompts.understand=0 --config.align.prompts.edit=0 \
        --config.align.rewards.generate.knowledge.weight=0

`lvrpo_jax.data.examples` has the protocols: what every source has, and what some stages ask for.
"""

import numpy as np

from lvrpo_jax.data import examples
from lvrpo_jax.data import loader
from lvrpo_jax.data import tokenizer as tokenizer_lib

COLORS = {'red': (200, 30, 30), 'green': (30, 160, 30), 'blue': (30, 30, 200)}


class Squares:
  """Random access: the index and the split are all that an example depends on."""

  image_size = 64

  def __init__(self, seed, tokenizer=None):
    self._seed = seed
    self.tokenizer = tokenizer or tokenizer_lib.from_words(['a', 'square', *COLORS])

  def size(self, task, split):
    """More than any run reads."""
    return loader.EPOCH_ROWS

  def categories(self, task, split):
    """Kinds of held-out examples; a task without any is not measured."""
    return ('color',) if (task, split) == ('generate', 'eval') else ()

  def example(self, task, split, index, category='color'):
    """A caption, its image, and the record that the rules check."""
    color, image = self._draw(split, index)
    entry = {'class': 'square', 'count': 1, 'color': color}
    spec = {'tag': 'colors', 'include': [entry], 'exclude': []}
    caption = f'a {color} square'
    return examples.Example(index, caption, target=image, kind='color', meaning=color, spec=spec)

  def _draw(self, split, index):
    rng = np.random.default_rng((self._seed, *split.encode(), index))
    color, (y, x) = str(rng.choice(list(COLORS))), rng.integers(0, self.image_size - 24, 2)
    image = np.full((self.image_size, self.image_size, 3), 230, np.uint8)
    image[y : y + 24, x : x + 24] = COLORS[color]
    return color, image

  def images(self, count):
    """Images, to which the small autoencoder is fitted."""
    return np.stack([self._draw('pretrain', index)[1] for index in range(count)])

  def image_text_pair(self, index):
    """A true pair, on which the small dual encoder is trained."""
    color, image = self._draw('pretrain', index)
    return image, f'a {color} square'
