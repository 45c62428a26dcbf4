"""Guided rollouts, and the gap between rollout and replay: that it is none, and what opens it."""

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
from lvrpo_jax.data import tasks
from lvrpo_jax.evaluation import evaluate
from lvrpo_jax.rollouts import guidance
from lvrpo_jax.rollouts import mismatch
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import align
from lvrpo_jax.training import learner
from tests.helpers import noise

TASKS = (tasks.GENERATE, tasks.EDIT, tasks.THINK_GENERATE)
LIMITS = base.get_config().align.gap_limit
NONE = 1e-6
"""The largest |log-ratio| that counts as none in float32."""


def build(**changes):
  """The tiny job with words for a plan, and sizes that few programs have."""
  config = tiny.get_config()
  config.model.depth = 1
  dtype = changes.pop('dtype', 'float32')
  config.model.dtype = dtype
  config.align.update(
    diagnose_every=0, objective='sde', steps_per_image=3, window=1, **dict.fromkeys(TASKS, 2)
  )
  config.align.update(changes)
  for rewards in config.align.rewards.values():
    rewards.update({name: float(name == 'rules') for name in rewards})
  return experiment_lib.build(config, pathlib.Path('unused'))


def collected(**changes):
  """An aligner, and what its first update would read."""
  experiment = build(**changes)
  aligner = learner.Learner(experiment, *noise.parameters(experiment))
  data = align.prompt_batches(experiment)
  return aligner, aligner.collect(align.draw(experiment, data, data), 1)[0]


class FollowTest(absltest.TestCase):
  def test_against_texts_that_were_never_encoded(self):
    experiment, rng = build(), np.random.default_rng(0)
    params, vae, _ = noise.parameters(experiment)
    policy = experiment.policy
    prompts, dropped, x, time = {}, {}, {}, {}
    for task in (tasks.GENERATE, tasks.EDIT):
      rows = [experiment.data.example(task, 'align', i) for i in range(2)]
      prompts[task] = experiment.encoder(task, rows).prompts
      dropped[task] = experiment.encoder(
        task, [dataclasses.replace(e, drop_text=True) for e in rows]
      ).prompts
      x[task] = jnp.asarray(rng.normal(size=(2, 3, *policy.latent_shape)), jnp.float32)
      time[task] = jnp.asarray(rng.uniform(0.2, 0.9, (2, 3)), jnp.float32)
    scale = jnp.array([[2.0, 2.0, 3.0], [4.0, 1.5, 4.0]])
    got, _ = jax.jit(
      lambda p: guidance.forward(
        policy, p, vae, prompts, x, time, {tasks.GENERATE: None, tasks.EDIT: scale}, {}
      )
    )(params)
    ask = jax.jit(lambda p, asked: policy.forward(p, vae, asked, x, time, {})[0])
    v, empty = ask(params, prompts), ask(params, dropped)
    np.testing.assert_allclose(got[tasks.GENERATE], v[tasks.GENERATE], atol=1e-6)
    s, v, empty = (np.asarray(a, np.float64) for a in (scale, v['edit'], empty['edit']))
    s = s[..., None, None]
    self.assertGreater(np.abs(v - empty).max(), 0.01)
    np.testing.assert_allclose(got['edit'], s * v - (s - 1) * empty, rtol=1e-4, atol=1e-5)
    self.assertEqual(got.keys(), {tasks.GENERATE, tasks.EDIT})


class GapTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.aligner, cls.batch = collected(guidance=4.0)

  def gaps(self, batch):
    return {name: float(jnp.max(x)) for name, x in self.aligner.gaps(batch).items()}

  def changed(self, task, **fields):
    return {**self.batch, task: self.batch[task].replace(**fields)}

  def test_there_is_none(self):
    found = self.gaps(self.batch)
    for task in (*TASKS, tasks.PLAN, tasks.UNDERSTAND):
      self.assertLess(found[f'gap/{task}'], NONE, task)
    mismatch.check(1, found, dict.fromkeys(LIMITS, NONE))

  @parameterized.parameters(*TASKS)
  def test_the_scale_travels_with_the_images(self, task):
    b = self.batch[task]
    np.testing.assert_array_equal(b.guidance_BM, np.full(b.time_BM.shape, 4.0))

  def test_latents_are_float32(self):
    # Rounded to bfloat16 the same latents give other densities.
    steps = self.batch['generate'].transitions
    self.assertEqual(steps.x_BMNC.dtype, jnp.float32)
    rounded = steps.replace(x_BMNC=steps.x_BMNC.astype(jnp.bfloat16).astype(jnp.float32))
    gap = self.gaps(self.changed('generate', transitions=rounded, x_BMNC=rounded.x_BMNC))
    self.assertGreater(gap['gap/generate'], LIMITS.images)

  @parameterized.parameters(
    ('generate', 'guidance_BM', lambda x: x - 0.5),
    ('edit', 'guidance_BM', lambda x: None),
    ('think_generate', 'guidance_BM', lambda x: None),
    ('generate', 'x_BMNC', lambda x: x + 0.1),
    ('generate', 'time_BM', lambda x: x - 0.1),
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
    batch = self.changed(task, **{field: change(getattr(self.batch[task], field))})
    kind = 'texts' if task in tasks.TEXT_OUTPUTS else 'images'
    with self.assertRaisesRegex(
      ValueError, f'iteration 3: gap/{task} is .*gap_limit.{kind} is 1e-05'
    ):
      mismatch.check(3, self.gaps(batch), LIMITS)


class LargeModelTest(absltest.TestCase):
  def test_its_limits_tell_another_temperature(self):
    aligner, batch = collected(objective='nft', dtype='bfloat16', think_generate=0, edit=0)
    limits = bagel_7b.get_config().align.gap_limit

    def found(b):
      return {
        name: float(jnp.max(x)) for name, x in aligner.gaps({**batch, 'understand': b}).items()
      }

    b = batch['understand']
    mismatch.check(1, found(b), limits)
    with self.assertRaisesRegex(ValueError, 'gap/understand/mean is .*limit.texts_mean is 0.02'):
      mismatch.check(1, found(b.replace(temperature_B=b.temperature_B / 2)), limits)


class FinalImagesTest(parameterized.TestCase):
  """What an objective on final images reads."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.aligner, cls.batch = collected(objective='nft', window=2, understand=0)

  def changed(self, task, change):
    b = self.batch[task]
    found = self.aligner.gaps({**self.batch, task: b.replace(latents_BGNC=change(b.latents_BGNC))})
    return {name: float(jnp.max(x)) for name, x in found.items()}

  @parameterized.parameters(*TASKS)
  def test_are_the_ones_that_were_drawn(self, task):
    mismatch.check(1, self.changed(task, lambda x: x), dict.fromkeys(LIMITS, NONE))

    def rounded(x):
      return x.astype(jnp.bfloat16).astype(jnp.float32)

    for change in (lambda x: x + 0.1, lambda x: x[::-1], lambda x: 1.1 * x, rounded):
      with self.assertRaisesRegex(ValueError, f'gap/{task} is .*gap_limit.images is 1e-05'):
        mismatch.check(1, self.changed(task, change), LIMITS)


class MeasurementTest(absltest.TestCase):
  def test_scores_of_another_policy_than_the_trained_one_are_announced(self):
    with self.assertLogs(level='WARNING') as logged:
      align.check(build(guidance=4.0))
    self.assertIn('align.rollout.guidance is 4 and config.evaluate.guidance is 1', logged.output[0])
    with self.assertNoLogs(level='WARNING'):
      align.check(build(guidance=4.0, objective='nft'))  # Trains the plain one.
      align.check(build())
    for settings in (dict(gap_limit=dict(images=3e-4)), dict(image_clip=2e-6)):
      with self.assertLogs(level='WARNING') as logged:
        align.check(build(**settings))
      self.assertIn('a fifth of the clip range', logged.output[0])

  def test_pictures_are_measured_as_configured(self):
    experiment = build()
    params, vae, _ = noise.parameters(experiment)
    prompts = experiment.place(
      experiment.encoder(
        'generate', [experiment.data.example('generate', 'align', i) for i in range(2)]
      ).prompts
    )
    plain = evaluate.samplers(experiment)
    config = tiny.get_config()
    config.evaluate.guidance = 2.0
    guided = evaluate.samplers(dataclasses.replace(experiment, config=config)).draw(
      params, vae, prompts
    )
    np.testing.assert_array_equal(guided, plain.draw(params, vae, prompts, 2.0))
    self.assertGreater(np.abs(np.int32(guided) - plain.draw(params, vae, prompts)).max(), 5)


class ObjectivesTest(absltest.TestCase):
  def test_the_guided_policy_is_trained_on_steps(self):
    aligner, batch = collected(guidance=3.0, think_generate=0, understand=0)
    batch = aligner.with_reference(batch)
    # The reference is the policy itself, as long as nothing has been learned.
    v = aligner.velocities(aligner.params, batch)
    for task in v:
      np.testing.assert_allclose(batch[task].reference_BMNC, v[task], atol=1e-6)
    _, metrics = aligner.step(aligner.state, aligner._frozen(), batch)
    self.assertLess(float(metrics['generate/velocity_mse']), 1e-9)
    self.assertEqual(float(metrics['generate/clip_fraction']), 0.0)

  def test_the_plain_policy_is_trained_on_final_images(self):
    aligner, batch = collected(guidance=3.0, objective='nft', think_generate=0, understand=0)
    self.assertLess(float(aligner.gaps(batch)['gap/generate']), NONE)
    read = aligner.with_reference(batch)
    self.assertIsNone(read['generate'].guidance_BM)
    plain = aligner.velocities(aligner.params, read)['generate']
    np.testing.assert_allclose(read['generate'].reference_BMNC, plain, atol=1e-6)
    guided = aligner.velocities(
      aligner.params,
      {'generate': read['generate'].replace(guidance_BM=batch['generate'].guidance_BM)},
    )['generate']
    self.assertGreater(float(jnp.abs(guided - plain).max()), 0.01)

  def test_sixteen_bits(self):
    aligner, batch = collected(dtype='bfloat16', think_generate=0)
    for task, gap in aligner.gaps(batch).items():
      self.assertLess(float(jnp.max(gap)), NONE, task)


if __name__ == '__main__':
  absltest.main()
