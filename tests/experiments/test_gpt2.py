"""The GPT-2 model against closed formulas, a NumPy forward pass and itself computed other ways."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compiled import costs
from experiments.errors import UserError
from experiments.mesh import batch_sharding, make_mesh, tree_shardings
from experiments.models import gpt2, lm
from jaxrw import base_measure, gradients

CFG = gpt2.GPT2Config(vocab_size=37, max_len=12, n_layer=2, n_head=2, n_embd=16)
ROWS, LENGTH = 8, 10


@pytest.fixture(scope='module')
def params():
  # Larger than at initialization, so that attention and the gelu leave their linear range.
  fresh = fresh_params(CFG)
  noise = lambda leaf: 0.3 * np.random.default_rng(leaf.size).standard_normal(leaf.shape)
  return jax.tree.map(lambda leaf: (leaf + noise(leaf)).astype(jnp.float32), fresh)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(1)
  base = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
  tokens = rng.integers(0, CFG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
  return {'tokens': tokens, 'base': base}


def replace(**changes):
  return dataclasses.replace(CFG, **changes)


def mean_loss(params, batch, cfg, mesh=None):
  return lm.token_losses(params, batch, cfg, mesh=mesh).mean()


@partial(jax.jit, static_argnums=2)
def losses_of(params, batch, cfg):
  return lm.token_losses(params, batch, cfg)


@partial(jax.jit, static_argnums=2)
def logits_of(params, tokens, cfg):
  return lm.apply(params, tokens, cfg)


@partial(jax.jit, static_argnums=2)
def grads_of(params, batch, cfg):
  return jax.value_and_grad(mean_loss)(params, batch, cfg)


@partial(jax.jit, static_argnums=2)
def definitions_of(params, batch, cfg):
  return jax.vmap(partial(lm.example_loss, cfg=cfg), in_axes=(None, 0))(params, batch)


@jax.jit
def example_grads_of(params, example):
  return jax.value_and_grad(lm.example_loss)(params, example, CFG)


def fresh_params(cfg):
  return jax.jit(partial(lm.init, cfg=cfg))(jax.random.key(0))


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'count', 'millions'),
  [
    ('gpt2_124m', 124_046_592, '124.0'),
    ('gpt2_209m', 209_101_056, '209.1'),
    ('gpt2_294m', 294_155_520, '294.2'),
  ],
)
def test_presets_have_the_published_parameter_counts(name, count, millions):
  cfg = gpt2.PRESETS[name]
  shapes = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count == cfg.num_params()
  assert f'{count / 1e6:.1f}' == millions


def test_params_are_plain_float32_dicts_with_stacked_blocks(params):
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes['blocks']['attn']['qkv'] == {'kernel': (2, 16, 48), 'bias': (2, 48)}
  assert shapes['wte'] == {'embedding': (37, 16)}
  assert set(shapes) == {'wte', 'wpe', 'ln_f', 'blocks'}
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_initial_scales():
  cfg = gpt2.GPT2Config(vocab_size=500, max_len=100, n_layer=8, n_head=2, n_embd=64)
  fresh = fresh_params(cfg)
  blocks = fresh['blocks']
  np.testing.assert_allclose(fresh['wte']['embedding'].std(), 0.02, rtol=0.05)
  np.testing.assert_allclose(blocks['mlp']['up']['kernel'].std(), 0.02, rtol=0.05)
  np.testing.assert_allclose(blocks['mlp']['down']['kernel'].std(), 0.005, rtol=0.05)
  np.testing.assert_allclose(blocks['attn']['out']['kernel'].std(), 0.005, rtol=0.05)
  assert not np.any(blocks['attn']['qkv']['bias'])
  assert np.all(blocks['ln_1']['scale'] == 1)
  assert not np.allclose(blocks['mlp']['up']['kernel'][0], blocks['mlp']['up']['kernel'][1])


def test_a_fresh_model_predicts_almost_uniformly(batch):
  losses = losses_of(fresh_params(CFG), batch, CFG)
  np.testing.assert_allclose(losses.mean(), np.log(CFG.vocab_size), rtol=0.02)


def test_useful_flops_of_124m_by_hand():
  # 12 layers of 12 x 768^2, causal attention 512 x 768, 768 x 50257 logits: x 2, x 3.
  by_hand = 6 * (12 * 12 * 768**2 + 12 * 512 * 768 + 768 * 50257)
  assert gpt2.PRESETS['gpt2_124m'].flops_per_token() == by_hand
  assert 0.7e9 < by_hand < 0.8e9


# Values -----------------------------------------------------------------------------------------


def numpy_logits(params, tokens, n_head):
  """GPT-2 written once more, for one row of tokens, in float64 and with explicit loops."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

  def norm(x, p):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']

  def linear(x, p):
    return x @ p['kernel'] + p['bias']

  def attention(x, p):
    q, k, v = np.split(linear(x, p['qkv']), 3, axis=-1)
    size = x.shape[1] // n_head
    out = np.zeros_like(x)
    for head in range(n_head):
      cols = slice(head * size, (head + 1) * size)
      for t in range(len(x)):
        scores = k[: t + 1, cols] @ q[t, cols] / np.sqrt(size)
        weights = np.exp(scores - scores.max())
        out[t, cols] = weights / weights.sum() @ v[: t + 1, cols]
    return linear(out, p['out'])

  def mlp(x, p):
    h = linear(x, p['up'])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    return linear(h, p['down'])

  x = np.stack([p['wte']['embedding'][token] for token in tokens])
  x = x + p['wpe']['embedding'][: len(tokens)]
  for layer in range(len(p['blocks']['ln_1']['scale'])):
    block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p['blocks'])
    x = x + attention(norm(x, block['ln_1']), block['attn'])
    x = x + mlp(norm(x, block['ln_2']), block['mlp'])
  return norm(x, p['ln_f']) @ p['wte']['embedding'].T


