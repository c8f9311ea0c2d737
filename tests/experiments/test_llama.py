"""Llama against published sizes, a NumPy forward pass, and itself computed other ways."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments import config as config_lib
from experiments import models
from experiments.compiled import costs
from experiments.errors import UserError
from experiments.mesh import batch_sharding, make_mesh, tree_shardings
from experiments.models import llama, lm

CFG = llama.LlamaConfig(
  vocab_size=40, max_len=12, n_layer=2, n_head=4, n_embd=16, n_kv_head=2, d_ff=24
)
ROWS, LENGTH = 8, 10


@pytest.fixture(scope='module')
def params():
  fresh = jax.jit(partial(lm.init, cfg=CFG))(jax.random.key(0))
  noise = lambda leaf: 0.3 * np.random.default_rng(leaf.size).standard_normal(leaf.shape)
  return jax.tree.map(lambda leaf: (leaf + noise(leaf)).astype(jnp.float32), fresh)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(1)
  base = (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32)
  tokens = rng.integers(0, CFG.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
  return {'tokens': tokens, 'base': base}


def mean_loss(params, batch, cfg, mesh=None):
  return lm.token_losses(params, batch, cfg, mesh=mesh).mean()


@partial(jax.jit, static_argnums=2)
def grads_of(params, batch, cfg):
  return jax.value_and_grad(mean_loss)(params, batch, cfg)


@partial(jax.jit, static_argnums=2)
def logits_of(params, tokens, cfg):
  return lm.apply(params, tokens, cfg)


def sized(name):
  """The architecture of a size of configs/llama.py."""
  config = config_lib.load(f'configs/llama.py:size={name}')
  return models.from_config(config.model, vocab_size=257, seq_len=config.data.seq_len)


# Sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'count'),
  [('1b', 1_100_048_384), ('1.4b', 1_364_297_728), ('7b', 6_738_415_616)],
)
def test_sizes_have_the_published_parameter_counts(name, count):
  cfg = sized(name)
  shapes = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count == cfg.num_params()


@pytest.mark.parametrize('name', ['tiny', '1b', '1.4b', '7b'])
def test_the_default_hidden_width_is_eight_thirds_in_steps_of_256(name):
  cfg = sized(name)
  assert dataclasses.replace(cfg, d_ff=0).hidden == cfg.hidden == cfg.d_ff


def test_useful_flops_of_7b_by_hand():
  # 32 layers of four 4096^2 and three 4096 x 11008, causal attention, 32000 logits: x 2, x 3.
  by_hand = 6 * (32 * (4 * 4096**2 + 3 * 4096 * 11_008 + 2048 * 4096) + 4096 * 32_000)
  assert sized('7b').flops_per_token() == by_hand


def test_useful_flops_are_those_of_the_compiled_program():
  """Forward, unblocked attention: the program computes all T^2 scores, the formula half of them."""
  cfg = dataclasses.replace(CFG, n_layer=3, max_len=64)
  shapes = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  batch = {'tokens': jax.ShapeDtypeStruct((2, 65), jnp.int32)}
  counted = costs(jax.jit(partial(lm.token_losses, cfg=cfg)).lower(shapes, batch).compile())
  causal_half = 2 * cfg.n_layer * 64 * cfg.n_embd
  assert counted.matmul_flops == 2 * 64 * (cfg.flops_per_token(64) // 3 + causal_half)


# A forward pass in NumPy ------------------------------------------------------------------------


def numpy_logits(params, tokens, cfg):
  """The published formulas, one position and one head at a time, in float64."""
  params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  head = cfg.n_embd // cfg.n_head
  norm = lambda x, p: x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * p['scale']

  def turn(vector, position):
    """Each pair (i, i + d/2) as a complex number, turned by its own angle."""
    z = vector[: head // 2] + 1j * vector[head // 2 :]
    z = z * np.exp(1j * position * cfg.rope_theta ** (-2 * np.arange(head // 2) / head))
    return np.concatenate([z.real, z.imag])

  def attention(x, p):
    q, k, v = (x @ p[name]['kernel'] for name in ('q', 'k', 'v'))
    out = np.zeros_like(q)
    for h in range(cfg.n_head):
      mine = slice(h * head, (h + 1) * head)
      shared = h // (cfg.n_head // cfg.kv_heads)
      theirs = slice(shared * head, (shared + 1) * head)
      for t in range(len(x)):
        query = turn(q[t, mine], t)
        scores = [query @ turn(k[s, theirs], s) / np.sqrt(head) for s in range(t + 1)]
        weights = np.exp(scores - np.max(scores))
        out[t, mine] = weights @ v[: t + 1, theirs] / weights.sum()
    return out @ p['out']['kernel']

  def hidden_layer(x, p):
    gate = x @ p['gate']['kernel']
    return (gate / (1 + np.exp(-gate)) * (x @ p['up']['kernel'])) @ p['down']['kernel']

  rows = []
  for row in tokens:
    x = params['wte']['embedding'][row]
    for i in range(cfg.n_layer):
      block = jax.tree.map(lambda leaf: leaf[i], params['blocks'])  # noqa: B023
      x = x + attention(norm(x, block['ln_1']), block['attn'])
      x = x + hidden_layer(norm(x, block['ln_2']), block['mlp'])
    rows.append(norm(x, params['ln_f']) @ params['head']['embedding'].T)
  return np.stack(rows)


def test_equals_a_numpy_forward_pass(params, batch):
  tokens = batch['tokens'][:3, :-1]
  ours = logits_of(params, tokens, CFG)
  assert ours.dtype == jnp.float32
  np.testing.assert_allclose(ours, numpy_logits(params, tokens, CFG), rtol=2e-4, atol=2e-4)


def test_rotary_scores_depend_on_the_distance_alone():
  rng = np.random.default_rng(0)
  q, k = (np.broadcast_to(rng.standard_normal(8), (1, 6, 1, 8)) for _ in 'qk')
  turned_q, turned_k = (np.asarray(llama.rotate(jnp.asarray(x), 100.0))[0, :, 0] for x in (q, k))
  scores = turned_q @ turned_k.T
  for distance in range(-5, 6):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4)
  assert np.ptp(scores) > 0.1


def test_a_token_never_changes_earlier_logits(params, batch):
  tokens = batch['tokens'][:, :-1]
  changed = tokens.copy()
  changed[:, 6] = (tokens[:, 6] + 1) % CFG.vocab_size
  before, after = logits_of(params, tokens, CFG), logits_of(params, changed, CFG)
  np.testing.assert_array_equal(before[:, :6], after[:, :6])
  assert not np.allclose(before[:, 6:], after[:, 6:])


# Other ways -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'changes', [{'scan': False}, {'remat': 'dots'}, {'remat': 'full'}, {'loss_chunk': 4}], ids=str
)
def test_other_ways_to_compute_agree_in_values_and_gradients(params, batch, changes):
  value, grads = grads_of(params, batch, CFG)
  other_value, other_grads = grads_of(params, batch, dataclasses.replace(CFG, **changes))
  np.testing.assert_allclose(other_value, value, rtol=1e-6)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), other_grads, grads)


@pytest.mark.slow
def test_remat_saves_memory_in_the_order_of_its_names():
  cfg = dataclasses.replace(sized('tiny'), n_layer=8, loss_chunk=32)
  shapes = jax.eval_shape(partial(lm.init, cfg=cfg), jax.random.key(0))
  batch = {'tokens': jax.ShapeDtypeStruct((8, 129), jnp.int32)}

  def count(remat):
    loss = partial(mean_loss, cfg=dataclasses.replace(cfg, remat=remat))
    return costs(jax.jit(jax.grad(loss)).lower(shapes, batch).compile())

  none, dots, full = map(count, lm.REMAT)
  assert full.temp_bytes < dots.temp_bytes < none.temp_bytes
  assert none.matmul_flops < dots.matmul_flops < full.matmul_flops


@pytest.mark.parametrize('loss_chunk', [0, 4])
@pytest.mark.parametrize('sizes', [(8,), (2, 4), (2, 2, 2), (1, 1, 8)], ids=str)
def test_a_mesh_equals_one_device(params, batch, sizes, loss_chunk):
  cfg = dataclasses.replace(CFG, loss_chunk=loss_chunk)
  expected_value, expected_grads = grads_of(params, batch, CFG)
  mesh = make_mesh(*sizes)
  loss = jax.value_and_grad(partial(mean_loss, cfg=cfg, mesh=mesh))
  layout = tree_shardings(params, mesh, cfg.sharding_rules)
  placed = jax.device_put(params, layout)
  rows = jax.device_put(batch, batch_sharding(mesh))
  value, grads = jax.jit(loss, out_shardings=(None, layout))(placed, rows)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), grads, expected_grads)
  kernel = grads['blocks']['mlp']['up']['kernel']
  assert kernel.addressable_shards[0].data.size == kernel.size // np.prod(sizes[1:])


# Config -----------------------------------------------------------------------------------------


def model_config(**changes):
  model = common.base_config().model
  model.update(name='llama', n_layer=2, n_head=4, n_embd=96, n_kv_head=2, d_ff=256)
  model.update(changes)
  return model


def test_from_config_chooses_the_family():
  made = models.from_config(model_config(), vocab_size=257, seq_len=128)
  assert made == sized('tiny')


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'n_kv_head': 3}, ('model.n_kv_head=3', 'model.n_head=4')),
    ({'n_embd': 12}, ('model.n_embd=12', 'model.n_head=4', 'odd')),
  ],
)
def test_from_config_explains_what_does_not_fit(changes, words):
  with pytest.raises(UserError) as error:
    models.from_config(model_config(**changes), vocab_size=257, seq_len=128)
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert word in message
