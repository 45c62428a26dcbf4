"""Tests of whole-batch losses: against loops with a linear policy, and invariances with the model."""

import dataclasses
import functools
import pathlib
import tempfile
from types import SimpleNamespace

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from configs import tiny
from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.rollouts import replay
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import losses

NUMBERS = losses.Alignment(
  weights={'generate': 1.0, 'understand': 0.5, 'edit': 2.0},
  objective='nft',
  sampler='sde',
  nft_beta=0.7,
  nft_scale=2.0,
  image_clip=1e-3,
  velocity_penalty=0.3,
  text_low=0.2,
  text_high=0.28,
  text_objective='dapo',
  text_penalty=0.4,
)
GENERATION = ('layers/gen/', 'norm_gen', 'llm2vae', 'vae2llm', 'time_embedder')
"""Parts of the names of parameters that belong to the generation expert."""
POINTS = jax.jit(functools.partial(replay.noise_points, shift=2.2))


def total(loss, params, batch, vae=None):
  """The scalar that the update descends."""
  weights = loss.weights(batch)
  sums, _ = loss.sums(params, None, {'vae': vae}, batch)
  return sum(loss.coefficients[k] * ops.divide(v, weights[k]) for k, v in sums.items())


def fake_policy():
  """A linear velocity and a table of next-token logits in the place of the model."""
  return SimpleNamespace(
    bos=0,
    latent_shape=(3, 2),
    encode=lambda _, image_BYXC: image_BYXC,
    follow=lambda params, vae, prompts, x, time, ids: (
      {t: params['scale'] * x[t] + params['offset'] * time[t][..., None, None] for t in x},
      {t: params['table'][rows] for t, rows in ids.items()},
    ),
  )


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def fake_params():
  return {'scale': np.float64(0.8), 'offset': np.array([0.1, -0.2]), 'table': random(5, 5)}


def text_case(B, G, T, V, prompts, seed=0):
  """Answers of different lengths, one of them invalid."""
  rng = np.random.default_rng(seed)
  mask = np.arange(T) < rng.integers(1, T + 1, (B, G, 1))
  valid = np.ones((B, G), bool)
  valid[0, 1] = False
  return types.TextTrainBatch(
    prompts=prompts,
    tokens_BGT=rng.integers(0, V, (B, G, T)).astype(np.int32),
    logp_BGT=-rng.uniform(0.5, 3, (B, G, T)),
    mask_BGT=mask,
    temperature_B=np.linspace(0.7, 1.3, B),
    reference_BGT=-rng.uniform(0.5, 3, (B, G, T)),
    advantage_BG=rng.normal(size=(B, G)),
    valid_BG=valid,
  )