def test_equals_a_numpy_forward_pass(params, batch):
  tokens = batch['tokens'][:, :-1]
  logits = logits_of(params, tokens, CFG)
  expected = np.stack([numpy_logits(params, row, CFG.n_head) for row in tokens])
  assert np.abs(expected).max() > 1  # the comparison below would be empty on a near-zero output
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_token_losses_are_cross_entropy_of_the_next_token(params, batch):
  losses = losses_of(params, batch, CFG)
  logits = np.asarray(logits_of(params, batch['tokens'][:, :-1], CFG), np.float64)
  log_z = np.log(np.exp(logits).sum(-1))
  picked = np.take_along_axis(logits, batch['tokens'][:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(losses, log_z - picked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'changes', [{'scan': False}, {'remat': 'dots'}, {'remat': 'full'}, {'loss_chunk': 4}]
)
def test_other_ways_to_compute_agree_in_values_and_gradients(params, batch, changes):
  value, grads = grads_of(params, batch, CFG)
  other_value, other_grads = grads_of(params, batch, replace(**changes))
  np.testing.assert_allclose(value, other_value, rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, other_grads)


def test_a_token_never_changes_earlier_logits(params, batch):
  tokens = batch['tokens'][:, :-1]
  before = np.asarray(logits_of(params, tokens, CFG))
  for t in range(LENGTH):
    changed = tokens.copy()
    changed[:, t] = (changed[:, t] + 1) % CFG.vocab_size
    after = np.asarray(logits_of(params, changed, CFG))
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert np.all(np.any(after[:, t] != before[:, t], axis=-1))


def test_positions_matter_and_short_rows_are_a_prefix(params, batch):
  tokens = batch['tokens'][:, :-1]
  full = logits_of(params, tokens, CFG)
  np.testing.assert_allclose(
    logits_of(params, tokens[:, :4], CFG), full[:, :4], rtol=1e-4, atol=1e-5
  )
  repeated = np.full((1, 4), 5, np.int32)
  logits = np.asarray(logits_of(params, repeated, CFG))[0]
  assert not np.allclose(logits[0], logits[1])


def test_too_many_tokens_are_an_error(params):
  with pytest.raises(ValueError, match=r'13 tokens .* 12'):
    lm.apply(params, np.zeros((1, 13), np.int32), CFG)


def test_the_token_table_is_also_the_output_layer(params, batch):
  # Token 0 is never read or predicted, so only the output layer can move its row.
  tokens = np.maximum(batch['tokens'], 1)
  _, grads = grads_of(params, {'tokens': tokens}, CFG)
  assert np.any(np.asarray(grads['wte']['embedding'][0]) != 0)
  scaled = jax.tree.map(lambda leaf: leaf, params)
  scaled['wte'] = {'embedding': params['wte']['embedding'].at[0].multiply(2.0)}
  logits = logits_of(params, tokens[:, :-1], CFG)
  other = logits_of(scaled, tokens[:, :-1], CFG)
  np.testing.assert_allclose(other[..., 0], 2 * logits[..., 0], rtol=1e-5)
  np.testing.assert_array_equal(other[..., 1:], logits[..., 1:])


def test_batched_losses_agree_with_the_definition(params, batch):
  losses = losses_of(params, batch, CFG)
  base = batch['base']
  expected = (losses * base).sum(1) / base.sum(1)
  by_definition = definitions_of(params, batch, CFG)
  np.testing.assert_allclose(by_definition, expected, rtol=1e-5)


def test_an_example_without_valid_targets_has_loss_zero(params, batch):
  example = {'tokens': batch['tokens'][0], 'base': np.zeros(LENGTH, np.float32)}
  loss, grads = example_grads_of(params, example)
  assert loss == 0
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_the_definition_has_forward_derivatives(params, batch):
  # One jvp must equal the inner product with the reverse-mode gradient.
  example = jax.tree.map(lambda leaf: leaf[0], batch)
  loss = partial(lm.example_loss, example=example, cfg=CFG)
  direction = jax.tree.map(jnp.ones_like, params)
  forward = jax.jit(lambda p: jax.jvp(loss, (p,), (direction,))[1])(params)
  _, grads = example_grads_of(params, example)
  reverse = sum(leaf.sum() for leaf in jax.tree.leaves(grads))
  np.testing.assert_allclose(forward, reverse, rtol=1e-4)


def test_bfloat16_compute_keeps_float32_losses_and_gradients(batch):
  fresh = fresh_params(CFG)
  cfg = replace(dtype='bfloat16')
  losses = losses_of(fresh, batch, cfg)
  assert losses.dtype == jnp.float32
  assert len(np.unique(np.asarray(losses))) > 0.9 * losses.size  # 16-bit losses would tie
  np.testing.assert_allclose(losses, losses_of(fresh, batch, CFG), atol=0.02)
  _, grads = grads_of(fresh, batch, cfg)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype('float32')}


def test_bfloat16_matmuls_really_are_16_bit(batch):
  shapes = jax.eval_shape(partial(lm.init, cfg=CFG), jax.random.key(0))
  text = str(jax.make_jaxpr(partial(lm.token_losses, cfg=replace(dtype='bfloat16')))(shapes, batch))
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert len(products) >= 7
  assert not [line for line in products if line.strip().split(' ')[0].endswith('[float32]')]


@pytest.mark.parametrize(
  ('capability', 'dtype', 'head', 'kernel'),
  [
    ('9.0', 'bfloat16', 64, 'cudnn'),
    ('9.0', 'float32', 64, 'xla'),
    ('9.0', 'bfloat16', 60, 'xla'),
    ('9.0', 'bfloat16', 256, 'xla'),
    ('7.5', 'bfloat16', 64, 'xla'),
    ('gfx942', 'bfloat16', 64, 'xla'),
    (None, 'bfloat16', 64, 'xla'),
  ],
)
def test_auto_attention_picks_cudnn_only_where_it_applies(
  monkeypatch, capability, dtype, head, kernel
):
  device = SimpleNamespace(compute_capability=capability) if capability else SimpleNamespace()
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  sizes = {'n_embd': 2 * head, 'n_head': 2, 'dtype': dtype}
  assert lm.attention_kernel(replace(**sizes, attention='auto')) == kernel
  assert lm.attention_kernel(replace(**sizes, attention='xla')) == 'xla'


# 1, 2 and 4 blocks of queries.
@pytest.mark.parametrize(
  'length', [1, 130, *(pytest.param(n, marks=pytest.mark.slow) for n in (70, 128, 256))]
)
@pytest.mark.parametrize(('dtype', 'tol'), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_blocked_attention_equals_the_library_in_values_and_gradients(length, dtype, tol):
  shape = (2, length, 3, 8)
  q, k, v, g = (
    jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)
  )
  heads_first = lambda x: x.transpose(0, 2, 1, 3)

  def blocked(q, k, v):
    return heads_first(lm.causal_attention(*map(heads_first, (q, k, v))))

  def library(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)

  got, want = (jax.vjp(f, q, k, v) for f in (blocked, library))
  assert got[0].dtype == dtype
  chex.assert_trees_all_close(got[0], want[0], rtol=tol, atol=tol)
  chex.assert_trees_all_close(got[1](g), want[1](g), rtol=4 * tol, atol=4 * tol)


# Dropout ----------------------------------------------------------------------------------------


def test_dropout_follows_the_row_not_the_batch(params, batch):
  cfg = replace(dropout=0.3)
  keys = lm.dropout_keys(jax.random.key(7), 3, np.arange(ROWS))
  rows = {'tokens': batch['tokens'], 'dropout_key': keys}
  losses = losses_of(params, rows, cfg)
  order = np.array([5, 2, 7, 0])
  subset = jax.tree.map(lambda leaf: leaf[order], rows)
  np.testing.assert_allclose(losses_of(params, subset, cfg), losses[order], rtol=1e-4)
  later = lm.dropout_keys(jax.random.key(7), 4, np.arange(ROWS))
  assert not np.allclose(losses_of(params, {**rows, 'dropout_key': later}, cfg), losses)


def test_dropout_in_the_batched_losses_is_that_of_the_definition(params, batch):
  cfg = replace(dropout=0.3)
  keys = lm.dropout_keys(jax.random.key(7), 3, np.arange(ROWS))
  rows = {'tokens': batch['tokens'], 'base': np.ones_like(batch['base']), 'dropout_key': keys}
  by_definition = definitions_of(params, rows, cfg)
  np.testing.assert_allclose(by_definition, losses_of(params, rows, cfg).mean(1), rtol=1e-5)


def test_dropout_without_keys_is_an_error(params, batch):
  with pytest.raises(KeyError, match='dropout_key'):
    lm.token_losses(params, batch, replace(dropout=0.1))


def test_dropout_keeps_the_mean():
  x = jnp.ones((4, 50, 40))
  dropped = lm.dropout(x, jax.random.split(jax.random.key(0), 4), 0, 0.25)
  assert np.unique(dropped).tolist() == pytest.approx([0, 4 / 3])
  np.testing.assert_allclose(dropped.mean(), 1.0, atol=0.03)
  assert not np.array_equal(dropped[0], dropped[1])


# Meshes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize('sizes', [(8, 1), (2, 4), (2, 2, 2)], ids=str)
def test_a_mesh_equals_one_device(params, batch, sizes):
  expected_value, expected_grads = grads_of(params, batch, CFG)
  mesh = make_mesh(*sizes)
  loss = jax.value_and_grad(partial(mean_loss, cfg=CFG, mesh=mesh))
  layout = tree_shardings(params, mesh, gpt2.GPT2Config.sharding_rules)
  placed = jax.device_put(params, layout)
  rows = jax.device_put(batch, batch_sharding(mesh))
  value, grads = jax.jit(loss, out_shardings=(None, layout))(placed, rows)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, expected_grads)
  kernel = grads['blocks']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // np.prod(sizes[1:])


