"""Reads the text of a compiled program, HLO: computations, instructions, shapes, loops, groups."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

Computation = dict[str, 'Instruction']
Module = dict[str, Computation]


class Shape(NamedTuple):
  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.dims)


class Instruction(NamedTuple):
  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # of the result, tuples flattened
  operands: str  # what is between the parentheses
  text: str  # what follows them
  is_root: bool = False  # what its computation returns

  @property
  def callees(self) -> list[str]:
    """The computations it runs; the scalar ones of reductions and the like never hold a matmul."""
    if self.opcode not in ('while', 'conditional', 'fusion', 'call', 'custom-call', 'async-start'):
      return []
    found = re.findall(
      r'\b(?:calls|to_apply|body|condition|true_computation|false_computation'
      r'|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)',
      self.text,
    )
    return [name for group in found for name in re.findall(r'[\w.-]+', group)]

  @property
  def operand_names(self) -> list[str]:
    # Some printers write the operands' types in place as well.
    return re.findall(r'[\w.-]+', re.sub(r'[a-z]\w*\[[\d,<=]*\](\{[^}]*\})?', '', self.operands))

  def attribute(self, name: str) -> str:
    """The computation or number that `name=` gives; '' without one."""
    match = re.search(rf'\b{name}=%?([\w.-]+)', self.text)
    return match[1] if match else ''

  @property
  def op_name(self) -> str:
    match = re.search(r'op_name="([^"]*)"', self.text)
    return match[1] if match else ''


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$')
_ASSIGNMENT = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = ')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<=]*)\]')


def parse(text: str) -> tuple[Module, str]:
  """HLO text -> ({computation: {instruction name: instruction}}, name of the entry)."""
  computations: Module = {}
  current, entry = None, ''
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and (assignment := _ASSIGNMENT.match(line)):
      rest = re.sub(r'/\*.*?\*/', '', line[assignment.end() :])
      made = _instruction(assignment[1], rest)
      current[made.name] = made._replace(is_root=line.lstrip().startswith('ROOT '))
  if not entry:
    raise ValueError('not an HLO module: it has no ENTRY computation')
  return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
  """Parses `type opcode(operands), attributes`."""
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  opcode, _, _ = rest[end:].strip().partition('(')
  start = rest.index('(', end)
  stop = _closing(rest, start)
  result = tuple(shapes(rest[:end]))
  return Instruction(name, opcode, result, rest[start + 1 : stop - 1], rest[stop:])


def _closing(text: str, start: int) -> int:
  """The position after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  raise ValueError(f'unbalanced parentheses in HLO: {text[:80]}')


def shapes(text: str) -> Iterator[Shape]:
  for dtype, dims in _SHAPE.findall(text):
    yield Shape(dtype, tuple(int(d) for d in re.findall(r'\d+', dims)))


def operand_shapes(instruction: Instruction, scope: Computation) -> list[Shape]:
  """Shapes of the operands, looked up by name."""
  return [shape for name in instruction.operand_names for shape in scope[name].shapes]


def shape_bytes(shape: Shape) -> int:
  bits = re.search(r'\d+', shape.dtype)
  per_element = 8 if shape.dtype == 'pred' else int(bits[0]) if bits else 0
  return math.ceil(shape.size * per_element / 8)


def ints(match: re.Match[str] | None) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', match[1])] if match else []


# Loops ------------------------------------------------------------------------------------------


