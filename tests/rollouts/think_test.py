"""Plans before images: contexts, both halves of a trajectory, and whole iterations."""

import dataclasses
import pathlib
import tempfile

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.evaluation import samplers
from lvrpo_jax.models import contexts
from lvrpo_jax.rollouts import think
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import fit
from lvrpo_jax.training import learner as learner_lib
from lvrpo_jax.training import losses
from lvrpo_jax.training import prompts as prompts_lib
from tests.helpers import noise

B, G = 2, 4


def build(folder, **changes):
  config = tiny.get_config()
  config.align.update(
    prompts=dict(generate=2, understand=2, edit=0, think_generate=B), rollout=dict(group_size=G)
  )
  config.pretrain.rows.think_generate = 2
  config.evaluate.prompts.think_generate = 2
  for part, values in changes.items():
    config[part].update(values)
  return experiment_lib.build(config, pathlib.Path(folder))


class ThinkingTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    cls.experiment = experiment = build(folder.name)
    cls.policy = experiment.policy
    rng = np.random.default_rng(0)
    cls.params, _, cls.dual_encoder = noise.parameters(experiment)
    cls.vae = fit.fit_autoencoder(experiment)
    cls.prompts = experiment.encoder(
      'think_generate', [experiment.data.example('think_generate', 'align', i) for i in range(B)]
    ).prompts
    T = 5
    cls.tokens = rng.integers(3, len(experiment.data.tokenizer), (B, G, T)).astype(np.int32)
    length = rng.integers(1, T + 1, (B, G))
    cls.mask = np.arange(T) < length[..., None]
    cls.tokens[np.arange(T) == length[..., None] - 1] = cls.policy.eos

    def drawn(params, vae, prompts):
      rows = prompts.ids_BL.shape[0]
      x = jax.random.normal(jax.random.key(0), (1, 1, *cls.policy.latent_shape))
      return cls.policy.velocity(
        params,
        cls.policy.prefill(params, vae, prompts),
        jnp.tile(x, (rows, 1, 1, 1)),
        jnp.full((rows, 1), 0.6),
      )

    cls.drawn = staticmethod(jax.jit(drawn))
    cls.after = contexts.after_plans(cls.prompts, cls.tokens, cls.mask, cls.policy.bos)

  def velocity(self, prompts):
    return self.drawn(self.params, self.vae, prompts)

  def test_a_context_with_a_plan_reads_as_the_plan_was_scored(self):
    bos = np.full((B, G, 1), self.policy.bos, np.int32)
    ids = np.concatenate([bos, self.tokens], axis=-1)
    scored = jax.jit(
      lambda params, vae: self.policy.text_logits(
        params, self.policy.prefill(params, vae, self.prompts), ids
      )
    )(self.params, self.vae)
    logits = jax.jit(
      lambda params, vae: self.policy.model.apply(
        {'params': params}, self.policy.sequence(vae, self.after)
      )[0]
    )(self.params, self.vae)
    L = self.prompts.ids_BL.shape[1]
    found = logits[:, L : L + ids.shape[-1]].reshape(*scored.shape)
    mask = np.concatenate([np.ones((B, G, 1), bool), self.mask], axis=-1)
    np.testing.assert_allclose(found[mask], scored[mask], rtol=2e-4, atol=2e-4)

  def test_images_depend_on_their_plan_and_not_on_padding(self):
    before = self.velocity(self.after)
    tokens = np.where(self.mask, self.tokens, 7)
    same = contexts.after_plans(self.prompts, tokens, self.mask, self.policy.bos)
    np.testing.assert_array_equal(self.velocity(same), before)
    tokens = self.tokens.copy()
    tokens[1, 2, 0] += 1
    other = self.velocity(contexts.after_plans(self.prompts, tokens, self.mask, self.policy.bos))
    changed = np.abs(np.asarray(other - before)).reshape(B * G, -1).max(axis=1) > 1e-6
    self.assertEqual(np.flatnonzero(changed).tolist(), [1 * G + 2])

  def test_a_longer_template_changes_nothing(self):
    def wide(x, value):
      return np.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=value)

    longer = contexts.after_plans(
      self.prompts, wide(self.tokens, 0), wide(self.mask, False), self.policy.bos
    )
    np.testing.assert_allclose(self.velocity(longer), self.velocity(self.after), atol=1e-5)
    np.testing.assert_array_equal(longer.next_position_B, self.after.next_position_B)

  def test_rows_have_indices_of_their_own(self):
    self.assertLen(set(np.asarray(self.after.index_B).tolist()), B * G)

  def test_halves_keep_every_sample_with_its_plan(self):
    rng = np.random.default_rng(3)
    K, N, C = 2, 3, 5

    def draw(*shape):
      return rng.normal(size=shape).astype(np.float32)

    steps = types.Transitions(
      **{
        field.name: draw(B, K, G, N, C) if field.name.endswith('NC') else draw(B, K, G)
        for field in dataclasses.fields(types.Transitions)
      }
    )
    image = types.SampledImages(
      prompts=self.prompts,
      latents_BGNC=draw(B, G, N, C),
      steps=steps,
      scale_BKG=draw(B, K, G),
    )
    plan = types.SampledTexts(
      prompts=self.prompts,
      tokens_BGT=self.tokens,
      logp_BGT=draw(B, G, 5),
      mask_BGT=self.mask,
      temperature_B=draw(B),
    )
    credit, valid = draw(B, G), rng.random((B, G)) < 0.5
    out = think.split_halves(think.SampledPlans(plan, image), self.policy.bos, credit, valid)
    self.assertEqual(set(out), {'plan', 'think_generate'})
    texts, text_credit, text_valid = out['plan']
    self.assertIs(texts, plan)
    np.testing.assert_array_equal(text_credit, credit)
    np.testing.assert_array_equal(text_valid, valid)
    images, image_credit, image_valid = out['think_generate']
    for b, g in np.ndindex(B, G):
      row = b * G + g
      self.assertEqual(image_credit[row, 0], credit[b, g])
      self.assertEqual(image_valid[row, 0], valid[b, g])
      np.testing.assert_array_equal(images.latents_BGNC[row, 0], image.latents_BGNC[b, g])
      for k in range(K):
        for found, want in zip(jax.tree.leaves(images.steps), jax.tree.leaves(steps)):
          np.testing.assert_array_equal(found[row, k, 0], want[b, k, g])
        self.assertEqual(images.scale_BKG[row, k, 0], image.scale_BKG[b, k, g])
      said = np.asarray(images.prompts.ids_BL)[row, -5:]
      np.testing.assert_array_equal(said[self.mask[b, g]], self.tokens[b, g][self.mask[b, g]])

  def test_pretraining_learns_both_halves(self):
    loss = losses.pretraining(self.policy, dict(think_generate=0.5), 2, 2.2, 3)
    batch = {
      'think_generate': self.experiment.encoder(
        'think_generate',
        [self.experiment.data.example('think_generate', 'pretrain', i) for i in range(2)],
      )
    }
    state = types.TrainState(jnp.int32(4), None, None)

    def sums(loss, b):
      return jax.jit(loss.sums)(self.params, state, {'vae': self.vae}, b)[0]

    found, weights = sums(loss, batch), loss.weights(batch)
    self.assertEqual(loss.coefficients, {'think_generate': 0.5, 'plan': 0.5})
    b = batch['think_generate']
    # Oracle: the plan as the answer of a text task, the picture after a context that holds it.
    alone = losses.pretraining(self.policy, dict(understand=1.0), 2, 2.2, 3)
    text = {'understand': b.replace(target_BYXC=b.target_BYXC[:, :0])}
    np.testing.assert_allclose(found['plan'], sums(alone, text)['understand'], rtol=1e-5)
    self.assertEqual(float(weights['plan']), b.answer_mask_BL.sum())
    said = np.concatenate([np.ones((2, 1), bool), b.answer_mask_BL], axis=1)
    drawing = losses.pretraining(self.policy, dict(generate=1.0), 2, 2.2, 3)
    image = {'generate': b.replace(prompts=contexts.with_text(b.prompts, b.answer_BL, said))}
    np.testing.assert_allclose(found['think_generate'], sums(drawing, image)['generate'], rtol=1e-5)
    answer = self.experiment.data.example('think_generate', 'pretrain', 0).answer
    self.assertEqual(len(answer.replace(' , ', '|').split('|')), 4)

  def iteration(self, **changes):
    folder = self.create_tempdir().full_path
    experiment = build(folder, **changes)
    # The update takes the state away, and with it what it was made of.
    mine = jax.tree.map(jnp.copy, (self.params, self.vae, self.dual_encoder))
    learner = learner_lib.Learner(experiment, *mine)
    data = prompts_lib.prompt_batches(experiment)
    prompts = prompts_lib.next_prompts(experiment, data, data)

    def next_prompts(names):
      del names
      return prompts

    metrics, images = learner.iterate(prompts, 1, next_prompts)
    return metrics, images

  def test_an_iteration_scores_what_was_sampled(self):
    metrics, images = self.iteration()
    for name in (
      'mismatch/plan',
      'mismatch/think_generate',
      'mismatch/understand',
      'mismatch/generate',
    ):
      self.assertLess(float(metrics[name]), 1e-5, name)
    self.assertEqual(images['think_generate'].shape[:2], (B, G))
    self.assertIn('loss/plan', metrics)
    self.assertIn('loss/think_generate_penalty', metrics)
    self.assertIn('accuracy/think_generate/correct', metrics)

  def test_fresh_prompts_take_the_places_of_dead_ones(self):
    metrics, _ = self.iteration(
      align=dict(dynamic_sampling=dict(rounds=1, reward=''), prompts=dict(understand=0, generate=0))
    )
    self.assertIn('dynamic_sampling/think_generate/rounds', metrics)
    self.assertLess(float(metrics['mismatch/think_generate']), 1e-5)

  def test_measured_with_the_noise_of_images_without_a_plan(self):
    tools = samplers.build(self.experiment)
    plans, images = tools.think(self.params, self.vae, self.prompts)
    side = self.experiment.data.image_size
    count = self.experiment.config.evaluate.samples
    self.assertEqual(images.shape, (B, count, side, side, 3))
    self.assertEqual(plans.shape, (B, count, self.experiment.config.data.answer_tokens + 1))
    again, _ = tools.think(self.params, self.vae, self.prompts)
    np.testing.assert_array_equal(plans, again)


if __name__ == '__main__':
  absltest.main()
