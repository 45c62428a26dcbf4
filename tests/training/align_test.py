"""Tests of iterations of alignment; `align_run_test` runs the loop."""

import gc
import math
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.rollouts import replay
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import fit
from lvrpo_jax.training import learner as learner_lib
from lvrpo_jax.training import prompts as prompts_lib
from lvrpo_jax.training import update as update_lib
from tests.helpers import noise

SCALARS = {
  'accuracy/generate/correct': 0.2,
  'accuracy/edit/correct': 0.6,
  'accuracy/understand/format': 1.0,
  'reward/generate/rules': 0.9,
}


class ScoreTest(absltest.TestCase):
  def test_default_is_what_is_correct(self):
    self.assertAlmostEqual(align.score(SCALARS, ''), 0.4)
    self.assertTrue(math.isnan(align.score({'loss': 1.0}, '')))

  def test_any_metric(self):
    self.assertEqual(align.score(SCALARS, 'reward/generate/rules'), 0.9)
    with self.assertRaisesRegex(
      ValueError, "config.align.checkpoints.metric is 'reward'; allowed: .*rules"
    ):
      align.score(SCALARS, 'reward')


class InitialTest(absltest.TestCase):
  def test_reference_is_kept_as_passes_read_it(self):
    config = tiny.get_config()
    config.model.dtype = 'bfloat16'
    experiment = experiment_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    params = experiment.policy.init(jax.random.key(experiment.config.seed))
    params['llm2vae']['kernel'] = 0.1 * jax.random.normal(
      jax.random.key(5), params['llm2vae']['kernel'].shape
    )
    optimizer, _ = update_lib.build_update(experiment)
    state = update_lib.initial_state(experiment, params, optimizer)

    def kernel(tree):
      return tree['trunk']['layers']['gen']['q_proj']['kernel']

    self.assertEqual(kernel(state.reference).dtype, jnp.bfloat16)
    self.assertEqual(kernel(state.params).dtype, jnp.float32)
    vae = fit.fit_autoencoder(experiment)
    example = experiment.data.example('generate', 'align', 0)
    query = types.FlowQuery(
      experiment.encoder('generate', [example]).prompts,
      jax.random.normal(jax.random.key(0), (1, 1, 1, *experiment.policy.latent_shape)),
      jnp.full((1, 1, 1), 0.5),
    )
    ask = jax.jit(lambda p: experiment.policy.forward(p, vae, {'generate': query})['generate'])
    self.assertGreater(float(jnp.abs(ask(state.params)).max()), 0.0)
    np.testing.assert_array_equal(ask(state.reference), ask(state.params))

  def test_adapters_keep_no_reference_of_their_own(self):
    config = tiny.get_config()
    config.align.lora.rank = 2
    experiment = experiment_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    optimizer, _ = update_lib.build_update(experiment)
    self.assertIsNone(
      update_lib.initial_state(experiment, {'kernel': jnp.ones((2, 2))}, optimizer).reference
    )