def trip_count(loop: Instruction, scope: Computation, module: Module) -> int | None:
  """How often a `while` runs; None where neither the compiler nor its condition says.

  TPU programs carry no such note, but a loop of `scan` or `map` counts i = a, a + s, ... while
  i < n, with constants a, s and n.
  """
  if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
    return int(noted[1])
  condition, body = module[loop.attribute('condition')], module[loop.attribute('body')]
  initial = scope[loop.operand_names[0]]
  test, (counter, limit) = _binary(_root(condition), condition, module)
  if test.attribute('direction') != 'LT' or not _is_element(counter) or initial.opcode != 'tuple':
    return None
  initially = lambda element: _origin(initial.operand_names[int(element.attribute('index'))], scope)
  start = _constant(initially(counter))
  end = _constant(initially(limit) if _is_element(limit) else limit)
  update = _origin(_root(body).operand_names[int(counter.attribute('index'))], body)
  operation, terms = _binary(update, body, module)
  steps = [step for step in map(_constant, terms) if step is not None]
  if operation.opcode != 'add' or None in (start, end) or len(steps) != 1 or steps[0] < 1:
    return None
  return max(0, -((start - end) // steps[0]))


def _root(computation: Computation) -> Instruction:
  return next(instruction for instruction in computation.values() if instruction.is_root)


def _origin(name: str, scope: Computation) -> Instruction:
  """The instruction that computes what `name` holds, behind copies."""
  found = scope[name]
  while found.opcode in ('copy', 'copy-start', 'copy-done', 'bitcast'):
    found = scope[found.operand_names[0]]
  return found


def _binary(
  instruction: Instruction, scope: Computation, module: Module
) -> tuple[Instruction, list[Instruction | None]]:
  """(an operation of two operands, where these come from); a fusion is what it returns."""
  if instruction.opcode != 'fusion':
    origins = [_origin(name, scope) for name in instruction.operand_names if name in scope]
  else:
    outside = [_origin(name, scope) for name in instruction.operand_names]
    inside = module[instruction.callees[0]]
    instruction = _root(inside)
    origins = [_origin(name, inside) for name in instruction.operand_names if name in inside]
    origins = [outside[int(o.operands)] if o.opcode == 'parameter' else o for o in origins]
  return instruction, origins if len(origins) == 2 else [None, None]


def _is_element(instruction: Instruction | None) -> bool:
  return instruction is not None and instruction.opcode == 'get-tuple-element'


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != 'constant':
    return None
  return int(instruction.operands) if re.fullmatch(r'-?\d+', instruction.operands) else None


# Groups of devices ------------------------------------------------------------------------------


def first_group(instruction: Instruction) -> tuple[int, ...]:
  """The devices, by their place in the mesh, that the first group of a collective joins; () if all.

  The three spellings in use: lists `{{0,1},{2,3}}`, `[groups,size]<=[dims]T(order)`, and axes of a
  mesh `mesh['x'=2,'y'=4] {'y'}`.
  """
  text = instruction.text
  if match := re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}', text):
    return tuple(ints(match))
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text):
    dims = [int(n) for n in match[3].split(',')]
    order = [int(n) for n in match[4].split(',')] if match[4] else range(len(dims))
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return tuple(ids.reshape(int(match[1]), int(match[2]))[0].tolist())
  if match := re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}', text
  ):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
    ids = _device_order(match[2], math.prod(sizes.values())).reshape(list(sizes.values()))
    # An axis may be split: 'x':(2)4 are the 4 in the middle of what has 2 before it.
    joined = {
      name: (int(before or 1), int(size or sizes[name]))
      for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])
    }
    for axis, (name, size) in enumerate(sizes.items()):
      before, inside = joined.get(name, (size, 1))
      after = size // (before * inside)
      ids = np.take(ids, np.arange(inside) * after, axis=axis)
    return tuple(ids.reshape(-1).tolist())
  return ()


def _device_order(text: str | None, count: int) -> np.ndarray:
  """The devices of a mesh in its order: '[2,2]T(1,0', '1,0,3,2', or None for their own."""
  if not text:
    return np.arange(count)
  if match := re.match(r'\[([\d,]+)\](?:T\(([\d,]+))?', text):
    ids = np.arange(count).reshape([int(n) for n in match[1].split(',')])
    return ids.transpose([int(n) for n in match[2].split(',')]) if match[2] else ids
  return np.array([int(n) for n in text.split(',')])


def axes_of(group: tuple[int, ...], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes along which the devices of a group differ; all axes of more than one for ()."""
  sizes = tuple(mesh_shape.values())
  if not group:
    return tuple(name for name, size in mesh_shape.items() if size > 1)
  places = np.unravel_index(group, sizes)
  return tuple(name for name, at in zip(mesh_shape, places) if np.ptp(at) > 0)
