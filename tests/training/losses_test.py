"""Tests of whole-batch losses against loops, with a linear policy."""

import functools
from types import SimpleNamespace

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.data import tasks
from lvrpo_jax.rollouts import replay
from lvrpo_jax.training import losses
from tests.helpers import loss_cases

image_case, settings = loss_cases.image_case, loss_cases.settings
text_case, total = loss_cases.text_case, loss_cases.total

POINTS = jax.jit(functools.partial(replay.noise_points, shift=2.2))


class LinearPolicy:
  """A linear velocity and a table of next-token logits in the place of the model."""

  bos = 0
  latent_shape = 3, 2

  def encode_image(self, vae_params, image_BYXC):
    """Images are latents here."""
    del vae_params
    return image_BYXC

  def forward(self, params, vae_params, queries):
    """Velocities and logits by task."""
    del vae_params
    return {
      task: params['table'][q.ids_BML]
      if isinstance(q, types.TextQuery)
      else params['scale'] * q.x_BKGNC + params['offset'] * q.time_BKG[..., None, None]
      for task, q in queries.items()
    }


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def fake_params():
  return {'scale': np.float64(0.8), 'offset': np.array([0.1, -0.2]), 'table': random(5, 5)}


def text_oracle(text, table, b, cut):
  """(loss, k3) of a batch of answers by loops in float64.

  `cut` holds CISPO's weights of the first call: they carry no gradient.
  """
  loss = kl = weight = 0.0
  sampled, objective = b.sampled, text.objective
  T = sampled.mask_BGT.shape[-1]
  for i, g in np.ndindex(*b.valid_BG.shape):
    length, A = sampled.mask_BGT[i, g].sum(), b.advantage_BG[i, g]
    ids = [0, *sampled.tokens_BGT[i, g]]
    if not b.valid_BG[i, g]:
      continue
    temperature = sampled.temperature_B[i]
    logps = np.array(
      [special.log_softmax(table[ids[t]] / temperature)[ids[t + 1]] for t in range(length)]
    )
    ratios = np.exp(logps - sampled.logp_BGT[i, g, :length])
    if objective == 'gspo':
      ratios = np.full(length, np.exp(np.mean(logps - sampled.logp_BGT[i, g, :length])))
    if objective == 'dr_grpo':
      weight += 1.0
    for t, (logp, ratio) in enumerate(zip(logps, ratios)):
      w = {'dapo': 1.0, 'cispo': 1.0, 'dr_grpo': 1 / T}.get(objective, 1 / length)
      if objective == 'cispo':
        loss -= w * cut.setdefault((i, g, t), min(ratio, 1 + text.clip_high)) * A * logp
      else:
        loss += w * max(-A * ratio, -A * np.clip(ratio, 1 - text.clip_low, 1 + text.clip_high))
      d = b.reference_BGT[i, g, t] - logp
      kl += w * {'k1': -d, 'k3': np.exp(d) - d - 1}[text.kl]
      weight += 0.0 if objective == 'dr_grpo' else w
  return loss / weight, kl / weight


