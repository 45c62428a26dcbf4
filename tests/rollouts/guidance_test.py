"""Guided rollouts, and the mismatch between rollout and replay: that it is none, and its causes."""

import dataclasses
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import bagel_7b
from configs import base
from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import samplers
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import learner as learner_lib
from lvrpo_jax.training import prompts as prompts_lib
from tests.helpers import noise

TASKS = (tasks.GENERATE, tasks.EDIT, tasks.THINK_GENERATE)
LIMITS = mismatch.limits(base.get_config().align.checks.mismatch, 'float32')
NONE = 1e-6
"""The largest |log-ratio| that counts as none in float32."""


def build(dtype='float32', **changes):
  """The tiny experiment with words for a plan, and sizes that few programs have.

  Args:
    changes: to `config.align`, by section.
  """
  config = tiny.get_config()
  config.model.depth = 1
  config.model.dtype = dtype
  config.align.update(
    checks=dict(gradients_every=0),
    image=dict(objective='flow_grpo'),
    rollout=dict(steps=3, window=1),
    prompts=dict.fromkeys(TASKS, 2),
  )
  config.align.update(changes)
  for rewards in config.align.rewards.values():
    for name, reward in rewards.items():
      reward.weight = float(name == 'rules')
  return experiment_lib.build(config, pathlib.Path('unused'))


def collect(**changes):
  """A learner, and the samples that its first update would read."""
  experiment = build(**changes)
  learner = learner_lib.Learner(experiment, *noise.parameters(experiment))
  data = prompts_lib.prompt_batches(experiment)
  return learner, learner.collect(prompts_lib.next_prompts(experiment, data, data), 1)[0]


def change_samples(credited, task, **fields):
  """Samples of all tasks, some fields of those of one task replaced."""
  found = credited[task]
  return {**credited, task: found.replace(sampled=found.sampled.replace(**fields))}


def largest(metrics):
  return {name: float(jnp.max(x)) for name, x in metrics.items()}


class ForwardTest(absltest.TestCase):
  def test_against_texts_that_were_never_encoded(self):
    experiment, rng = build(), np.random.default_rng(0)
    params, vae, _ = noise.parameters(experiment)
    policy = experiment.policy
    scale = jnp.array([[2.0, 2.0, 3.0], [4.0, 1.5, 4.0]])[:, None]
    queries, plain, dropped = {}, {}, {}
    for task in (tasks.GENERATE, tasks.EDIT):
      rows = [experiment.data.example(task, 'align', i) for i in range(2)]
      bare = [dataclasses.replace(example, drop_text=True) for example in rows]
      points = dict(
        x_BKGNC=jnp.asarray(rng.normal(size=(2, 1, 3, *policy.latent_shape)), jnp.float32),
        time_BKG=jnp.asarray(rng.uniform(0.2, 0.9, (2, 1, 3)), jnp.float32),
      )
      plain[task] = types.FlowQuery(prompts=experiment.encoder(task, rows).prompts, **points)
      dropped[task] = types.FlowQuery(prompts=experiment.encoder(task, bare).prompts, **points)
    queries = {
      tasks.GENERATE: plain[tasks.GENERATE],
      tasks.EDIT: types.GuidedFlowQuery(**vars(plain[tasks.EDIT]), scale_BKG=scale),
    }
    got = jax.jit(lambda p: guidance.forward(policy, p, vae, queries))(params)
    ask = jax.jit(lambda p, asked: policy.forward(p, vae, asked))
    v, empty = ask(params, plain), ask(params, dropped)
    np.testing.assert_allclose(got[tasks.GENERATE], v[tasks.GENERATE], atol=1e-6)
    s, v, empty = (np.asarray(x, np.float64) for x in (scale, v['edit'], empty['edit']))
    s = s[..., None, None]
    self.assertGreater(np.abs(v - empty).max(), 0.01)
    np.testing.assert_allclose(got['edit'], s * v - (s - 1) * empty, rtol=1e-4, atol=1e-5)
    self.assertEqual(got.keys(), {tasks.GENERATE, tasks.EDIT})


class MismatchTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.learner, cls.credited = collect(rollout=dict(guidance=4.0))

  def mismatch(self, credited):
    return largest(self.learner.mismatch(credited))

  def test_there_is_none(self):
    found = self.mismatch(self.credited)
    for task in (*TASKS, tasks.PLAN, tasks.UNDERSTAND):
      self.assertLess(found[f'mismatch/{task}'], NONE, task)
    mismatch.check(1, found, dict.fromkeys(LIMITS, NONE))

  @parameterized.parameters(*TASKS)
  def test_the_scale_travels_with_the_images(self, task):
    images = self.credited[task].sampled
    np.testing.assert_array_equal(images.scale_BKG, np.full(images.steps.time_BKG.shape, 4.0))

  def test_latents_are_float32(self):
    # Rounded to bfloat16 the same latents give other densities.
    steps = self.credited['generate'].sampled.steps
    self.assertEqual(steps.x_BKGNC.dtype, jnp.float32)
    rounded = steps.replace(x_BKGNC=steps.x_BKGNC.astype(jnp.bfloat16).astype(jnp.float32))
    found = self.mismatch(change_samples(self.credited, 'generate', steps=rounded))
    self.assertGreater(found['mismatch/generate'], LIMITS['image_max'])

  @parameterized.parameters(
    ('generate', 'scale_BKG', lambda x: x - 0.5),
    ('edit', 'scale_BKG', jnp.ones_like),
    ('think_generate', 'scale_BKG', jnp.ones_like),
    ('generate', 'steps', lambda x: x.replace(x_BKGNC=x.x_BKGNC + 0.1)),
    ('generate', 'steps', lambda x: x.replace(time_BKG=x.time_BKG - 0.1)),
    (
      'edit',
      'prompts',
      lambda x: x.replace(ids_BL=x.ids_BL[::-1], text=jax.tree.map(lambda a: a[::-1], x.text)),
    ),
    ('understand', 'temperature_B', lambda x: x + 0.5),
    ('plan', 'temperature_B', lambda x: x / 2),
    ('understand', 'tokens_BGT', lambda x: x[:, ::-1]),
    ('understand', 'mask_BGT', lambda x: ~x),
    ('understand', 'logp_BGT', lambda x: x - 0.1),
  )
  def test_what_does_not_fit_the_rollout_ends_the_run(self, task, field, change):
    fields = {field: change(getattr(self.credited[task].sampled, field))}
    kind = 'text_max' if task in tasks.TEXT_OUTPUTS else 'image_max'
    with self.assertRaisesRegex(
      ValueError, f'iteration 3: mismatch/{task} is .*checks.mismatch.{kind} is 1e-05'
    ):
      mismatch.check(3, self.mismatch(change_samples(self.credited, task, **fields)), LIMITS)


class LargeModelTest(absltest.TestCase):
  def test_its_limits_tell_another_temperature(self):
    learner, credited = collect(
      dtype='bfloat16',
      image=dict(objective='diffusion_nft'),
      prompts=dict(think_generate=0, edit=0),
    )
    large = bagel_7b.get_config()
    limits = mismatch.limits(large.align.checks.mismatch, large.model.dtype)
    mismatch.check(1, largest(learner.mismatch(credited)), limits)
    temperature_B = credited['understand'].sampled.temperature_B / 2
    other = change_samples(credited, 'understand', temperature_B=temperature_B)
    with self.assertRaisesRegex(
      ValueError, 'mismatch/understand/mean is .*mismatch.text_mean is 0.02'
    ):
      mismatch.check(1, largest(learner.mismatch(other)), limits)


