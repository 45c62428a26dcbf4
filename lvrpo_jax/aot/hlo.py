"""Reads from the text of a compiled program the bytes it moves through memory and the network.

A loop's body counts as often as it runs; XLA's own cost analysis counts it once.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
import math
import re
from typing import NamedTuple

from lvrpo_jax.aot import hlo_text

COLLECTIVES = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')

_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_GROUPS = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_IOTA = re.compile(r'replica_groups=\[(\d+),(\d+)\]')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
_INTEGER = re.compile(r'[su]\d+\[\]')
_AXIS = re.compile(r"'(\w+)'=(\d+)")


class Affine(NamedTuple):
  """An integer: an element of a loop's state plus a constant.

  Attributes:
    element: index into the state; None where the integer is the constant alone.
    added: the constant.
  """

  element: int | None
  added: int


class Computation:
  """A computation whose instructions are found by name.

  Attributes:
    body: instructions by name.
    root: the instruction whose result the computation returns, if it has one.
    program: the program around it.
    given: integer parameters that are known, by index. The parameter of a loop is its state, a
      tuple.
  """

  def __init__(
    self,
    body: list[hlo_text.Instruction],
    program: hlo_text.Program,
    given: dict[int, Affine | None],
  ):
    """Indexes the instructions of a body."""
    self.body = {op.name: op for op in body}
    self.root = next((op for op in body if op.line.lstrip().startswith('ROOT ')), None)
    self.program = program
    self.given = given


def _scalar(name: str, within: Computation) -> Affine | None:
  """Returns the integer of this name, None where it is no element of the state plus a constant."""
  op = within.body.get(name)
  if op is None or not _INTEGER.match(op.shape):
    return None
  if op.opcode == 'constant':
    return Affine(element=None, added=int(hlo_text.first_group(r'constant\((-?\d+)\)', op.line)))
  if op.opcode == 'parameter':
    return within.given.get(int(hlo_text.first_group(r'parameter\((\d+)\)', op.line)))
  if op.opcode == 'get-tuple-element':
    source = within.body.get(hlo_text.operand_names(op)[0])
    if source is None or source.opcode != 'parameter':
      return None
    return Affine(element=int(hlo_text.first_group(r'\), index=(\d+)', op.line)), added=0)
  if op.opcode == 'fusion':
    inside = _inside(op, within)
    return _scalar(inside.root.name, inside) if inside.root else None
  if op.opcode in ('copy', 'bitcast', 'convert'):
    return _scalar(hlo_text.operand_names(op)[0], within)
  if op.opcode not in ('add', 'subtract'):
    return None
  one, two = (_scalar(operand, within) for operand in hlo_text.operand_names(op))
  if one is None or two is None:
    return None
  if op.opcode == 'subtract':
    return Affine(one.element, one.added - two.added) if two.element is None else None
  if None not in (one.element, two.element):
    return None
  return Affine(one.element if two.element is None else two.element, one.added + two.added)


def _inside(op: hlo_text.Instruction, within: Computation) -> Computation:
  """Returns the computation that a fusion runs, with the integers it is given."""
  values = enumerate(_scalar(operand, within) for operand in hlo_text.operand_names(op))
  return Computation(within.program.get(hlo_text.calls(op)[0], []), within.program, dict(values))


def _bounds(within: Computation) -> Iterator[tuple[int, int, str]]:
  """Yields (element, constant, direction) where a condition compares the state with a constant."""
  for op in within.body.values():
    if op.opcode == 'fusion':
      yield from _bounds(_inside(op, within))
    if op.opcode != 'compare':
      continue
    one, two = (_scalar(operand, within) for operand in hlo_text.operand_names(op))
    direction = hlo_text.first_group(r'direction=(\w+)', op.line)
    if one and two and one.element is None:
      one, two, direction = two, one, direction.translate(str.maketrans('LG', 'GL'))
    if one and two and one.element is not None and two.element is None:
      yield one.element, two.added - one.added, direction


def passes(
  op: hlo_text.Instruction, outer: list[hlo_text.Instruction], program: hlo_text.Program
) -> float | None:
  """Returns how often a loop's body runs, an upper bound where the loop can end early.

  Args:
    op: the loop.
    outer: the computation that holds it.
    program: the program around it.

  Returns:
    The number, or None where the text does not determine it.
  """
  known = _TRIPS.search(op.line)
  if known:
    return float(known[1])
  # XLA:TPU writes no count; there a counted loop compares its counter with a constant. Where the
  # text hides the start of a counter or its step, 0 and 1 are taken.
  condition, body = (
    Computation(
      program.get(hlo_text.first_group(rf'{part}=%?([\w.\-]+)', op.line), []), program, {}
    )
    for part in ('condition', 'body')
  )
  around = Computation(outer, program, {})
  given, out = around.body.get(hlo_text.operand_names(op)[0]), []
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


def _element(made: hlo_text.Instruction | None, index: int, within: Computation) -> Affine | None:
  """Returns an element of the tuple that an instruction makes."""
  if made is None or made.opcode != 'tuple':
    return None
  return _scalar(hlo_text.operand_names(made)[index], within)


def unknown_loops(text: str) -> list[str]:
  """Returns the names of the loops whose number of passes the text does not determine."""
  _, program = hlo_text.computations(text)
  return [
    op.name
    for body in program.values()
    for op in body
    if op.opcode == 'while' and passes(op, body, program) is None
  ]


def trips(text: str, unknown: int = 1) -> dict[str, float]:
  """Counts how often every computation runs.

  Args:
    text: of the compiled program.
    unknown: passes of a loop whose number the text does not determine, see `unknown_loops`.
  """
  entry, program = hlo_text.computations(text)
  out: dict[str, float] = collections.defaultdict(float)

  def visit(name: str, count: float) -> None:
    out[name] += count
    body = program.get(name, [])
    for op in body:
      factor = 1.0
      if op.opcode == 'while':
        found = passes(op, body, program)
        factor = float(unknown) if found is None else found
      for called in hlo_text.calls(op):
        visit(called, count * factor)

  visit(entry, 1.0)
  return out


def moved(kind: str, given: float, made: float, group: int) -> float:
  """Returns the bytes that a chip receives in a collective, by the ring algorithm.

  Args:
    kind: one of `COLLECTIVES`.
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
  """Returns the number of chips in one group of a collective."""
  listed, iota, mesh = _GROUPS.search(line), _IOTA.search(line), _MESH.search(line)
  if listed:
    return len(listed[1].split(','))
  if mesh:
    axes = dict(_AXIS.findall(mesh[1]))
    return math.prod(int(axes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
  return int(iota[2]) if iota else chips


def collectives(text: str, chips: int, unknown: int = 1) -> dict[str, float]:
  """Returns the bytes that a chip receives in one run of a program, by kind of collective."""
  _, program = hlo_text.computations(text)
  out: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
  for name, count in trips(text, unknown).items():
    # XLA:TPU writes a reduce-scatter as an all-reduce fused with the slice that each chip keeps.
    scattered = 'all-reduce-scatter' in name
    shapes = {op.name: op.shape for op in program.get(name, ())}
    for op in program.get(name, ()):
      kind = op.opcode.removesuffix('-start')
      if kind not in COLLECTIVES:
        continue
      given = sum(map(hlo_text.size, hlo_text.operands(op, shapes)))
      made = hlo_text.size(op.shape) - (given if op.opcode.endswith('-start') else 0)
      kind = 'reduce-scatter' if scattered and kind == 'all-reduce' else kind
      out[kind] += count * moved(kind, given, made, group_size(op.line, chips))
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
"""Opcodes that read a part of their first operand."""


def memory_traffic(text: str, unknown: int = 1) -> float:
  """Returns the bytes that a chip reads and writes: operands and results of every instruction.

  A fusion counts as one instruction. Of an operand that is only sliced, and of a result that is
  only updated, the part counts. What stays in fast memory between two instructions counts too.
  """
  _, program = hlo_text.computations(text)
  control = ('while', 'conditional', 'call', 'async-start')
  fused = {
    called
    for body in program.values()
    for op in body
    if op.opcode not in control
    for called in hlo_text.calls(op)
  }
  total = 0.0
  for name, count in trips(text, unknown).items():
    if name in fused:
      continue
    shapes = {op.name: op.shape for op in program.get(name, ())}
    for op in program.get(name, ()):
      if op.opcode not in PASSIVE and not op.opcode.endswith('-done'):
        total += count * _traffic(op, program, shapes)
  return total


def _traffic(op: hlo_text.Instruction, program: hlo_text.Program, shapes: dict[str, str]) -> float:
  """Returns the bytes of one instruction; `shapes` are those of its computation by name."""
  inside = program.get(hlo_text.calls(op)[0], []) if op.opcode == 'fusion' else [op]
  updates = [other for other in inside if other.opcode == 'dynamic-update-slice']
  written, skipped = hlo_text.size(op.shape), 0.0
  if updates and hlo_text.size(updates[-1].shape) == written:
    known = {**shapes, **{other.name: other.shape for other in inside}}
    target, part = [*hlo_text.operands(updates[-1], known)][:2]
    written, skipped = 2 * hlo_text.size(part), hlo_text.size(target)
  if op.opcode in SLICES:
    return 2 * written
  read = 0.0
  for index, shape in enumerate(hlo_text.operands(op, shapes)):
    whole = hlo_text.size(shape)
    if skipped and whole == skipped:
      skipped = 0.0
    else:
      read += _read(hlo_text.calls(op)[0], index, program) if op.opcode == 'fusion' else whole
  return written + read


def _read(name: str, index: int, program: hlo_text.Program) -> float:
  """Returns the bytes that a fused computation reads from its parameter of this index."""
  inside = program.get(name, [])
  source = next(
    (op for op in inside if op.opcode == 'parameter' and f' parameter({index})' in op.line), None
  )
  if source is None:
    return 0.0
  whole, total = hlo_text.size(source.shape), 0.0
  for user in inside:
    for place, found in enumerate(hlo_text.operand_names(user)):
      if found != source.name:
        continue
      if user.opcode in SLICES and place == 0:
        total += hlo_text.size(user.shape)
      elif user.opcode == 'fusion':
        total += _read(hlo_text.calls(user)[0], place, program)
      else:
        return whole
  return min(total, whole)
