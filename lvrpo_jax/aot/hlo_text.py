"""Parses the text of a compiled program into instructions by computation."""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import re

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
"""Element type: bytes."""

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'^((?:\((?:[^()]|\([^()]*\))*\)|\S+)) ([\w\-]+)\(')
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|body|condition|to_apply)=%?([\w.\-]+)')
_LISTED = re.compile(r'(?:branch_computations|called_computations|calls)=\{([^}]*)\}')


@dataclasses.dataclass
class Instruction:
  """One line of a program.

  Attributes:
    name: of the instruction and its result.
    opcode: such as 'fusion'.
    shape: text of the result's shape.
    line: the whole line.
  """

  name: str
  opcode: str
  shape: str
  line: str


Program = dict[str, list[Instruction]]
"""Instructions of every computation."""


def size(shape: str) -> float:
  """Returns the bytes of a shape, summed over a tuple; control values such as tokens have none."""
  total = 0.0
  for kind, dims in _SHAPE.findall(shape):
    count = 1
    for dim in dims.split(','):
      count *= int(dim) if dim else 1
    total += WIDTHS.get(kind, 0) * count
  return total


def computations(text: str) -> tuple[str, Program]:
  """Returns the name of the entry, and the instructions of every computation."""
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
      current.append(Instruction(name=found[1], opcode=opcode[2], shape=opcode[1], line=line))
  return entry, out


def first_group(pattern: str, line: str) -> str:
  """Returns the first group of a pattern in a line.

  Raises:
    ValueError: the line does not match.
  """
  found = re.search(pattern, line)
  if found is None:
    raise ValueError(f'the program has a line without {pattern!r}: {line!r}')
  return found[1]


def _arguments(op: Instruction) -> str:
  return op.line.split(f' {op.opcode}(', 1)[1].split('), ')[0]


def operand_names(op: Instruction) -> list[str]:
  """Returns the names of the operands."""
  return re.findall(r'%([\w.\-]+)', _arguments(op))


def calls(op: Instruction) -> list[str]:
  """Returns the names of the computations that an instruction runs."""
  lists = ''.join(found + ',' for found in _LISTED.findall(op.line))
  return _CALLED.findall(op.line) + re.findall(r'[\w.\-]+', lists)


def operands(op: Instruction, shapes: dict[str, str]) -> Iterator[str]:
  """Yields the shapes of an instruction's operands.

  Args:
    op: the instruction.
    shapes: name of an instruction of its computation: shape.
  """
  for name in operand_names(op):
    if name in shapes:
      yield shapes[name]
