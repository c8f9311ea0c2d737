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

import numpy as np

from experiments import hlo
from experiments.hlo import Computation, Instruction, ints, operand_shapes, shape_bytes


class Collective(NamedTuple):
  """One communication instruction.

  Attributes:
    kind: 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', ...
    bytes: size of the whole array on one device: what goes in, or for a gather what comes out.
    count: how often one call of the program runs it.
    name: where it comes from, e.g. 'jit(step)/reduce_max'; '' when the compiler does not say.
    group: the devices of its first group, by their place in the mesh; () if it joins all.
    chain: the same for the pieces that a TPU cuts one collective into; '' for a whole one.
  """

  kind: str
  bytes: int
  count: int
  name: str = ''
  group: tuple[int, ...] = ()
  chain: str = ''


class UncountableError(ValueError):
  """A matmul or collective runs as often as the data say."""


class Costs(NamedTuple):
  """Costs of one call on one device. Elementwise work is not in `matmul_flops`."""

  matmul_flops: int
  collectives: tuple[Collective, ...]
  argument_bytes: int
  output_bytes: int
  temp_bytes: int
  alias_bytes: int = 0  # of the outputs, written over arguments that were donated
  code_bytes: int = 0

  @property
  def peak_bytes(self) -> int:
    """What a device holds at once while the program runs."""
    new_outputs = self.output_bytes - self.alias_bytes
    return self.argument_bytes + new_outputs + self.temp_bytes + self.code_bytes


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
  kinds = ('argument', 'output', 'temp', 'alias', 'generated_code')
  return Costs(flops, collectives, *map(size, kinds))


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


def si(value: float, unit: str) -> str:
  """'7.93 GFLOP'; steps of 1000."""
  power = min(5, int(math.log10(value) // 3)) if value >= 1 else 0
  digits = 0 if power == 0 else 2
  return f'{value / 1000**power:.{digits}f} {"_kMGTP"[power].strip("_")}{unit}'


# Counting ---------------------------------------------------------------------------------------


def count_hlo(text: str) -> tuple[int, tuple[Collective, ...]]:
  """Counts one HLO module: (matmul FLOPs, collectives), loop bodies times their trip counts."""
  computations, entry = hlo.parse(text)
  counted: dict[str, tuple[int, tuple[Collective, ...]]] = {}

  def count(name: str) -> tuple[int, tuple[Collective, ...]]:
    if name not in counted:
      flops, collectives = 0, []
      computation = computations[name]
      for instruction in computation.values():
        flops += _matmul_flops(instruction, computation)
        collectives += _collective(instruction, computation)
        for more_flops, more_collectives in _called(instruction, computation):
          flops += more_flops
          collectives += more_collectives
      if 'all-reduce-scatter' in name:  # a TPU's fusion of a reduction and the slice that is kept
        collectives = [
          c._replace(kind=c.kind.replace('all-reduce', 'reduce-scatter')) for c in collectives
        ]
      counted[name] = flops, tuple(_joined(collectives))
    return counted[name]

  def _called(
    instruction: Instruction, scope: Computation
  ) -> Iterator[tuple[int, Iterable[Collective]]]:
    callees = [count(name) for name in instruction.callees]
    if instruction.opcode == 'while':
      trips = hlo.trip_count(instruction, scope, computations)
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


def _joined(collectives: list[Collective]) -> Iterator[Collective]:
  """A TPU spreads a collective over the fusions that hide it: pieces of a chain are one."""
  chains = set()
  for collective in collectives:
    if not collective.chain or collective.chain not in chains:
      yield collective
    chains.add(collective.chain)


_COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)


def _collective(instruction: Instruction, scope: Computation) -> list[Collective]:
  kind = instruction.opcode.removesuffix('-start')
  if kind not in _COLLECTIVES:
    return []
  size = sum(shape_bytes(shape) for shape in operand_shapes(instruction, scope))
  if kind == 'all-gather':
    result = sum(shape_bytes(shape) for shape in instruction.shapes)
    # The asynchronous form returns its operands along with its results.
    size = result - size if instruction.opcode.endswith('-start') else result
  chain = re.search(r'chain_id="(\d+)"', instruction.text)
  return [
    Collective(
      kind, size, 1, instruction.op_name, hlo.first_group(instruction), chain[1] if chain else ''
    )
  ]


def _matmul_flops(instruction: Instruction, scope: Computation) -> int:
  """2 x (size of the result) x (length of the contracted axes); 0 if it is not a matmul."""
  if instruction.opcode == 'dot':
    lhs = operand_shapes(instruction, scope)[0].dims
    axes = ints(re.search(r'lhs_contracting_dims=\{([^}]*)\}', instruction.text))
    return 2 * instruction.shapes[0].size * math.prod(lhs[axis] for axis in axes)
  if instruction.opcode == 'convolution':
    return _convolution_flops(instruction, scope)
  if instruction.opcode == 'custom-call':
    return _library_flops(instruction, scope)
  return 0


def _convolution_flops(instruction: Instruction, scope: Computation) -> int:
  """2 x outputs x inputs of a feature x the pairs of positions that meet, padding and holes apart.

  TPU compilers write every matmul so; a batch axis becomes a window that meets one position each.
  """
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.text)
  inputs, kernel, output = labels.groups()
  lhs, rhs = (shape.dims for shape in operand_shapes(instruction, scope)[:2])
  out = instruction.shapes[0].dims
  window = re.search(r'window=\{([^}]*)\}', instruction.text)
  window = dict(item.split('=') for item in window[1].split()) if window else {}
  numbers = lambda name, default: window[name].split('x') if name in window else [default] * count
  count = sum(label.isdigit() for label in kernel)
  pairs = 1
  for axis in range(count):
    low = int(numbers('pad', '0_0')[axis].split('_')[0])
    stride, holes, spread = (
      int(numbers(name, 1)[axis]) for name in ('stride', 'lhs_dilate', 'rhs_dilate')
    )
    starts = np.arange(out[output.index(str(axis))])[:, None] * stride - low
    places = starts + np.arange(rhs[kernel.index(str(axis))]) * spread
    last = (lhs[inputs.index(str(axis))] - 1) * holes
    pairs *= int(np.sum((places >= 0) & (places <= last) & (places % holes == 0)))
  features = out[output.index('b')] * out[output.index('f')] * rhs[kernel.index('i')]
  return 2 * features * pairs // int(instruction.attribute('batch_group_count') or 1)


