"""Tests of whole-batch losses with the model: what tasks, siblings and invalid samples change."""

import functools
import pathlib
import tempfile

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np

from configs import tiny
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import losses
from tests.helpers import loss_cases

WEIGHTS = loss_cases.WEIGHTS
GENERATION = ('layers/gen/', 'norm_gen', 'llm2vae', 'vae2llm', 'time_embedder')
"""Parts of the names of parameters that belong to the generation expert."""

B, G, K = 2, 3, 2
"""Sizes of the batches of the model's tests: prompts, samples, draws."""


def permuted(b, order_BG, answers_too=True):
  """Siblings in another order; with `answers_too` False only their advantages move."""
  index = np.asarray(order_BG)

  def take(x, axis=1):
    """Takes siblings of an array whose axis of samples is 1 or 2."""
    x = np.asarray(x)
    shape = (len(index), *(1,) * (axis - 1), G, *(1,) * (x.ndim - axis - 1))
    return np.take_along_axis(x, index.reshape(shape), axis)

  b = b.replace(advantage_BG=take(b.advantage_BG), valid_BG=take(b.valid_BG))
  if isinstance(b, types.TextTrainBatch):
    if not answers_too:
      return b
    names = ('tokens_BGT', 'logp_BGT', 'mask_BGT')
    moved = {name: take(getattr(b.sampled, name)) for name in names}
    return b.replace(sampled=b.sampled.replace(**moved), reference_BGT=take(b.reference_BGT))
  return b.replace(
    sampled=b.sampled.replace(latents_BGNC=take(b.sampled.latents_BGNC)),
    query=b.query.replace(x_BKGNC=take(b.query.x_BKGNC, 2), time_BKG=take(b.query.time_BKG, 2)),
    old_BKGNC=take(b.old_BKGNC, 2),
    reference_BKGNC=take(b.reference_BKGNC, 2),
  )


class ModelTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    config = tiny.get_config()
    config.model.depth = 1
    cls.experiment = experiment_lib.build(config, pathlib.Path(folder.name))
    policy = cls.experiment.policy
    # The model's own start has a velocity head of zeros, which hides every gradient behind it.
    rng = np.random.default_rng(0)

    def draw(f):
      return jax.tree.map(
        lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32),
        jax.eval_shape(f, jax.random.key(0)),
      )

    cls.params = draw(policy.init)
    vae = draw(lambda key: policy.vae.init(key, jnp.zeros((1, 32, 32, 3)))['params'])
    prompts = {
      t: cls.experiment.encoder(
        t, [cls.experiment.data.example(t, 'align', i) for i in range(B)]
      ).prompts
      for t in WEIGHTS
    }
    N, C = policy.latent_shape
    cls.batch = {
      t: loss_cases.text_case(B, G, 5, policy.config.vocab, prompts[t])
      if t == 'understand'
      else loss_cases.image_case(B, G, K, N, C, prompts[t], seed)
      for seed, t in enumerate(WEIGHTS)
    }
    cls.batch = jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, cls.batch)

    def compiled(weights):
      loss = losses.alignment(policy, loss_cases.settings(weights))
      return jax.jit(jax.value_and_grad(functools.partial(loss_cases.total, loss, vae=vae)))

    cls.mixed = staticmethod(compiled(WEIGHTS))
    cls.alone = staticmethod(compiled(dict.fromkeys(WEIGHTS, 1.0)))
    cls.value, cls.grad = cls.mixed(cls.params, cls.batch)

  def test_parts_of_groups_add_up(self):
    mixed = {t: b.replace(valid_BG=np.asarray(b.valid_BG).copy()) for t, b in self.batch.items()}
    mixed['understand'].valid_BG[0, :] = False
    loss = losses.alignment(self.experiment.policy, loss_cases.settings())
    weights = loss.weights(mixed)

    def divided(b):
      return {t: np.asarray(b[t].valid_BG).sum() for t in b}

    parts = losses.split_group(mixed, G)

    def count(tree, n):
      return jax.tree.map(lambda x: x[n], tree)

    pieces = [count(parts, n) for n in range(G)]
    for task, b in mixed.items():
      self.assertEqual(pieces[0][task].valid_BG.shape, (B, 1))
      self.assertEqual(sum(divided(p)[task] for p in pieces), b.valid_BG.sum())
    for name, want in weights.items():
      got = sum(loss.weights(p)[name] for p in pieces)
      np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=name)
    # Every sample keeps its own points.
    b, piece = mixed['generate'], pieces[1]['generate']
    for name in ('x_BKGNC', 'time_BKG'):
      np.testing.assert_array_equal(
        getattr(piece.query, name), np.asarray(getattr(b.query, name))[:, :, 1:2]
      )
    for name in ('old_BKGNC', 'reference_BKGNC'):
      np.testing.assert_array_equal(getattr(piece, name), np.asarray(getattr(b, name))[:, :, 1:2])
    np.testing.assert_array_equal(
      piece.sampled.latents_BGNC, np.asarray(b.sampled.latents_BGNC)[:, 1:2]
    )
    np.testing.assert_array_equal(piece.advantage_BG, np.asarray(b.advantage_BG)[:, 1:2])
    np.testing.assert_array_equal(piece.query.prompts.index_B, b.query.prompts.index_B)
    with self.assertRaisesRegex(
      ValueError, f'groups of {G} samples do not divide into parallel.group_parts = {G + 1}'
    ):
      losses.split_group(mixed, G + 1)

  def named(self, tree):
    return {
      '/'.join(k.key for k in path): np.asarray(x)
      for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }

  def split(self, grad):
    """Gradients of the generation expert, and of all else."""
    named = self.named(grad)
    mine = {k: v for k, v in named.items() if any(part in k for part in GENERATION)}
    return mine, {k: v for k, v in named.items() if k not in mine}

  def assert_close(self, tree, other, bound):
    """Every leaf within `bound` of the largest gradient."""
    largest = max(np.abs(x).max() for x in self.named(other).values())
    for (name, x), y in zip(self.named(tree).items(), self.named(other).values()):
      self.assertLess(np.abs(x - y).max(), bound * largest, name)

  def test_mixed_gradient_is_the_weighted_sum_of_single_tasks(self):
    value, grad = 0.0, jax.tree.map(np.zeros_like, self.params)
    for task, weight in WEIGHTS.items():
      # Both image tasks have one shape, so that one compiled function serves them.
      key = task if task == 'understand' else 'generate'
      one, slope = self.alone(self.params, {key: self.batch[task]})
      self.assertGreater(float(ops.global_norm(slope)), 1e-3, task)
      value += weight * one
      grad = jax.tree.map(lambda x, y, w=weight: x + w * y, grad, slope)
    self.assertAlmostEqual(float(value), float(self.value), delta=1e-6 * abs(float(self.value)))
    self.assert_close(self.grad, grad, 1e-6)

  def test_text_siblings_do_not_touch_the_generation_expert(self):
    mine, rest = self.split(self.grad)
    self.assertTrue(all(np.abs(x).max() > 0 for x in mine.values()))
    order = np.array([[2, 0, 1], [1, 2, 0]])
    for consistent in (True, False):
      batch = dict(self.batch)
      batch['understand'] = permuted(batch['understand'], order, consistent)
      moved, others = self.split(self.mixed(self.params, batch)[1])
      for name, x in mine.items():
        np.testing.assert_array_equal(moved[name], x, name)
      largest = max(np.abs(x).max() for x in rest.values())
      change = max(np.abs(others[name] - x).max() for name, x in rest.items()) / largest
      if consistent:
        self.assertLess(change, 1e-6)
      else:
        self.assertGreater(change, 1e-3)

  def test_order_of_siblings_does_not_matter(self):
    order = np.array([[2, 0, 1], [0, 2, 1]])
    batch = {task: permuted(b, order) for task, b in self.batch.items()}
    value, grad = self.mixed(self.params, batch)
    self.assertAlmostEqual(float(value), float(self.value), delta=1e-6 * abs(float(self.value)))
    self.assert_close(grad, self.grad, 1e-6)

  def test_an_invalid_sample_contributes_nothing(self):
    batch = dict(self.batch)
    b = batch['understand']
    ((i, g),) = np.argwhere(~b.valid_BG)

    def change(x, value):
      return np.concatenate(
        [
          x[:i],
          np.concatenate(
            [x[i : i + 1, :g], np.full_like(x[i : i + 1, g : g + 1], value), x[i : i + 1, g + 1 :]],
            1,
          ),
          x[i + 1 :],
        ]
      )

    texts = b.sampled
    batch['understand'] = b.replace(
      sampled=texts.replace(
        tokens_BGT=change(texts.tokens_BGT, 3),
        logp_BGT=change(texts.logp_BGT, -7.0),
        mask_BGT=change(texts.mask_BGT, True),
      ),
      advantage_BG=change(b.advantage_BG, 5.0),
    )
    for task in ('generate', 'edit'):
      b = batch[task]
      ((i, g),) = np.argwhere(~b.valid_BG)
      x, advantage = b.query.x_BKGNC.copy(), b.advantage_BG.copy()
      latents = b.sampled.latents_BGNC.copy()
      x[i, :, g], latents[i, g], advantage[i, g] = 0.5, -2.0, 5.0
      batch[task] = b.replace(
        sampled=b.sampled.replace(latents_BGNC=latents),
        query=b.query.replace(x_BKGNC=x),
        advantage_BG=advantage,
      )
    value, grad = self.mixed(self.params, batch)
    self.assertEqual(float(value), float(self.value))
    jax.tree.map(np.testing.assert_array_equal, grad, self.grad)

  def test_a_valid_sample_contributes(self):
    batch = dict(self.batch)
    advantage = batch['generate'].advantage_BG.copy()
    advantage[0, 0] += 1.0
    batch['generate'] = batch['generate'].replace(advantage_BG=advantage)
    self.assertNotEqual(float(self.mixed(self.params, batch)[0]), float(self.value))


if __name__ == '__main__':
  absltest.main()