@pytest.mark.parametrize('sizes', [(8, 1), (2, 4)])
def test_a_chunked_head_communicates_no_more_than_a_whole_one(params, batch, sizes):
  mesh = make_mesh(*sizes)
  layout = tree_shardings(params, mesh, gpt2.GPT2Config.sharding_rules)
  placed, rows = jax.device_put(params, layout), jax.device_put(batch, batch_sharding(mesh))

  def run(cfg):
    loss = jax.value_and_grad(partial(mean_loss, cfg=cfg, mesh=mesh))
    compiled = jax.jit(loss, out_shardings=(None, layout)).lower(placed, rows).compile()
    return compiled(placed, rows), sum(c.count * c.bytes for c in costs(compiled).collectives)

  (value, grads), sent = run(CFG)
  (chunked_value, chunked_grads), chunked_sent = run(replace(loss_chunk=3))
  np.testing.assert_allclose(chunked_value, value, rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), chunked_grads, grads)
  assert 0 < chunked_sent <= sent


@pytest.mark.slow
def test_a_chunked_head_costs_a_third_of_the_head():
  """At a vocabulary of 32768 the head is 12% of a 24-layer step; compiled, not run."""
  whole = dataclasses.replace(gpt2.PRESETS['gpt2_209m'], vocab_size=32768)
  params = jax.eval_shape(partial(lm.init, cfg=whole), jax.random.key(0))
  batch = {'tokens': jax.ShapeDtypeStruct((2, 513), jnp.int32)}

  def count(cfg):
    gradient = jax.jit(jax.value_and_grad(partial(mean_loss, cfg=cfg)))
    return costs(gradient.lower(params, batch).compile()).matmul_flops

  flops = count(whole)
  head = 3 * 2 * (2 * 512) * 768 * 32768
  assert 0.10 < head / flops < 0.15
  chunked = count(dataclasses.replace(whole, loss_chunk=64))
  assert chunked - flops == head // 3
  assert chunked < 1.05 * flops


