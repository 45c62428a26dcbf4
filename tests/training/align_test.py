"""Tests of the parts of lvrpo_jax.align; `end_to_end_test` runs the loop."""

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
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.runtime import checkpoint
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import fit
from lvrpo_jax.training import learner
from lvrpo_jax.training import update as update_lib
from lvrpo_jax.training import pretrain
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
    with self.assertRaisesRegex(ValueError, "config.align.checkpoints.metric is 'reward'; allowed: .*rules"):
      align.score(SCALARS, 'reward')


class InitialTest(absltest.TestCase):
  def test_reference_is_kept_as_passes_read_it(self):
    config = tiny.get_config()
    config.model.dtype = 'bfloat16'
    experiment = experiment_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    params = pretrain.initial(experiment)
    params['llm2vae']['kernel'] = 0.1 * jax.random.normal(
      jax.random.key(5), params['llm2vae']['kernel'].shape
    )
    optimizer, _ = update_lib.build_update(experiment)
    state = update_lib.initial_state(experiment, params, optimizer)
    kernel = lambda tree: tree['trunk']['layers']['gen']['q_proj']['kernel']
    self.assertEqual(kernel(state.reference).dtype, jnp.bfloat16)
    self.assertEqual(kernel(state.params).dtype, jnp.float32)
    vae = fit.fit_autoencoder(experiment)
    prompts = {'generate': experiment.encoder('generate', [experiment.data.example('generate', 'align', 0)]).prompts}
    x = jax.random.normal(jax.random.key(0), (1, 1, *experiment.policy.latent_shape))
    ask = jax.jit(
      lambda p: experiment.policy.forward(
        p, vae, prompts, {'generate': x}, {'generate': jnp.full((1, 1), 0.5)}, {}
      )[0]['generate']
    )
    self.assertGreater(float(jnp.abs(ask(state.params)).max()), 0.0)
    np.testing.assert_array_equal(ask(state.reference), ask(state.params))

  def test_adapters_keep_no_reference_of_their_own(self):
    config = tiny.get_config()
    config.align.lora.rank = 2
    experiment = experiment_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    optimizer, _ = update_lib.build_update(experiment)
    self.assertIsNone(update_lib.initial_state(experiment, {'kernel': jnp.ones((2, 2))}, optimizer).reference)


