"""Answers, plans, statements and derived questions, recomputed from the scene and the record."""

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data.shapes import plans
from lvrpo_jax.data.shapes import questions
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording
from tests.helpers import shapes_items


def referents(scene, name):
  words = name.split()
  return [o for o in scene.objects if all(w in (o.shape, o.color) for w in words)]


def counted(scene, name):
  words = [w for w in name.split() if w != 'shapes']
  singular = {plural: shape for shape, plural in wording.PLURALS.items()}
  wanted = [singular.get(w, w) for w in words]
  return sum(all(w in (o.shape, o.color) for w in wanted) for o in scene.objects)


def recompute(item):
  """Answer of a question, from the scene and the record alone."""
  record, scene = item.record, item.scene
  kind = record['type']
  if kind in ('color', 'shape'):
    (found,) = referents(scene, record['a'])
    return found.color if kind == 'color' else found.shape
  if kind == 'count':
    return wording.NUMBERS[counted(scene, record['a'])]
  if kind == 'relation':
    (a,), (b,) = referents(scene, record['a']), referents(scene, record['b'])
    return 'yes' if shapes_items.strictly(a, record['r'], b) else 'no'
  if kind == 'region':
    (a,) = referents(scene, record['a'])
    where = {('top', 'bottom')[a.row], ('left', 'right')[a.col]}
    return 'yes' if set(record['r'].split()) <= where else 'no'
  if kind == 'compare':
    first, second = counted(scene, record['a']), counted(scene, record['b'])
    return 'yes' if (first > second if record['r'] == 'more' else first < second) else 'no'
  if kind == 'others':
    return wording.NUMBERS[sum(o.color != record['b'] for o in scene.objects)]
  (anchor,) = referents(scene, record['b'])
  (found,) = [
    o for o in scene.objects if o is not anchor and shapes_items.strictly(o, record['r'], anchor)
  ]
  return found.color if kind == 'neighbour_color' else found.shape