def image_oracle(image, sampler, scale, offset, b, frozen):
  """(loss, velocity MSE) of a batch of images by loops; `frozen` holds NFT's weights."""
  found = []
  for i, k, g in np.ndindex(*b.query.time_BKG.shape):
    if not b.valid_BG[i, g]:
      continue
    at = i, k, g
    x, t, A = b.query.x_BKGNC[at], b.query.time_BKG[at], b.advantage_BG[i, g]
    clean = b.sampled.latents_BGNC[i, g]
    v = scale * x + offset * t
    drift = ((v - b.reference_BKGNC[at]) ** 2).mean()
    if image.objective == 'diffusion_nft':
      old, r = b.old_BKGNC[at], np.clip(0.5 + A / (2 * image.nft_advantage_scale), 0, 1)
      parts = [
        (r, image.nft_beta * v + (1 - image.nft_beta) * old),
        (1 - r, (1 + image.nft_beta) * old - image.nft_beta * v),
      ]
      loss = 0.0
      for sign, (p, mixed) in enumerate(parts):
        off = x - t * mixed - clean
        w = frozen.setdefault((*at, sign), np.abs(off).mean())
        loss += p * (off**2).mean() / w / image.nft_beta
    elif image.objective == 'awm':
      target = (x - clean) / t  # Noise less image.
      ratio = np.exp(((b.old_BKGNC[at] - target) ** 2).mean() - ((v - target) ** 2).mean())
      loss = max(-A * ratio, -A * np.clip(ratio, 1 - image.clip, 1 + image.clip))
    else:
      s = b.sampled.steps
      eta, t_next = s.eta_BKG[at], s.next_time_BKG[at]
      dt = t_next - t
      half = eta**2 * t / (1 - t) / (2 * t)
      if sampler == 'sde':
        mean = x * (1 + half * dt) + v * (1 + half * (1 - t)) * dt
      elif sampler == 'cps':
        start, pure, kept = x - t * v, x + (1 - t) * v, t_next * np.cos(eta * np.pi / 2)
        mean = (1 - t_next) * start + kept * pure
      else:
        score = -(x - (1 - t) * (x - t * v)) / t**2
        mean = x + v * dt - eta**2 / 2 * score * dt
      # Log-probabilities of the sampled latents under both policies.
      old_mean, std = s.mean_BKGNC[at], s.std_BKG[at]
      d, sampled = mean - old_mean, old_mean + std * s.noise_BKGNC[at]
      moved = ((sampled - old_mean) ** 2).mean() - ((sampled - mean) ** 2).mean()
      log_ratio = {'flow_grpo': moved / (2 * std**2), 'flow_cps': moved}.get(
        image.objective, std * (moved / (2 * std**2) + (d**2).mean() / (2 * std**2))
      )
      ratio = np.exp(log_ratio)
      loss = max(-A * ratio, -A * np.clip(ratio, 1 - image.clip, 1 + image.clip))
      if image.objective == 'grpo_guard':
        loss /= abs(dt)
      if image.kl == 'gaussian':
        apart = (v - b.reference_BKGNC[at]) * (1 + half * (1 - t)) * dt
        drift = (apart**2).mean() / (2 * std**2)
    found.append((loss, drift))
  return np.mean(found, axis=0)


