"""Tests of lvrpo_jax.rollouts.text: stops, nucleus, log-probabilities and what a row depends on."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np

from lvrpo_jax import ops
from lvrpo_jax import types
from lvrpo_jax.models.bagel import model as bagel
from lvrpo_jax.rollouts import text as text_rollout

BOS, EOS, VOCABULARY = 1, 2, 12
CONFIG = bagel.ModelConfig(
  vocab=VOCABULARY,
  width=16,
  depth=2,
  heads=4,
  kv_heads=2,
  ff_width=16,
  latent_channels=3,
  latent_side=2,
  vit=bagel.VitConfig(width=8, depth=1, heads=2, ff_width=8, patch=2, side=2),
  start_of_image=10,
  end_of_image=11,
  rope_theta=100.0,
)
MODEL = bagel.Unified(CONFIG)


def keys(*shape, seed=0):
  return ops.fold_rows(jax.random.key(seed), shape)


def script_decode(script_BGT, calls):
  """A policy that says token `script[..., i]` at step i whatever it hears, and counts its steps."""
  script_BGT = jnp.asarray(script_BGT)

  def decode(row, index, token_BG):
    jax.debug.callback(lambda i: calls.append(int(i)), index)
    return 50.0 * jax.nn.one_hot(script_BGT[..., index], VOCABULARY), row

  return decode


@functools.cache
def parameters():
  params = jax.jit(functools.partial(bagel.init, CONFIG))(jax.random.key(0))
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: x + (0.3 * rng.normal(size=x.shape)).astype(np.float32), params)


@functools.cache
def context(rows=3):
  """A context with keys and values at random and padding in it."""
  rng = np.random.default_rng(0)
  shape = (CONFIG.depth, rows, 5, CONFIG.kv_heads, CONFIG.width // CONFIG.heads)
  k, v = rng.normal(size=(2, *shape)).astype(np.float32)
  valid = np.arange(5) < rng.integers(2, 6, rows)[:, None]
  return types.Cache(*map(jnp.asarray, (k, v, valid, valid.sum(1).astype(np.int32))))


@functools.partial(jax.jit, static_argnames=('temperature', 'length'))
def answer(params, cache, key_BG, temperature, length=6):
  def decode(row, i, token):
    return MODEL.apply({'params': params}, cache, row, i, token, method='decode')

  row = bagel.empty_row(CONFIG, key_BG.shape, length)
  return text_rollout.sample(decode, row, key_BG, BOS, EOS, length, temperature)


@jax.jit
def read(params, cache, ids):
  return MODEL.apply({'params': params}, cache, ids, method='read')


def pick(cache, rows):
  return types.Cache(
    cache.k_EBSJK[:, rows],
    cache.v_EBSJK[:, rows],
    cache.valid_BS[rows],
    cache.next_position_B[rows],
  )


class ScriptedTextTest(parameterized.TestCase):
  def run_script(self, script, length, temperature=1.0):
    calls = []
    script = np.array(script)
    out = text_rollout.sample(
      script_decode(script, calls),
      jnp.zeros(()),
      keys(*script.shape[:2]),
      BOS,
      EOS,
      length,
      temperature,
    )
    jax.effects_barrier()
    return jax.tree.map(np.asarray, out), calls

  @parameterized.parameters(0.0, 1.0)
  def test_stops_when_all_have_ended(self, temperature):
    out, calls = self.run_script([[[5, 6, EOS, 7, 7, 7], [8, EOS, 9, 9, 9, 9]]], 6, temperature)
    self.assertEqual(calls, [0, 1, 2])
    np.testing.assert_array_equal(out.tokens_BGT, [[[5, 6] + [EOS] * 4, [8] + [EOS] * 5]])
    np.testing.assert_array_equal(out.mask_BGT, [[[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]])
    np.testing.assert_array_equal(out.logp_BGT[~out.mask_BGT], 0.0)

  def test_answer_without_an_end_is_cut(self):
    out, calls = self.run_script([[[5, 6, 7, 8], [EOS, 9, 9, 9]]], 3)
    self.assertEqual(calls, [0, 1, 2])
    np.testing.assert_array_equal(out.tokens_BGT, [[[5, 6, 7], [EOS] * 3]])
    np.testing.assert_array_equal(out.mask_BGT, [[[1, 1, 1], [1, 0, 0]]])

  def test_tokens_are_fed_back(self):
    heard = []

    def decode(row, index, token_BG):
      jax.debug.callback(lambda i, t: heard.append((int(i), int(t[0, 0]))), index, token_BG)
      return 50.0 * jax.nn.one_hot(token_BG + 2, VOCABULARY), row + 1

    out = text_rollout.sample(decode, jnp.int32(0), keys(1, 1), BOS, EOS, 3, 1.0)
    jax.effects_barrier()
    self.assertEqual(sorted(heard), [(0, BOS), (1, 3), (2, 5)])
    np.testing.assert_array_equal(out.tokens_BGT, [[[3, 5, 7]]])

  def test_teacher_ids(self):
    np.testing.assert_array_equal(
      text_rollout.teacher_ids(jnp.array([[[5, 6, EOS]]]), BOS), [[[BOS, 5, 6]]]
    )

  def test_samples_follow_the_tempered_softmax(self):
    logits = jnp.log(jnp.array([0.0, 0.0, 0.1, 0.2, 0.7]))

    def decode(row, i, token):
      return (jnp.broadcast_to(logits, (*token.shape, 5)), row)

    for temperature in (1.0, 0.5):
      out = text_rollout.sample(decode, jnp.zeros(()), keys(4, 500), BOS, EOS, 1, temperature)
      want = np.array([0.0, 0.0, 0.1, 0.2, 0.7]) ** (1 / temperature)
      want /= want.sum()
      share = np.bincount(np.asarray(out.tokens_BGT).ravel(), minlength=5) / 2000
      np.testing.assert_allclose(share, want, atol=0.04)
      np.testing.assert_allclose(np.exp(out.logp_BGT), want[out.tokens_BGT], atol=1e-5)


class NucleusTest(parameterized.TestCase):
  def oracle(self, logits_V, temperature, top_p):
    """Token by token: the most likely ones until their mass reaches `top_p`."""
    p = np.exp((logits_V - logits_V.max()) / temperature)
    p /= p.sum()
    kept, mass = [], 0.0
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
      if mass >= top_p:
        break
      kept.append(token)
      mass += p[token]
    return kept

  @parameterized.product(temperature=(0.5, 1.0, 2.0), top_p=(1e-6, 0.3, 0.9, 0.999))
  def test_oracle(self, temperature, top_p):
    logits = np.random.default_rng(0).normal(size=(2, 3, VOCABULARY)).astype(np.float32) * 2
    found = np.asarray(text_rollout.nucleus(jnp.asarray(logits), temperature, top_p))
    for index in np.ndindex(2, 3):
      kept = self.oracle(logits[index], temperature, top_p)
      self.assertCountEqual(np.flatnonzero(np.isfinite(found[index])), kept)
      np.testing.assert_array_equal(found[index][kept], logits[index][kept])

  def test_samples_and_logp_are_of_the_nucleus(self):
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))

    def decode(row, index, token):
      return (jnp.broadcast_to(logits, (*token.shape, 4)), row)

    out = text_rollout.sample(decode, None, keys(1, 4000), 0, 3, 1, 1.0, top_p=0.75)
    share = np.bincount(np.asarray(out.tokens_BGT).ravel(), minlength=4) / 4000
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=4 * 0.008)
    np.testing.assert_allclose(
      out.logp_BGT.ravel(), np.log([0.625, 0.375])[np.asarray(out.tokens_BGT).ravel()], rtol=1e-5
    )


class ModelTextTest(parameterized.TestCase):
  @parameterized.parameters(0.7, 0.0)
  def test_logp_equals_teacher_forcing(self, temperature):
    out = answer(parameters(), context(), keys(3, 2), temperature)
    scale = temperature or 1.0
    self.assertAlmostEqual(float(out.temperature), scale, places=6)
    logits = read(parameters(), context(), text_rollout.teacher_ids(out.tokens_BGT, BOS))
    want = np.asarray(logits, np.float64) / scale
    want -= np.log(np.exp(want).sum(-1, keepdims=True))
    want = np.take_along_axis(want, np.asarray(out.tokens_BGT)[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.logp_BGT, np.where(out.mask_BGT, want, 0.0), atol=1e-5)

  def test_rescored_answers_keep_what_teacher_forcing_says(self):
    out = answer(parameters(), context(), keys(3, 2), 0.7)
    logits = read(parameters(), context(), text_rollout.teacher_ids(out.tokens_BGT, BOS))
    scored = text_rollout.rescore(out, logits)
    self.assertLess(float(scored.drift), 1e-5)
    np.testing.assert_array_equal(scored.tokens_BGT, out.tokens_BGT)
    np.testing.assert_array_equal(scored.logp_BGT[~out.mask_BGT], 0.0)
    wrong = text_rollout.rescore(out, logits.at[..., 0].add(1.0))
    self.assertGreater(float(wrong.drift), 1e-2)
    np.testing.assert_allclose(
      wrong.drift, np.abs(np.asarray(wrong.logp_BGT) - np.asarray(out.logp_BGT)).max(), rtol=1e-6
    )

  def test_greedy_takes_the_most_likely_token(self):
    out = answer(parameters(), context(), keys(3, 2), 0.0)
    logits = read(parameters(), context(), text_rollout.teacher_ids(out.tokens_BGT, BOS))
    mask = np.asarray(out.mask_BGT)
    np.testing.assert_array_equal(
      np.asarray(out.tokens_BGT)[mask], np.asarray(jnp.argmax(logits, -1))[mask]
    )
    np.testing.assert_array_equal(out.tokens_BGT[:, 0], out.tokens_BGT[:, 1])

  def test_mask_ends_at_the_end_token(self):
    outs = [answer(parameters(), context(), keys(3, 2, seed=seed), 0.7) for seed in range(4)]
    tokens, mask = (
      np.concatenate([np.asarray(x).reshape(-1, 6) for x in xs])
      for xs in zip(*((out.tokens_BGT, out.mask_BGT) for out in outs))
    )
    ended = 0
    for row, row_mask in zip(tokens, mask):
      place = row.tolist().index(EOS) + 1 if EOS in row else 6
      ended += EOS in row
      np.testing.assert_array_equal(row_mask, np.arange(6) < place)
    self.assertBetween(ended, 1, 23)

  def test_row_depends_on_its_own_key_and_context_alone(self):
    key_BG = keys(3, 2)
    whole = answer(parameters(), context(), key_BG, 0.7)
    rows = np.array([2, 0, 1])
    turned = answer(parameters(), pick(context(), rows), key_BG[rows][:, ::-1], 0.7)
    np.testing.assert_array_equal(turned.tokens_BGT, np.asarray(whole.tokens_BGT)[rows][:, ::-1])
    alone = answer(parameters(), pick(context(), np.array([1])), key_BG[1:2, :1], 0.7)
    np.testing.assert_array_equal(alone.tokens_BGT, whole.tokens_BGT[1:2, :1])
    np.testing.assert_allclose(alone.logp_BGT, whole.logp_BGT[1:2, :1], atol=1e-5)
    other = answer(parameters(), context(), keys(3, 2, seed=1), 0.7)
    self.assertFalse(np.array_equal(other.tokens_BGT, whole.tokens_BGT))


if __name__ == '__main__':
  absltest.main()