# Gradient signals -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def signals(params, batch):
  """A weighted step, and its oracle: the gradient of every example's definition, one by one."""
  rng = np.random.default_rng(2)
  noise = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)
  directions = [jax.tree.map(noise, params) for _ in range(2)]
  weights = np.array([1.0, 0.5, 0.0, 2.0, 1.0, 1.5, 0.25, 1.0], np.float32)

  @jax.jit
  def one_by_one(params, batch):
    row_loss = partial(lm.example_loss, cfg=CFG)
    each = jax.vmap(jax.grad(row_loss), in_axes=(None, 0))(params, batch)
    rows = lambda a, b: jnp.einsum('bn,bn->b', a.reshape(ROWS, -1), b.reshape(ROWS, -1))
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(rows, a, b)))
    spread = lambda u: jax.tree.map(lambda u: jnp.broadcast_to(u, (ROWS, *u.shape)), u)
    return dot(each, each), jnp.stack([dot(each, spread(u)) for u in directions], axis=1)

  norms, products = one_by_one(params, batch)
  return directions, weights, weights**2 * norms, weights[:, None] * products


def weighted_loss(params, batch, weights, cfg, mesh=None, probe=None):
  losses = lm.token_losses(params, batch, cfg, mesh=mesh, probe=probe)
  base = base_measure(batch['base'], losses)
  return jnp.sum(base * weights[:, None] * losses)


