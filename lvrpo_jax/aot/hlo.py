"""What a compiled program does, read from its text: bytes through memory and through the network.

Loops count as often as they run: XLA's own cost analysis counts their bodies once.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import dataclasses
import math
import re
from typing import NamedTuple

WIDTHS = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  'f8e4m3fn': 1,
  'f8e5m2': 1,
  's16': 2,
  'u16': 2,
  'f16': 2,
  'bf16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
}
"""Bytes of an element."""

COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'^((?:\((?:[^()]|\([^()]*\))*\)|\S+)) ([\w\-]+)\(')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|body|condition|to_apply)=%?([\w.\-]+)')
_LISTED = re.compile(r'(?:branch_computations|called_computations|calls)=\{([^}]*)\}')
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_GROUPS = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
_INTEGER = re.compile(r'[su]\d+\[\]')
_AXIS = re.compile(r"'(\w+)'=(\d+)")


@dataclasses.dataclass
class Instruction:
  """One line of a program: name, opcode, text of its result's shape, and the whole line."""

  name: str
  opcode: str
  shape: str
  line: str


Program = dict[str, list[Instruction]]
"""Instructions of every computation."""


class Affine(NamedTuple):
  """An integer: an element of a loop's state (None: nothing) plus a constant."""

  element: int | None
  added: int


class Computation:
  """A computation by the names of its instructions.

  Attributes:
    given: what is known of its parameters, by number; that of a loop is the state, a tuple.
  """

  def __init__(self, body: list[Instruction], program: Program, given: dict[int, Affine | None]):
    self.body = {i.name: i for i in body}
    self.root = next((i for i in body if i.line.lstrip().startswith('ROOT ')), None)
    self.program = program
    self.given = given


def size(shape: str) -> float:
  """Bytes of a shape, tuples added up; control values such as tokens have none."""
  total = 0.0
  for kind, dims in _SHAPE.findall(shape):
    count = 1
    for dim in dims.split(','):
      count *= int(dim) if dim else 1
    total += WIDTHS.get(kind, 0) * count
  return total


def computations(text: str) -> tuple[str, Program]:
  """Name of the entry, and the instructions of every computation."""
  out: Program = {}
  current, entry = None, ''
  for line in text.splitlines():
    if line.rstrip().endswith('{') and ' = ' not in line.split('{')[0].split('(')[0]:
      name = line.split('(')[0].replace('ENTRY', '').strip().lstrip('%')
      name = name.split(' ')[0]
      if name and not line.startswith('HloModule'):
        current = out.setdefault(name, [])
        entry = name if line.startswith('ENTRY') else entry
      continue
    found = _INSTRUCTION.match(line)
    if current is None or not found:
      continue
    opcode = _OPCODE.match(found[2])
    if opcode:
      current.append(Instruction(found[1], opcode[2], opcode[1], line))
  return entry, out


def _arguments(i: Instruction) -> str:
  return i.line.split(f' {i.opcode}(', 1)[1].split('), ')[0]


def _names(i: Instruction) -> list[str]:
  """Names of the operands."""
  return re.findall(r'%([\w.\-]+)', _arguments(i))


def calls(i: Instruction) -> list[str]:
  """Names of the computations that an instruction runs."""
  lists = ''.join(found + ',' for found in _LISTED.findall(i.line))
  return _CALLED.findall(i.line) + re.findall(r'[\w.\-]+', lists)


def _scalar(name: str, within: Computation) -> Affine | None:
  """An integer of a computation as an element of the loop's state plus a constant, if it is one."""
  i = within.body.get(name)
  if i is None or not _INTEGER.match(i.shape):
    return None
  if i.opcode == 'constant':
    return Affine(None, int(re.search(r'constant\((-?\d+)\)', i.line)[1]))
  if i.opcode == 'parameter':
    return within.given.get(int(re.search(r'parameter\((\d+)\)', i.line)[1]))
  if i.opcode == 'get-tuple-element':
    source = within.body.get(_names(i)[0])
    state = source is not None and source.opcode == 'parameter'
    return Affine(int(re.search(r'\), index=(\d+)', i.line)[1]), 0) if state else None
  if i.opcode == 'fusion':
    inside = _inside(i, within)
    return _scalar(inside.root.name, inside)
  if i.opcode in ('copy', 'bitcast', 'convert'):
    return _scalar(_names(i)[0], within)
  if i.opcode not in ('add', 'subtract'):
    return None
  one, two = (_scalar(operand, within) for operand in _names(i))
  if one is None or two is None:
    return None
  if i.opcode == 'subtract':
    return Affine(one.element, one.added - two.added) if two.element is None else None
  if None not in (one.element, two.element):
    return None
  return Affine(one.element if two.element is None else two.element, one.added + two.added)


