"""Tests of lvrpo_jax.models.bagel.policy, on contexts as the pipeline encodes them."""

import dataclasses
import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import types
from lvrpo_jax.data import encoding
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks
from lvrpo_jax.models import contexts
from lvrpo_jax.models import layers
from lvrpo_jax.runtime import experiment as experiment_lib
from tests.helpers import noise


@functools.cache
def experiment():
  return experiment_lib.build(tiny.get_config(), pathlib.Path('unused'))


@functools.cache
def parameters():
  """Parameters of the model and of the autoencoder, noise on every leaf."""
  return noise.parameters(experiment(), 0.2)[:2]


@functools.cache
def prompts(task, uniform, count=2, **changes):
  """Encoded alignment prompts; `changes` go to the examples."""
  template = experiment().encoder.template
  encoder = encoding.Encoder(
    experiment().data.tokenizer,
    encoding.Template(
      template.prompt_tokens,
      template.answer_tokens,
      template.vit_tokens,
      template.latent_tokens,
      uniform,
      template.image_size,
    ),
  )
  examples = [experiment().data.example(task, 'align', i) for i in range(count)]
  return encoder(
    task, [examples_lib.Example(**{**e.__dict__, **changes}) for e in examples]
  ).prompts


class PositionsTest(absltest.TestCase):
  def test_small_images_are_stretched_over_the_tables(self):
    policy = experiment().policy
    side = policy.config.latent_side
    np.testing.assert_array_equal(
      policy.latent_position(2), [[0, side // 2, side**2 // 2, side * (side + 1) // 2]] * 2
    )
    released = dataclasses.replace(
      policy, config=dataclasses.replace(policy.config, interpolate_pos=False)
    )
    np.testing.assert_array_equal(released.latent_position(1), [[0, 1, side, side + 1]])


@jax.jit
def prefill(params, vae_params, p):
  return experiment().policy.prefill(params, vae_params, p)


@jax.jit
def outputs(params, cache, ids, x, time):
  """Text logits and velocities after a context."""
  return (
    experiment().policy.text_logits(params, cache, ids),
    experiment().policy.velocity(params, cache, x, time),
  )


def inputs(rows=2):
  rng = np.random.default_rng(5)
  N, C = experiment().policy.latent_shape
  return (
    jnp.asarray(rng.integers(0, 100, (rows, 2, 4)), jnp.int32),
    jnp.asarray(rng.normal(size=(rows, 2, N, C)), jnp.float32),
    jnp.asarray(rng.uniform(size=(rows, 2)), jnp.float32),
  )


def answers(p, cache=None):
  params, vae_params = parameters()
  return outputs(params, prefill(params, vae_params, p) if cache is None else cache, *inputs())


def close(got, want):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, want)


class ContextTest(parameterized.TestCase):
  @parameterized.parameters(*tasks.TASKS)
  def test_uniform_rows_give_the_same_numbers(self, task):
    close(answers(prompts(task, True)), answers(prompts(task, False)))

  @parameterized.parameters('generate', 'edit')
  def test_without_text_equals_dropping_it(self, task):
    params, vae_params = parameters()
    p = prompts(task, True)
    hidden = contexts.without_text(prefill(params, vae_params, p), p)
    dropped = answers(prompts(task, True, drop_text=True))
    close(answers(None, hidden), dropped)
    with_text = answers(p)
    self.assertGreater(np.abs(with_text[1] - dropped[1]).max(), 1e-3)

  @parameterized.parameters('drop_vit', 'drop_latents')
  def test_dropped_images_are_gone(self, name):
    whole, part = answers(prompts('edit', True)), answers(prompts('edit', True, **{name: True}))
    self.assertGreater(np.abs(whole[1] - part[1]).max(), 1e-4)

  def test_source_image_reaches_the_answer(self):
    p = prompts('understand', True)
    other = p.replace(source_BYXC=255 - p.source_BYXC)
    self.assertGreater(np.abs(answers(p)[0] - answers(other)[0]).max(), 1e-4)
    # A caption shows no image: the padding's pixels are nobody's business.
    p = prompts('generate', True)
    other = p.replace(source_BYXC=p.source_BYXC + 200)
    close(answers(other), answers(p))


class SeveralTasksTest(absltest.TestCase):
  def test_one_pass_equals_separate_passes(self):
    policy = experiment().policy
    params, vae_params = parameters()
    p = {task: prompts(task, True) for task in tasks.TASKS}
    together = jax.jit(policy.prefill_all)(params, vae_params, p)
    alone = {task: prefill(params, vae_params, p[task]) for task in p}
    close(together, alone)
    _, x, time = inputs()
    xs = {'generate': x, 'edit': x + 1.0}
    times = {'generate': time, 'edit': 1.0 - time}
    caches = {task: alone[task] for task in xs}
    v = jax.jit(policy.velocity_all)(params, caches, xs, times)
    for task in xs:
      close(v[task], outputs(params, alone[task], inputs()[0], xs[task], times[task])[1])

  def test_joint_pass_gives_the_same_numbers_and_gradients(self):
    params, vae_params = parameters()
    ids, x, time = inputs()
    # Rows of unlike shapes, as a released model has them.
    p = {task: prompts(task, False) for task in tasks.TASKS}
    points = dict(generate=(x, time), edit=(x + 1.0, 1.0 - time), think_generate=(x - 1.0, time))
    # Two steps of one sample, or one step of two.
    queries = {
      task: types.FlowQuery(p[task], x_BMNC[:, :, None], time_BM[:, :, None])
      if task == 'generate'
      else types.FlowQuery(p[task], x_BMNC[:, None], time_BM[:, None])
      for task, (x_BMNC, time_BM) in points.items()
    }
    queries['understand'] = types.TextQuery(p['understand'], ids)

    def run(joint):
      policy = dataclasses.replace(experiment().policy, joint=joint)

      def total(params):
        out = policy.forward(params, vae_params, queries)
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(out)), out

      (_, out), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
      return out, grads

    (want, want_grads), (got, got_grads) = run(False), run(True)
    self.assertEqual(set(got), set(tasks.TASKS))
    close(got, want)
    for task, (x_BMNC, time_BM) in points.items():
      self.assertEqual(got[task].shape, queries[task].x_BKGNC.shape)
      alone = outputs(params, prefill(params, vae_params, p[task]), ids, x_BMNC, time_BM)[1]
      close(got[task].reshape(alone.shape), alone)
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(want_grads))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size, rtol=1e-4),
      got_grads,
      want_grads,
    )

  def test_group_by_shape(self):
    shapes = {'a': np.zeros((2, 3)), 'b': np.zeros((5, 4)), 'c': np.zeros((7, 3))}
    self.assertEqual(contexts.group_by_shape(shapes), [['a', 'c'], ['b']])
    self.assertEqual(contexts.group_by_shape({}), [])


