"""A model family of your own. This one is BAGEL with grey images.

    python -m lvrpo_jax.main --config=configs/tiny.py --workdir=runs/family \
        --config.model.family=examples.custom_family:FAMILY

A new architecture is a class with the methods of `lvrpo_jax.models.family.Policy`, which is what
rollouts, rewards, evaluation and training ask of a model; `build` below would return it.
"""

import dataclasses

from lvrpo_jax.models.bagel import family as bagel_family
from lvrpo_jax.models.bagel import policy as bagel_policy


class GreyscalePolicy(bagel_policy.Policy):
  """A policy whose decoded images are grey."""

  def decode_image(self, vae_params, latents):
    """uint8 images (..., Y, X, 3), all channels alike."""
    image = super().decode_image(vae_params, latents)
    grey = image.astype('float32').mean(-1, keepdims=True)
    return (grey + 0 * image).astype('uint8')


class Greyscale(bagel_family.Family):
  """Builds such policies; weights are read and written as those of BAGEL."""

  def build(self, config, tokenizer, image_size):
    """The policy of a config."""
    policy = super().build(config, tokenizer, image_size)
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)}
    return GreyscalePolicy(**fields)


FAMILY = Greyscale()