@partial(jax.jit, static_argnums=4, static_argnames='mesh')
def probed(params, batch, weights, probe, cfg, mesh=None):
  objective = lambda p, probe: weighted_loss(p, batch, weights, cfg, mesh, probe)
  return gradients.probed_value_and_grad(objective)(params, probe)


def check_signals(readings, signals):
  _, _, norms, products = signals
  np.testing.assert_allclose(readings.squared_norms, norms, rtol=1e-4)
  np.testing.assert_allclose(readings.products, products, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  'changes',
  [
    {'scan': False, 'remat': 'full', 'loss_chunk': 3},
    *(pytest.param(c, marks=pytest.mark.slow) for c in ({}, {'scan': False}, {'remat': 'full'})),
  ],
)
def test_a_probe_reads_every_examples_gradient_and_changes_nothing(params, batch, signals, changes):
  directions, weights = signals[:2]
  cfg, probe = replace(**changes), gradients.make_probe(ROWS, directions)
  value, grads, readings = probed(params, batch, weights, probe, cfg)
  plain = jax.jit(jax.value_and_grad(weighted_loss), static_argnums=3)
  expected_value, expected_grads = plain(params, batch, weights, CFG)
  np.testing.assert_allclose(value, expected_value, rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), grads, expected_grads)
  check_signals(readings, signals)


@pytest.mark.parametrize('sizes', [(8, 1), (2, 4)])
def test_a_probe_on_a_mesh_equals_one_device(params, batch, signals, sizes):
  directions, weights = signals[:2]
  mesh = make_mesh(*sizes)
  layout = tree_shardings(params, mesh, gpt2.GPT2Config.sharding_rules)
  placed, *directions = (jax.device_put(tree, layout) for tree in (params, *directions))
  rows, weights = jax.device_put((batch, weights), batch_sharding(mesh))
  probe = gradients.make_probe(ROWS, directions, shards=8)
  _, _, readings = probed(placed, rows, weights, probe, CFG, mesh=mesh)
  check_signals(readings, signals)