class IterationTest(parameterized.TestCase):
  """Whole iterations of the production class on a tiny model with every objective for images."""

  def make(self, **changes):
    config = tiny.get_config()
    config.model.depth = 1
    config.align.update(prompts=dict(edit=0), checks=dict(gradients_every=0))
    config.align.update(changes)
    experiment = experiment_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    params, _, dual_encoder = noise.parameters(experiment)
    vae = fit.fit_autoencoder(experiment)
    data = prompts_lib.prompt_batches(experiment)
    return (
      learner_lib.Learner(experiment, params, vae, dual_encoder),
      prompts_lib.next_prompts(experiment, data, data),
    )

  @parameterized.parameters('diffusion_nft', 'flow_grpo')
  def test_adapters_are_all_that_is_held_of_a_policy(self, objective):
    learner, prompts = self.make(lora=dict(rank=2), image=dict(objective=objective))
    move = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0.05, tree))
    learner.state = learner.state.replace(params=move(learner.state.params))
    if learner.state.old is not None:
      learner.state = learner.state.replace(old=move(learner.state.params))
    shapes = {
      x.shape
      for path, x in jax.tree_util.tree_leaves_with_path(learner.frozen['base'])
      if 'q_proj' in jax.tree_util.keystr(path)
    }

    def kernels():
      gc.collect()
      return sum(x.shape in shapes for x in jax.live_arrays())

    before, held = kernels(), []
    self.assertGreater(before, 0)

    def watched(run):
      def call(*args):
        held.append(kernels())
        return run(*args)

      return call

    for name in ('step', '_velocities', '_log_probabilities'):
      setattr(learner, name, watched(getattr(learner, name)))
    metrics, _ = learner.iterate(prompts, 1)
    self.assertEqual(set(held), {before})
    self.assertEqual(kernels(), before)
    for task in ('generate', 'understand'):  # They sample, and are replayed, merged.
      self.assertLess(float(metrics[f'mismatch/{task}']), 1e-6)
    self.assertIs(learner.sampler_policies[-1].base, learner.frozen['base'])

    def kernel(tree):
      return np.asarray(tree['trunk']['layers']['gen']['q_proj']['kernel'])

    self.assertGreater(np.abs(kernel(learner.params) - kernel(learner.reference)).max(), 0.01)

  def test_adapters_go_on_from_a_checkpoint_bit_for_bit(self):
    learner, prompts = self.make(lora=dict(rank=2), prompts=dict(understand=0))
    fresh, _ = self.make(lora=dict(rank=2), prompts=dict(understand=0))
    learner.iterate(prompts, 1)
    store = checkpoint.Checkpoints(pathlib.Path(self.create_tempdir().full_path))
    store.save(1, learner.state, {'iteration': 1})
    learner.iterate(prompts, 2)
    fresh.state, _ = store.restore(fresh.state)
    store.close()
    fresh.iterate(prompts, 2)
    jax.tree.map(np.testing.assert_array_equal, fresh.state, learner.state)
    for name in ('a', 'b'):
      change = np.asarray(learner.state.params['trunk']['layers']['gen']['q_proj']['kernel'][name])
      self.assertGreater(np.abs(change).max(), 0.0)

  def test_a_mismatch_shows_adapters_that_did_not_draw(self):
    learner, prompts = self.make(lora=dict(rank=2), image=dict(objective='flow_grpo'))
    credited, _, _ = learner.collect(prompts, 1)
    learner.state = learner.state.replace(
      params=jax.tree.map(lambda x: x + 0.05, learner.state.params)
    )
    for task in ('generate', 'understand'):
      self.assertGreater(float(learner.mismatch(credited)[f'mismatch/{task}']), 1e-3)

  def test_the_mismatch_of_decoding_is_that_of_all_rounds(self):
    learner, prompts = self.make(dynamic_sampling=dict(rounds=1), prompts=dict(generate=0))
    sample, rounds = learner._sample, []

    def with_drift(*args):
      found, metrics = sample(*args)
      rounds.append(0.25 * len(rounds))
      return found, {**metrics, mismatch.DECODE: jnp.float32(rounds[-1])}

    learner._sample = with_drift
    _, metrics, _ = learner.collect(prompts, 1, lambda names: prompts)
    self.assertEqual(rounds, [0.0, 0.25])
    self.assertEqual(float(metrics[mismatch.DECODE]), 0.25)

  def test_dynamic_sampling_wants_fresh_prompts(self):
    learner, prompts = self.make(dynamic_sampling=dict(rounds=1), prompts=dict(generate=0))
    with self.assertRaisesRegex(ValueError, 'dynamic_sampling.rounds is not 0'):
      learner.collect(prompts, 1)

  def test_images_are_drawn_and_replayed_by_the_old_policy(self):
    learner, prompts = self.make(updates_per_rollout=2)
    credited, metrics, pictures = learner.collect(prompts, 1)
    tokens_BGT = np.asarray(credited['understand'].sampled.tokens_BGT)
    unended_BG = np.all(tokens_BGT != learner.experiment.policy.eos, axis=-1)
    self.assertAlmostEqual(float(metrics['truncated/understand']), unended_BG.mean())
    self.assertGreater(unended_BG.mean(), 0.0)
    old = jax.tree.map(lambda x: 0.8 * x, learner.state.params)
    learner.state = learner.state.replace(old=old)
    moved, _, other = learner.collect(prompts, 1)
    self.assertGreater(np.abs(pictures['generate'].astype(int) - other['generate']).max(), 0)
    np.testing.assert_array_equal(
      credited['understand'].sampled.tokens_BGT, moved['understand'].sampled.tokens_BGT
    )
    for name, found in learner.mismatch(moved).items():
      self.assertLess(float(jnp.max(found)), 1e-6, name)
    # Replayed by the policy itself the mismatch would show that it did not draw them.
    images = moved['generate'].sampled
    query = replay.step_query(images, guided=False)
    stale = learner._velocities_at(learner.params, {'generate': query})['generate']
    self.assertGreater(float(mismatch.image_mismatch('sde', stale, images.steps).max()), 1e-3)

  # Losses of all of them are checked in losses_test; these are all ways through the iteration.
  @parameterized.parameters(('flow_grpo', 'dance'), ('flow_cps', 'cps'), ('awm', 'sde'))
  def test_other_objectives_run(self, objective, sampler):
    coupled = flow_objectives.find(objective).coupled
    self.assertEqual(coupled, objective != 'awm')
    learner, prompts = self.make(
      rollout=dict(sampler=sampler),
      prompts=dict(understand=0),
      image=dict(objective=objective, kl='gaussian' if coupled else 'velocity', kl_target=1e-3),
    )
    self.assertEqual(learner.state.old is None, coupled)
    before = jax.tree.map(np.asarray, learner.state.params)
    metrics, _ = learner.iterate(prompts, 1)
    self.assertLess(float(metrics['mismatch/generate']), 1e-6)
    self.assertEqual(float(metrics['skipped']), 0.0)
    change = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, learner.state.params)
    self.assertGreater(max(jax.tree.leaves(change)), 0.0)
    # The penalty is far from its target, so its weight moves by a fifth of `kl_adaptation`.
    self.assertAlmostEqual(abs(metrics['factor/images_penalty'] - 1.0), 0.02)
    self.assertEqual(learner.factors['images_penalty'], metrics['factor/images_penalty'])

  def test_gradients_are_read_from_any_optimizer(self):
    learner, prompts = self.make(
      optimizer=dict(kind='muon'), prompts=dict(understand=0), checks=dict(gradients_every=1)
    )
    metrics, _ = learner.iterate(prompts, 1)
    for name in ('understanding_expert', 'generation_expert', 'images_on_shared'):
      self.assertGreater(float(metrics[f'gradient/{name}']), 0.0, name)
    self.assertEqual(float(metrics['gradient/answers_on_shared']), 0.0)
    # The two experts hold all that is trained, and nothing else has moved the norm.
    experts = [float(metrics[f'gradient/{x}_expert']) for x in ('understanding', 'generation')]
    self.assertAlmostEqual(np.hypot(*experts) / float(metrics['grad_norm']), 1.0, places=3)

  def test_noise_keeps_to_the_window(self):
    learner, prompts = self.make(
      rollout=dict(noise_outside_window=False, window=1), prompts=dict(understand=0)
    )
    engine = learner.engine
    self.assertGreater(len(engine.noisy), 1)
    for iteration in (1, 2, 3):
      found = engine.rollout(learner.sampler_policies, learner.frozen['vae'], prompts, iteration)
      noisy = np.flatnonzero(np.asarray(found.images['generate'].std_T))
      np.testing.assert_array_equal(noisy, engine.replayed_steps(iteration))

  def test_a_skipped_update_shows_among_several(self):
    learner, prompts = self.make(updates_per_rollout=2, prompts=dict(understand=0))
    run, calls = learner.step, []

    def step(state, frozen, batch):
      calls.append(1)
      if len(calls) == 1:
        batch = {t: b.replace(advantage_BG=b.advantage_BG * jnp.nan) for t, b in batch.items()}
      return run(state, frozen, batch)

    learner.step = step
    metrics, _ = learner.iterate(prompts, 1)
    self.assertLen(calls, 2)
    self.assertEqual(float(metrics['skipped']), 0.5)

  def test_rewards_of_answers_leave_images_alone(self):
    # Siblings of another task in another order: nothing of the images may change, not even a bit.
    learner, prompts = self.make(rollout=dict(group_size=4))
    order = np.array([2, 0, 3, 1])
    sampled, _ = learner._sample(prompts, 1, lambda: None)
    self.enter_context(mock.patch.object(learner, '_sample', lambda *_: (sampled, {})))

    def image_gradient():
      credited = learner.collect(prompts, 1)[0]
      batch = {**learner.text_batches(credited), **learner.image_batches(credited)}
      off = {**learner.frozen, 'factors': {**learner.factors, 'answers': 0.0}}
      loss = update_lib.alignment_loss(learner.experiment)
      weights = loss.weights(batch)

      def objective(params):
        sums = loss.sums(params, learner.state, off, batch)[0]
        return sum(loss.coefficients[k] * sums[k] / weights[k] for k in sums)

      return batch, jax.jit(jax.grad(objective))(learner.state.params)

    batch, grad = image_gradient()
    answers = sampled['understand']
    sampled['understand'] = answers._replace(
      rewards=jax.tree.map(
        lambda x: x[:, order] + 0.25 * (x.dtype != bool) * jnp.arange(4), answers.rewards
      )
    )
    other, shuffled = image_gradient()
    self.assertGreater(
      float(jnp.abs(other['understand'].advantage_BG - batch['understand'].advantage_BG).max()), 0.1
    )
    for task in ('generate',):
      np.testing.assert_array_equal(batch[task].advantage_BG, other[task].advantage_BG)
    self.assertGreater(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grad)), 0.0)
    jax.tree.map(np.testing.assert_array_equal, grad, shuffled)


if __name__ == '__main__':
  absltest.main()