def image_case(B, G, K, N, C, prompts, seed=0, objective='nft'):
  """Points of `K` draws (or steps) of every sample; row m = k * G + g."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape)
  M = K * G
  x, time = draw(B, M, N, C), rng.uniform(0.3, 0.9, (B, M))
  steps = None
  if objective in flow_objectives.COUPLED:
    steps = types.Transitions(
      x_BMNC=x,
      next_BMNC=x,
      time_BM=time,
      next_time_BM=time - 0.2,
      first_time_BM=np.full((B, M), 0.95),
      eta_BM=np.full((B, M), 0.7),
      noise_BMNC=draw(B, M, N, C),
      mean_BMNC=x + 0.1 * draw(B, M, N, C),
      std_BM=rng.uniform(0.1, 0.4, (B, M)),
    )
  valid = np.ones((B, G), bool)
  valid[1, 0] = False
  return types.ImageTrainBatch(
    prompts=prompts,
    latents_BGNC=draw(B, G, N, C),
    transitions=steps,
    x_BMNC=x,
    time_BM=time,
    old_BMNC=draw(B, M, N, C),
    reference_BMNC=draw(B, M, N, C),
    advantage_BG=draw(B, G),
    valid_BG=valid,
  )


def text_oracle(a, table, b, cut):
  """(loss, k3) of a batch of answers by loops in float64.

  `cut` holds CISPO's weights of the first call: they carry no gradient.
  """
  loss = kl = weight = 0.0
  T = b.mask_BGT.shape[-1]
  for i, g in np.ndindex(*b.valid_BG.shape):
    length, A = b.mask_BGT[i, g].sum(), b.advantage_BG[i, g]
    ids = [0, *b.tokens_BGT[i, g]]
    if not b.valid_BG[i, g]:
      continue
    logps = np.array(
      [special.log_softmax(table[ids[t]] / b.temperature_B[i])[ids[t + 1]] for t in range(length)]
    )
    ratios = np.exp(logps - b.logp_BGT[i, g, :length])
    if a.text_objective == 'gspo':
      ratios = np.full(length, np.exp(np.mean(logps - b.logp_BGT[i, g, :length])))
    if a.text_objective == 'dr_grpo':
      weight += 1.0
    for t, (logp, ratio) in enumerate(zip(logps, ratios)):
      w = {'dapo': 1.0, 'cispo': 1.0, 'dr_grpo': 1 / T}.get(a.text_objective, 1 / length)
      if a.text_objective == 'cispo':
        loss -= w * cut.setdefault((i, g, t), min(ratio, 1 + a.text_high)) * A * logp
      else:
        loss += w * max(-A * ratio, -A * np.clip(ratio, 1 - a.text_low, 1 + a.text_high))
      d = b.reference_BGT[i, g, t] - logp
      kl += w * {'k1': -d, 'k3': np.exp(d) - d - 1}[a.text_kl]
      weight += 0.0 if a.text_objective == 'dr_grpo' else w
  return loss / weight, kl / weight


def image_oracle(a, scale, offset, b, frozen):
  """(loss, velocity MSE) of a batch of images by loops; `frozen` holds NFT's weights."""
  group, found = b.valid_BG.shape[1], []
  for i, m in np.ndindex(*b.time_BM.shape):
    g = m % group
    if not b.valid_BG[i, g]:
      continue
    x, t, A = b.x_BMNC[i, m], b.time_BM[i, m], b.advantage_BG[i, g]
    v = scale * x + offset * t
    drift = ((v - b.reference_BMNC[i, m]) ** 2).mean()
    if a.objective == 'nft':
      old, r = b.old_BMNC[i, m], np.clip(0.5 + A / (2 * a.nft_scale), 0, 1)
      parts = [
        (r, a.nft_beta * v + (1 - a.nft_beta) * old),
        (1 - r, (1 + a.nft_beta) * old - a.nft_beta * v),
      ]
      loss = 0.0
      for sign, (p, mixed) in enumerate(parts):
        off = x - t * mixed - b.latents_BGNC[i, g]
        w = frozen.setdefault((i, m, sign), np.abs(off).mean())
        loss += p * (off**2).mean() / w / a.nft_beta
    elif a.objective == 'awm':
      target = (x - b.latents_BGNC[i, g]) / t  # Noise less image.
      ratio = np.exp(((b.old_BMNC[i, m] - target) ** 2).mean() - ((v - target) ** 2).mean())
      loss = max(-A * ratio, -A * np.clip(ratio, 1 - a.image_clip, 1 + a.image_clip))
    else:
      s = b.transitions
      eta, t_next = s.eta_BM[i, m], s.next_time_BM[i, m]
      dt = t_next - t
      half = eta**2 * t / (1 - t) / (2 * t)
      if a.sampler == 'sde':
        mean = x * (1 + half * dt) + v * (1 + half * (1 - t)) * dt
      elif a.sampler == 'cps':
        clean, pure, kept = x - t * v, x + (1 - t) * v, t_next * np.cos(eta * np.pi / 2)
        mean = (1 - t_next) * clean + kept * pure
      else:
        score = -(x - (1 - t) * (x - t * v)) / t**2
        mean = x + v * dt - eta**2 / 2 * score * dt
      # Log-probabilities of the sampled latents under both policies.
      d, std = mean - s.mean_BMNC[i, m], s.std_BM[i, m]
      sampled = s.mean_BMNC[i, m] + std * s.noise_BMNC[i, m]
      square = lambda m: ((sampled - m) ** 2).mean()
      moved = square(s.mean_BMNC[i, m]) - square(mean)
      log_ratio = {'sde': moved / (2 * std**2), 'cps': moved}.get(
        a.objective, std * (moved / (2 * std**2) + (d**2).mean() / (2 * std**2))
      )
      ratio = np.exp(log_ratio)
      loss = max(-A * ratio, -A * np.clip(ratio, 1 - a.image_clip, 1 + a.image_clip))
      if a.objective == 'guard':
        loss /= abs(dt)
      if a.image_kl == 'gaussian':
        apart = (v - b.reference_BMNC[i, m]) * (1 + half * (1 - t)) * dt
        drift = (apart**2).mean() / (2 * std**2)
    found.append((loss, drift))
  return np.mean(found, axis=0)


