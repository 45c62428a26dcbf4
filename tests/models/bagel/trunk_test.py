"""Tests of lvrpo_jax.models.bagel.trunk."""

import dataclasses
import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax.models.bagel import model as bagel
from tests.models.bagel import sequences

QUESTION = (('vit', 4), ('text', 3))
DRAWING = (('vit', 4), ('text', 3), ('noise', 4))


@functools.partial(jax.jit, static_argnames='config')
def weighted_gradient(params, seq, text_weight_L, image_weight, config):
  def loss(params):
    logits, v = bagel.Unified(config).apply({'params': params}, seq)
    return jnp.sum(jnp.sin(logits) * text_weight_L[:, None]) + jnp.sum(jnp.sin(v) * image_weight)

  return jax.grad(loss)(params)


def gradient(parts, head, config=sequences.CONFIG):
  """Returns gradients of a loss on the text before the last image, or on velocities ('image')."""
  seq = sequences.sequence(parts)
  count = seq.ids_BL.shape[1] + seq.patches_BNP.shape[1]
  text = np.arange(count) < seq.ids_BL.shape[1] - (0 if parts[-1][0] == 'text' else 2)
  image = np.float32(head == 'image')
  return weighted_gradient(sequences.parameters(), seq, text * (1 - image), image, config)


class ExpertsTest(parameterized.TestCase):
  def assert_zero(self, tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      np.testing.assert_array_equal(leaf, 0.0, err_msg=str(path))

  def assert_used(self, tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      self.assertGreater(np.abs(leaf).max(), 0.0, str(path))

  @parameterized.named_parameters(('no_latents', QUESTION), ('later_latents', DRAWING))
  def test_text_does_not_reach_the_generation_expert(self, parts):
    grad = gradient(parts, 'text')
    self.assert_zero(
      [
        grad['trunk']['layers']['gen'],
        grad['trunk']['norm_gen'],
        grad['vae2llm'],
        grad['llm2vae'],
        grad['time_embedder'],
      ]
    )
    self.assert_zero([grad['vit_pos_embed'], grad['latent_pos_embed']])  # Fixed tables.
    self.assert_used(
      [
        grad['trunk']['layers']['und'],
        grad['trunk']['norm_und'],
        grad['embed_tokens'],
        grad['lm_head'],
        grad['connector_fc1'],
      ]
    )

  def test_image_trains_both_experts(self):
    grad = gradient(DRAWING, 'image')
    layers = grad['trunk']['layers']
    self.assert_used(
      [
        layers['gen'],
        layers['und']['k_proj']['kernel'],
        grad['vae2llm'],
        grad['llm2vae'],
        grad['time_embedder'],
        grad['embed_tokens'],
        grad['vit'],
      ]
    )
    self.assert_zero([grad['lm_head'], grad['trunk']['norm_und']])
    # Of the last layer of the understanding expert, images read keys and values only.
    self.assert_zero(layers['und']['o_proj']['kernel'][-1])

  def test_frozen_understanding(self):
    config = dataclasses.replace(sequences.CONFIG, freeze_und=True)
    grad = gradient(DRAWING, 'image', config)
    self.assert_zero([grad['trunk']['layers']['und'], grad['embed_tokens']])
    self.assert_used([grad['trunk']['layers']['gen']])

  @parameterized.parameters({'remat': 'full', 'unroll': 2}, {'remat': 'dots_saveable'})
  def test_execution_does_not_change_gradients(self, **changes):
    other = gradient(DRAWING, 'image', dataclasses.replace(sequences.CONFIG, **changes))
    jax.tree.map(
      functools.partial(sequences.close, tolerance=1e-4), other, gradient(DRAWING, 'image')
    )


if __name__ == '__main__':
  absltest.main()
