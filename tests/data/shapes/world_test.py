"""The shapes world: rendering, splits, texts and answers, recomputed independently."""

import collections
import functools
import itertools
import json
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data.shapes import edits
from lvrpo_jax.data.shapes import questions
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording
from lvrpo_jax.data.shapes import world

WORLD = world.World()
TASKS = {'generate': WORLD.generate, 'question': WORLD.question, 'edit': WORLD.edit}
COUNT = 1000


@functools.cache
def items(task, split, count=COUNT):
  return [TASKS[task](index, split) for index in range(count)]


def text_of(item):
  if isinstance(item, world.GenerateItem):
    return item.caption
  if isinstance(item, edits.EditItem):
    return item.instruction
  return item.question


def scenes_of(item):
  return [item.scene, item.target] if isinstance(item, edits.EditItem) else [item.scene]


def canonical(a, relation, b):
  return {
    'left of': (a, 'left of', b),
    'right of': (b, 'left of', a),
    'above': (a, 'above', b),
    'below': (b, 'above', a),
  }[relation]


def strictly(a, relation, b):
  """Independent of the package: cells as (row, col) and the sign of their difference."""
  step = (b.row - a.row, b.col - a.col)
  return (
    step == {'left of': (0, 1), 'right of': (0, -1), 'above': (1, 0), 'below': (-1, 0)}[relation]
  )


def referents(scene, name):
  words = name.split()
  return [o for o in scene.objects if all(w in (o.shape, o.color) for w in words)]


def counted(scene, name):
  words = [w for w in name.split() if w != 'shapes']
  singular = {plural: shape for shape, plural in wording.PLURALS.items()}
  wanted = [singular.get(w, w) for w in words]
  return sum(all(w in (o.shape, o.color) for w in wanted) for o in scene.objects)


def recompute(item):
  """The answer, from the scene and the record alone."""
  record, scene = item.record, item.scene
  kind = record['type']
  if kind in ('color', 'shape'):
    (found,) = referents(scene, record['a'])
    return found.color if kind == 'color' else found.shape
  if kind == 'count':
    return wording.NUMBERS[counted(scene, record['a'])]
  if kind == 'relation':
    (a,), (b,) = referents(scene, record['a']), referents(scene, record['b'])
    return 'yes' if strictly(a, record['r'], b) else 'no'
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
  (found,) = [o for o in scene.objects if o is not anchor and strictly(o, record['r'], anchor)]
  return found.color if kind == 'neighbour_color' else found.shape


class RenderTest(parameterized.TestCase):
  def test_objects_stay_in_their_cells_and_order_does_not_matter(self):
    rng = np.random.default_rng(0)
    for _ in range(200):
      objects = [
        render.draw_object(rng, shape, 'red', cell)
        for cell, shape in enumerate(rng.choice(render.SHAPES, 4))
      ]
      image = render.render(render.Scene(tuple(objects)))
      np.testing.assert_array_equal(image, render.render(render.Scene(tuple(objects[::-1]))))
      for item in objects:
        alone = render.render(render.Scene((item,)))
        x0, y0, x1, y1 = item.box
        self.assertGreaterEqual(x0, item.col * 16)
        self.assertLessEqual(x1, item.col * 16 + 16)
        self.assertGreaterEqual(y0, item.row * 16)
        self.assertLessEqual(y1, item.row * 16 + 16)
        outside = np.ones((32, 32), bool)
        outside[item.row * 16 : item.row * 16 + 16, item.col * 16 : item.col * 16 + 16] = False
        self.assertTrue((alone[outside] == render.BACKGROUND).all())

  @parameterized.parameters(*render.SHAPES)
  def test_coverage_matches_supersampling(self, shape):
    centre, radius, factor = (8.3, 7.6), 5.4, 16
    fine = (np.arange(16 * factor) + 0.5) / factor
    x, y = fine[None] - centre[0], fine[:, None] - centre[1]
    inside = {
      'circle': lambda: x**2 + y**2 <= radius**2,
      'square': lambda: (abs(x) <= 0.9 * radius) & (abs(y) <= 0.9 * radius),
      'diamond': lambda: abs(x) + abs(y) <= radius,
      'triangle': lambda: (y <= radius) & (2 * abs(x) <= y + radius),
      'cross': lambda: (
        ((abs(x) <= radius) & (abs(y) <= render.CROSS_HALF_WIDTH * radius))
        | ((abs(y) <= radius) & (abs(x) <= render.CROSS_HALF_WIDTH * radius))
      ),
    }[shape]()
    expected = inside.reshape(16, factor, 16, factor).mean((1, 3))
    pixel = np.arange(16) + 0.5
    actual = render.coverage(shape, pixel[None] - centre[0], pixel[:, None] - centre[1], radius)
    self.assertLess(abs(actual - expected).max(), 0.35)  # corners are bounds, not exact
    self.assertLess(abs(actual - expected).mean(), 0.01)

  def test_scene_rejects_shared_cells_and_empty_scenes(self):
    rng = np.random.default_rng(0)
    item = render.draw_object(rng, 'circle', 'red', 0)
    with self.assertRaises(ValueError):
      render.Scene((item, render.draw_object(rng, 'square', 'blue', 0)))
    with self.assertRaises(ValueError):
      render.Scene(())
    with self.assertRaises(ValueError):
      render.coverage('hexagon', np.zeros(1), np.zeros(1), 1.0)