class PixelsTest(absltest.TestCase):
  def test_the_vision_tower_sees_no_more_than_its_table_holds(self):
    policy = experiment().policy
    vit = dataclasses.replace(policy.config.vit, patch=14, side=70)

    def at(size):
      return dataclasses.replace(
        policy,
        image_size=size,
        config=dataclasses.replace(policy.config, interpolate_pos=False, vit=vit),
      ).vit_size

    self.assertEqual([at(size) for size in (8, 512, 980, 1024)], [14, 37 * 14, 980, 980])

  def test_to_unit(self):
    np.testing.assert_allclose(
      contexts.to_unit(np.array([0, 255, 51], np.uint8)), [-1.0, 1.0, -0.6], atol=1e-6
    )

  def test_decode_truncates_and_clips(self):
    policy, vae_params = experiment().policy, parameters()[1]
    N, C = policy.latent_shape
    latents = 3 * np.random.default_rng(0).normal(size=(2, 3, N, C)).astype(np.float32)
    got = policy.decode_image(vae_params, latents)
    side = policy.image_size
    self.assertEqual((got.shape, got.dtype), ((2, 3, side, side, 3), jnp.uint8))
    # The small autoencoder keeps one latent pixel a token, in row-major order.
    grid = latents.reshape(6, policy.latent_grid, policy.latent_grid, C)
    image = np.asarray(policy.vae.apply({'params': vae_params}, grid, method='decode'))
    want = np.floor(np.clip(image / 2 + 0.5, 0, 1).astype(np.float32) * 255)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1)
    self.assertGreater(np.mean(np.asarray(got).reshape(want.shape) == want), 0.999)

  def test_patches_are_row_major(self):
    policy = experiment().policy
    side, patch = policy.image_size, policy.config.vit.patch
    image = np.zeros((1, side, side, 3), np.uint8)
    image[0, :patch, patch : 2 * patch] = 255  # The second patch of the first row.
    patches, position = policy.patches(image)
    np.testing.assert_array_equal(
      np.asarray(patches).mean(-1)[0], [1.0 if n == 1 else -1.0 for n in range(policy.vit_tokens)]
    )
    grid, table = side // patch, policy.config.vit.side
    np.testing.assert_array_equal(position, layers.spread_positions(grid, grid, table))


if __name__ == '__main__':
  absltest.main()
