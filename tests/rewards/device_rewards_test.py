"""Rewards of frozen models, sample by sample: every image meets its own prompt."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.rewards import base
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.rewards import scorer as scorer_lib
from tests.helpers import noise
from tests.helpers import scene as scene_lib

ROWS, GROUP, QUESTIONS, TOP = 3, 2, 2, 2
COMPONENTS = ('semantic', 'dense', 'knowledge', 'mutual')


class ImagesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    asked = dict.fromkeys(('knowledge', 'mutual'), dict(questions=QUESTIONS))
    entries = {**asked, 'dense': dict(top=TOP)}
    tasks = ('generate', 'edit', 'think_generate')
    cls.experiment = scene_lib.build(
      dict.fromkeys(COMPONENTS, 1.0),
      dict.fromkeys(tasks, entries),
      rollout=dict(group_size=GROUP),
      prompts=dict(understand=0, **dict.fromkeys(tasks, ROWS)),
    )
    cls.scorer = scorer_lib.Scorer(cls.experiment)
    cls.frozen = base.RewardParams(*noise.parameters(cls.experiment))
    cls.scorer.load(cls.frozen)
    side = cls.experiment.policy.image_size
    cls.pixels = (
      np.random.default_rng(1).integers(0, 256, (ROWS, GROUP, side, side, 3)).astype(np.uint8)
    )
    cls.answer_ids = [
      cls.experiment.data.tokenizer.encode(a)[0] for a in cls.experiment.data.answers
    ]
    cls.first_token = staticmethod(
      jax.jit(functools.partial(reference_qa.first_token, cls.experiment))
    )

  def score(self, task, examples, iteration):
    """Rewards of the pixels, each group as of one of the examples."""
    samples = self.scorer.samples(task, examples, jnp.asarray(self.pixels), iteration)
    prompts = self.experiment.encoder(task, examples).prompts
    return self.scorer.score(samples, prompts, self.frozen, scene_lib.NOBODY).rewards

  def embed(self, image, text):
    """Vectors of one image, its patches, and one text."""
    encoder, params = self.experiment.dual_encoder, {'params': self.frozen.dual_encoder}

    def apply(x, method):
      return encoder.module.apply(params, x, method=method)

    whole, patches = apply(image[None].astype(np.float32) / 127.5 - 1.0, 'embed_image')
    vector = apply(encoder.token_ids([text])[0], 'embed_text')[0]
    return (np.asarray(x[0], np.float64) for x in (whole, patches, vector))

  def logits(self, question, **changes):
    """Of the first token of the answer to one question."""
    example = examples_lib.Example(0, question, answer='', **changes)
    prompts = self.experiment.encoder(tasks_lib.UNDERSTAND, [example]).prompts
    return np.asarray(self.first_token(self.frozen, prompts)[0], np.float64)

  def oracle(self, example, image, iteration):
    """The components of one image, each from nothing but this image and its prompt."""
    out, experiment = {}, self.experiment
    whole, patches, text = self.embed(image, example.prompt)
    out['semantic'] = whole @ text
    matches = []
    for word in example.prompt.split():
      if word in experiment.data.key_words:
        _, _, vector = self.embed(image, word)
        matches.append(np.sort(patches @ vector)[-TOP:].mean())
    out['dense'] = np.mean(matches) if matches else 0.0
    ids, right, gains = self.answer_ids, [], []
    number = len(example.questions)
    for place in range(min(QUESTIONS, number)):
      question, answer = example.questions[(iteration * QUESTIONS + place) % number]
      mine = experiment.data.answers.index(answer)
      seen = self.logits(question, source=image)
      blind = self.logits(question, source=image, drop_vit=True)
      right.append(special.softmax(seen[ids])[mine])
      q = [0.95 * special.softmax(x[ids])[mine] + 0.05 / len(ids) for x in (seen, blind)]
      gains.append(np.log(q[0]) - np.log(q[1]))
    return {**out, 'knowledge': np.mean(right), 'mutual': np.mean(gains) * number}

  @parameterized.parameters('generate', 'edit', 'think_generate')
  def test_against_single_samples(self, task):
    iteration = 5
    rows = [self.experiment.data.example(task, 'align', i) for i in range(40)]

    def number(e):
      return len(e.questions)

    # One with fewer questions than are asked, one with more, and another one.
    examples = [next(e for e in rows if number(e) == n) for n in (1, 3)]
    examples.append(next(e for e in rows if number(e) == 2 and e not in examples))
    found = self.score(task, examples, iteration)
    want = [
      [self.oracle(e, image, iteration) for image in group]
      for e, group in zip(examples, self.pixels)
    ]
    self.assertEqual(found.keys(), set(COMPONENTS))
    for name in COMPONENTS:
      values = np.array([[sample[name] for sample in group] for group in want])
      np.testing.assert_allclose(found[name].value_BG, values, rtol=1e-4, atol=1e-5, err_msg=name)
      self.assertGreater(np.ptp(values), 1e-4, name)
      self.assertTrue(np.all(found[name].valid_BG))

  def test_prompts_without_questions_are_not_valid(self):
    examples = [
      examples_lib.Example(i, 'an image', questions=questions)
      for i, questions in enumerate(((), (('what colour is the cross ?', 'red'),), ()))
    ]
    found = self.score('generate', examples, 1)
    for name in ('knowledge', 'mutual'):
      np.testing.assert_array_equal(found[name].valid_BG, [[False] * 2, [True] * 2, [False] * 2])
    self.assertTrue(np.all(found['semantic'].valid_BG))

  def test_blind_questions_are_for_those_who_pay(self):
    example = self.experiment.data.example('generate', 'align', 0)

    def blind(paid):
      return reference_qa.prompt_questions(
        self.experiment, [example], 1, count=QUESTIONS, blind=paid
      ).blind

    self.assertEqual(blind(False), ())
    self.assertLen(blind(True), QUESTIONS)


if __name__ == '__main__':
  absltest.main()