class SplitTest(parameterized.TestCase):
  @parameterized.parameters('generate', 'question', 'edit')
  def test_meanings_are_disjoint(self, task):
    meanings = {split: {item.meaning for item in items(task, split)} for split in splits.SPLITS}
    for a, b in itertools.combinations(splits.SPLITS, 2):
      self.assertEmpty(meanings[a] & meanings[b])

  def test_split_is_the_same_for_every_seed(self):
    other = world.World(seed=5)
    train = {WORLD.generate(i, 'train').meaning for i in range(COUNT)}
    self.assertEmpty(train & {other.generate(i, 'eval').meaning for i in range(COUNT)})
    self.assertNotEqual(
      [WORLD.generate(i, 'train').caption for i in range(20)],
      [other.generate(i, 'train').caption for i in range(20)],
    )

  @parameterized.product(task=('generate', 'question', 'edit'), split=('train', 'eval'))
  def test_unseen_stays_unseen(self, task, split):
    for item in items(task, split):
      for scene in scenes_of(item):
        for o in scene.objects:
          self.assertNotIn((o.shape, o.color), splits.UNSEEN_PAIRS)
        for a, b in itertools.permutations(scene.objects, 2):
          if a.col < b.col:
            self.assertNotIn((a.shape, 'left of', b.shape), splits.UNSEEN_RELATIONS)
          if a.row < b.row:
            self.assertNotIn((a.shape, 'above', b.shape), splits.UNSEEN_RELATIONS)
      words = text_of(item).split() + vars(item).get('plan', '').split()
      singular = {plural: shape for shape, plural in wording.PLURALS.items()}
      for color, shape in zip(words, words[1:]):
        self.assertNotIn((singular.get(shape, shape), color), splits.UNSEEN_PAIRS)
      if 'position' in json.dumps(vars(item).get('spec', {})):
        b, a = item.spec['include']
        self.assertNotIn(
          canonical(a['class'], a['position'][0], b['class']), splits.UNSEEN_RELATIONS
        )
      if vars(item).get('record', {}).get('type') == 'relation':
        a, b = (item.record[k].split()[-1] for k in 'ab')
        self.assertNotIn(canonical(a, item.record['r'], b), splits.UNSEEN_RELATIONS)

  def test_unseen_items_need_what_is_unseen(self):
    kinds = collections.Counter()
    for item in items('generate', 'unseen', 600):
      kinds[item.kind] += 1
      pairs = {(e['class'], e.get('color')) for e in item.spec['include']}
      needs = bool(pairs & splits.UNSEEN_PAIRS)
      if item.kind == 'position':
        b, a = item.spec['include']
        needs |= canonical(a['class'], a['position'][0], b['class']) in splits.UNSEEN_RELATIONS
      self.assertTrue(needs, item.caption)
    self.assertEqual(set(kinds), {'colors', 'color_attr', 'position'})

  def test_shapes_and_colors_stay_well_represented(self):
    for axis, values in ((0, render.SHAPES), (1, tuple(render.COLORS))):
      for value in values:
        self.assertLessEqual(sum(p[axis] == value for p in splits.UNSEEN_PAIRS), 1)

  def test_there_are_thousands_of_captions_and_each_kind_is_held_out(self):
    meanings = collections.defaultdict(set)
    for split, factor in (('train', 2), ('eval', 1)):
      for kind in world.GENERATE_KINDS:
        for index in range(factor * (2500 if kind == 'position' else 400)):
          meanings[kind, split].add(WORLD.generate(index, split, kind).meaning)
    for kind in world.GENERATE_KINDS:
      self.assertGreaterEqual(len(meanings[kind, 'eval']), 8, kind)
    total = sum(map(len, meanings.values()))
    self.assertGreater(total, 2000)
    held_out = sum(len(found) for (_, split), found in meanings.items() if split == 'eval')
    self.assertBetween(held_out / total, 0.15, 0.25)

  def test_meaning_ignores_wording(self):
    by_meaning = collections.defaultdict(set)
    for index in range(4000):
      item = WORLD.generate(index, 'train', 'position')
      b, a = item.spec['include']
      by_meaning[item.meaning].add(a['position'][0])
    relations = set(map(frozenset, by_meaning.values()))
    self.assertIn(frozenset({'left of', 'right of'}), relations)
    self.assertIn(frozenset({'above', 'below'}), relations)
    self.assertNotIn(frozenset({'left of', 'above'}), relations)

  def test_items_do_not_depend_on_the_process(self):
    program = (
      'from lvrpo_jax.data.shapes import world; w = world.World(3); '
      'print([w.generate(7, "eval"), w.question(10**12, "train"), w.edit(0, "unseen")])'
    )
    outputs = {
      subprocess.run(
        [sys.executable, '-c', program],
        check=True,
        capture_output=True,
        env={'PYTHONHASHSEED': seed, 'PYTHONPATH': ':'.join(sys.path)},
        text=True,
      ).stdout
      for seed in '12'
    }
    self.assertLen(outputs, 1)
    self.assertIn('GenerateItem', outputs.pop())

  def test_wrong_arguments(self):
    with self.assertRaises(ValueError):
      WORLD.generate(0, 'test')
    with self.assertRaises(ValueError):
      WORLD.generate(0, 'unseen', 'counting')
    with self.assertRaises(ValueError):
      world.World(eval_fraction=1.0)


