"""Representation alignment against NumPy, and its place in pretraining."""

import pathlib
import tempfile

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax.objectives import repa as repa_lib
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import fit
from lvrpo_jax.training import losses
from lvrpo_jax.training import step as step_lib


class MisalignmentTest(absltest.TestCase):
  def test_negative_cosine_against_numpy(self):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 3, 5))
    expected = -(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(
      repa_lib.misalignment(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5
    )

  def test_bounds_scale_and_zero(self):
    a = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32)
    np.testing.assert_allclose(repa_lib.misalignment(3.0 * a, 0.1 * a), -1.0, rtol=1e-5)
    np.testing.assert_allclose(repa_lib.misalignment(a, -a), 1.0, rtol=1e-5)
    value, gradient = jax.value_and_grad(lambda x: repa_lib.misalignment(x, a).sum())(
      jnp.zeros_like(a)
    )
    self.assertEqual(float(value), 0.0)
    self.assertTrue(np.isfinite(gradient).all())

  def test_gradient_against_differences(self):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=5), rng.normal(size=5)

    def cosine(x):
      return -(x * b).sum() / np.linalg.norm(x) / np.linalg.norm(b)

    expected = [(cosine(a + e) - cosine(a - e)) / 2e-6 for e in 1e-6 * np.eye(5)]
    found = jax.grad(lambda x: repa_lib.misalignment(x, jnp.asarray(b)))(jnp.asarray(a))
    np.testing.assert_allclose(found, expected, atol=1e-5)


class PretrainingTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    config = tiny.get_config()
    cls.experiment = experiment = experiment_lib.build(config, pathlib.Path(folder.name))
    cls.repa = repa_lib.Repa(0.5, 1, experiment.dual_encoder)
    cls.policy = experiment.policy.init(jax.random.key(experiment.config.seed))
    # The velocity head of a fresh model is zero, which hides every gradient behind it.
    cls.policy['llm2vae']['kernel'] = 0.1 * jax.random.normal(
      jax.random.key(5), cls.policy['llm2vae']['kernel'].shape
    )
    cls.params = {
      **cls.policy,
      repa_lib.PROJECTOR: cls.repa.init(experiment.policy, jax.random.key(1)),
    }
    side = experiment.data.image_size
    encoder = experiment.dual_encoder.module.init(
      jax.random.key(2), jnp.zeros((1, side, side, 3)), experiment.dual_encoder.token_ids([''])[0]
    )
    cls.frozen = {'vae': fit.fit_autoencoder(experiment), 'dual_encoder': encoder['params']}
    cls.batch = {
      task: experiment.encoder(
        task, [experiment.data.example(task, 'pretrain', i) for i in range(2)]
      )
      for task in ('generate', 'understand', 'edit')
    }

  def total(self, params, repa):
    loss = losses.pretraining(
      self.experiment.policy, dict(generate=1.0, understand=1.0, edit=1.0), 2, 2.2, 3, repa
    )
    state = step_lib.types.TrainState(jnp.int32(4), params, None)
    sums, _ = loss.sums(params, state, self.frozen, self.batch)
    weights = loss.weights(self.batch)
    self.assertEqual(sums.keys(), weights.keys())
    return {k: v / weights[k] for k, v in sums.items()}

  def test_other_losses_stay_and_the_projector_is_not_read(self):
    plain = jax.jit(lambda p: self.total(p, None))(self.policy)
    both = jax.jit(lambda p: self.total(p, self.repa))(self.params)
    self.assertBetween(float(both.pop('repa')), -1.0, 1.0)
    self.assertEqual(plain.keys(), both.keys())
    for name, value in plain.items():
      np.testing.assert_allclose(both[name], value, rtol=1e-5, err_msg=name)

  def test_only_what_comes_before_the_layer_learns(self):
    gradient = jax.jit(jax.grad(lambda p: self.total(p, self.repa)['repa']))(self.params)
    layers = gradient['trunk']['layers']['gen']['down_proj']['kernel']
    self.assertGreater(float(jnp.abs(layers[0]).max()), 0.0)
    self.assertEqual(float(jnp.abs(layers[1]).max()), 0.0)
    self.assertEqual(float(jnp.abs(gradient['llm2vae']['kernel']).max()), 0.0)
    self.assertGreater(float(jnp.abs(gradient['projector']['mlp_0']['kernel']).max()), 0.0)

  def test_target_follows_the_grid_of_latent_tokens(self):
    images, patches = (
      self.batch['generate'].target_BYXC,
      self.experiment.dual_encoder.module.vision_config.patch,
    )
    count = (images.shape[1] // patches) ** 2
    whole = self.repa.target(self.frozen['dual_encoder'], images, count)
    _, features = self.experiment.dual_encoder.module.apply(
      {'params': self.frozen['dual_encoder']},
      images.astype(jnp.float32) / 127.5 - 1.0,
      False,
      method='embed_image',
    )
    np.testing.assert_allclose(whole, features, atol=1e-6)
    # One token stands for all: the mean of the features.
    one = self.repa.target(self.frozen['dual_encoder'], images, 1)
    np.testing.assert_allclose(one[:, 0], features.mean(axis=1), atol=1e-5)


if __name__ == '__main__':
  absltest.main()
