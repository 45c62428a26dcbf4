"""Files import only from layers below them, and stay small; read from the source, nothing is run."""

import ast
import collections
from collections.abc import Iterable
import graphlib
import pathlib
import textwrap

from absl.testing import absltest
from absl.testing import parameterized

PACKAGE = 'lvrpo_jax'
ROOT = pathlib.Path(__file__).resolve().parents[1] / PACKAGE

LAYERS = (
  ('types', 'ops', 'flow', 'symbols'),
  ('parallel',),
  ('data', 'models'),
  ('objectives', 'runtime'),
  ('rollouts', 'rewards'),
  ('evaluation',),
  ('training', 'reports'),
  ('programs', 'aot'),
  ('main', 'saved', 'study_tables', 'summary'),
)
"""Packages by layer, the lowest first. Those of one layer do not see each other."""


def room(module: str) -> str:
  """'lvrpo_jax.data.shapes' to 'data'."""
  return module.split('.')[1]


def layer(module: str) -> int:
  """Number of the layer of a module.

  Raises:
    KeyError: no layer holds it.
  """
  for number, rooms in enumerate(LAYERS):
    if room(module) in rooms:
      return number
  raise KeyError(f'{module} stands in no layer; add its room to LAYERS')


def imports(module: str, tree: ast.AST, modules: set[str]) -> set[str]:
  """Modules of the project that a syntax tree imports."""
  out = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      out |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ''
      if node.level:
        parents = module.split('.')[: -node.level]
        base = '.'.join(parents + ([base] if base else []))
      names = {f'{base}.{alias.name}' for alias in node.names}
      # `from package import module` names modules, `from module import name` does not.
      out |= {name if name in modules else base for name in names}
  return {name for name in out if name.split('.')[0] == PACKAGE and name != PACKAGE}


def local_imports(module: str, tree: ast.AST, modules: set[str]) -> set[str]:
  """Modules of the project that are imported inside functions."""
  functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
  return set().union(
    *(imports(module, node, modules) for node in ast.walk(tree) if isinstance(node, functions))
  )


def violations(sources: dict[str, str]) -> list[str]:
  """What is wrong with the imports of modules, by name and source."""
  modules, out, graph = set(sources), [], {}
  for module, source in sorted(sources.items()):
    tree = ast.parse(source)
    graph[module] = imports(module, tree, modules)
    for other in sorted(graph[module]):
      if other not in modules:
        out.append(f'{module} imports {other}, which does not exist')
      elif layer(other) > layer(module):
        out.append(f'{module} imports upward: {other}')
      elif layer(other) == layer(module) and room(other) != room(module):
        out.append(f'{module} imports sideways: {other}')
    for other in sorted(local_imports(module, tree, modules)):
      out.append(f'{module} imports {other} inside a function')
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    out.append('cycle: ' + ' -> '.join(error.args[1]))
  return out


MAX_MODULES, MAX_LINES, MAX_FUNCTION, MAX_LAMBDAS = 14, 400, 80, 4
"""Modules of a folder, lines of a file and of a function; lambdas stay below so many in 1,000 lines."""


def parsed(sources: dict[str, str]) -> dict[str, ast.Module]:
  """Syntax trees by dotted name."""
  return {module: ast.parse(source) for module, source in sources.items()}


def folder_sizes(modules: Iterable[str]) -> dict[str, int]:
  """Number of modules by dotted name of their folder."""
  return dict(collections.Counter(module.rpartition('.')[0] for module in modules))


def function_sizes(trees: dict[str, ast.Module]) -> dict[str, int]:
  """Lines of every function, decorators and docstring included."""
  return {
    f'{module}:{node.name}:{node.lineno}': node.end_lineno
    - min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    + 1
    for module, tree in trees.items()
    for node in ast.walk(tree)
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
  }


def lambdas(trees: dict[str, ast.Module]) -> dict[str, int]:
  """Number of lambdas by module."""
  counts = {
    module: sum(isinstance(node, ast.Lambda) for node in ast.walk(tree))
    for module, tree in trees.items()
  }
  return {module: count for module, count in counts.items() if count}


def named_lambdas(trees: dict[str, ast.Module]) -> list[str]:
  """Where a lambda is given a name."""
  return [
    f'{module}:{node.lineno}'
    for module, tree in trees.items()
    for node in ast.walk(tree)
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr))
    and isinstance(node.value, ast.Lambda)
  ]


def above(sizes: dict[str, int], limit: int) -> dict[str, int]:
  """What is larger than a limit."""
  return {name: size for name, size in sizes.items() if size > limit}