class FinalImagesTest(parameterized.TestCase):
  """What an objective on final images reads."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.learner, cls.credited = collect(
      image=dict(objective='diffusion_nft'), rollout=dict(window=2), prompts=dict(understand=0)
    )

  def changed(self, task, change):
    latents_BGNC = change(self.credited[task].sampled.latents_BGNC)
    credited = change_samples(self.credited, task, latents_BGNC=latents_BGNC)
    return largest(self.learner.mismatch(credited))

  @parameterized.parameters(*TASKS)
  def test_are_the_ones_that_were_drawn(self, task):
    def rounded(x):
      return x.astype(jnp.bfloat16).astype(jnp.float32)

    mismatch.check(1, self.changed(task, lambda x: x), dict.fromkeys(LIMITS, NONE))
    for change in (lambda x: x + 0.1, lambda x: x[::-1], lambda x: 1.1 * x, rounded):
      with self.assertRaisesRegex(
        ValueError, f'mismatch/{task} is .*checks.mismatch.image_max is 1e-05'
      ):
        mismatch.check(1, self.changed(task, change), LIMITS)


class MeasurementTest(absltest.TestCase):
  def test_scores_of_another_policy_than_the_trained_one_are_announced(self):
    guided = dict(guidance=4.0)
    with self.assertLogs(level='WARNING') as logged:
      align.check(build(rollout=guided))
    self.assertIn('align.rollout.guidance is 4 and config.evaluate.guidance is 1', logged.output[0])
    with self.assertNoLogs(level='WARNING'):
      # Trains the plain policy.
      align.check(build(rollout=guided, image=dict(objective='diffusion_nft')))
      align.check(build())
    for settings in (
      dict(checks=dict(mismatch=dict(image_max=3e-4))),
      dict(image=dict(clip=2e-6)),
    ):
      with self.assertLogs(level='WARNING') as logged:
        align.check(build(**settings))
      self.assertIn('a fifth of the clip range', logged.output[0])

  def test_images_are_measured_as_configured(self):
    experiment = build()
    params, vae, _ = noise.parameters(experiment)
    rows = [experiment.data.example('generate', 'align', i) for i in range(2)]
    prompts = experiment.place(experiment.encoder('generate', rows).prompts)
    plain = samplers.build(experiment)
    config = tiny.get_config()
    config.evaluate.guidance = 2.0
    guided = samplers.build(dataclasses.replace(experiment, config=config)).draw(
      params, vae, prompts
    )
    np.testing.assert_array_equal(guided, plain.draw(params, vae, prompts, 2.0))
    self.assertGreater(np.abs(np.int32(guided) - plain.draw(params, vae, prompts)).max(), 5)


class ObjectivesTest(absltest.TestCase):
  def velocities(self, learner, queries):
    """Velocities of the present policy, as the update computes them."""
    return learner._velocities_at(learner.params, queries)

  def test_the_guided_policy_is_trained_on_steps(self):
    learner, credited = collect(
      rollout=dict(guidance=3.0), prompts=dict(think_generate=0, understand=0)
    )
    batch = learner.image_batches(credited)
    # The reference is the policy itself, as long as nothing has been learned.
    for task, v in self.velocities(learner, {t: b.query for t, b in batch.items()}).items():
      self.assertIsInstance(batch[task].query, types.GuidedFlowQuery)
      np.testing.assert_allclose(batch[task].reference_BKGNC, v, atol=1e-6)
    _, metrics = learner.step(learner.state, learner._step_frozen(), batch)
    self.assertLess(float(metrics['generate/velocity_mse']), 1e-9)
    self.assertEqual(float(metrics['generate/clip_fraction']), 0.0)

  def test_the_plain_policy_is_trained_on_final_images(self):
    learner, credited = collect(
      rollout=dict(guidance=3.0),
      image=dict(objective='diffusion_nft'),
      prompts=dict(think_generate=0, understand=0),
    )
    self.assertLess(float(learner.mismatch(credited)['mismatch/generate']), NONE)
    batch = learner.image_batches(credited)['generate']
    self.assertNotIsInstance(batch.query, types.GuidedFlowQuery)
    plain = self.velocities(learner, {'generate': batch.query})['generate']
    np.testing.assert_allclose(batch.reference_BKGNC, plain, atol=1e-6)
    scale_BKG = credited['generate'].sampled.scale_BKG
    np.testing.assert_array_equal(scale_BKG, np.full(batch.query.time_BKG.shape, 3.0))
    query = types.GuidedFlowQuery(**vars(batch.query), scale_BKG=scale_BKG)
    guided = self.velocities(learner, {'generate': query})['generate']
    self.assertGreater(float(jnp.abs(guided - plain).max()), 0.01)

  def test_sixteen_bits(self):
    learner, credited = collect(dtype='bfloat16', prompts=dict(think_generate=0))
    for name, found in largest(learner.mismatch(credited)).items():
      self.assertLess(found, NONE, name)


if __name__ == '__main__':
  absltest.main()
