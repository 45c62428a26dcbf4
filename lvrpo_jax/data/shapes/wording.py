"""Words of the shapes world: phrases, templates, the vocabulary, and the strict answer reader.

All text is lower case. Words are separated by single spaces, and punctuation is a word of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from lvrpo_jax.data.shapes import render

Item = TypeVar('Item')

MAX_WORDS = 14  # the longest caption, question or instruction

NUMBERS = ('zero', 'one', 'two', 'three', 'four')
PLURALS = {shape: shape + ('es' if shape.endswith('s') else 's') for shape in render.SHAPES}
RELATIONS = ('left of', 'right of', 'above', 'below')
INVERSE = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
HALVES = ('left', 'right', 'top', 'bottom')
REGIONS = render.CORNERS + HALVES
REGION_CELLS = {
  **{corner: (cell,) for cell, corner in enumerate(render.CORNERS)},
  'left': (0, 2),
  'right': (1, 3),
  'top': (0, 1),
  'bottom': (2, 3),
}
# The first phrase is the plain one, used by statements, derived questions and long captions.
REGION_PHRASES = {
  **{
    corner: (f'in the {corner}', f'in the {corner} corner', f'at the {corner}')
    for corner in render.CORNERS
  },
  'left': ('on the left', 'on the left side'),
  'right': ('on the right', 'on the right side'),
  'top': ('at the top', 'in the top half'),
  'bottom': ('at the bottom', 'in the bottom half'),
}
RELATION_PHRASES = {
  'left of': ('left of', 'to the left of'),
  'right of': ('right of', 'to the right of'),
  'above': ('above',),
  'below': ('below',),
}
ANSWERS = tuple(render.COLORS) + render.SHAPES + NUMBERS + ('yes', 'no')

# Captions. {p} is a noun phrase such as 'a red circle in the top left' or 'two circles'.
CAPTIONS = (
  'a photo of {p}',
  'a picture of {p}',
  'an image of {p}',
  'a drawing of {p}',
  '{p}',
  'draw {p}',
  'show {p}',
  'there {be} {p}',
  'an image with {p}',
  'please draw {p}',
)

QUESTIONS = {
  'color': (
    'what colour is the {a} ?',
    'which colour is the {a} ?',
    'what is the colour of the {a} ?',
    'the {a} is what colour ?',
    'which colour does the {a} have ?',
    'tell me the colour of the {a} .',
  ),
  'shape': (
    'what shape is {a} ?',
    'which shape is {a} ?',
    'what is the shape that is {a} ?',
    'what is the {a} shape ?',
    'which shape has the colour {a} ?',
    'tell me which shape is {a} .',
  ),
  'count': (
    'how many {a} are there ?',
    'how many {a} does the image show ?',
    'what is the number of {a} ?',
    'count the {a} .',
    'how many {a} do you see ?',
    'tell me how many {a} there are .',
  ),
  'relation': (
    'is the {a} {r} the {b} ?',
    'does the image show the {a} {r} the {b} ?',
    'do you see the {a} {r} the {b} ?',
    'is it true that the {a} is {r} the {b} ?',
  ),
  'region': (
    'is the {a} {r} ?',
    'does the image show the {a} {r} ?',
    'do you see the {a} {r} ?',
    'is it true that the {a} is {r} ?',
  ),
  'compare': (
    'are there {r} {a} than {b} ?',
    'does the image show {r} {a} than {b} ?',
    'do you see {r} {a} than {b} ?',
    'is it true that there are {r} {a} than {b} ?',
  ),
  'others': (
    'how many shapes are not {b} ?',
    'what is the number of shapes that are not {b} ?',
    'count the shapes that are not {b} .',
    'how many shapes do you see not in {b} ?',
  ),
  'neighbour_color': (
    'what colour is the shape {r} the {b} ?',
    'which colour is the shape {r} the {b} ?',
    'what is the colour of the shape {r} the {b} ?',
    'which colour does the shape {r} the {b} have ?',
  ),
  'neighbour_shape': (
    'what shape is {r} the {b} ?',
    'which shape is {r} the {b} ?',
    'what is the shape {r} the {b} ?',
    'tell me which shape is {r} the {b} .',
  ),
}

DESCRIBE = (
  'describe the image',
  'describe the picture',
  'what does the image show ?',
  'what do you see ?',
  'tell me what is in the image .',
)

EDITS = {
  'recolor': (
    'make {a} {c}',
    'change {a} to {c}',
    'paint {a} {c}',
    'turn {a} {c}',
    'change the colour of {a} to {c}',
    '{a} should be {c}',
  ),
  'remove': (
    'remove {a}',
    'delete {a}',
    'erase {a}',
    'take {a} away',
    'take away {a}',
    'make the image without {a}',
  ),
  'add': (
    'add a {a} {r}',
    'put a {a} {r}',
    'draw a {a} {r}',
    'place a {a} {r}',
    'there should be a {a} {r}',
    'please add a {a} {r}',
  ),
  'move': (
    'move {a} to {r}',
    'shift {a} to {r}',
    'put {a} {i}',
    'place {a} {i}',
    'take {a} to {r}',
    '{a} should be {i}',
  ),
}

STATEMENTS = {
  'color': 'the {a} is {answer}',
  'shape': 'the {a} shape is a {answer}',
  'count': 'there {be} {answer} {a}',
  'relation': 'the {a} is {not}{r} the {b}',
  'region': 'the {a} is {not}{r}',
  'compare': 'there are {not}{r} {a} than {b}',
  'others': 'there {be} {answer} {a} that {be} not {b}',
  'neighbour_color': 'the shape {r} the {b} is {answer}',
  'neighbour_shape': 'the shape {r} the {b} is a {answer}',
}

CHATTY = (
  'i believe it is {answer} .',
  'i think it is {answer} .',
  'maybe {answer} .',
  'the answer is {answer} .',
  'it is {answer} , i believe .',
  'maybe it is {answer} ?',
)

_EXTRA_WORDS = (
  'think answer nothing it is i believe maybe the a an and than not more fewer equal '
  'shape shapes background . ; : , ?'
)
_RELATION_WORDS = frozenset('left right above below'.split())
_REGION_WORDS = frozenset('left right top bottom'.split())

CONTENT_WORDS = (
  frozenset(render.SHAPES + tuple(PLURALS.values()) + tuple(render.COLORS) + NUMBERS)
  | _RELATION_WORDS
  | _REGION_WORDS
)


def vocabulary() -> tuple[str, ...]:
  """Returns all words that any text of the world can contain, sorted."""
  words = set(_EXTRA_WORDS.split()) | CONTENT_WORDS | set(ANSWERS) | {'are', 'yes', 'no'}
  families = [CAPTIONS, CHATTY, DESCRIBE, tuple(STATEMENTS.values())]
  for table in (QUESTIONS, EDITS, REGION_PHRASES, RELATION_PHRASES):
    families.extend(table.values())
  for family in families:
    for template in family:
      words.update(word for word in template.replace('}', '} ').split() if '{' not in word)
  return tuple(sorted(words))


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
  """Draws uniformly from a sequence; this is much faster than `rng.choice`."""
  return items[int(rng.random() * len(items))]


def pick_text(rng: np.random.Generator, texts: Sequence[str]) -> str:
  """Draws uniformly from the texts of at most MAX_WORDS words.

  Raises:
    ValueError: all texts are longer.
  """
  short = [text for text in texts if text.count(' ') < MAX_WORDS]
  if not short:
    raise ValueError(f'no wording fits {MAX_WORDS} words: {texts[0]!r}')
  return pick(rng, short)


def noun(shape: str | None, color: str | None, count: int = 1) -> str:
  """Names objects: 'red circle', 'circles', 'red shapes'; a missing class is called 'shape'."""
  if shape is None:
    name = 'shape' if count == 1 else 'shapes'
  else:
    name = shape if count == 1 else PLURALS[shape]
  return f'{color} {name}' if color else name


def singular(text: str) -> str:
  """Puts the last word of a noun phrase into the singular: 'red circles' to 'red circle'."""
  head, _, last = text.rpartition(' ')
  names = {plural: shape for shape, plural in PLURALS.items()} | {'shapes': 'shape'}
  return f'{head} {names[last]}'.strip()


def read_answer(text: str) -> tuple[str | None, bool]:
  """Reads a reply as (answer word or None, whether the reply is well-formed).

  A well-formed reply is exactly one answer word, or 'think : <plan> ; <answer>' with a plan that
  is not empty. From any other text the last answer word is taken, and the flag is False.
  """
  words = text.split()
  if len(words) == 1 and words[0] in ANSWERS:
    return words[0], True
  planned = (
    len(words) >= 5
    and words[:2] == ['think', ':']
    and words[-2] == ';'
    and words.count(';') == 1
    and words.count('think') == 1
  )
  if planned and words[-1] in ANSWERS:
    return words[-1], True
  answers = [word for word in words if word in ANSWERS]
  return (answers[-1] if answers else None), False