def _inside(i: Instruction, within: Computation) -> Computation:
  """What a fusion of a computation runs."""
  values = enumerate(_scalar(operand, within) for operand in _names(i))
  return Computation(within.program.get(calls(i)[0], []), within.program, dict(values))


def _bounds(within: Computation) -> Iterator[tuple[int, int, str]]:
  """Elements of the state that a condition compares with a constant: element, constant, how."""
  for i in within.body.values():
    if i.opcode == 'fusion':
      yield from _bounds(_inside(i, within))
    if i.opcode != 'compare':
      continue
    one, two = (_scalar(operand, within) for operand in _names(i))
    direction = re.search(r'direction=(\w+)', i.line)[1]
    if one and two and one.element is None:
      one, two, direction = two, one, direction.translate(str.maketrans('LG', 'GL'))
    if one and two and one.element is not None and two.element is None:
      yield one.element, two.added - one.added, direction


def passes(i: Instruction, outer: list[Instruction], program: Program) -> float | None:
  """How often a loop runs, at most where it can end early; None where its text does not say.

  Args:
    outer: the computation that holds the loop.
  """
  known = _TRIPS.search(i.line)
  if known:
    return float(known[1])
  # XLA:TPU does not say; a counted loop compares its counter with a constant. Where the text hides
  # what a counter starts from or adds, that is 0 and 1.
  condition, body = (
    Computation(program.get(re.search(rf'{part}=%?([\w.\-]+)', i.line)[1], []), program, {})
    for part in ('condition', 'body')
  )
  around = Computation(outer, program, {})
  given, out = around.body.get(_names(i)[0]), []
  for element, limit, direction in _bounds(condition):
    start = _element(given, element, around)
    after = _element(body.root, element, body) or Affine(element, 1)
    first = start.added if start and start.element is None else 0
    step = after.added if after.element == element else 0
    limit += {'LE': 1, 'GE': -1}.get(direction, 0)
    up, down = direction in ('LT', 'LE', 'NE'), direction in ('GT', 'GE', 'NE')
    if up and step > 0 or down and step < 0:
      out.append(max(math.ceil((limit - first) / step), 0))
  return float(min(out)) if out else None


def _element(made: Instruction | None, number: int, within: Computation) -> Affine | None:
  """An element of a tuple that a computation makes."""
  if made is None or made.opcode != 'tuple':
    return None
  return _scalar(_names(made)[number], within)


def unknown_loops(text: str) -> list[str]:
  """Names of the loops whose number of passes a program does not tell."""
  _, program = computations(text)
  return [
    i.name
    for body in program.values()
    for i in body
    if i.opcode == 'while' and passes(i, body, program) is None
  ]


def trips(text: str, unknown: int = 1) -> dict[str, float]:
  """How often every computation runs.

  Args:
    unknown: passes of a loop whose number the program does not tell, see `unknown_loops`.
  """
  entry, program = computations(text)
  out: dict[str, float] = collections.defaultdict(float)

  def visit(name: str, count: float):
    out[name] += count
    body = program.get(name, [])
    for i in body:
      factor = 1.0
      if i.opcode == 'while':
        found = passes(i, body, program)
        factor = float(unknown) if found is None else found
      for called in calls(i):
        visit(called, count * factor)

  visit(entry, 1.0)
  return out


def operands(i: Instruction, shapes: dict[str, str]) -> Iterator[str]:
  """Shapes of the operands of an instruction, given those of its computation by name."""
  for name in _names(i):
    if name in shapes:
      yield shapes[name]