class TextTest(parameterized.TestCase):
  @parameterized.product(task=('generate', 'question', 'edit'), split=splits.SPLITS)
  def test_texts_are_short_and_within_the_vocabulary(self, task, split):
    vocabulary = set(wording.vocabulary())
    rng = np.random.default_rng(0)
    for item in items(task, split, 500):
      texts = [text_of(item)]
      self.assertLessEqual(len(texts[0].split()), 14)
      if task == 'question':
        texts += [item.answer, item.plan, questions.web_answer(item, rng, 0.5, 0.5)]
        texts += [questions.statement(item.record, answer) for answer in wording.ANSWERS]
        self.assertIn(item.answer, wording.ANSWERS)
      else:
        texts += [question for question, _ in questions.derived_questions(item.spec)]
        self.assertEqual(json.loads(json.dumps(item.spec)), item.spec)
      for text in texts:
        self.assertEqual(text, ' '.join(text.lower().split()))
        self.assertLessEqual(set(text.split()), vocabulary, text)

  def test_vocabulary_is_small_and_content_words_belong_to_it(self):
    self.assertLess(len(wording.vocabulary()), 150)
    self.assertLessEqual(wording.CONTENT_WORDS, set(wording.vocabulary()))
    extra = {'think', 'answer', 'it', 'is', 'i', 'believe', 'maybe', 'the', '.', ';', ':', ','}
    self.assertLessEqual(extra, set(wording.vocabulary()))

  def test_scene_shows_exactly_what_the_caption_says(self):
    for split in splits.SPLITS:
      for item in items('generate', split):
        left = list(item.scene.objects)
        taken = []
        for entry in item.spec['include']:
          fits = [
            o for o in left if o.shape == entry['class'] and entry.get('color') in (None, o.color)
          ]
          self.assertLen(fits, entry['count'])
          if 'region' in entry:
            words = set(entry['region'].split())
            self.assertLessEqual(words, set(fits[0].corner.split()))
          if 'position' in entry:
            relation, other = entry['position']
            self.assertTrue(strictly(fits[0], relation, taken[other][0]))
          left = [o for o in left if o not in fits]
          taken.append(fits)
        self.assertEmpty(left)

  def test_free_colors_are_not_biased(self):
    counts = collections.defaultdict(collections.Counter)
    for index in range(3000):
      (item,) = WORLD.generate(index, 'train', 'single_object').scene.objects
      counts[item.shape][item.color] += 1
    for shape, colors in counts.items():
      expected = colors.total() / sum((shape, c) not in splits.UNSEEN_PAIRS for c in render.COLORS)
      for count in colors.values():
        self.assertLess(abs(count - expected), 4.5 * expected**0.5)


