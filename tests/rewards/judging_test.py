"""What frozen models say about images, sample by sample: that every one meets its own prompt."""

import functools
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import numpy as jnp
import numpy as np
from scipy import special

from configs import tiny
from lvrpo_jax.data import examples as examples_lib
from lvrpo_jax.data import tasks as tasks_lib
from lvrpo_jax.models.bagel import policy
from lvrpo_jax.rewards import judging
from lvrpo_jax.rewards import reference_qa
from lvrpo_jax.rewards.remote import pending
from lvrpo_jax.runtime import experiment as experiment_lib
from lvrpo_jax.training import experience
from tests.helpers import noise

ROWS, GROUP, QUESTIONS, TOP = 3, 2, 2, 2
NOBODY = pending.PendingRewards({}, lambda: None)
COMPONENTS = ('semantic', 'dense', 'knowledge', 'mutual')


class ImagesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = tiny.get_config()
    config.model.depth = 1
    config.align.update(
      group=GROUP,
      questions=QUESTIONS,
      dense_top=TOP,
      understand=0,
      **dict.fromkeys(('generate', 'edit', 'think_generate'), ROWS),
    )
    for rewards in config.align.rewards.values():
      rewards.update({name: float(name in COMPONENTS) for name in rewards})
    cls.experiment = experiment_lib.build(config, pathlib.Path('unused'))
    cls.collector = experience.Collector(cls.experiment)
    cls.params, cls.vae, cls.siglip = noise.parameters(cls.experiment)
    cls.judges = experience.Judges(
      cls.params, cls.siglip, experiment_lib.word_table(cls.experiment, cls.siglip)
    )
    side = cls.experiment.policy.image_size
    cls.pixels = (
      np.random.default_rng(1).integers(0, 256, (ROWS, GROUP, side, side, 3)).astype(np.uint8)
    )
    cls.first_token = staticmethod(jax.jit(functools.partial(judging.first_token, cls.experiment)))

  def embed(self, image, text):
    """Vectors of one image, its patches, and one text."""
    apply = lambda x, method: self.experiment.dual_encoder.module.apply({'params': self.siglip}, x, method=method)
    whole, patches = apply(policy.to_unit(image[None]), 'embed_image')
    return (
      np.asarray(x[0], np.float64)
      for x in (whole, patches, apply(self.experiment.dual_encoder.token_ids([text])[0], 'embed_text')[0])
    )

  def logits(self, question, **changes):
    """Of the first token of the answer to one question."""
    example = examples_lib.Example(0, question, answer='', **changes)
    prompts = self.experiment.encoder(tasks_lib.UNDERSTAND, [example]).prompts
    return np.asarray(self.first_token(self.judges, self.vae, prompts)[0], np.float64)

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
    ids, right, gains = [int(i) for i in experiment.answer_ids], [], []
    number = len(example.questions)
    for place in range(min(QUESTIONS, number)):
      question, answer = example.questions[(iteration * QUESTIONS + place) % number]
      mine = experiment.data.answers.index(answer)
      seen = self.logits(question, source=image)
      blind = self.logits(question, source=image, drop_vit=True)
      right.append(special.softmax(seen[ids])[mine])
      log_q = lambda x: np.log(0.95 * special.softmax(x[ids])[mine] + 0.05 / len(ids))
      gains.append(log_q(seen) - log_q(blind))
    return {**out, 'knowledge': np.mean(right), 'mutual': np.mean(gains) * number}

  @parameterized.parameters('generate', 'edit', 'think_generate')
  def test_against_single_samples(self, task):
    iteration = 5
    rows = [self.experiment.data.example(task, 'align', i) for i in range(40)]
    # One with fewer questions than are asked, one with more, and another one.
    number = lambda e: len(e.questions)
    examples = [next(e for e in rows if number(e) == n) for n in (1, 3)]
    examples.append(next(e for e in rows if number(e) == 2 and e not in examples))
    tasks = experience.Tasks({task: examples}, {})
    found, _ = self.collector.image_rewards(
      task, tasks, jnp.asarray(self.pixels), self.judges, self.vae, iteration, NOBODY
    )
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
    found, _ = self.collector.image_rewards(
      'generate',
      experience.Tasks({'generate': examples}, {}),
      jnp.asarray(self.pixels),
      self.judges,
      self.vae,
      1,
      NOBODY,
    )
    for name in ('knowledge', 'mutual'):
      np.testing.assert_array_equal(found[name].valid_BG, [[False] * 2, [True] * 2, [False] * 2])
    self.assertTrue(np.all(found['semantic'].valid_BG))

  def test_blind_questions_are_for_those_who_pay(self):
    example = self.experiment.data.example('generate', 'align', 0)
    self.assertIsNone(reference_qa.prompt_questions(self.experiment, [example], 1, blind=False).blind)
    self.assertLen(
      reference_qa.prompt_questions(self.experiment, [example], 1, blind=True).blind, QUESTIONS
    )


class TurnsTest(absltest.TestCase):
  def test_every_question_has_its_turn(self):
    pairs = tuple((f'question {i}', 'yes') for i in range(5))
    example = examples_lib.Example(0, '', questions=pairs)
    self.assertEqual([example.asked(i) for i in range(7)], [*pairs, *pairs[:2]])
    self.assertEqual(
      [example.inquiry(i, 2) for i in range(3)],
      [[pairs[0], pairs[1]], [pairs[2], pairs[3]], [pairs[4], pairs[0]]],
    )
    self.assertCountEqual(example.inquiry(3, 9), pairs)
    self.assertEqual(examples_lib.Example(0, '').asked(3), ('', ''))
    self.assertEqual(examples_lib.Example(0, '').inquiry(3, 2), [])


if __name__ == '__main__':
  absltest.main()