class LinearPolicyTest(parameterized.TestCase):
  @parameterized.parameters(
    ('nft', 'dapo'),
    ('sde', 'grpo'),
    ('nft', 'dr_grpo'),
    ('nft', 'gspo'),
    ('nft', 'cispo'),
    ('sde', 'dapo', 'k1', 'gaussian'),
    ('awm', 'dapo'),
    ('guard', 'dapo'),
    ('guard_plain', 'dapo'),
    ('cps', 'dapo', 'k3', 'velocity', 'cps'),
    ('sde', 'dapo', 'k3', 'velocity', 'dance'),
    ('guard', 'dapo', 'k3', 'velocity', 'cps'),
  )
  def test_value_and_gradient_against_loops(
    self, objective, text_objective, text_kl='k3', image_kl='velocity', sampler='sde'
  ):
    a = dataclasses.replace(
      NUMBERS,
      objective=objective,
      text_objective=text_objective,
      text_kl=text_kl,
      image_kl=image_kl,
      sampler=sampler,
      image_clip=0.5,
    )
    batch = {
      'generate': image_case(2, 3, 2, 3, 2, (), 1, objective),
      'understand': text_case(2, 3, 4, 5, ()),
      'edit': image_case(3, 2, 1, 3, 2, (), 2, objective),
    }
    self.check(a, batch, a.weights)

  def check(self, a, batch, weights):
    """Value and gradient of a batch, whose tasks weigh so much, against loops."""
    params = fake_params()
    frozen = {task: {} for task in batch}

    def oracle(p):
      out = 0.0
      for task, weight in weights.items():
        if task in tasks.TEXT_OUTPUTS:
          loss, penalty = text_oracle(a, p['table'], batch[task], frozen[task])
          out += weight * (loss + a.text_penalty * penalty)
        else:
          loss, penalty = image_oracle(a, p['scale'], p['offset'], batch[task], frozen[task])
          out += weight * (loss + a.velocity_penalty * penalty)
      return out

    expected = oracle(params)
    slopes = {}
    for name, x in params.items():
      slopes[name] = np.zeros_like(x)
      for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        slopes[name][index] = (
          oracle(params | {name: x + step}) - oracle(params | {name: x - step})
        ) / 2e-6
    with jax.enable_x64(True):
      loss = losses.alignment(fake_policy(), a)
      value, grad = jax.jit(jax.value_and_grad(functools.partial(total, loss)))(
        jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, batch)
      )
    # Token probabilities are float32 by design (text_objectives_test has these gradients in
    # float64); everything of images is float64 here.
    self.assertAlmostEqual(float(value), expected, delta=1e-6 * abs(expected))
    np.testing.assert_allclose(grad['table'], slopes['table'], rtol=2e-5, atol=2e-6)
    for name in ('scale', 'offset'):
      np.testing.assert_allclose(grad[name], slopes[name], rtol=1e-6, atol=1e-9)

  @parameterized.parameters('nft', 'sde')
  def test_both_halves_of_a_thought_weigh_the_same(self, objective):
    weight = 1.7
    a = dataclasses.replace(
      NUMBERS,
      objective=objective,
      image_clip=0.5,
      weights={'think_generate': weight, 'understand': 0.5},
    )
    # Images after plans are rows with a context, and a group, of their own.
    batch = {
      'plan': text_case(2, 3, 4, 5, (), 1),
      'understand': text_case(2, 3, 4, 5, ()),
      'think_generate': image_case(6, 1, 2, 3, 2, (), 2, objective),
    }
    self.check(a, batch, {'plan': weight, 'think_generate': weight, 'understand': 0.5})

  def test_metrics(self):
    batch = {'understand': text_case(2, 3, 4, 5, ())}
    loss = losses.alignment(fake_policy(), NUMBERS)
    _, metrics = jax.jit(lambda params, batch: loss.sums(params, None, {'vae': None}, batch))(
      jax.tree.map(np.float32, fake_params()), batch
    )
    b = batch['understand']
    weight = float((b.mask_BGT & b.valid_BG[..., None]).sum())
    self.assertSetEqual(
      set(metrics), {f'understand/{k}' for k in ('kl_k3', 'entropy', 'clip_fraction')}
    )
    for value, count in metrics.values():
      self.assertEqual(float(count), weight)
      self.assertGreater(float(value), 0.0)

  def test_factors(self):
    batch = {'generate': image_case(2, 3, 2, 3, 2, (), 1), 'understand': text_case(2, 3, 4, 5, ())}
    loss, params = losses.alignment(fake_policy(), NUMBERS), fake_params()
    terms = lambda frozen: loss.sums(params, None, {'vae': None, **frozen}, batch)[0]
    plain = terms({})
    scaled = terms({'factors': dict(zip(losses.FACTORS, (2.0, 4.0, 3.0, 0.5), strict=True))})
    for name, factor in (
      ('generate', 4.0),
      ('generate_penalty', 2.0),
      ('understand', 2.0),
      ('understand_penalty', 6.0),
    ):
      np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-5)

  def test_penalty_of_steps_wants_steps(self):
    with self.assertRaisesRegex(ValueError, "align.image.kl is 'gaussian', .* 'velocity'"):
      losses.alignment(fake_policy(), dataclasses.replace(NUMBERS, image_kl='gaussian'))

  def test_unknown_objective(self):
    with self.assertRaisesRegex(ValueError, "'ppo'"):
      losses.alignment(fake_policy(), dataclasses.replace(NUMBERS, objective='ppo'))

  def test_log_probabilities_of_answers(self):
    b = text_case(2, 3, 4, 5, ())
    params = jax.tree.map(np.float32, fake_params())
    score = jax.jit(functools.partial(replay.replay, fake_policy()))
    velocities, logp = score(params, {'vae': None}, {'understand': b})
    self.assertEqual(velocities, {})
    logp = np.asarray(logp['understand'])
    np.testing.assert_array_equal(logp[~b.mask_BGT], 0.0)
    first = special.log_softmax(fake_params()['table'][0] / b.temperature_B[1])
    self.assertAlmostEqual(logp[1, 2, 0], first[b.tokens_BGT[1, 2, 0]], places=5)

  def test_noised_points_lie_on_their_paths(self):
    key_BM = ops.fold_rows(jax.random.key(0), (2, 3))
    x0 = np.float32(random(2, 1, 4, 2))
    points = POINTS(key_BM, x0)
    self.assertEqual((points.x_t.shape, points.t.shape), ((2, 3, 4, 2), (2, 3)))
    np.testing.assert_allclose(
      points.x_t, x0 + points.t[..., None, None] * points.target, rtol=1e-5, atol=1e-5
    )
    row = POINTS(key_BM[1:, 1:2], x0[1:])
    jax.tree.map(np.testing.assert_array_equal, row, jax.tree.map(lambda x: x[1:, 1:2], points))

  def test_pretraining_against_loops(self):
    rng = np.random.default_rng(0)
    answer = np.array([[0, 2, 3, 1], [0, 4, 1, 1]])
    mask = np.array([[True, True, True], [True, True, False]])
    images = rng.normal(size=(2, 3, 2)).astype(np.float32)

    def rows(index, target, *answers):
      prompts = types.Prompts(*[None] * 6, index_B=np.array(index))
      return types.SupervisedBatch(prompts, target, *(answers or (None, None)))

    batch = {'generate': rows((7, 9), images), 'understand': rows((1, 2), None, answer, mask)}
    loss = losses.pretraining(fake_policy(), {'generate': 1.0, 'understand': 0.5}, 2, 2.2, seed=3)
    params = jax.tree.map(np.float32, fake_params())
    sums = jax.jit(
      lambda params, step, batch: loss.sums(
        params, SimpleNamespace(step=step), {'vae': None}, batch
      )[0]
    )(params, 5, batch)
    weights = loss.weights(batch)
    self.assertEqual(
      {k: float(w) for k, w in weights.items()}, {'generate': 2 * 2 * 3, 'understand': 5}
    )
    logp = special.log_softmax(fake_params()['table'], -1)
    expected = -sum(logp[answer[i, t], answer[i, t + 1]] for i, t in np.argwhere(mask))
    self.assertAlmostEqual(float(sums['understand']), expected, places=4)
    root = jax.random.fold_in(jax.random.key(3), 5)
    expected = 0.0
    for row, index in enumerate((7, 9)):
      keys = ops.fold_rows(jax.random.fold_in(root, index), (1, 2))
      p = jax.tree.map(np.asarray, POINTS(keys, images[row][None, None]))
      v = params['scale'] * p.x_t + params['offset'] * p.t[..., None, None]
      expected += float(((v - p.target) ** 2).mean(-1).sum())
    np.testing.assert_allclose(sums['generate'], expected, rtol=1e-5)


