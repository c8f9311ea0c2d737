"""The cost counter against formulas, unrolled programs, and library calls written out by hand."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from experiments import compiled
from experiments.mesh import batch_sharding, make_mesh, replicated, tree_shardings
from experiments.models import gpt2, lm

CFG = gpt2.GPT2Config(vocab_size=48, max_len=16, n_layer=2, n_head=2, n_embd=32)
ROWS = 16


def compile_model(cfg, mode, mesh=None, rows=ROWS):
  """Compiles the 'forward' pass (losses) or the 'backward' pass (loss and gradients)."""
  params = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((rows, cfg.max_len + 1), jnp.int32)
  losses = lambda params, tokens: lm.token_losses(params, {'tokens': tokens}, cfg, mesh=mesh)
  loss = lambda params, tokens: losses(params, tokens).mean()
  run = losses if mode == 'forward' else jax.value_and_grad(loss)
  if mesh is None:
    return jax.jit(run).lower(params, tokens).compile()
  layout = tree_shardings(params, mesh, gpt2.GPT2Config.sharding_rules)
  jitted = jax.jit(
    run,
    in_shardings=(layout, batch_sharding(mesh)),
    out_shardings=(replicated(mesh), layout),
  )
  return jitted.lower(params, tokens).compile()


@pytest.fixture(scope='module')
def model_costs():
  """Costs by (changes to CFG, mode), each compiled once."""
  cache = {}

  def get(mode, **changes):
    key = (mode, *sorted(changes.items()))
    if key not in cache:
      cache[key] = compiled.costs(compile_model(dataclasses.replace(CFG, **changes), mode))
    return cache[key]

  return get


def forward_flops(cfg, rows=ROWS):
  """2 x every product: 12 D^2 a layer, scores and values over all T x T, logits."""
  d, t = cfg.n_embd, cfg.max_len
  per_token = cfg.n_layer * (12 * d * d + 2 * t * d) + d * cfg.vocab_size
  return 2 * per_token * rows * t


# Matmul FLOPs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('mode', 'factor'), [('forward', 1), ('backward', 3)])
@pytest.mark.parametrize('scan', [True, False])
def test_model_flops_equal_the_formula(model_costs, mode, factor, scan):
  assert model_costs(mode, scan=scan).matmul_flops == factor * forward_flops(CFG)


def test_flops_grow_with_the_layers_of_a_scan(model_costs):
  flops = [model_costs('forward', n_layer=layers).matmul_flops for layers in (2, 3, 8)]
  assert flops[1] - flops[0] == (flops[2] - flops[0]) / 6 > 0


def test_remat_is_seen(model_costs):
  plain = model_costs('backward').matmul_flops
  more = model_costs('backward', remat='full').matmul_flops
  assert 1.1 * plain < more <= 4 / 3 * plain


def test_bfloat16_costs_the_same_matmuls(model_costs):
  assert model_costs('backward', dtype='bfloat16').matmul_flops == 3 * forward_flops(CFG)


def test_batch_dimensions_of_a_matmul():
  f = jax.jit(lambda x, y: jnp.einsum('bik,bkj->bij', x, y))
  x, y = jnp.zeros((5, 32, 48)), jnp.zeros((5, 48, 64))
  assert compiled.costs(f.lower(x, y).compile()).matmul_flops == 2 * 5 * 32 * 48 * 64


def test_nested_loops_multiply():
  def inner(x, _):
    return x @ x, None

  def outer(x, _):
    return jax.lax.scan(inner, x, length=4)[0], None

  f = jax.jit(lambda x: jax.lax.scan(outer, x, length=6)[0])
  costs = compiled.costs(f.lower(jnp.zeros((64, 64))).compile())
  assert costs.matmul_flops == 6 * 4 * 2 * 64**3


def test_a_branch_counts_as_the_costliest():
  branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
  f = jax.jit(lambda i, x: jax.lax.switch(i, branches, x))
  assert compiled.costs(f.lower(1, jnp.zeros((64, 64))).compile()).matmul_flops == 2 * 2 * 64**3


def test_an_unknown_trip_count_is_an_error_only_around_matmuls():
  f = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x))
  with pytest.raises(ValueError, match='trip count'):
    compiled.costs(f.lower(3, jnp.zeros((64, 64))).compile())
  g = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: x + 1, x))
  assert compiled.costs(g.lower(3, jnp.zeros((64, 64))).compile()).matmul_flops == 0


# Library calls, as GPU and other CPU compilers print them -----------------------------------------


def module(*lines):
  body = '\n'.join(f'  {line}' for line in lines)
  return f'HloModule m\n\nENTRY %main (p: f32[2]) -> f32[2] {{\n{body}\n}}\n'


GEMM_CONFIG = (
  'backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,'
  '"dot_dimension_numbers":{"lhs_contracting_dimensions":["0"],'
  '"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},'
  '"epilogue":"DEFAULT"}}'
)
FMHA_CONFIG = (
  'backend_config={"operation_queue_id":"0","cudnn_fmha_backend_config":{"fmha_scale":0.125,'
  '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","4","16","16"],'
  '"tuple_shapes":[],"layout":{"minor_to_major":["3","2","1","0"]}},"mask_type":"CAUSAL"}}'
)
QKV = [f'%{name} = bf16[2,16,4,8]{{3,2,1,0}} parameter({i})' for i, name in enumerate('qkv')]


@pytest.mark.parametrize('target', ['__cublas$gemm', '__cublas$lt$matmul'])
def test_cublas(target):
  text = module(
    '%a = bf16[768,2304]{1,0} parameter(0)',
    '%b = bf16[8192,768]{1,0} parameter(1)',
    f'%c = (bf16[2304,8192]{{1,0}}, s8[4194304]{{0}}) custom-call(%a, %b), '
    f'custom_call_target="{target}", {GEMM_CONFIG}',
  )
  assert compiled.count_hlo(text)[0] == 2 * 768 * 2304 * 8192


def test_operands_printed_with_their_shapes():
  text = module(
    '%a = f32[4,8]{1,0:T(8,128)S(1)} parameter(0)',
    '%b = f32[8,16]{1,0:T(8,128)} parameter(1)',
    'ROOT %c = f32[4,16]{1,0:T(8,128)} dot(f32[4,8]{1,0:T(8,128)S(1)} %a, '
    'f32[8,16]{1,0:T(8,128)} %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}',
  )
  assert compiled.count_hlo(text)[0] == 2 * 4 * 8 * 16


@pytest.mark.parametrize(('suffix', 'matmuls'), [('', 2), ('Backward', 5)])
def test_cudnn_attention(suffix, matmuls):
  text = module(
    *QKV,
    '%o = (bf16[2,16,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), '
    f'custom_call_target="__cudnn$fmhaSoftmax{suffix}", {FMHA_CONFIG}',
  )
  assert compiled.count_hlo(text)[0] == matmuls * 2 * (2 * 4) * 16 * 16 * 8


@pytest.mark.parametrize('lhs', ['3,4,16', '3,16,4'])
def test_onednn(lhs):
  text = module(
    f'a = f32[{lhs}]{{2,1,0}} parameter(0)',
    'b = f32[3,16,32]{2,1,0} parameter(1)',
    'ROOT c = f32[3,4,32]{2,1,0} custom-call(a, b), custom_call_target="__onednn$matmul", '
    'backend_config={"onednn_matmul_config":{}}',
  )
  assert compiled.count_hlo(text)[0] == 2 * 3 * 4 * 16 * 32


def test_convolution():
  text = module(
    '%a = f32[4,8]{1,0} parameter(0)',
    '%b = f32[8,16]{1,0} parameter(1)',
    'ROOT %c = f32[4,16]{1,0} convolution(%a, %b), dim_labels=bf_io->bf',
  )
  assert compiled.count_hlo(text)[0] == 2 * 4 * 8 * 16


@pytest.mark.parametrize('target', ['__vendor$matmul', 'tpu_custom_call', '__gpu$xla.gpu.triton'])
def test_an_unknown_library_call_is_an_error(target):
  text = module(
    '%a = f32[4,4]{1,0} parameter(0)',
    f'ROOT %c = f32[4,4]{{1,0}} custom-call(%a), custom_call_target="{target}"',
  )
  with pytest.raises(ValueError, match='may hold matmuls'):
    compiled.count_hlo(text)


def test_library_calls_without_matmuls_cost_nothing():
  text = module(
    '%a = f32[4,4]{1,0} parameter(0)',
    'ROOT %c = (f32[4,2]{1,0}, s32[4,2]{1,0}) custom-call(%a), custom_call_target="TopK"',
  )
  assert compiled.count_hlo(text) == (0, ())


def test_text_without_an_entry_is_an_error():
  with pytest.raises(ValueError, match='ENTRY'):
    compiled.count_hlo('module @jit_f {}')


# Collectives ------------------------------------------------------------------------------------


def totals(costs):
  return sorted((c.kind, c.bytes, c.count) for c in costs.collectives)


def test_one_device_has_no_collectives(model_costs):
  assert model_costs('backward').collectives == ()


def test_psum_in_a_scan_counts_every_trip():
  mesh = make_mesh(8, 1)

  @jax.jit
  @partial(jax.shard_map, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  def f(x):
    step = lambda x, _: (jax.lax.pcast(jax.lax.psum(x * x, 'data'), 'data', to='varying'), None)
    return jax.lax.scan(step, x, length=5)[0]

  costs = compiled.costs(f.lower(jnp.zeros((16, 3))).compile())
  assert totals(costs) == [('all-reduce', 2 * 3 * 4, 5)]
  assert 'psum' in costs.collectives[0].name


def test_sizes_are_those_of_the_whole_array():
  mesh = make_mesh(8, 1)
  rows, whole = batch_sharding(mesh), replicated(mesh)
  x = jax.ShapeDtypeStruct((16, 4), jnp.float32)
  gather = jax.jit(lambda x: x * 2, in_shardings=rows, out_shardings=whole)
  assert totals(compiled.costs(gather.lower(x).compile())) == [('all-gather', 16 * 4 * 4, 1)]
  total = jax.jit(lambda x: x.sum(), in_shardings=rows, out_shardings=whole)
  assert totals(compiled.costs(total.lower(x).compile())) == [('all-reduce', 4, 1)]


def test_asynchronous_forms():
  text = module(
    '%a = bf16[2,8]{1,0} parameter(0)',
    '%g = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%a), dimensions={0}',
    '%h = bf16[16,8]{1,0} all-gather-done(%g)',
    '%r = (f32[], /*index=1*/f32[4]{0}) all-reduce-start(%s, %t), to_apply=%add',
    '%s = f32[] parameter(1)',
    '%t = f32[4]{0} parameter(2)',
    '%p = (bf16[2,8]{1,0}, bf16[2,8]{1,0}, u32[], u32[]) collective-permute-start(%a)',
  )
  _, found = compiled.count_hlo(text)
  assert [(c.kind, c.bytes) for c in found] == [
    ('all-gather', 16 * 8 * 2),
    ('all-reduce', 5 * 4),
    ('collective-permute', 2 * 8 * 2),
  ]


def test_data_parallel_step_reduces_each_gradient_once():
  mesh = make_mesh(8, 1)
  costs = compiled.costs(compile_model(CFG, 'backward', mesh))
  assert costs.matmul_flops == 3 * forward_flops(CFG) / 8
  assert {c.kind for c in costs.collectives} == {'all-reduce'}
  # The scalar loss, and every parameter; the token table twice: as input and as output layer.
  table = CFG.vocab_size * CFG.n_embd
  size = sum(c.bytes * c.count for c in costs.collectives)
  assert 4 * CFG.num_params() <= size <= 4 * (CFG.num_params() + table + 1)


def test_fsdp_moves_parameters_never_activations():
  mesh = make_mesh(2, 4)
  small, large = (
    compiled.costs(compile_model(CFG, 'backward', mesh, rows)) for rows in (ROWS, 4 * ROWS)
  )
  assert totals(small) == totals(large)  # nothing that travels grows with the batch
  assert large.matmul_flops == 3 * forward_flops(CFG, 4 * ROWS) / 8
  assert {c.kind for c in small.collectives} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
  gathered = sum(c.bytes * c.count for c in small.collectives if c.kind == 'all-gather')
  kernels, table = CFG.n_layer * 12 * CFG.n_embd**2, CFG.vocab_size * CFG.n_embd
  assert gathered <= 4 * 2 * (kernels + table)  # once forward and once backward


def test_extra_collectives_are_named():
  make = lambda *found: compiled.Costs(0, found, 0, 0, 0)
  c = compiled.Collective
  base = make(c('all-reduce', 4, 2, 'a'), c('all-gather', 64, 3, 'b'))
  other = make(
    c('all-gather', 64, 3, 'b'), c('all-reduce', 4, 3, 'max'), c('all-reduce', 8, 1, 'm')
  )
  assert compiled.extra_collectives(base, other) == (
    c('all-reduce', 4, 1, 'max'),
    c('all-reduce', 8, 1, 'm'),
  )
  assert compiled.extra_collectives(base, base) == ()


# Text -------------------------------------------------------------------------------------------


def test_memory_and_format(model_costs):
  costs = model_costs('backward')
  params = 4 * CFG.num_params()
  assert costs.argument_bytes == params + 4 * ROWS * (CFG.max_len + 1)
  assert params < costs.output_bytes < params + 1000
  assert costs.temp_bytes > 0
  assert costs.peak_bytes >= costs.argument_bytes + costs.output_bytes + costs.temp_bytes


@pytest.mark.parametrize(
  ('value', 'text'), [(0, '0 B'), (999, '999 B'), (2_500_000, '2.50 MB'), (7.93e15, '7.93 PB')]
)
def test_sizes_in_words(value, text):
  assert compiled.si(value, 'B') == text
