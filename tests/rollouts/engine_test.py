"""Tests of lvrpo_jax.rollouts.engine: which steps are noisy and kept, and what samples depend on."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from configs import tiny
from lvrpo_jax import flow
from lvrpo_jax.data import tasks
from lvrpo_jax.rollouts import engine as engine_lib
from lvrpo_jax.rollouts import schedule
from lvrpo_jax.runtime import experiment as experiment_lib
from tests.helpers import noise

STEPS = 8
TASKS = (tasks.GENERATE, tasks.UNDERSTAND, tasks.EDIT)


def build(objective='flow_grpo', **rollout):
  """The tiny experiment with changes to the rollout."""
  config = tiny.get_config()
  config.model.depth = 1
  config.align.update(image=dict(objective=objective), rollout=rollout)
  return experiment_lib.build(config, pathlib.Path('unused'))


def engine(objective='flow_grpo', **rollout):
  return engine_lib.RolloutEngine(build(objective, steps=STEPS, **rollout), apart=False)


class StepsTest(parameterized.TestCase):
  def test_windows_lie_on_noisy_steps(self):
    found = engine(window=2, noise_low=0.5)
    grid = np.asarray(flow.time_grid(STEPS + 1, 2.2))
    np.testing.assert_allclose(found.grid, grid, rtol=1e-6)
    np.testing.assert_array_equal(found.noisy, np.flatnonzero(grid[:-1] > 0.5))
    for iteration in range(1, 20):
      first = schedule.window_start('random', 0, iteration, len(found.noisy), 2, 25)
      np.testing.assert_array_equal(
        found.replayed_steps(iteration), found.noisy[[first, first + 1]]
      )

  def test_a_window_of_zero_is_all_noisy_steps(self):
    found = engine(window=0)
    self.assertEqual(found.window, len(found.noisy))
    for iteration in (1, 2):
      np.testing.assert_array_equal(found.replayed_steps(iteration), found.noisy)

  def test_decoupled_objectives_keep_the_step_that_ends_in_the_image(self):
    coupled, decoupled = engine(window=2), engine('diffusion_nft', window=2)
    for iteration in range(1, 5):
      steps = coupled.replayed_steps(iteration)
      np.testing.assert_array_equal(coupled.kept_steps(iteration), steps)
      np.testing.assert_array_equal(decoupled.kept_steps(iteration), [steps[0], STEPS - 1])

  def test_noise_outside_the_window(self):
    everywhere, inside = (engine(window=2, noise_outside_window=value) for value in (True, False))
    for iteration in range(1, 5):
      np.testing.assert_array_equal(everywhere.noise_levels(iteration), everywhere.levels_T)
      levels_T = np.asarray(inside.noise_levels(iteration))
      np.testing.assert_array_equal(np.flatnonzero(levels_T), inside.replayed_steps(iteration))
      np.testing.assert_allclose(levels_T[inside.replayed_steps(iteration)], 0.7, rtol=1e-6)

  @parameterized.parameters(dict(window=5), dict(window=0, noise_low=0.99, noise_high=0.995))
  def test_too_few_noisy_steps(self, **changes):
    with self.assertRaisesRegex(
      ValueError, f'align.rollout.window is {changes["window"]}, but only . of .*= 4 steps'
    ):
      engine_lib.RolloutEngine(build(steps=4, **changes), apart=False)


class PoliciesTest(parameterized.TestCase):
  @parameterized.parameters(
    (['understand'], ('texts',)),
    (['generate', 'edit'], ('images',)),
    (['edit', 'understand'], ('texts', 'images')),
    (['think_generate'], ('texts', 'images')),
  )
  def test_only_those_that_are_read(self, names, expected):
    self.assertEqual(engine_lib.needed_policies(('texts', 'images'), names), expected)
    self.assertEqual(engine_lib.needed_policies(('both',), names), ('both',))


class SamplesTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.experiment = build(steps=2, window=1)
    params, cls.vae, _ = noise.parameters(cls.experiment)
    cls.policies = (params,)
    cls.engines = {
      apart: engine_lib.RolloutEngine(cls.experiment, apart) for apart in (False, True)
    }

  def rollout(self, indices, iteration=1, apart=False):
    """Samples for prompts by index."""
    examples = {
      task: [self.experiment.data.example(task, 'align', index) for index in indices]
      for task in TASKS
    }
    prompts = {task: self.experiment.encoder(task, rows).prompts for task, rows in examples.items()}
    return self.engines[apart].rollout(
      self.policies, self.vae, engine_lib.PromptBatch(examples, prompts), iteration
    )

  def test_samples_depend_on_seed_iteration_and_prompt_alone(self):
    whole = self.rollout([3, 5])
    self.assertEqual(set(whole.texts), {tasks.UNDERSTAND})
    self.assertEqual(set(whole.images), {tasks.GENERATE, tasks.EDIT})
    for other in (self.rollout([5, 3]), self.rollout([5, 3], apart=True)):
      for task in TASKS:
        if task in whole.texts:
          found, want = other.texts[task], whole.texts[task]
          np.testing.assert_array_equal(found.tokens_BGT, np.asarray(want.tokens_BGT)[::-1])
          np.testing.assert_allclose(found.logp_BGT, np.asarray(want.logp_BGT)[::-1], atol=1e-5)
        else:
          found, want = other.images[task], whole.images[task]
          np.testing.assert_array_equal(found.noise_TBGNC, want.noise_TBGNC[:, ::-1])
          np.testing.assert_allclose(found.latents_BGNC, want.latents_BGNC[::-1], atol=1e-5)
          away = np.abs(np.int32(other.pixels[task]) - np.int32(whole.pixels[task])[::-1])
          self.assertLessEqual(away.max(), 1)
    later = self.rollout([3, 5], iteration=2)
    for task in whole.images:
      self.assertFalse(np.array_equal(later.images[task].x_TBGNC[0], whole.images[task].x_TBGNC[0]))

  def test_trajectories_have_the_configured_noise(self):
    out, found = self.rollout([3, 5]), self.engines[False]
    for trajectory in out.images.values():
      np.testing.assert_array_equal(
        np.asarray(trajectory.std_T) > 0, np.asarray(found.levels_T) > 0
      )
      np.testing.assert_allclose(np.append(trajectory.time_T, 0.0), found.grid, rtol=1e-6)
      self.assertEqual(jax.device_get(trajectory.guidance), 1.0)


if __name__ == '__main__':
  absltest.main()