B, G, K = 2, 3, 2
"""Sizes of the batches of the model's tests: prompts, samples, draws."""


def permuted(b, order_BG, answers_too=True):
  """Siblings in another order; with `answers_too` False only their advantages move."""
  take = lambda x, order: np.stack([row[o] for row, o in zip(np.asarray(x), order)])
  if isinstance(b, types.TextTrainBatch):
    moved = {'advantage_BG': take(b.advantage_BG, order_BG), 'valid_BG': take(b.valid_BG, order_BG)}
    if answers_too:
      names = ('tokens_BGT', 'logp_BGT', 'mask_BGT', 'reference_BGT')
      moved.update({name: take(b.__dict__[name], order_BG) for name in names})
    return b.replace(**moved)
  order_BM = np.concatenate([order_BG + k * G for k in range(K)], axis=1)
  moved = {
    name: take(b.__dict__[name], order_BG) for name in ('latents_BGNC', 'advantage_BG', 'valid_BG')
  }
  moved.update(
    {
      name: take(b.__dict__[name], order_BM)
      for name in ('x_BMNC', 'time_BM', 'old_BMNC', 'reference_BMNC')
    }
  )
  return b.replace(**moved)


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
    draw = lambda f: jax.tree.map(
      lambda s: 0.3 * rng.normal(size=s.shape).astype(np.float32),
      jax.eval_shape(f, jax.random.key(0)),
    )
    cls.params = draw(lambda key: bagel.init(policy.config, key))
    vae = draw(lambda key: policy.vae.init(key, jnp.zeros((1, 32, 32, 3)))['params'])
    prompts = {
      t: cls.experiment.encoder(t, [cls.experiment.data.example(t, 'align', i) for i in range(B)]).prompts
      for t in NUMBERS.weights
    }
    N, C = policy.latent_shape
    cls.batch = {
      t: text_case(B, G, 5, policy.config.vocab, prompts[t])
      if t == 'understand'
      else image_case(B, G, K, N, C, prompts[t], seed)
      for seed, t in enumerate(NUMBERS.weights)
    }
    cls.batch = jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, cls.batch)

    def compiled(weights):
      loss = losses.alignment(policy, dataclasses.replace(NUMBERS, weights=weights))
      return jax.jit(jax.value_and_grad(functools.partial(total, loss, vae=vae)))

    cls.mixed = staticmethod(compiled(NUMBERS.weights))
    cls.alone = staticmethod(compiled(dict.fromkeys(NUMBERS.weights, 1.0)))
    cls.value, cls.grad = cls.mixed(cls.params, cls.batch)

  def test_parts_of_groups_add_up(self):
    mixed = {t: b.replace(valid_BG=np.asarray(b.valid_BG).copy()) for t, b in self.batch.items()}
    mixed['understand'].valid_BG[0, :] = False
    loss = losses.alignment(self.experiment.policy, NUMBERS)
    weights = loss.weights(mixed)
    divided = lambda b: {t: np.asarray(b[t].valid_BG).sum() for t in b}
    parts = losses.split_group(mixed, G)
    count = lambda tree, n: jax.tree.map(lambda x: x[n], tree)
    pieces = [count(parts, n) for n in range(G)]
    for task, b in mixed.items():
      self.assertEqual(pieces[0][task].valid_BG.shape, (B, 1))
      self.assertEqual(sum(divided(p)[task] for p in pieces), b.valid_BG.sum())
    for name, want in weights.items():
      got = sum(loss.weights(p)[name] for p in pieces)
      np.testing.assert_allclose(got, want, rtol=1e-6, err_msg=name)
    # Every sample keeps its own points: row m of a sample g of G is m * G + g.
    b, piece = mixed['generate'], pieces[1]['generate']
    np.testing.assert_array_equal(piece.x_BMNC, np.asarray(b.x_BMNC)[:, 1::G])
    np.testing.assert_array_equal(piece.advantage_BG, np.asarray(b.advantage_BG)[:, 1:2])
    np.testing.assert_array_equal(piece.prompts.index_B, b.prompts.index_B)
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
    for task, weight in NUMBERS.weights.items():
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
    change = lambda x, value: np.concatenate(
      [
        x[:i],
        np.concatenate(
          [x[i : i + 1, :g], np.full_like(x[i : i + 1, g : g + 1], value), x[i : i + 1, g + 1 :]], 1
        ),
        x[i + 1 :],
      ]
    )
    batch['understand'] = b.replace(
      tokens_BGT=change(b.tokens_BGT, 3),
      logp_BGT=change(b.logp_BGT, -7.0),
      mask_BGT=change(b.mask_BGT, True),
      advantage_BG=change(b.advantage_BG, 5.0),
    )
    for task in ('generate', 'edit'):
      b = batch[task]
      ((i, g),) = np.argwhere(~b.valid_BG)
      x, latents, advantage = b.x_BMNC.copy(), b.latents_BGNC.copy(), b.advantage_BG.copy()
      x[i, g::G], latents[i, g], advantage[i, g] = 0.5, -2.0, 5.0
      batch[task] = b.replace(x_BMNC=x, latents_BGNC=latents, advantage_BG=advantage)
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