@pytest.mark.slow
def test_norms_send_nothing_between_devices_and_gradients_once():
  mesh = make_mesh(8, 1)
  cfg = dataclasses.replace(CFG, n_embd=32)
  params = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  rows = jax.ShapeDtypeStruct((32, LENGTH + 1), jnp.int32, sharding=batch_sharding(mesh))

  def collectives(probe):
    loss = lambda p, probe, tokens: lm.token_losses(
      p, {'tokens': tokens}, cfg, mesh=mesh, probe=probe
    ).mean()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    found = costs(gradient.lower(params, probe, rows).compile()).collectives
    return sum(c.count for c in found), sum(c.count * c.bytes for c in found)

  assert 0 < collectives(None)[0] <= 5
  # More chunks than one, so that a sum over devices inside their loop would show.
  assert collectives(gradients.make_probe(32, shards=8, chunks=4)) == collectives(None)


@pytest.mark.slow
def test_signals_cost_next_to_nothing():
  """Two layers of the quickstart, 32 rows: compiled, not run."""
  cfg, rows = gpt2.PRESETS['tiny'], 32
  params = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  batch = {'tokens': jax.ShapeDtypeStruct((rows, cfg.max_len + 1), jnp.int32)}
  losses = partial(lm.token_losses, cfg=cfg)

  def probed(params, batch, *directions):
    objective = lambda params, probe: losses(params, batch, probe=probe).mean()
    probe = gradients.make_probe(rows, directions)
    return gradients.probed_value_and_grad(objective)(params, probe)

  def products(params, batch, direction, reduce):
    return gradients.alignment(lambda p: reduce(losses(p, batch)), params, direction)

  def count(function, *args):
    return costs(jax.jit(function).lower(params, batch, *args).compile())

  plain = count(lambda p, b: jax.value_and_grad(lambda p: losses(p, b).mean())(p))
  for directions in ((), (params,)):
    with_probe = count(probed, *directions)
    # What is left is the small product that adds up repeated tokens.
    small = 2 * rows * cfg.max_len**2 * cfg.n_embd
    assert with_probe.matmul_flops == plain.matmul_flops + small
    assert with_probe.matmul_flops <= 1.02 * plain.matmul_flops
    assert with_probe.temp_bytes <= 1.10 * plain.temp_bytes
  domains = lambda losses: losses.reshape(4, -1).mean(1)
  for reduce in (lambda losses: losses, lambda losses: losses.mean(1), domains):
    forwards = count(partial(products, reduce=reduce), params)
    assert forwards.matmul_flops <= 1.05 * plain.matmul_flops
    assert forwards.temp_bytes <= 0.5 * plain.temp_bytes


# Config -----------------------------------------------------------------------------------------


def model_config(**changes):
  defaults = dict(
    n_layer=2, n_head=4, n_embd=96, max_len=0, vocab_size=0, dtype='float32', scan=True,
    remat='none', d_ff=0, attention='auto', loss_chunk=0, dropout=0.0,
  )  # fmt: skip
  return SimpleNamespace(**{**defaults, **changes})


def test_from_config_fills_in_the_tokenizer_and_the_data():
  made = gpt2.GPT2Config.from_config(model_config(), vocab_size=257, seq_len=128)
  assert made == gpt2.PRESETS['tiny']


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'max_len': 64}, ('data.seq_len=128', 'model.max_len=64', 'at least 128')),
    ({'vocab_size': 256}, ('model.vocab_size=256', '257 tokens')),
    ({'n_embd': 97}, ('model.n_embd=97', 'model.n_head=4')),
    ({'dtype': 'float16'}, ("model.dtype='float16'", "'bfloat16'")),
    ({'remat': 'some'}, ("model.remat='some'", 'none, dots, full')),
    ({'attention': 'flash'}, ("model.attention='flash'", "'cudnn'")),
  ],
)
def test_from_config_explains_what_does_not_fit(changes, words):
  with pytest.raises(UserError) as error:
    gpt2.GPT2Config.from_config(model_config(**changes), vocab_size=257, seq_len=128)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message