class LinearPolicyTest(parameterized.TestCase):
  @parameterized.parameters(
    ('diffusion_nft', 'dapo'),
    ('flow_grpo', 'grpo'),
    ('diffusion_nft', 'dr_grpo'),
    ('diffusion_nft', 'gspo'),
    ('diffusion_nft', 'cispo'),
    ('flow_grpo', 'dapo', 'k1', 'gaussian'),
    ('awm', 'dapo'),
    ('grpo_guard', 'dapo'),
    ('grpo_guard_plain', 'dapo'),
    ('flow_cps', 'dapo', 'k3', 'velocity', 'cps'),
    ('flow_grpo', 'dapo', 'k3', 'velocity', 'dance'),
    ('grpo_guard', 'dapo', 'k3', 'velocity', 'cps'),
  )
  def test_value_and_gradient_against_loops(
    self, objective, text_objective, text_kl='k3', image_kl='velocity', sampler='sde'
  ):
    align = settings(
      sampler=sampler,
      text=dict(objective=text_objective, kl=text_kl),
      image=dict(objective=objective, kl=image_kl, clip=0.5),
    )
    batch = {
      'generate': image_case(2, 3, 2, 3, 2, (), 1, objective),
      'understand': text_case(2, 3, 4, 5, ()),
      'edit': image_case(3, 2, 1, 3, 2, (), 2, objective),
    }
    self.check(align, batch, loss_cases.WEIGHTS)

  def check(self, align, batch, weights):
    """Value and gradient of a batch, whose tasks weigh so much, against loops."""
    params = fake_params()
    frozen = {task: {} for task in batch}
    text, image = align.text, align.image

    def oracle(p):
      out = 0.0
      for task, weight in weights.items():
        b = batch[task]
        if task in tasks.TEXT_OUTPUTS:
          loss, penalty = text_oracle(text, p['table'], b, frozen[task])
          out += weight * (loss + text.kl_weight * penalty)
        else:
          loss, penalty = image_oracle(
            image, align.rollout.sampler, p['scale'], p['offset'], b, frozen[task]
          )
          out += weight * (loss + image.kl_weight * penalty)
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
      loss = losses.alignment(LinearPolicy(), align)
      value, grad = jax.jit(jax.value_and_grad(functools.partial(total, loss)))(
        jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, batch)
      )
    # Token probabilities are float32 by design (text_objectives_test has these gradients in
    # float64); everything of images is float64 here.
    self.assertAlmostEqual(float(value), expected, delta=1e-6 * abs(expected))
    np.testing.assert_allclose(grad['table'], slopes['table'], rtol=2e-5, atol=2e-6)
    for name in ('scale', 'offset'):
      np.testing.assert_allclose(grad[name], slopes[name], rtol=1e-6, atol=1e-9)

  @parameterized.parameters('diffusion_nft', 'flow_grpo')
  def test_both_halves_of_a_thought_weigh_the_same(self, objective):
    weight = 1.7
    align = settings(
      {'think_generate': weight, 'understand': 0.5}, image=dict(objective=objective, clip=0.5)
    )
    # Images after plans are rows with a context, and a group, of their own.
    batch = {
      'plan': text_case(2, 3, 4, 5, (), 1),
      'understand': text_case(2, 3, 4, 5, ()),
      'think_generate': image_case(6, 1, 2, 3, 2, (), 2, objective),
    }
    self.check(align, batch, {'plan': weight, 'think_generate': weight, 'understand': 0.5})

  def test_metrics(self):
    batch = {'understand': text_case(2, 3, 4, 5, ())}
    loss = losses.alignment(LinearPolicy(), settings())
    _, metrics = jax.jit(lambda params, batch: loss.sums(params, None, {'vae': None}, batch))(
      jax.tree.map(np.float32, fake_params()), batch
    )
    b = batch['understand']
    weight = float((b.sampled.mask_BGT & b.valid_BG[..., None]).sum())
    self.assertSetEqual(
      set(metrics), {f'understand/{k}' for k in ('kl_k3', 'entropy', 'clip_fraction')}
    )
    for value, count in metrics.values():
      self.assertEqual(float(count), weight)
      self.assertGreater(float(value), 0.0)

  def test_factors(self):
    batch = {'generate': image_case(2, 3, 2, 3, 2, (), 1), 'understand': text_case(2, 3, 4, 5, ())}
    loss, params = losses.alignment(LinearPolicy(), settings()), fake_params()

    def terms(frozen):
      return loss.sums(params, None, {'vae': None, **frozen}, batch)[0]

    plain = terms({})
    scaled = terms({'factors': dict(zip(losses.FACTORS, (2.0, 4.0, 3.0, 0.5), strict=True))})
    for name, factor in (
      ('generate', 4.0),
      ('generate_penalty', 2.0),
      ('understand', 2.0),
      ('understand_penalty', 6.0),
    ):
      np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-5)

  @parameterized.product(objective=('diffusion_nft', 'flow_grpo'), parts=(2, 4))
  def test_parts_of_groups_add_up(self, objective, parts):
    batch = {
      'generate': image_case(2, 4, 2, 3, 2, (), 1, objective),
      'understand': text_case(2, 4, 4, 5, ()),
    }
    loss = losses.alignment(LinearPolicy(), settings(image=dict(objective=objective)))
    params = jax.tree.map(np.float32, fake_params())

    def sums(batch):
      return loss.sums(params, None, {'vae': None}, batch)

    pieces = loss.split_group(batch, parts)
    found = [sums(jax.tree.map(lambda x, n=n: x[n], pieces)) for n in range(parts)]
    jax.tree.map(
      lambda whole, *some: np.testing.assert_allclose(sum(some), whole, rtol=1e-5, atol=1e-6),
      sums(batch),
      *found,
    )

  def test_penalty_of_steps_wants_steps(self):
    with self.assertRaisesRegex(ValueError, "align.image.kl is 'gaussian', .* 'velocity'"):
      losses.alignment(LinearPolicy(), settings(image=dict(kl='gaussian')))

  def test_unknown_objective(self):
    for section in ('text', 'image'):
      with self.assertRaisesRegex(ValueError, f"config.align.{section}.objective is 'ppo'"):
        losses.alignment(LinearPolicy(), settings(**{section: dict(objective='ppo')}))

  def test_log_probabilities_of_answers(self):
    texts = text_case(2, 3, 4, 5, ()).sampled
    params = jax.tree.map(np.float32, fake_params())
    score = jax.jit(functools.partial(replay.log_probabilities, LinearPolicy()))
    found = score(params, {'vae': None}, {'understand': texts})
    self.assertEqual(found.keys(), {'understand'})
    logp = np.asarray(found['understand'])
    np.testing.assert_array_equal(logp[~texts.mask_BGT], 0.0)
    first = special.log_softmax(fake_params()['table'][0] / texts.temperature_B[1])
    self.assertAlmostEqual(logp[1, 2, 0], first[texts.tokens_BGT[1, 2, 0]], places=5)

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
    loss = losses.pretraining(LinearPolicy(), {'generate': 1.0, 'understand': 0.5}, 2, 2.2, seed=3)
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


if __name__ == '__main__':
  absltest.main()
