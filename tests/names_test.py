"""Names of tasks, rewards and objectives stand as strings in their own rooms and tables alone."""

import ast
import pathlib

from absl.testing import absltest

from lvrpo_jax.data import tasks
from lvrpo_jax.objectives import flow as flow_objectives
from lvrpo_jax.objectives import text as text_objectives
from lvrpo_jax.rewards import base as rewards

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / 'lvrpo_jax'

ROOMS = {
  # The shapes world is a data source: it makes examples of every task.
  'task': ({*tasks.TASKS, tasks.PLAN}, ('data/tasks.py', 'data/shapes/', 'runtime/renamed.py')),
  'reward': (set(rewards.TABLE), ('rewards/base.py', 'runtime/renamed.py')),
  'objective': (
    {*flow_objectives.OBJECTIVES, *text_objectives.OBJECTIVES},
    ('objectives/flow.py', 'objectives/text.py', 'runtime/renamed.py'),
  ),
}
"""Names of a kind, and the files and folders in which they may stand as strings."""

ELSEWHERE = {'runtime/validate.py': {'rules', 'remote', 'dense', 'knowledge', 'mutual', 'cispo'}}
"""Checks of a config that hold for one reward or objective alone."""


def strings(path):
  """(line, value) of all string constants of a file."""
  tree = ast.parse(path.read_text())
  return [
    (node.lineno, node.value)
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  ]


class NamesTest(absltest.TestCase):
  def test_names_stand_in_their_rooms(self):
    found = []
    for path in sorted(PACKAGE.rglob('*.py')):
      name = path.relative_to(PACKAGE).as_posix()
      for kind, (names, rooms) in ROOMS.items():
        if name.startswith(rooms):
          continue
        for line, value in strings(path):
          if value in names and value not in ELSEWHERE.get(name, ()):
            found.append(f'{name}:{line}: {kind} {value!r}')
    self.assertEqual(found, [])

  def test_rooms_exist(self):
    for _, rooms in ROOMS.values():
      for room in rooms:
        self.assertTrue((PACKAGE / room).exists(), room)


if __name__ == '__main__':
  absltest.main()