class QuestionTest(parameterized.TestCase):
  @parameterized.parameters(*splits.SPLITS)
  def test_answers(self, split):
    for item in items('question', split, 2000):
      self.assertEqual(recompute(item), item.answer, item.question)
      self.assertEqual(bool(item.plan), item.kind not in ('color', 'shape'))

  @parameterized.product(kind=('relation', 'compare'), split=('train', 'eval'))
  def test_yes_and_no_are_balanced(self, kind, split):
    yes = np.mean([WORLD.question(i, split, kind).answer == 'yes' for i in range(1600)])
    self.assertBetween(yes, 0.45, 0.55)  # four standard errors

  def test_plans_lead_to_the_answer(self):
    for index in range(800):
      item = WORLD.question(index, 'train', 'compare')
      counts, verdict = item.plan.split(' , ')
      for side in counts.split(' than '):
        *words, number = side.split()
        self.assertLen(words, wording.NUMBERS.index(number))
      self.assertEqual(item.answer == 'yes', verdict == item.record['r'])
      item = WORLD.question(index, 'train', 'relation')
      if item.record['type'] == 'relation':
        self.assertEqual(item.answer == 'yes', item.plan.split()[-1] in item.record['r'].split())
      for kind in ('count', 'reason'):
        item = WORLD.question(index, 'train', kind)
        if item.record['type'] in ('count', 'others'):
          named = item.plan.replace('nothing', '').split()
          self.assertEqual(item.answer, wording.NUMBERS[len(named) // 2])
        else:
          self.assertIn(item.answer, item.plan.split(' , ')[1].split())

  def test_a_description_names_every_cell(self):
    rng = np.random.default_rng(0)
    for index in range(200):
      scene = WORLD.question(index, 'train').scene
      prompt, text = questions.describe(scene, rng)
      self.assertIn(prompt, wording.DESCRIBE)
      cells = text.split(' , ')
      self.assertLen(cells, render.MAX_OBJECTS)
      self.assertEqual(
        {(cell, number) for number, cell in enumerate(cells) if cell != 'nothing'},
        {(f'{color} {shape}', cell) for shape, color, cell in scene.content()},
      )
      shapes_only = questions.reading(scene.objects, ('shape',)).split(' , ')
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
    for item in items('question', 'train', 300):
      reply = f'think : {item.plan} ; {item.answer}' if item.plan else item.answer
      self.assertEqual(read(reply), (item.answer, True))

  def test_web_answer(self):
    rng = np.random.default_rng(0)
    for item in items('question', 'train', 300):
      self.assertEqual(questions.web_answer(item, rng, 0.0, 0.0), item.answer)
      wrong = questions.web_answer(item, rng, 1.0, 0.0)
      self.assertIn(wrong, wording.ANSWERS)
      self.assertNotEqual(wrong, item.answer)
      chatty = questions.web_answer(item, rng, 0.0, 1.0)
      self.assertEqual(wording.read_answer(chatty), (item.answer, False))
    rates = [
      questions.web_answer(WORLD.question(0, 'train'), rng, 0.3, 0.0)
      != WORLD.question(0, 'train').answer
      for _ in range(1000)
    ]
    self.assertBetween(np.mean(rates), 0.25, 0.35)

  @parameterized.parameters('generate', 'edit')
  def test_derived_questions_hold_in_the_target_scene(self, task):
    for item in items(task, 'train', 800):
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
    fake = questions.QuestionItem(0, '', question, '', '', '', scene, table[question])
    return recompute(fake)


class EditTest(parameterized.TestCase):
  @parameterized.parameters(*splits.SPLITS)
  def test_the_rest_stays_identical(self, split):
    for item in items('edit', split):
      source, target = render.render(item.scene), render.render(item.target)
      before, after = item.scene.content(), item.target.content()
      cells = {cell for _, _, cell in before ^ after}
      for cell in range(4):
        row, col = divmod(cell, 2)
        window = np.s_[row * 16 : row * 16 + 16, col * 16 : col * 16 + 16]
        same = (source[window] == target[window]).all()
        self.assertEqual(same, cell not in cells)
      change = (len(before - after), len(after - before))
      self.assertEqual(
        change, {'recolor': (1, 1), 'remove': (1, 0), 'add': (0, 1), 'move': (1, 1)}[item.kind]
      )
      self.assertLen(item.spec['keep'], len(before & after))

  def test_instructions_name_one_object(self):
    for item in items('edit', 'train'):
      if item.kind == 'add':
        continue
      words = item.instruction.split()
      shape = next(i for i, w in enumerate(words) if w in render.SHAPES)
      color = words[shape - 1] if words[shape - 1] in render.COLORS else None
      named = [
        o for o in item.scene.objects if o.shape == words[shape] and color in (None, o.color)
      ]
      self.assertLen(named, 1)
      self.assertNotIn(named[0], item.target.objects)


class SpeedTest(absltest.TestCase):
  def test_an_item_takes_little_time(self):
    for draw in TASKS.values():
      start = time.process_time()
      for index in range(200):
        render.render(draw(index, 'eval').scene)
      self.assertLess((time.process_time() - start) / 200, 1.5e-3)


if __name__ == '__main__':
  absltest.main()