# Library calls that never multiply matrices have names without any of these words.
_SUSPECT = re.compile(
  r'gemm|mat_?mul|dot|conv|fmha|attention|einsum|tpu_custom|triton|mosaic', re.I
)


def _library_flops(instruction: Instruction, scope: Computation) -> int:
  """Matmuls that the compiler handed to cuBLAS, cuDNN or oneDNN."""
  target = re.search(r'custom_call_target="([^"]*)"', instruction.text)[1]
  if target.startswith(('__cublas$gemm', '__cublas$lt$matmul')):
    lhs = operand_shapes(instruction, scope)[0].dims
    axes = ints(re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.text))
    return 2 * instruction.shapes[0].size * math.prod(lhs[axis] for axis in axes)
  if target == '__onednn$matmul':
    # [.., m, k] @ [.., k, n], either side possibly transposed: k = size of lhs / (.. m).
    out = instruction.shapes[0]
    return 2 * out.dims[-1] * operand_shapes(instruction, scope)[0].size
  if target.startswith('__cudnn$fmha'):
    # Attention without storing the [B, N, T, S] scores, all counted, masked or not. Forward: two
    # matmuls; backward: the scores once more, then four.
    scores = re.search(
      r'"intermediate_tensor_shape":\{.*?"dimensions":\[([^\]]*)\]', instruction.text
    )
    head = operand_shapes(instruction, scope)[0].dims[-1]
    return 2 * math.prod(ints(scores)) * head * (5 if 'Backward' in target else 2)
  if _SUSPECT.search(target):
    raise ValueError(
      f"cannot count {instruction.name}: a call of '{target}', which may hold matmuls; "
      'teach experiments/compiled.py its formula'
    )
  return 0


# All the arithmetic -----------------------------------------------------------------------------


class Work(NamedTuple):
  """What one call computes and moves on one device.

  Attributes:
    operations: matmul FLOPs, one for each element that any other arithmetic writes or a reduction
      reads, and one for each number a library call (a sort) takes in.
    bytes: read and written by instructions that are not fused into others.
  """

  operations: int
  bytes: int


def work(compiled: Any) -> Work:
  """Counts all the arithmetic of a compiled program, loop bodies times their trip counts.

  For small programs next to large ones: an operation counts 1 whether it adds or takes a logarithm.

  Raises:
    UncountableError: a loop whose trip count the compiler does not know.
  """
  computations, entry = hlo.parse(compiled.as_text())
  counted: dict[str, Work] = {}

  def count(name: str, fused: bool) -> Work:
    if name not in counted:
      computation = computations[name]
      parts = [one(instruction, computation, fused) for instruction in computation.values()]
      counted[name] = Work(*map(sum, zip(*parts)))
    return counted[name]

  def one(instruction: Instruction, scope: Computation, fused: bool) -> Work:
    opcode, results = instruction.opcode, instruction.shapes
    if opcode in _NO_WORK:
      return Work(0, 0)
    inside = fused or opcode == 'fusion'
    callees = [count(name, inside) for name in instruction.callees]
    if opcode == 'while':
      trips = hlo.trip_count(instruction, scope, computations)
      if trips is None:
        raise UncountableError(f'cannot count {instruction.name}: how often it runs is not known')
      return Work(*(trips * sum(x) for x in zip(*callees)))
    if opcode == 'conditional':
      return Work(*map(max, zip(*callees)))
    operands = operand_shapes(instruction, scope)
    moved = 0
    if not fused and opcode != 'call':
      moved = sum(map(shape_bytes, (*operands, *results)))
    operations = _matmul_flops(instruction, scope)
    if opcode in ('reduce', 'reduce-window', 'scatter', 'sort', 'custom-call'):
      operations += sum(shape.size for shape in operands)
    elif not callees and not operations and opcode not in _MOVES:
      operations += sum(shape.size for shape in results)
    return Work(*map(sum, zip((operations, moved), *callees)))

  return count(entry, False)


# Instructions that neither compute nor move anything, and those that only move.
_NO_WORK = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'partition-id')
_MOVES = (
  *('broadcast', 'copy', 'reshape', 'transpose', 'slice', 'concatenate', 'pad', 'reverse', 'iota'),
  *('gather', 'dynamic-slice', 'dynamic-update-slice', 'copy-start', 'copy-done', *_COLLECTIVES),
)
