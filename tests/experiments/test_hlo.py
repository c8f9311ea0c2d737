"""What is read from a program's text: from texts written by hand and from real programs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import compiled, hlo
from experiments.mesh import make_mesh

# Loops, as a TPU's compiler prints them ---------------------------------------------------------


def loop(
  *, start='constant(0)', limit='constant(6)', step='constant(1)', direction='LT', fused=False
):
  """Two 4 x 4 products in the body of a loop whose trip count is nowhere noted."""
  add = f"""
  %by = s32[] {step}
  ROOT %add.1 = s32[] add(%p.1, %by)"""
  update = 'fusion(%i.1), kind=kLoop, calls=%fused' if fused else 'add(%i.1, %by.1)'
  return f"""HloModule m

%fused (p.1: s32[]) -> s32[] {{
  %p.1 = s32[]{{:T(128)}} parameter(0){add}
}}

%condition (c: (s32[], f32[4,4])) -> pred[] {{
  %c = (s32[], f32[4,4]) parameter(0)
  %n = s32[]{{:T(128)}} {limit}
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %n), direction={direction}
}}

%body (b: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {{
  %b = (s32[], f32[4,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %by.1 = s32[] {step}
  %x = f32[4,4]{{1,0:T(8,128)}} get-tuple-element(%b), index=1
  %y = f32[4,4]{{1,0:T(8,128)}} convolution(%x, %x), dim_labels=bf_io->bf
  %z = f32[4,4] convolution(%y, %x), dim_labels=bf_io->bf
  %next = s32[] {update}
  %copied = s32[] copy(%next)
  ROOT %out = (s32[], f32[4,4]) tuple(%copied, %z)
}}

ENTRY %main (p: f32[4,4]) -> f32[4,4] {{
  %p = f32[4,4] parameter(0)
  %zero = s32[] {start}
  %start.copy = s32[] copy(%zero)
  %init = (s32[], f32[4,4]) tuple(%start.copy, %p)
  %while = (s32[], f32[4,4]) while(%init), condition=%condition, body=%body
  ROOT %result = f32[4,4] get-tuple-element(%while), index=1
}}
"""


@pytest.mark.parametrize(
  ('changes', 'trips'),
  [
    ({}, 6),
    ({'fused': True}, 6),
    ({'start': 'constant(2)'}, 4),
    ({'step': 'constant(4)'}, 2),
    ({'start': 'constant(9)'}, 0),
  ],
)
def test_a_trip_count_is_read_from_the_condition(changes, trips):
  flops, _ = compiled.count_hlo(loop(**changes))
  assert flops == trips * 2 * (2 * 4**3)


@pytest.mark.parametrize(
  'changes',
  [
    {'start': 'parameter(1)'},
    {'limit': 'parameter(1)'},
    {'step': 'parameter(1)'},
    {'step': 'constant(-1)'},
    {'direction': 'NE'},
  ],
)
def test_a_loop_that_does_not_count_by_constants_is_not_guessed(changes):
  with pytest.raises(compiled.UncountableError, match='trip count'):
    compiled.count_hlo(loop(**changes))


def test_the_condition_agrees_with_the_compilers_note():
  """On this machine both are there."""
  f = jax.jit(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0])
  text = f.lower(jnp.zeros((8, 8))).compile().as_text()
  assert 'known_trip_count' in text
  without = text.replace('known_trip_count', 'nothing')
  assert compiled.count_hlo(without) == compiled.count_hlo(text)
  assert compiled.count_hlo(text)[0] == 7 * 2 * 8**3


# Matmuls written as convolutions ----------------------------------------------------------------


def convolution_flops(x, y, **options):
  """As counted from the text of the program before optimization."""
  f = jax.jit(lambda x, y: jax.lax.conv_general_dilated(x, y, **options))
  text = f.lower(x, y).compiler_ir('hlo').as_hlo_text()
  text = re.sub(r'ENTRY (\S+) {', r'ENTRY \1 (x: f32[1]) -> f32[1] {', text)
  return compiled.count_hlo(text)[0]


@pytest.mark.parametrize(
  ('size', 'kernel', 'options'),
  [
    (5, 3, dict(window_strides=[1], padding=[(0, 0)])),
    (5, 3, dict(window_strides=[2], padding=[(2, 1)])),
    (4, 4, dict(window_strides=[3], padding=[(0, 0)], lhs_dilation=[4])),  # a batch of matmuls
    (6, 2, dict(window_strides=[1], padding=[(1, 1)], rhs_dilation=[3])),
  ],
)
def test_padding_and_holes_are_not_multiplied(size, kernel, options):
  batch, inputs, outputs = 2, 3, 5
  x, y = jnp.ones((batch, inputs, size)), jnp.ones((outputs, inputs, kernel))
  # With ones everywhere an output is the number of pairs that met.
  met = np.asarray(jax.lax.conv_general_dilated(x, y, **options)).sum()
  assert convolution_flops(x, y, **options) == 2 * met


# Collectives ------------------------------------------------------------------------------------


def instruction(attributes):
  return hlo.Instruction('r', 'all-reduce', (), 'x', f'), {attributes}')


@pytest.mark.parametrize(
  ('attributes', 'group', 'axes'),
  [
    ('replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add', (0, 2), ('fsdp',)),
    ('replica_groups={{0,1,2,3},{4,5,6,7}}', (0, 1, 2, 3), ('fsdp', 'tensor')),
    ('replica_groups={}', (), ('data', 'fsdp', 'tensor')),
    ('replica_groups=[4,2]<=[8]', (0, 1), ('tensor',)),
    ('replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true', (0, 4), ('data',)),
    ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={1}", (0, 2), ('fsdp',)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4), ('data',)),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2), ('fsdp',)),
    ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}, x", (0, 2), ('fsdp',)),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", (0, 4), ('data',)),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8)), ('data', 'fsdp', 'tensor')),
    ('source_target_pairs={{0,1},{1,0}}', (0, 1), ('tensor',)),
  ],
)
def test_groups_and_their_axes(attributes, group, axes):
  assert hlo.first_group(instruction(attributes)) == group
  assert hlo.axes_of(group, {'data': 2, 'fsdp': 2, 'tensor': 2}) == axes


@pytest.mark.parametrize('axis', ['data', 'fsdp', 'tensor'])
def test_the_axis_of_a_reduction_on_this_machine(axis):
  mesh = make_mesh(2, 2, 2)
  spec = jax.sharding.PartitionSpec(axis)
  rows = jax.sharding.NamedSharding(mesh, spec)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  f = jax.jit(jnp.sum, in_shardings=rows, out_shardings=whole)
  (found,) = compiled.costs(f.lower(jax.ShapeDtypeStruct((8,), 'float32')).compile()).collectives
  assert hlo.axes_of(found.group, mesh.shape) == (axis,)


CHAIN = 'frontend_attributes={chain_id="7"}'
PIECES = f"""HloModule m

%first (p.0: bf16[2,4]) -> bf16[8,4] {{
  %p.0 = bf16[2,4] parameter(0)
  ROOT %a = bf16[8,4]{{1,0:T(8,128)(2,1)}} all-gather(%p.0), channel_id=3, dimensions={{0}}, {CHAIN}
}}

%second (p.1: bf16[2,4]) -> bf16[8,4] {{
  %p.1 = bf16[2,4] parameter(0)
  ROOT %b = bf16[8,4]{{1,0:T(8,128)(2,1)}} all-gather(%p.1), channel_id=3, dimensions={{0}}, {CHAIN}
}}

%all-reduce-scatter.1 (p.2: f32[8,4]) -> f32[2,4] {{
  %p.2 = f32[8,4] parameter(0)
  %sum = f32[8,4] all-reduce(%p.2), channel_id=4, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %kept = f32[2,4] dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={{2,4}}
}}

ENTRY %main (p: bf16[2,4], q: f32[8,4]) -> f32[2,4] {{
  %p = bf16[2,4] parameter(0)
  %q = f32[8,4] parameter(1)
  %x = bf16[8,4] fusion(%p), kind=kCustom, calls=%first
  %y = bf16[8,4] fusion(%p), kind=kCustom, calls=%second
  ROOT %z = f32[2,4] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
}}
"""


def test_what_a_tpu_cuts_up_or_fuses_is_one_collective():
  _, found = compiled.count_hlo(PIECES)
  assert [(c.kind, c.bytes, c.count) for c in found] == [
    ('all-gather', 64, 1),
    ('reduce-scatter', 128, 1),
  ]
