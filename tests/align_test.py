"""Tests of the parts of lvrpo_jax.align; `end_to_end_test` runs the loop."""

import math
import pathlib

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import align
from lvrpo_jax import job as job_lib
from lvrpo_jax import pretrain

SCALARS = {'accuracy/generate/correct': .2, 'accuracy/edit/correct': .6,
           'accuracy/understand/format': 1., 'reward/generate/rules': .9}


class ScoreTest(absltest.TestCase):

  def test_default_is_what_is_correct(self):
    self.assertAlmostEqual(align.score(SCALARS, ''), .4)
    self.assertTrue(math.isnan(align.score({'loss': 1.}, '')))

  def test_any_metric(self):
    self.assertEqual(align.score(SCALARS, 'reward/generate/rules'), .9)
    with self.assertRaisesRegex(ValueError, "config.align.score is 'reward'; allowed: .*rules"):
      align.score(SCALARS, 'reward')


class InitialTest(absltest.TestCase):

  def test_reference_is_kept_as_passes_read_it(self):
    config = tiny.get_config()
    config.model.dtype = 'bfloat16'
    job = job_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    params = pretrain.initial(job)
    params['llm2vae']['kernel'] = .1 * jax.random.normal(
        jax.random.key(5), params['llm2vae']['kernel'].shape)
    optimizer, _ = align.update(job)
    state = align.initial(job, params, optimizer)
    kernel = lambda tree: tree['trunk']['layers']['gen']['q_proj']['kernel']
    self.assertEqual(kernel(state.reference).dtype, jnp.bfloat16)
    self.assertEqual(kernel(state.params).dtype, jnp.float32)
    vae = pretrain.fit_autoencoder(job)
    prompts = {'generate': job.encoder('generate', [job.data.prompt('generate', 0)]).prompts}
    x = jax.random.normal(jax.random.key(0), (1, 1, *job.policy.latent_shape))
    ask = jax.jit(lambda p: job.policy.follow(
        p, vae, prompts, {'generate': x}, {'generate': jnp.full((1, 1), .5)}, {})[0]['generate'])
    self.assertGreater(float(jnp.abs(ask(state.params)).max()), 0.)
    np.testing.assert_array_equal(ask(state.reference), ask(state.params))

  def test_adapters_keep_no_reference_of_their_own(self):
    config = tiny.get_config()
    config.align.lora.rank = 2
    job = job_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    optimizer, _ = align.update(job)
    self.assertIsNone(align.initial(job, {'kernel': jnp.ones((2, 2))}, optimizer).reference)


if __name__ == '__main__':
  absltest.main()
