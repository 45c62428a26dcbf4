"""The shapes world: splits, texts, captions and edits, recomputed independently."""

import collections
import itertools
import json
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from lvrpo_jax.data.shapes import questions
from lvrpo_jax.data.shapes import render
from lvrpo_jax.data.shapes import splits
from lvrpo_jax.data.shapes import wording
from lvrpo_jax.data.shapes import world
from tests.helpers import shapes_items


class SplitTest(parameterized.TestCase):
  @parameterized.parameters('generate', 'question', 'edit')
  def test_meanings_are_disjoint(self, task):
    meanings = {
      split: {item.meaning for item in shapes_items.items(task, split)} for split in splits.SPLITS
    }
    for a, b in itertools.combinations(splits.SPLITS, 2):
      self.assertEmpty(meanings[a] & meanings[b])

  def test_split_is_the_same_for_every_seed(self):
    other = world.World(seed=5)
    train = {shapes_items.WORLD.generate(i, 'train').meaning for i in range(shapes_items.COUNT)}
    self.assertEmpty(train & {other.generate(i, 'eval').meaning for i in range(shapes_items.COUNT)})
    self.assertNotEqual(
      [shapes_items.WORLD.generate(i, 'train').caption for i in range(20)],
      [other.generate(i, 'train').caption for i in range(20)],
    )

  @parameterized.product(task=('generate', 'question', 'edit'), split=('train', 'eval'))
  def test_unseen_stays_unseen(self, task, split):
    for item in shapes_items.items(task, split):
      for scene in shapes_items.scenes_of(item):
        for o in scene.objects:
          self.assertNotIn((o.shape, o.color), splits.UNSEEN_PAIRS)
        for a, b in itertools.permutations(scene.objects, 2):
          if a.col < b.col:
            self.assertNotIn((a.shape, 'left of', b.shape), splits.UNSEEN_RELATIONS)
          if a.row < b.row:
            self.assertNotIn((a.shape, 'above', b.shape), splits.UNSEEN_RELATIONS)
      words = shapes_items.text_of(item).split() + vars(item).get('plan', '').split()
      singular = {plural: shape for shape, plural in wording.PLURALS.items()}
      for color, shape in itertools.pairwise(words):
        self.assertNotIn((singular.get(shape, shape), color), splits.UNSEEN_PAIRS)
      if 'position' in json.dumps(vars(item).get('spec', {})):
        b, a = item.spec['include']
        self.assertNotIn(
          shapes_items.canonical(a['class'], a['position'][0], b['class']), splits.UNSEEN_RELATIONS
        )
      if vars(item).get('record', {}).get('type') == 'relation':
        a, b = (item.record[k].split()[-1] for k in 'ab')
        self.assertNotIn(shapes_items.canonical(a, item.record['r'], b), splits.UNSEEN_RELATIONS)

  def test_unseen_items_need_what_is_unseen(self):
    kinds = collections.Counter()
    for item in shapes_items.items('generate', 'unseen', 600):
      kinds[item.kind] += 1
      pairs = {(e['class'], e.get('color')) for e in item.spec['include']}
      needs = bool(pairs & splits.UNSEEN_PAIRS)
      if item.kind == 'position':
        b, a = item.spec['include']
        needs |= (
          shapes_items.canonical(a['class'], a['position'][0], b['class'])
          in splits.UNSEEN_RELATIONS
        )
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
          meanings[kind, split].add(shapes_items.WORLD.generate(index, split, kind).meaning)
    for kind in world.GENERATE_KINDS:
      self.assertGreaterEqual(len(meanings[kind, 'eval']), 8, kind)
    total = sum(map(len, meanings.values()))
    self.assertGreater(total, 2000)
    held_out = sum(len(found) for (_, split), found in meanings.items() if split == 'eval')
    self.assertBetween(held_out / total, 0.15, 0.25)

  def test_meaning_ignores_wording(self):
    by_meaning = collections.defaultdict(set)
    for index in range(4000):
      item = shapes_items.WORLD.generate(index, 'train', 'position')
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
      shapes_items.WORLD.generate(0, 'test')
    with self.assertRaises(ValueError):
      shapes_items.WORLD.generate(0, 'unseen', 'counting')
    with self.assertRaises(ValueError):
      world.World(eval_fraction=1.0)


class TextTest(parameterized.TestCase):
  @parameterized.product(task=('generate', 'question', 'edit'), split=splits.SPLITS)
  def test_texts_are_short_and_within_the_vocabulary(self, task, split):
    vocabulary = set(wording.vocabulary())
    rng = np.random.default_rng(0)
    for item in shapes_items.items(task, split, 500):
      texts = [shapes_items.text_of(item)]
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
      for item in shapes_items.items('generate', split):
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
            self.assertTrue(shapes_items.strictly(fits[0], relation, taken[other][0]))
          left = [o for o in left if o not in fits]
          taken.append(fits)
        self.assertEmpty(left)

  def test_free_colors_are_not_biased(self):
    counts = collections.defaultdict(collections.Counter)
    for index in range(3000):
      (item,) = shapes_items.WORLD.generate(index, 'train', 'single_object').scene.objects
      counts[item.shape][item.color] += 1
    for shape, colors in counts.items():
      expected = colors.total() / sum((shape, c) not in splits.UNSEEN_PAIRS for c in render.COLORS)
      for count in colors.values():
        self.assertLess(abs(count - expected), 4.5 * expected**0.5)


class EditTest(parameterized.TestCase):
  @parameterized.parameters(*splits.SPLITS)
  def test_the_rest_stays_identical(self, split):
    for item in shapes_items.items('edit', split):
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
    for item in shapes_items.items('edit', 'train'):
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
    for draw in shapes_items.TASKS.values():
      start = time.process_time()
      for index in range(200):
        render.render(draw(index, 'eval').scene)
      self.assertLess((time.process_time() - start) / 200, 1.5e-3)


if __name__ == '__main__':
  absltest.main()
