"""What a compiled program really does: matmul FLOPs, collectives and memory, counted from its text.

XLA's own cost analysis visits the body of a loop once, so a scan over 2 layers and one over 32
report the same number. Here the optimized HLO is walked from its entry, and whatever a loop body
holds counts as often as the loop runs. All numbers are those of one device.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple


class Collective(NamedTuple):
  """One communication instruction.

  Attributes:
    kind: 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', ...
    bytes: size of the whole array on one device: what goes in, or for a gather what comes out.
    count: how often one call of the program runs it.
    name: where it comes from, e.g. 'jit(step)/reduce_max'; '' when the compiler does not say.
  """

  kind: str
  bytes: int
  count: int
  name: str = ''


class UncountableError(ValueError):
  """A matmul or collective runs as often as the data say."""


class Costs(NamedTuple):
  """Costs of one call on one device. Elementwise work is not in `matmul_flops`."""

  matmul_flops: int
  collectives: tuple[Collective, ...]
  argument_bytes: int
  output_bytes: int
  temp_bytes: int


def costs(compiled: Any) -> Costs:
  """Counts a `jax.jit(f).lower(...).compile()`.

  Raises:
    UncountableError: a loop with a matmul or collective whose trip count the compiler does not
      know.
    ValueError: the program hides a matmul or collective elsewhere (an unknown library call).
  """
  flops, collectives = count_hlo(compiled.as_text())
  memory = compiled.memory_analysis()
  size = lambda kind: int(getattr(memory, f'{kind}_size_in_bytes', 0))
  return Costs(flops, collectives, size('argument'), size('output'), size('temp'))


def extra_collectives(base: Costs, other: Costs) -> tuple[Collective, ...]:
  """The collectives of `other` that `base` lacks, matched by kind and size."""
  rest = Counter()
  for c in base.collectives:
    rest[c.kind, c.bytes] += c.count
  extra = []
  for c in other.collectives:
    matched = min(c.count, rest[c.kind, c.bytes])
    rest[c.kind, c.bytes] -= matched
    if c.count > matched:
      extra.append(c._replace(count=c.count - matched))
  return tuple(extra)


def format_costs(value: Costs) -> str:
  """A few aligned lines for people."""
  arguments, outputs, temporary = (_si(size, 'B') for size in value[2:])
  lines = [
    f'matmul     {_si(value.matmul_flops, "FLOP")} per device',
    f'memory     {arguments} arguments, {outputs} outputs, {temporary} temporary',
  ]
  totals: dict[str, list[int]] = {}
  for c in value.collectives:
    total = totals.setdefault(c.kind, [0, 0])
    total[0] += c.count
    total[1] += c.count * c.bytes
  for kind, (count, size) in sorted(totals.items()):
    lines.append(f'{kind:<10} {count} x, {_si(size, "B")} in all')
  return '\n'.join(lines if totals else [*lines, 'collectives none'])


def _si(value: float, unit: str) -> str:
  power = min(5, int(math.log10(value) // 3)) if value >= 1 else 0
  digits = 0 if power == 0 else 2
  return f'{value / 1000**power:.{digits}f} {"_kMGTP"[power].strip("_")}{unit}'


# Counting ---------------------------------------------------------------------------------------


def count_hlo(text: str) -> tuple[int, tuple[Collective, ...]]:
  """Counts one HLO module: (matmul FLOPs, collectives), loop bodies times their trip counts."""
  computations, entry = _parse(text)
  counted: dict[str, tuple[int, tuple[Collective, ...]]] = {}

  def count(name: str) -> tuple[int, tuple[Collective, ...]]:
    if name not in counted:
      flops, collectives = 0, []
      computation = computations[name]
      for instruction in computation.values():
        flops += _matmul_flops(instruction, computation)
        collectives += _collective(instruction, computation)
        for more_flops, more_collectives in _called(instruction):
          flops += more_flops
          collectives += more_collectives
      counted[name] = flops, tuple(collectives)
    return counted[name]

  def _called(instruction: _Instruction) -> Iterator[tuple[int, Iterable[Collective]]]:
    callees = [count(name) for name in instruction.callees]
    if instruction.opcode == 'while':
      trips = instruction.trip_count
      if trips is None and any(flops or collectives for flops, collectives in callees):
        raise UncountableError(
          f'cannot count {instruction.name}: a loop with matmuls or collectives in its body, '
          'whose trip count the compiler does not know'
        )
      for flops, collectives in callees:
        yield (trips or 0) * flops, [c._replace(count=(trips or 0) * c.count) for c in collectives]
    elif instruction.opcode == 'conditional':
      # One branch runs; take the costliest, so that the count is an upper bound.
      weight = lambda branch: (branch[0], sum(c.count * c.bytes for c in branch[1]))
      yield max(callees, key=weight)
    else:
      yield from callees

  return count(entry)


_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


def _collective(instruction: _Instruction, scope: dict[str, _Instruction]) -> list[Collective]:
  kind = instruction.opcode.removesuffix('-start')
  if kind not in _COLLECTIVES:
    return []
  size = sum(_bytes(shape) for shape in _operand_shapes(instruction, scope))
  if kind == 'all-gather':
    result = sum(_bytes(shape) for shape in instruction.shapes)
    # The asynchronous form returns its operands along with its results.
    size = result - size if instruction.opcode.endswith('-start') else result
  return [Collective(kind, size, 1, instruction.op_name)]


def _matmul_flops(instruction: _Instruction, scope: dict[str, _Instruction]) -> int:
  """2 x (size of the result) x (length of the contracted axes); 0 if it is not a matmul."""
  if instruction.opcode == 'dot':
    lhs = _operand_shapes(instruction, scope)[0].dims
    axes = _ints(re.search(r'lhs_contracting_dims=\{([^}]*)\}', instruction.text))
    return 2 * instruction.shapes[0].size * math.prod(lhs[axis] for axis in axes)
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, scope)
  if instruction.opcode == 'custom-call':
    return _library_flops(instruction, scope)
  return 0


def _convolution_flops(instruction: _Instruction, scope: dict[str, _Instruction]) -> int:
  window = re.search(r'window=\{([^}]*)\}', instruction.text)
  if window and re.search(r'pad|dilate', window[1]):
    raise ValueError(f'cannot count {instruction.name}: a padded or dilated convolution')
  labels = re.search(r'dim_labels=\w+_(\w+)->', instruction.text)
  kernel = _operand_shapes(instruction, scope)[1]
  return 2 * instruction.shapes[0].size * kernel.size // kernel.dims[labels[1].index('o')]


# Library calls that never multiply matrices have names without any of these words.
_SUSPECT = re.compile(
  r'gemm|mat_?mul|dot|conv|fmha|attention|einsum|tpu_custom|triton|mosaic', re.I
)


def _library_flops(instruction: _Instruction, scope: dict[str, _Instruction]) -> int:
  """Matmuls that the compiler handed to cuBLAS, cuDNN or oneDNN."""
  target = re.search(r'custom_call_target="([^"]*)"', instruction.text)[1]
  if target.startswith(('__cublas$gemm', '__cublas$lt$matmul')):
    lhs = _operand_shapes(instruction, scope)[0].dims
    axes = _ints(re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.text))
    return 2 * instruction.shapes[0].size * math.prod(lhs[axis] for axis in axes)
  if target == '__onednn$matmul':
    # [.., m, k] @ [.., k, n], either side possibly transposed: k = size of lhs / (.. m).
    out = instruction.shapes[0]
    return 2 * out.dims[-1] * _operand_shapes(instruction, scope)[0].size
  if target.startswith('__cudnn$fmha'):
    # Attention without storing the [B, N, T, S] scores, all counted, masked or not. Forward: two
    # matmuls; backward: the scores once more, then four.
    scores = re.search(
      r'"intermediate_tensor_shape":\{.*?"dimensions":\[([^\]]*)\]', instruction.text
    )
    head = _operand_shapes(instruction, scope)[0].dims[-1]
    return 2 * math.prod(_ints(scores)) * head * (5 if 'Backward' in target else 2)
  if _SUSPECT.search(target):
    raise ValueError(
      f"cannot count {instruction.name}: a call of '{target}', which may hold matmuls; "
      'teach experiments/compiled.py its formula'
    )
  return 0


# Parsing ----------------------------------------------------------------------------------------


class _Shape(NamedTuple):
  dtype: str
  dims: tuple[int, ...]

  @property
  def size(self) -> int:
    return math.prod(self.dims)


class _Instruction(NamedTuple):
  name: str
  opcode: str
  shapes: tuple[_Shape, ...]  # of the result, tuples flattened
  operands: str  # what is between the parentheses
  text: str  # what follows them

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
  def trip_count(self) -> int | None:
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.text)
    return int(match[1]) if match else None

  @property
  def op_name(self) -> str:
    match = re.search(r'op_name="([^"]*)"', self.text)
    return match[1] if match else ''


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$')
_ASSIGNMENT = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = ')
_SHAPE = re.compile(r'([a-z]\w*)\[([\d,<=]*)\]')


def _parse(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
  """HLO text -> ({computation: {instruction name: instruction}}, name of the entry)."""
  computations: dict[str, dict[str, _Instruction]] = {}
  current, entry = None, ''
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and (assignment := _ASSIGNMENT.match(line)):
      rest = re.sub(r'/\*.*?\*/', '', line[assignment.end() :])
      current[assignment[1]] = _instruction(assignment[1], rest)
  if not entry:
    raise ValueError('not an HLO module: it has no ENTRY computation')
  return computations, entry


def _instruction(name: str, rest: str) -> _Instruction:
  """Parses `type opcode(operands), attributes`."""
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  opcode, _, _ = rest[end:].strip().partition('(')
  start = rest.index('(', end)
  stop = _closing(rest, start)
  shapes = tuple(_shapes(rest[:end]))
  return _Instruction(name, opcode, shapes, rest[start + 1 : stop - 1], rest[stop:])


def _closing(text: str, start: int) -> int:
  """The position after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(text, start):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  raise ValueError(f'unbalanced parentheses in HLO: {text[:80]}')


def _shapes(text: str) -> Iterator[_Shape]:
  for dtype, dims in _SHAPE.findall(text):
    yield _Shape(dtype, tuple(int(d) for d in re.findall(r'\d+', dims)))


def _operand_shapes(instruction: _Instruction, scope: dict[str, _Instruction]) -> list[_Shape]:
  """Shapes of the operands, looked up by name; some printers write them in place as well."""
  bare = re.sub(r'[a-z]\w*\[[\d,<=]*\](\{[^}]*\})?', '', instruction.operands)
  names = re.findall(r'[\w.-]+', bare)
  return [shape for name in names for shape in scope[name].shapes]


def _bytes(shape: _Shape) -> int:
  bits = re.search(r'\d+', shape.dtype)
  per_element = 8 if shape.dtype == 'pred' else int(bits[0]) if bits else 0
  return math.ceil(shape.size * per_element / 8)


def _ints(match: re.Match[str] | None) -> list[int]:
  return [int(n) for n in re.findall(r'\d+', match[1])] if match else []