def moved(kind: str, given: float, made: float, group: int) -> float:
  """Bytes that a chip receives in a collective, by the ring algorithm.

  Args:
    given, made: bytes of the chip's operands and results.
    group: chips that take part.
  """
  share = (group - 1) / group
  return {
    'all-gather': made * share,
    'reduce-scatter': given * share,
    'all-reduce': 2 * given * share,
    'all-to-all': given * share,
    'collective-permute': given,
  }[kind]


def group_size(line: str, chips: int) -> int:
  """Chips of one group of a collective."""
  listed, iota, mesh = _GROUPS.search(line), _IOTA.search(line), _MESH.search(line)
  if listed:
    return len(listed[1].split(','))
  if mesh:
    axes = dict(_AXIS.findall(mesh[1]))
    return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  return int(iota[2]) if iota else chips


def collectives(text: str, chips: int, unknown: int = 1) -> dict[str, float]:
  """Bytes that a chip receives in one run of a program, by kind of collective."""
  _, program = computations(text)
  out = dict.fromkeys(COLLECTIVES, 0.0)
  for name, count in trips(text, unknown).items():
    # XLA:TPU fuses an all-reduce with the slice that each chip keeps: a reduce-scatter.
    scattered = 'all-reduce-scatter' in name
    shapes = {i.name: i.shape for i in program.get(name, ())}
    for i in program.get(name, ()):
      kind = i.opcode.removesuffix('-start')
      if kind not in COLLECTIVES:
        continue
      given = sum(map(size, operands(i, shapes)))
      made = size(i.shape) - (given if i.opcode.endswith('-start') else 0)
      kind = 'reduce-scatter' if scattered and kind == 'all-reduce' else kind
      out[kind] += count * moved(kind, given, made, group_size(i.line, chips))
  return out


PASSIVE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
)
"""Opcodes that move nothing themselves."""
SLICES = ('dynamic-slice', 'gather', 'slice')


def memory_traffic(text: str, unknown: int = 1) -> float:
  """Bytes read and written by a chip: operands and results of every fused instruction.

  Of an operand that is only sliced, and of a result that is only updated, the part counts. What
  stays in fast memory between two instructions is counted too.
  """
  _, program = computations(text)
  control = ('while', 'conditional', 'call', 'async-start')
  fused = {
    called
    for body in program.values()
    for i in body
    if i.opcode not in control
    for called in calls(i)
  }
  total = 0.0
  for name, count in trips(text, unknown).items():
    if name in fused:
      continue
    shapes = {i.name: i.shape for i in program.get(name, ())}
    for i in program.get(name, ()):
      if i.opcode not in PASSIVE and not i.opcode.endswith('-done'):
        total += count * _traffic(i, program, shapes)
  return total


def _traffic(i: Instruction, program: Program, shapes: dict[str, str]) -> float:
  """Bytes of one instruction, among others of these shapes."""
  inside = program.get(calls(i)[0], []) if i.opcode == 'fusion' else [i]
  updates = [other for other in inside if other.opcode == 'dynamic-update-slice']
  written, skipped = size(i.shape), 0.0
  if updates and size(updates[-1].shape) == written:
    target, part = [*operands(updates[-1], {**shapes, **{o.name: o.shape for o in inside}})][:2]
    written, skipped = 2 * size(part), size(target)
  if i.opcode in SLICES:
    return 2 * written
  read = 0.0
  for number, shape in enumerate(operands(i, shapes)):
    whole = size(shape)
    if skipped and whole == skipped:
      skipped = 0.0
    else:
      read += _read(calls(i)[0], number, program) if i.opcode == 'fusion' else whole
  return written + read


def _read(name: str, number: int, program: Program) -> float:
  """Bytes that a fused computation reads of its parameter of this number."""
  inside = program.get(name, [])
  source = next(
    (i for i in inside if i.opcode == 'parameter' and f' parameter({number})' in i.line), None
  )
  if source is None:
    return 0.0
  whole, total = size(source.shape), 0.0
  for user in inside:
    for place in (n for n, found in enumerate(_names(user)) if found == source.name):
      if user.opcode in SLICES and place == 0:
        total += size(user.shape)
      elif user.opcode == 'fusion':
        total += _read(calls(user)[0], place, program)
      else:
        return whole
  return min(total, whole)