class IterationTest(parameterized.TestCase):
  """Whole iterations of the production class on a tiny model with every objective for images."""

  def make(self, **changes):
    config = tiny.get_config()
    config.model.depth = 1
    config.align.update(prompts=dict(edit=0), checks=dict(gradients_every=0))
    config.align.update(changes)
    experiment = experiment_lib.build(config, pathlib.Path(self.create_tempdir().full_path))
    params, _, judge = noise.parameters(experiment)
    aligner = learner.Learner(experiment, params, fit.fit_autoencoder(experiment), judge)
    data = align.prompt_batches(experiment)
    return aligner, align.draw(experiment, data, data)

  @parameterized.parameters('nft', 'sde')
  def test_adapters_are_all_that_is_held_of_a_policy(self, objective):
    aligner, tasks = self.make(lora=dict(rank=2), objective=objective)
    move = jax.jit(lambda tree: jax.tree.map(lambda x: x + 0.05, tree))
    aligner.state = aligner.state.replace(params=move(aligner.state.params))
    if aligner.state.old is not None:
      aligner.state = aligner.state.replace(old=move(aligner.state.params))
    shapes = {
      x.shape
      for path, x in jax.tree_util.tree_leaves_with_path(aligner.frozen['base'])
      if 'q_proj' in jax.tree_util.keystr(path)
    }

    def kernels():
      gc.collect()
      return sum(x.shape in shapes for x in jax.live_arrays())

    before, held = kernels(), []
    self.assertGreater(before, 0)
    for name in ('step', '_velocities', '_replay'):

      def watched(*args, run=getattr(aligner, name)):
        held.append(kernels())
        return run(*args)

      setattr(aligner, name, watched)
    metrics, _ = aligner.iterate(tasks, 1)
    self.assertEqual(set(held), {before})
    self.assertEqual(kernels(), before)
    for task in ('generate', 'understand'):  # They sample, and are replayed, merged.
      self.assertLess(float(metrics[f'gap/{task}']), 1e-6)
    self.assertIs(aligner.sampling[-1].base, aligner.frozen['base'])
    kernel = lambda tree: np.asarray(tree['trunk']['layers']['gen']['q_proj']['kernel'])
    self.assertGreater(np.abs(kernel(aligner.params) - kernel(aligner.reference)).max(), 0.01)

  def test_adapters_go_on_from_a_checkpoint_bit_for_bit(self):
    aligner, tasks = self.make(lora=dict(rank=2), understand=0)
    fresh, _ = self.make(lora=dict(rank=2), understand=0)
    aligner.iterate(tasks, 1)
    store = checkpoint.Checkpoints(pathlib.Path(self.create_tempdir().full_path))
    store.save(1, aligner.state, {'iteration': 1})
    aligner.iterate(tasks, 2)
    fresh.state, _ = store.restore(fresh.state)
    store.close()
    fresh.iterate(tasks, 2)
    jax.tree.map(np.testing.assert_array_equal, fresh.state, aligner.state)
    for name in ('a', 'b'):
      change = np.asarray(aligner.state.params['trunk']['layers']['gen']['q_proj']['kernel'][name])
      self.assertGreater(np.abs(change).max(), 0.0)

  def test_a_gap_shows_adapters_that_did_not_draw(self):
    aligner, tasks = self.make(lora=dict(rank=2), objective='sde')
    batch, _, _ = aligner.collect(tasks, 1)
    aligner.state = aligner.state.replace(
      params=jax.tree.map(lambda x: x + 0.05, aligner.state.params)
    )
    for task in ('generate', 'understand'):
      self.assertGreater(float(aligner.gaps(batch)[f'gap/{task}']), 1e-3)

  def test_the_gap_of_decoding_is_that_of_all_rounds(self):
    aligner, tasks = self.make(refill=1, generate=0)
    sample, rounds = aligner._sample, []

    def with_drift(*args):
      found, metrics = sample(*args)
      rounds.append(0.25 * len(rounds))
      return found, {**metrics, mismatch.DECODE: jnp.float32(rounds[-1])}

    aligner._sample = with_drift
    _, metrics, _ = aligner.collect(tasks, 1, lambda names: tasks)
    self.assertEqual(rounds, [0.0, 0.25])
    self.assertEqual(float(metrics[mismatch.DECODE]), 0.25)

  def test_images_are_drawn_and_replayed_by_the_old_policy(self):
    aligner, tasks = self.make(updates=2)
    batch, _, pictures = aligner.collect(tasks, 1)
    old = jax.tree.map(lambda x: 0.8 * x, aligner.state.params)
    aligner.state = aligner.state.replace(old=old)
    moved, _, other = aligner.collect(tasks, 1)
    self.assertGreater(np.abs(pictures['generate'].astype(int) - other['generate']).max(), 0)
    np.testing.assert_array_equal(batch['understand'].tokens_BGT, moved['understand'].tokens_BGT)
    for name, gap in aligner.gaps(moved).items():
      self.assertLess(float(jnp.max(gap)), 1e-6, name)
    # Replayed by the policy itself the gap would show that it did not draw them.
    stale = aligner.velocities(aligner.params, moved)['generate']
    steps = moved['generate'].transitions
    self.assertGreater(float(mismatch.image_mismatch('sde', stale, steps, 2).max()), 1e-3)

  # Losses of all of them are checked in losses_test; these are all ways through the iteration.
  @parameterized.parameters(('sde', 'dance'), ('cps', 'cps'), ('awm', 'sde'))
  def test_other_objectives_run(self, objective, sampler):
    aligner, tasks = self.make(
      objective=objective,
      sampler=sampler,
      image_kl=('gaussian' if objective in flow_objectives.COUPLED else 'velocity'),
      understand=0,
      image_target=1e-3,
    )
    self.assertEqual(aligner.state.old is None, objective in flow_objectives.COUPLED)
    before = jax.tree.map(np.asarray, aligner.state.params)
    metrics, _ = aligner.iterate(tasks, 1)
    self.assertLess(float(metrics['gap/generate']), 1e-6)
    self.assertEqual(float(metrics['skipped']), 0.0)
    change = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, aligner.state.params)
    self.assertGreater(max(jax.tree.leaves(change)), 0.0)
    # The penalty is far from its target, so its weight moves by a fifth of `adapt`.
    self.assertAlmostEqual(abs(metrics['factor/images_penalty'] - 1.0), 0.02)
    self.assertEqual(aligner.factors['images_penalty'], metrics['factor/images_penalty'])

  def test_noise_keeps_to_the_window(self):
    aligner, tasks = self.make(noise_outside=False, window=1, understand=0)
    collector = aligner.collector
    self.assertGreater(len(collector.noisy), 1)
    for iteration in (1, 2, 3):
      _, images, _ = collector.rollout(aligner.sampling, aligner.frozen['vae'], tasks, iteration)
      noisy = np.flatnonzero(np.asarray(images['generate'].std_T))
      np.testing.assert_array_equal(noisy, collector.replayed(iteration))

  def test_a_skipped_update_shows_among_several(self):
    aligner, tasks = self.make(updates=2, understand=0)
    run, calls = aligner.step, []

    def step(state, frozen, batch):
      calls.append(1)
      if len(calls) == 1:
        batch = {t: b.replace(advantage_BG=b.advantage_BG * jnp.nan) for t, b in batch.items()}
      return run(state, frozen, batch)

    aligner.step = step
    metrics, _ = aligner.iterate(tasks, 1)
    self.assertLen(calls, 2)
    self.assertEqual(float(metrics['skipped']), 0.5)

  def test_rewards_of_answers_leave_images_alone(self):
    # Siblings of another task in another order: nothing of the images may change, not even a bit.
    aligner, tasks = self.make(group=4)
    order = np.array([2, 0, 3, 1])
    sampled, _ = aligner._sample(tasks, 1, lambda: None)
    self.enter_context(mock.patch.object(aligner, '_sample', lambda *_: (sampled, {})))

    def image_gradient():
      batch = aligner.with_reference(aligner.collect(tasks, 1)[0])
      _, logp = aligner._replay(
        aligner.reference, aligner.frozen, {'understand': batch['understand']}
      )
      batch['understand'] = batch['understand'].replace(reference_BGT=logp['understand'])
      off = {**aligner.frozen, 'factors': {**aligner.factors, 'answers': 0.0}}
      loss = update_lib.alignment_loss(aligner.experiment)
      weights = loss.weights(batch)

      def objective(params):
        sums = loss.sums(params, aligner.state, off, batch)[0]
        return sum(loss.coefficients[k] * sums[k] / weights[k] for k in sums)

      return batch, jax.jit(jax.grad(objective))(aligner.state.params)

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