class QuestionTest(parameterized.TestCase):
  @parameterized.parameters(*splits.SPLITS)
  def test_answers(self, split):
    for item in shapes_items.items('question', split, 2000):
      self.assertEqual(recompute(item), item.answer, item.question)
      self.assertEqual(bool(item.plan), item.kind not in ('color', 'shape'))

  @parameterized.product(kind=('relation', 'compare'), split=('train', 'eval'))
  def test_yes_and_no_are_balanced(self, kind, split):
    yes = np.mean(
      [shapes_items.WORLD.question(i, split, kind).answer == 'yes' for i in range(1600)]
    )
    self.assertBetween(yes, 0.45, 0.55)  # four standard errors

  def test_plans_lead_to_the_answer(self):
    for index in range(800):
      item = shapes_items.WORLD.question(index, 'train', 'compare')
      counts, verdict = item.plan.split(' , ')
      for side in counts.split(' than '):
        *words, number = side.split()
        self.assertLen(words, wording.NUMBERS.index(number))
      self.assertEqual(item.answer == 'yes', verdict == item.record['r'])
      item = shapes_items.WORLD.question(index, 'train', 'relation')
      if item.record['type'] == 'relation':
        self.assertEqual(item.answer == 'yes', item.plan.split()[-1] in item.record['r'].split())
      for kind in ('count', 'reason'):
        item = shapes_items.WORLD.question(index, 'train', kind)
        if item.record['type'] in ('count', 'others'):
          named = item.plan.replace('nothing', '').split()
          self.assertEqual(item.answer, wording.NUMBERS[len(named) // 2])
        else:
          self.assertIn(item.answer, item.plan.split(' , ')[1].split())

  def test_a_description_names_every_cell(self):
    rng = np.random.default_rng(0)
    for index in range(200):
      scene = shapes_items.WORLD.question(index, 'train').scene
      prompt, text = questions.describe(scene, rng)
      self.assertIn(prompt, wording.DESCRIBE)
      cells = text.split(' , ')
      self.assertLen(cells, render.MAX_OBJECTS)
      self.assertEqual(
        {(cell, index) for index, cell in enumerate(cells) if cell != 'nothing'},
        {(f'{color} {shape}', cell) for shape, color, cell in scene.content()},
      )
      shapes_only = plans.reading(scene.objects, ('shape',)).split(' , ')
      self.assertEqual([cell.split()[-1] for cell in cells], shapes_only)

  def test_statement(self):
    say = questions.statement
    count = {'type': 'count', 'a': 'circles'}
    self.assertEqual(say(count, 'two'), 'there are two circles')
    self.assertEqual(say(count, 'one'), 'there is one circle')
    self.assertEqual(say({'type': 'count', 'a': 'red crosses'}, 'one'), 'there is one red cross')
    self.assertEqual(say({'type': 'color', 'a': 'circle'}, 'red'), 'the circle is red')
    relation = {'type': 'relation', 'a': 'circle', 'r': 'left of', 'b': 'square'}
    self.assertEqual(say(relation, 'yes'), 'the circle is left of the square')
    self.assertEqual(say(relation, 'no'), 'the circle is not left of the square')

  def test_read_answer(self):
    read = wording.read_answer
    self.assertEqual(read('red'), ('red', True))
    self.assertEqual(read('think : two , one ; yes'), ('yes', True))
    self.assertEqual(read('think : ; yes'), ('yes', False))
    self.assertEqual(read('think : two ; one ; yes'), ('yes', False))
    self.assertEqual(read('i believe it is red .'), ('red', False))
    self.assertEqual(read('red red'), ('red', False))
    self.assertEqual(read('the'), (None, False))
    self.assertEqual(read(''), (None, False))
    for item in shapes_items.items('question', 'train', 300):
      reply = f'think : {item.plan} ; {item.answer}' if item.plan else item.answer
      self.assertEqual(read(reply), (item.answer, True))

  def test_web_answer(self):
    rng = np.random.default_rng(0)
    for item in shapes_items.items('question', 'train', 300):
      self.assertEqual(questions.web_answer(item, rng, 0.0, 0.0), item.answer)
      wrong = questions.web_answer(item, rng, 1.0, 0.0)
      self.assertIn(wrong, wording.ANSWERS)
      self.assertNotEqual(wrong, item.answer)
      chatty = questions.web_answer(item, rng, 0.0, 1.0)
      self.assertEqual(wording.read_answer(chatty), (item.answer, False))
    rates = [
      questions.web_answer(shapes_items.WORLD.question(0, 'train'), rng, 0.3, 0.0)
      != shapes_items.WORLD.question(0, 'train').answer
      for _ in range(1000)
    ]
    self.assertBetween(np.mean(rates), 0.25, 0.35)

  @parameterized.parameters('generate', 'edit')
  def test_derived_questions_hold_in_the_target_scene(self, task):
    for item in shapes_items.items(task, 'train', 800):
      scene = item.scene if task == 'generate' else item.target
      derived = questions.derived_questions(item.spec)
      self.assertNotEmpty(derived)
      for question, answer in derived:
        self.assertEqual(self._answer_plain(question, scene), answer, (question, item.spec))

  def _answer_plain(self, question, scene):
    """Answers by matching the question with every record the grammar could have asked."""
    nouns = list(render.SHAPES)
    records = [{'type': 'color', 'a': n} for n in nouns]
    records += [
      {'type': 'count', 'a': wording.noun(s, c, 2)}
      for s in (None, *nouns)
      for c in (None, *render.COLORS)
    ]
    records += [{'type': 'region', 'a': n, 'r': r} for n in nouns for r in wording.REGIONS]
    records += [
      {'type': 'relation', 'a': a, 'r': r, 'b': b}
      for a in nouns
      for b in nouns
      for r in wording.RELATIONS
    ]
    table = self.__dict__.setdefault('table', {questions.ask(r): r for r in records})
    asked = questions.QuestionItem(
      index=0,
      kind='',
      question=question,
      answer='',
      plan='',
      meaning='',
      scene=scene,
      record=table[question],
    )
    return recompute(asked)


if __name__ == '__main__':
  absltest.main()