def project() -> dict[str, str]:
  """Sources of all modules by dotted name."""
  out = {}
  for path in ROOT.rglob('*.py'):
    parts = path.relative_to(ROOT.parent).with_suffix('').parts
    if parts[-1] != '__init__':
      out['.'.join(parts)] = path.read_text()
    elif path.read_text().strip():
      raise AssertionError(f'{path} must be empty: it would run on every import below it')
  return out


class LayeringTest(parameterized.TestCase):
  def test_project(self):
    sources = project()
    self.assertGreater(len(sources), 40)
    self.assertEqual(violations(sources), [])

  def test_every_room_exists(self):
    rooms = {room(module) for module in project()}
    self.assertEqual(rooms, {name for names in LAYERS for name in names})

  @parameterized.named_parameters(
    ('upward', {'types': 'from lvrpo_jax import main', 'main': ''}, 'imports upward'),
    (
      'upward_by_name',
      {'data.a': 'from lvrpo_jax.training import sum', 'training.sum': ''},
      'imports upward',
    ),
    (
      'upward_plain',
      {'training.a': 'import lvrpo_jax.programs.run', 'programs.run': ''},
      'imports upward',
    ),
    ('upward_relative', {'data.a': 'from .. import main', 'main': ''}, 'imports upward'),
    ('sideways', {'data.a': 'from lvrpo_jax.models import b', 'models.b': ''}, 'sideways'),
    (
      'sideways_rooms',
      {'rewards.a': 'from lvrpo_jax.rollouts.b import f', 'rollouts.b': ''},
      'sideways',
    ),
    (
      'cycle',
      {'data.a': 'from lvrpo_jax.data import b', 'data.b': 'import lvrpo_jax.data.a'},
      'cycle',
    ),
    ('inside', {'main': 'def f():\n  from lvrpo_jax import types', 'types': ''}, 'inside'),
    ('missing', {'main': 'from lvrpo_jax.data import gone'}, 'does not exist'),
  )
  def test_fault_is_found(self, sources, message):
    sources = {f'{PACKAGE}.{name}': textwrap.dedent(text) for name, text in sources.items()}
    found = violations(sources)
    self.assertLen(found, 1)
    self.assertIn(message, found[0])

  def test_good_imports_pass(self):
    sources = {
      'lvrpo_jax.data.a': 'from lvrpo_jax import types\nimport numpy',
      'lvrpo_jax.types': '',
      'lvrpo_jax.rewards.b': 'from lvrpo_jax.data.a import f',
      'lvrpo_jax.programs.run': 'from lvrpo_jax.training import align',
      'lvrpo_jax.training.align': '',
    }
    self.assertEqual(violations(sources), [])

  def test_unknown_room_is_named(self):
    with self.assertRaisesRegex(KeyError, 'lvrpo_jax.novel'):
      violations({'lvrpo_jax.novel': 'from lvrpo_jax import types', 'lvrpo_jax.types': ''})


class SizesTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.sources = project()
    cls.trees = parsed(cls.sources)
    cls.lines = {module: len(source.splitlines()) for module, source in cls.sources.items()}

  def test_folders(self):
    self.assertEqual(above(folder_sizes(self.sources), MAX_MODULES), {})

  def test_files(self):
    self.assertEqual(above(self.lines, MAX_LINES), {})

  def test_functions(self):
    self.assertEqual(above(function_sizes(self.trees), MAX_FUNCTION), {})

  def test_lambdas(self):
    self.assertEqual(named_lambdas(self.trees), [])
    found = lambdas(self.trees)
    share = 1000 * sum(found.values()) / sum(self.lines.values())
    self.assertLess(share, MAX_LAMBDAS, sorted(found.items(), key=lambda pair: -pair[1])[:10])

  def test_what_is_counted(self):
    source = """\
    f = lambda x: x
    g: object = lambda: 0

    @decorator
    def h():
      return map(lambda x: x, [])
    """
    trees = parsed({'lvrpo_jax.data.a': textwrap.dedent(source)})
    self.assertEqual(
      folder_sizes(['lvrpo_jax.data.a', 'lvrpo_jax.main']), {'lvrpo_jax.data': 1, 'lvrpo_jax': 1}
    )
    self.assertEqual(function_sizes(trees), {'lvrpo_jax.data.a:h:5': 3})
    self.assertEqual(lambdas(trees), {'lvrpo_jax.data.a': 3})
    self.assertEqual(named_lambdas(trees), ['lvrpo_jax.data.a:1', 'lvrpo_jax.data.a:2'])
    self.assertEqual(above({'a': 3, 'b': 4}, 3), {'b': 4})


if __name__ == '__main__':
  absltest.main()
