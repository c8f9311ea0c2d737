"""The train step against gradients put together by hand, on one device and on eight."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled
from jaxrw import steps
from tests import oracles

B, T, D, M = 16, 5, 3, 4
SGD = optax.sgd(1.0)  # new parameters = old - gradient
UNIFORM, LINUPPER = jaxrw.uniform(), jaxrw.linupper(0.4)  # one object each: compiled once


def _loss(params, example):
  """Squared error of a line; `base` and the ids in the example are none of its business."""
  return (example['x'] @ params - example['y']) ** 2


def _token_loss(params, batch):
  """[B, T] losses of T targets for each input."""
  return (batch['x'] @ params - batch['y']) ** 2


def _data(tokens=False, seed=0):
  """(params, batch) with base: uneven padding, one whole row of it in the first microbatch."""
  rng = np.random.default_rng(seed)
  shape = (B, T) if tokens else (B,)
  batch = {
    'x': rng.normal(size=(B, D)),
    'y': rng.normal(size=shape),
    'base': (rng.random(shape) < 0.75).astype(float),
  }
  batch['base'][:2], batch['base'][8] = 1, 0
  params = rng.normal(size=(D, T) if tokens else (D,))
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


@functools.cache
def _step(rw, loss=_loss, **options):
  return jax.jit(steps.make_train_step(loss, SGD, rw, **options))


def _run(rw, params, batch, signals=None, loss=_loss, **options):
  """(gradient, metrics) of one step."""
  state = steps.TrainState.create(params, SGD, rw)
  new, metrics = _step(rw, loss, **options)(state, batch, signals)
  return np.asarray(params - new.params), jax.tree.map(np.asarray, metrics)


@jax.jit
def _row_gradients(params, batch):
  """(losses [B], gradients [B, D]) of the examples, one by one."""
  return jax.vmap(jax.value_and_grad(_loss), in_axes=(None, 0))(params, batch)


@functools.cache
def _by_hand(seed=0):
  params, batch = _data(seed=seed)
  losses, gradients = map(np.asarray, _row_gradients(params, batch))
  return params, batch, losses.astype(float), gradients.astype(float), np.asarray(batch['base'])


# The weighted gradient


@pytest.mark.parametrize('name', ['linupper', 'quadratic', 'kl_dro'])
def test_gradient_is_the_weighted_mean_of_the_examples_gradients(name):
  params, batch, losses, gradients, base = _by_hand()
  weights = oracles.base_mean_one(name, losses, 0.4, base)
  grad, metrics = _run(getattr(jaxrw, name)(0.4), params, batch)
  expected = np.sum((base * weights)[:, None] * gradients, 0) / base.sum()
  np.testing.assert_allclose(grad, expected, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(metrics['weights'], weights, rtol=2e-5)
  np.testing.assert_allclose(metrics['losses'], losses, rtol=1e-6)
  np.testing.assert_allclose(metrics['loss_sum'], np.sum(base * losses), rtol=1e-6)
  np.testing.assert_allclose(
    metrics['weighted_loss_sum'], np.sum(base * weights * losses), rtol=2e-5
  )
  assert metrics['base_sum'] == base.sum()
  np.testing.assert_allclose(metrics['grad_norm'], np.linalg.norm(expected), rtol=2e-5)


def test_gradient_through_the_weights_would_be_another_one():
  params, batch, *_ = _by_hand()
  batch = {**batch, 'base': jnp.ones(B)}

  def leaky(params):
    losses = jax.vmap(_loss, in_axes=(None, 0))(params, batch)
    low, high = jnp.min(losses), jnp.max(losses)
    h = (2 * losses - low - high) / (high - low)
    return jnp.sum(jax.nn.softmax(jnp.minimum(h + 1, 1) / 0.4) * losses)

  wrong = np.asarray(jax.jit(jax.grad(leaky))(params))
  grad, _ = _run(LINUPPER, params, batch)
  assert np.linalg.norm(grad - wrong) > 0.1 * np.linalg.norm(grad)


def test_uniform_is_bit_for_bit_the_plain_mean():
  params, batch, *_ = _by_hand()
  batch = {k: v for k, v in batch.items() if k != 'base'}
  grad, metrics = _run(UNIFORM, params, batch)
  plain = jax.grad(lambda p: jnp.sum(jax.vmap(_loss, in_axes=(None, 0))(p, batch)))
  step = jax.jit(lambda p: p - plain(p) * (1 / jnp.float32(B)))
  np.testing.assert_array_equal(grad, params - step(params))
  np.testing.assert_array_equal(metrics['weights'], np.ones(B))


# Data parallelism, emulated as separate workers


def _worker_mean(params, losses, gradients, weights, assigned, world):
  """Mean over the workers of the gradient of world * sum(w_i l_i) on each worker's rows."""
  rows = np.arange(B).reshape(world, -1)
  parts = [world * assigned(weights, rank, rows) @ gradients[rows[rank]] for rank in range(world)]
  return np.mean(parts, axis=0)


def _global_rank(weights, rank, rows):
  return weights[rows[rank]]


def _local_rank(weights, rank, rows, ranks_per_node=4):
  """The mistake: every node reads the weights of the first node's rows."""
  return weights[rows[rank % ranks_per_node]]


@pytest.mark.parametrize(('assigned', 'right'), [(_global_rank, True), (_local_rank, False)])
def test_workers_agree_with_the_global_step_unless_weights_are_indexed_by_local_rank(
  assigned, right
):
  """2 nodes x 4 ranks x 2 rows: the comparison passes the right indexing and catches the other."""
  params, batch, losses, gradients, _ = _by_hand()
  step_gradient, _ = _run(LINUPPER, params, {**batch, 'base': jnp.ones(B)})
  weights = oracles.official_sum_one('linupper', losses, 0.4)
  workers = _worker_mean(params, losses, gradients, weights, assigned, world=8)
  error = np.linalg.norm(workers - step_gradient) / np.linalg.norm(step_gradient)
  if right:
    assert error < 1e-5
  else:
    assert error > 0.2, 'a run with misplaced weights would pass for a correct one'


# Eight devices


def _network_loss(params, example):
  return jnp.sum((jnp.tanh(example['x'] @ params['in']) @ params['out'] - example['y']) ** 2)


def _train(rw, mesh=None, batch_axes=None, microbatches=1):
  """Three AdamW steps of a small network; parameters over `fsdp` where the mesh has it."""
  rng = np.random.default_rng(0)
  params = {'in': rng.normal(size=(D, 8)) / 2, 'out': rng.normal(size=(8, 2)) / 2}
  batch = {
    'x': rng.normal(size=(B, D)),
    'y': rng.normal(size=(B, 2)),
    'base': np.array([1, 1, 1, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0]),  # devices 2 of 8: nothing
    'example_id': np.arange(B),
  }
  params, batch = jax.tree.map(
    lambda x: np.asarray(x, np.float32 if x.dtype == float else np.int32), (params, batch)
  )
  tx = optax.adamw(1e-2)
  if mesh is not None:
    fsdp = 'fsdp' if 'fsdp' in mesh.axis_names else None
    layout = {'in': PartitionSpec(None, fsdp), 'out': PartitionSpec(fsdp, None)}
    params = {k: jax.device_put(v, NamedSharding(mesh, layout[k])) for k, v in params.items()}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(batch_axes)))
  step = jax.jit(steps.make_train_step(_network_loss, tx, rw, microbatches=microbatches))
  state = steps.TrainState.create(jax.tree.map(jnp.asarray, params), tx, rw)
  history = []
  for _ in range(3):
    state, metrics = step(state, batch)
    history.append(np.asarray(metrics['weights']))
  return state.params, np.stack(history)


def _mesh(axis_type=AxisType.Auto, **axes):
  devices = np.asarray(jax.devices()).reshape(tuple(axes.values()))
  return Mesh(devices, tuple(axes), axis_types=(axis_type,) * len(axes))


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
  'data 8': (AUTO, {'data': 8}, 'data', 1),
  'data 8, Explicit': (EXPLICIT, {'data': 8}, 'data', 2),
  'data 4 x fsdp 2': (AUTO, {'data': 4, 'fsdp': 2}, ('data', 'fsdp'), 1),
  'data 2 x fsdp 4, microbatches': (AUTO, {'data': 2, 'fsdp': 4}, ('data', 'fsdp'), 2),
}


WEIGHTINGS = {
  'linupper + cap': jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(1.5)),
  'row_shuffled': jaxrw.row_shuffled(jaxrw.upper(1.0)),
}


@functools.cache
def _train_alone(weighting):
  return _train(WEIGHTINGS[weighting])


@pytest.mark.parametrize(
  ('weighting', 'layout'),
  [*(('linupper + cap', layout) for layout in MESHES), ('row_shuffled', 'data 4 x fsdp 2')],
)
def test_eight_devices_train_like_one(weighting, layout):
  axis_type, axes, batch_axes, microbatches = MESHES[layout]
  mesh = _mesh(axis_type, **axes)
  with jax.set_mesh(mesh):
    params, weights = _train(WEIGHTINGS[weighting], mesh, batch_axes, microbatches)
  alone, alone_weights = _train_alone(weighting)
  np.testing.assert_allclose(weights, alone_weights, rtol=2e-5)
  assert np.ptp(alone_weights[0]) > 0.5, 'uniform weights would make this an easy test'
  for name in params:
    np.testing.assert_allclose(params[name], alone[name], rtol=2e-5, atol=1e-6, err_msg=name)


@functools.cache
def _all_reduces(name):
  """Element counts of the all-reduces in the compiled step, and the other collectives' names."""
  rw = jaxrw.uniform() if name == 'uniform' else getattr(jaxrw, name)(0.4)
  mesh = _mesh(data=8)
  rows = NamedSharding(mesh, PartitionSpec('data'))
  everywhere = NamedSharding(mesh, PartitionSpec())
  tx = optax.adam(1e-3)
  params = {'in': jnp.ones((D, 7)), 'out': jnp.ones((7, 2))}
  state = jax.device_put(steps.TrainState.create(params, tx, rw), everywhere)
  batch = jax.device_put({'x': jnp.ones((B, D)), 'y': jnp.ones((B, 2)), 'base': jnp.ones(B)}, rows)
  step = jax.jit(steps.make_train_step(_network_loss, tx, rw))
  text = step.lower(state, batch).compile().as_text()
  found, others = [], []
  for line in text.splitlines():
    match = re.search(r'= (\(?[a-z0-9]+\[.*?) ([a-z-]+)\(', line)
    if not match:
      continue
    shapes, kind = match.groups()
    if kind in ('all-reduce', 'all-reduce-start'):
      shapes = re.findall(r'\[([\d,]*)\]', shapes)
      found.append(int(sum(np.prod([int(n) for n in s.split(',') if n]) for s in shapes)))
    elif re.match('all-|reduce-scatter|collective-', kind) and not kind.endswith('-done'):
      others.append(kind)
  return collections.Counter(found), others


# The two that LinUpper adds: max of the pair (l, -l), and the sums that keep sum(base * w).
# `kl_dro` needs the largest loss only; `quadratic` also the largest f(h), not known beforehand.
EXTRA = {'linupper': 2, 'kl_dro': 2, 'quadratic': 3}


@pytest.mark.parametrize('name', EXTRA)
def test_reweighting_adds_a_few_tiny_collectives(name):
  plain, plain_others = _all_reduces('uniform')
  ours, our_others = _all_reduces(name)
  assert not plain - ours, f'{plain} against {ours}'
  extra = sorted((ours - plain).elements())
  assert len(extra) <= EXTRA[name], f'extra all-reduces of {extra} elements'
  assert all(size <= 2 for size in extra), f'extra all-reduces of {extra} elements'
  assert extra, 'global weights without any collective cannot be global'
  assert our_others == plain_others == []


# Microbatches


@pytest.mark.parametrize(('tokens', 'example_base'), [(False, 'any'), (True, 'tokens')])
def test_global_scope_equals_one_big_batch(tokens, example_base):
  params, batch = _data(tokens)
  options = {'example_base': example_base}
  if tokens:
    options |= {'loss': None, 'batched_loss': _token_loss}
  rw = jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(1.5))
  one, metrics = _run(rw, params, batch, **options)
  many, split = _run(rw, params, batch, microbatches=M, **options)
  np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(split[name], metrics[name], rtol=1e-5, err_msg=name)


def test_microbatch_scope_weighs_each_part_alone_and_divides_once():
  params, batch, losses, gradients, base = _by_hand()
  numerator, weights = np.zeros(D), np.zeros(B)
  for part in range(M):
    rows = np.arange(part, B, M)  # interleaved
    weights[rows] = oracles.base_mean_one('linupper', losses[rows], 0.4, base[rows])
    numerator += np.sum((base * weights)[rows, None] * gradients[rows], axis=0)
  grad, metrics = _run(LINUPPER, params, batch, microbatches=M, scope='microbatch')
  np.testing.assert_allclose(metrics['weights'], weights, rtol=2e-5)
  np.testing.assert_allclose(grad, numerator / base.sum(), rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(metrics['losses'], losses, rtol=1e-6)
  # The mean of the microbatches' means, which frameworks often compute, is something else here.
  sizes = base.reshape(-1, M).sum(0)
  assert np.ptp(sizes) > 0


ONLINE = {
  'kl_dro': jaxrw.kl_dro(0.5),
  'kl_dro of huge losses': jaxrw.kl_dro(1e-3),
  'chain with burn-in over': jaxrw.chain(a=jaxrw.kl_dro(1.0), b=jaxrw.after(0, jaxrw.kl_dro(2.0))),
  'burn-in': jaxrw.after(3, jaxrw.kl_dro(0.5)),
  'linupper_stale': jaxrw.linupper_stale(0.4),
  'uniform': jaxrw.uniform(),
}


@pytest.mark.parametrize('tokens', [False, True])
@pytest.mark.parametrize('name', ONLINE)
def test_online_scope_equals_one_big_batch(name, tokens):
  """Two steps, so that a state (the range of the losses before) has something to say."""
  rw, options = ONLINE[name], {}
  params, batch = _data(tokens)
  batch['weights'] = jnp.linspace(0.0, 2.0, B)
  if tokens:
    options = {'loss': None, 'batched_loss': _token_loss, 'example_base': 'tokens'}
  results = []
  for microbatches, scope in ((1, 'global'), (M, 'online')):
    step = _step(rw, microbatches=microbatches, scope=scope, **options)
    state = steps.TrainState.create(params, SGD, rw)
    for _ in range(2):
      state, metrics = step(state._replace(params=params), batch)
    results.append((np.asarray(params - state.params), metrics, state.weighting))
  (one, metrics, weighting), (many, split, split_weighting) = results
  np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(split_weighting, weighting)
  for key in metrics:
    np.testing.assert_allclose(split[key], metrics[key], rtol=1e-4, err_msg=key)
  if name in ('kl_dro', 'linupper_stale'):
    assert np.ptp(metrics['weights']) > 0.5, 'uniform weights would make this an easy test'


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
def test_online_scope_shows_a_broken_row_and_survives_an_empty_batch(bad):
  params, batch = _data()
  options = {'microbatches': M, 'scope': 'online'}
  grad, _ = _run(ONLINE['kl_dro'], params, {**batch, 'y': batch['y'].at[5].set(bad)}, **options)
  assert np.all(np.isnan(grad))
  grad, metrics = _run(ONLINE['kl_dro'], params, {**batch, 'base': jnp.zeros(B)}, **options)
  np.testing.assert_array_equal(grad, np.zeros(D))
  assert metrics['base_sum'] == 0


def test_online_scope_is_for_weights_of_the_softmax_type():
  for rw in (LINUPPER, jaxrw.chain(a=jaxrw.kl_dro(1.0), cap=jaxrw.cap(2.0))):
    with pytest.raises(ValueError, match="use scope='global'"):
      steps.make_train_step(_loss, SGD, rw, microbatches=M, scope='online')


def test_stale_linupper_uses_the_range_of_the_step_before():
  rng = np.random.default_rng(0)
  before, losses = rng.gamma(2.0, 1.0, (2, B)).astype(np.float32)
  base = np.where(np.arange(B) == 3, 0, 1).astype(np.float32)
  before[3] = 100  # padding: not part of any range
  rw = jaxrw.linupper_stale(0.4)
  state = rw.init()
  weights, state = rw.update(jnp.ones(B), state, losses=jnp.asarray(before), base=base)
  np.testing.assert_allclose(weights, base, rtol=1e-6)  # no range yet: uniform
  weights, state = rw.update(jnp.ones(B), state, losses=jnp.asarray(losses), base=base)
  seen = [x for x, b in zip(before.astype(float), base) if b]
  tilts = []
  for loss, present in zip(losses.astype(float), base):
    h = (2 * loss - min(seen) - max(seen)) / (max(seen) - min(seen))
    tilts.append(np.exp(min(max(h, -1), 0) / 0.4) * present)
  np.testing.assert_allclose(weights, np.array(tilts) * base.sum() / sum(tilts), rtol=1e-5)
  np.testing.assert_allclose(state, [losses[base > 0].min(), losses[base > 0].max()])
  _, kept = rw.update(jnp.ones(B), state, losses=jnp.full(B, jnp.nan), base=base)
  np.testing.assert_array_equal(kept, state)  # one broken batch does not break the next


COSTS = {  # matmul FLOPs of the step over those of one microbatch
  ('kl_dro', 'online'): 1.0,
  ('kl_dro', 'microbatch'): 1.0,
  ('kl_dro', 'global'): 4 / 3,
  ('linupper_stale', 'online'): 1.0,
}


@pytest.mark.parametrize(('name', 'scope'), COSTS)
def test_what_accumulation_costs(name, scope):
  rng = np.random.default_rng(0)
  params = {k: jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for k in ('in', 'mid', 'out')}
  batch = {'x': jnp.ones((B, 16)), 'y': jnp.ones((B, 16))}

  def loss(params, example):
    # The input is differentiated, too, so that a backward pass is two forward passes exactly.
    x = example['x'] * (1 + params['in'][0])
    for name in ('in', 'mid', 'out'):
      x = jnp.tanh(params[name] @ x)
    return jnp.sum((x - example['y']) ** 2)

  def flops(microbatches, scope):
    rw = ONLINE[name]
    step = jax.jit(steps.make_train_step(loss, SGD, rw, microbatches=microbatches, scope=scope))
    state = steps.TrainState.create(params, SGD, rw)
    return compiled.costs(step.lower(state, batch).compile()).matmul_flops

  ratio = flops(M, scope) / flops(1, 'global')
  assert ratio == pytest.approx(COSTS[name, scope], rel=1e-3)


def test_row_signals_are_computed_at_the_parameters_of_the_step_and_not_differentiated():
  params, batch, _, gradients, base = _by_hand()
  direction = jnp.array([1.0, -2.0, 0.5])

  def row_signals(params, batch, signals):
    row_losses = lambda p: jax.vmap(_loss, in_axes=(None, 0))(p, batch)
    return {'alignment': jax.jvp(row_losses, (params,), (signals['direction'],))[1]}

  rw = jaxrw.Weighting(lambda: (), lambda w, s, *, alignment, **_: (w * jnp.tanh(alignment), s))
  weights = np.tanh(gradients @ np.asarray(direction))
  expected = np.sum((base * weights)[:, None] * gradients, 0) / base.sum()
  for options in ({}, {'microbatches': M}, {'microbatches': M, 'scope': 'microbatch'}):
    grad, metrics = _run(
      rw, params, batch, {'direction': direction}, row_signals=row_signals, **options
    )
    np.testing.assert_allclose(metrics['weights'], weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"row_signals returned 'alignment' with shape \(\)"):
    _run(rw, params, batch, row_signals=lambda *_: {'alignment': jnp.float32(1)})


def test_row_i_goes_to_microbatch_i_mod_m():
  tree = {'a': jnp.arange(12), 'b': jnp.arange(24).reshape(12, 2)}
  parts = steps.split_rows(tree, 4)
  np.testing.assert_array_equal(parts['a'], np.arange(12).reshape(3, 4).T)
  assert parts['b'].shape == (4, 3, 2)
  back = steps.join_rows(parts)
  for name in tree:
    np.testing.assert_array_equal(back[name], tree[name])
  # Losses equal within i mod M: uniform weights there, and only there.
  batch = {'x': jnp.zeros((B, D)), 'y': jnp.arange(B, dtype=jnp.float32) % M}
  _, metrics = _run(jaxrw.upper(0.4), jnp.zeros(D), batch, microbatches=M, scope='microbatch')
  np.testing.assert_array_equal(metrics['weights'], np.ones(B))
  np.testing.assert_array_equal(metrics['losses'], (np.arange(B) % M) ** 2)


def _counting():
  """State counts the updates; a weight is 1 + the count before it."""
  update = lambda weights, count, **_: (weights * (1 + count), count + 1)
  return jaxrw.Weighting(lambda: jnp.zeros((), jnp.float32), update)


@pytest.mark.parametrize(('scope', 'updates'), [('global', 1), ('microbatch', M)])
def test_state_passes_through_the_updates_in_order(scope, updates):
  params, batch = _data()
  rw = _counting()
  step = _step(rw, microbatches=M, scope=scope)
  state, metrics = step(steps.TrainState.create(params, SGD, rw), batch)
  assert state.weighting == updates
  np.testing.assert_array_equal(metrics['weights'], 1 + np.arange(B) % updates)
  state, _ = step(state, batch)
  assert (int(state.weighting), int(state.step)) == (2 * updates, 2)


# What an example counts


def test_base_measure_by_hand():
  validity = jnp.array([[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
  token, example = jnp.zeros((3, 4)), jnp.zeros(3)
  third = 1 / 3
  expected = [[third, third, third, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  np.testing.assert_allclose(steps.base_measure(validity, token, 'any'), expected, rtol=1e-7)
  np.testing.assert_array_equal(steps.base_measure(validity, token, 'tokens'), validity)
  np.testing.assert_allclose(steps.base_measure(validity, example, 'any'), [1, 1, 0], rtol=1e-7)
  np.testing.assert_array_equal(steps.base_measure(validity, example, 'tokens'), [3, 1, 0])
  counts = jnp.array([3, 1, 0])
  np.testing.assert_array_equal(steps.base_measure(counts, example, 'any'), [1, 1, 0])
  np.testing.assert_array_equal(steps.base_measure(counts, example, 'tokens'), [3, 1, 0])
  np.testing.assert_array_equal(steps.base_measure(None, example), [1, 1, 1])
  np.testing.assert_array_equal(steps.base_measure(None, token), np.full((3, 4), 0.25))
  np.testing.assert_array_equal(
    steps.base_measure(jnp.array([True, False, True]), token, 'tokens')[:, 0], [1, 0, 1]
  )


@pytest.mark.parametrize('example_base', ['any', 'tokens'])
def test_token_losses_weigh_examples_by_their_base(example_base):
  params, batch = _data(tokens=True)
  _, metrics = _run(
    LINUPPER, params, batch, loss=None, batched_loss=_token_loss, example_base=example_base
  )
  valid = np.asarray(batch['base'])
  losses = np.asarray(_token_loss(params, batch), float)
  count = valid.sum(1)
  means = np.sum(valid * losses, 1) / np.maximum(count, 1)
  mass = (count > 0).astype(float) if example_base == 'any' else count
  weights = oracles.base_mean_one('linupper', means, 0.4, mass)
  np.testing.assert_allclose(metrics['weights'], np.tile(weights[:, None], T), rtol=3e-5)
  np.testing.assert_allclose(metrics['base_sum'], mass.sum(), rtol=1e-6)
  np.testing.assert_allclose(metrics['loss_sum'], np.sum(mass * means), rtol=1e-5)
  np.testing.assert_allclose(
    metrics['weighted_loss_sum'], np.sum(mass * weights * means), rtol=3e-5
  )


def test_loss_and_batched_loss_that_agree_give_the_same_step():
  params, batch, *_ = _by_hand()
  batched = lambda params, batch: (batch['x'] @ params - batch['y']) ** 2
  one, _ = _run(LINUPPER, params, batch)
  other, _ = _run(LINUPPER, params, batch, batched_loss=batched)
  np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)


def test_padding_rows_do_not_reach_the_gradient():
  params, batch, _, _, base = _by_hand()
  kept = np.flatnonzero(base)
  grad, _ = _run(LINUPPER, params, jax.tree.map(lambda x: x[kept], batch))
  garbage = jax.tree.map(lambda x: x.copy(), batch)
  garbage['y'] = jnp.where(batch['base'] > 0, batch['y'], 1e6)
  padded, metrics = _run(LINUPPER, params, garbage)
  np.testing.assert_allclose(padded, grad, rtol=1e-5, atol=1e-6)
  assert metrics['base_sum'] == kept.size


def test_an_all_padding_batch_changes_nothing():
  params, batch = _data()
  for options in ({}, {'microbatches': M}):
    grad, metrics = _run(LINUPPER, params, {**batch, 'base': jnp.zeros(B)}, **options)
    np.testing.assert_array_equal(grad, np.zeros(D))
    assert metrics['loss_sum'] == metrics['weighted_loss_sum'] == metrics['base_sum'] == 0


# Weights and losses that are not clean


def test_weights_of_the_dataset_start_the_chain():
  params, batch, losses, gradients, base = _by_hand()
  own = np.random.default_rng(5).uniform(0, 2, B).astype(np.float32)
  grad, metrics = _run(UNIFORM, params, {**batch, 'weights': jnp.asarray(own)})
  np.testing.assert_array_equal(metrics['weights'], own)
  expected = np.sum((base * own)[:, None] * gradients, 0) / base.sum()
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
  _, metrics = _run(LINUPPER, params, {**batch, 'weights': jnp.asarray(own)}, microbatches=M)
  expected = oracles.base_mean_one('linupper', losses, 0.4, base, own)
  np.testing.assert_allclose(metrics['weights'], expected, rtol=3e-5)


@pytest.mark.parametrize('per_token', [False, True])
def test_weights_of_the_dataset_spread_over_tokens(per_token):
  params, batch = _data(tokens=True)
  shape = (B, T) if per_token else (B,)
  own = np.random.default_rng(5).uniform(0, 2, shape)
  options = {'loss': None, 'batched_loss': _token_loss}
  for dtype in (jnp.float32, jnp.bfloat16):
    given = jnp.asarray(own, dtype)
    _, metrics = _run(UNIFORM, params, {**batch, 'weights': given}, **options)
    expected = np.asarray(given, np.float32)
    expected = expected if per_token else np.tile(expected[:, None], T)
    np.testing.assert_array_equal(metrics['weights'], expected)
    assert metrics['weights'].dtype == np.float32


@pytest.mark.parametrize('shape', [(B,), (B, T)])
def test_weights_of_the_dataset_must_be_floats(shape):
  params, batch = _data(tokens=True)
  batch['weights'] = jnp.ones(shape, jnp.int32)
  with pytest.raises(TypeError, match='has dtype int32; store weights as floats'):
    _run(UNIFORM, params, batch, loss=None, batched_loss=_token_loss)


def test_token_weights_need_token_losses():
  params, batch = _data()
  with pytest.raises(ValueError, match='return per-token losses from batched_loss'):
    _run(UNIFORM, params, {**batch, 'weights': jnp.ones((B, T))})


@pytest.mark.parametrize('options', [{}, {'microbatches': M}])
def test_a_nan_row_is_masked_or_spoils_the_step(options):
  """The NaN comes after the differentiable part; inside it, 0 * nan would reach the gradient."""
  params, batch, losses, gradients, base = _by_hand()
  assert base[1] == 1
  batch = {**batch, 'fault': jnp.zeros(B).at[1].set(jnp.nan)}
  faulty = lambda params, example: _loss(params, example) + example['fault']
  grad, metrics = _run(jaxrw.linupper(0.4, nonfinite='mask'), params, batch, loss=faulty, **options)
  present = base * (np.arange(B) != 1)
  weights = oracles.base_mean_one('linupper', losses, 0.4, present) * base.sum() / present.sum()
  np.testing.assert_allclose(metrics['weights'], weights, rtol=3e-5)
  expected = np.sum((present * weights)[:, None] * gradients, 0) / base.sum()
  np.testing.assert_allclose(grad, expected, rtol=2e-5, atol=1e-6)
  assert np.isfinite(metrics['weighted_loss_sum'])
  assert np.isnan(metrics['loss_sum']), 'the plain loss keeps the evidence'
  for rw in (LINUPPER, jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(2.0))):
    grad, metrics = _run(rw, params, batch, loss=faulty, **options)
    assert np.isnan(metrics['weighted_loss_sum'])
    assert np.all(np.isnan(grad))


def test_bfloat16_losses_are_weighed_in_float32():
  params, batch, *_ = _by_hand()
  half = lambda params, example: _loss(params, example).astype(jnp.bfloat16)
  grad, metrics = _run(LINUPPER, params, batch, loss=half)
  assert metrics['weights'].dtype == metrics['losses'].dtype == np.float32
  losses = np.asarray(metrics['losses'])
  expected = oracles.base_mean_one('linupper', losses, 0.4, np.asarray(batch['base']))
  np.testing.assert_allclose(metrics['weights'], expected, rtol=2e-5)
  assert grad.dtype == np.float32


# Signals


def _recorder(seen, *needed):
  def update(weights, state, **signals):
    missing = [name for name in needed if name not in signals]
    assert not missing, missing
    seen.append(jax.tree.map(jnp.shape, {k: v for k, v in signals.items() if k != 'key'}))
    return weights, state

  return jaxrw.Weighting(lambda: (), update)


@pytest.mark.parametrize(
  ('options', 'rows'),
  [
    ({}, B),
    ({'microbatches': M, 'scope': 'global'}, B),
    ({'microbatches': M, 'scope': 'microbatch'}, B // M),
  ],
)
def test_signals_arrive_under_their_names_and_in_the_scope(options, rows):
  params, batch = _data()
  batch |= {
    'domain_id': jnp.arange(B) % 3,
    'example_id': jnp.arange(B),
    'sampling_prob': jnp.full(B, 0.5),
    'tokens': jnp.zeros((B, T), jnp.int32),  # no signal: it stays out
  }

  def batched(params, part):
    losses = (part['x'] @ params - part['y']) ** 2
    return losses, {'labels': part['example_id'], 'surprise': {'deep': losses[:, None]}}

  seen = []
  whole = {'objective_prob': jnp.ones(3), 'anchor': jnp.ones(7), 'extra': {'mine': jnp.ones(())}}
  _run(_recorder(seen), params, batch, whole, batched_loss=batched, **options)
  assert seen[0] == {
    'losses': (rows,),
    'base': (rows,),
    'step': (),
    'group_ids': (rows,),
    'example_ids': (rows,),
    'sampling_prob': (rows,),
    'labels': (rows,),
    'objective_prob': (3,),
    'anchor': (7,),
    'extra': {'mine': (), 'surprise': {'deep': (rows, 1)}},
  }


def test_signals_of_the_forward_pass_keep_the_row_order_and_stop_gradients():
  """Weights made from the predictions: constants for differentiation, at any M."""
  params, batch, _, gradients, base = _by_hand()

  def batched(params, part):
    prediction = part['x'] @ params
    return (prediction - part['y']) ** 2, {'prediction': prediction}

  rw = jaxrw.Weighting(lambda: (), lambda w, s, *, extra, **_: (w * extra['prediction'] ** 2, s))
  weights = np.asarray(batch['x'] @ params, float) ** 2
  expected = np.sum((base * weights)[:, None] * gradients, 0) / base.sum()
  for microbatches in (1, M):
    grad, metrics = _run(rw, params, batch, batched_loss=batched, microbatches=microbatches)
    np.testing.assert_allclose(metrics['weights'], weights, rtol=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=2e-5, atol=1e-5)


def test_misplaced_and_misspelled_signals_are_refused():
  params, batch = _data()
  with pytest.raises(TypeError, match="unknown signal 'anchors': did you mean 'anchor'"):
    _run(UNIFORM, params, batch, {'anchors': jnp.ones(2)})
  with pytest.raises(TypeError, match=r"unknown signal 'mine'.*extra=\{'mine': \.\.\.\}"):
    _run(UNIFORM, params, batch, {'mine': jnp.ones(2)})
  with pytest.raises(TypeError, match="'group_ids' has one row per example"):
    _run(UNIFORM, params, batch, {'group_ids': jnp.ones(B)})
  missing = jaxrw.Weighting(lambda: (), lambda w, s, *, ref_losses, **_: (w, s))
  with pytest.raises(TypeError, match='ref_losses'):
    _run(missing, params, batch)


@pytest.mark.parametrize('options', [{}, {'microbatches': M}])
def test_what_batched_loss_returns_is_checked(options):
  params, batch = _data()
  losses = lambda p, b: (b['x'] @ p - b['y']) ** 2
  run = functools.partial(_run, UNIFORM, params, batch, **options)
  with pytest.raises(TypeError, match="'losses', a reserved name that is not one of a row signal"):
    run(batched_loss=lambda p, b: (losses(p, b), {'losses': b['y']}))
  with pytest.raises(TypeError, match="'objective_prob', a reserved name"):
    run(batched_loss=lambda p, b: (losses(p, b), {'objective_prob': jnp.ones(3)}))
  with pytest.raises(ValueError, match=r"'accuracy' with shape \(\); expected one row"):
    run(batched_loss=lambda p, b: (losses(p, b), {'accuracy': jnp.float32(0.5)}))
  with pytest.raises(TypeError, match='expected a dict'):
    run(batched_loss=lambda p, b: (losses(p, b), b['y']))
  with pytest.raises(ValueError, match='Return one loss per example or token, not their mean'):
    run(batched_loss=lambda p, b: jnp.mean(losses(p, b)))


def test_bad_arguments_are_refused_when_the_step_is_built():
  build = functools.partial(steps.make_train_step, _loss, SGD, jaxrw.uniform())
  with pytest.raises(ValueError, match='microbatches=0'):
    build(microbatches=0)
  with pytest.raises(ValueError, match=r'microbatches=2\.0'):
    build(microbatches=2.0)
  with pytest.raises(ValueError, match="scope='local'"):
    build(scope='local')
  with pytest.raises(ValueError, match="example_base='rows'"):
    build(example_base='rows')
  with pytest.raises(ValueError, match='batched_loss'):
    steps.make_train_step(None, SGD, jaxrw.uniform())


def test_batches_that_do_not_fit_are_refused():
  params, batch = _data()
  with pytest.raises(ValueError, match='16 rows does not split into microbatches=5'):
    _run(UNIFORM, params, batch, microbatches=5)
  with pytest.raises(ValueError, match='same leading axis B'):
    _run(UNIFORM, params, {**batch, 'y': batch['y'][:8]})
  with pytest.raises(ValueError, match='same leading axis B'):
    _run(UNIFORM, params, {**batch, 'temperature': jnp.float32(1.0)})
  with pytest.raises(ValueError, match=r'base has shape \(16, 2\)'):
    _run(
      UNIFORM,
      *_data(tokens=True)[:1],
      {**_data(tokens=True)[1], 'base': jnp.ones((B, 2))},
      loss=None,
      batched_loss=_token_loss,
    )


# Compilation


@pytest.mark.parametrize('options', [{}, {'microbatches': M}])
def test_steps_compile_once_and_give_their_state_away(options):
  traces = []

  def loss(params, example):
    traces.append(1)
    return _loss(params, example)

  rw = jaxrw.chain(
    loss=jaxrw.after(2, jaxrw.linupper(jaxrw.temperature_schedule(10.0, 0.4, begin=2, steps=3))),
    count=_counting(),
  )
  tx = optax.adam(0.01)
  params, batch = _data()
  step = jax.jit(steps.make_train_step(loss, tx, rw, **options), donate_argnums=0)
  state = steps.TrainState.create(params, tx, rw)
  first = state
  state, _ = step(state, batch)
  traced = len(traces)
  for _ in range(4):
    state, _ = step(state, batch)
  assert len(traces) == traced, 'a later step traced the loss again'
  assert step._cache_size() == 1
  assert int(state.step) == 5
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first)), 'donated buffers stay alive'


def test_the_step_runs_inside_scan():
  params, batch = _data()
  rw = jaxrw.chain(loss=jaxrw.linupper(0.4), count=_counting())
  step = steps.make_train_step(_loss, optax.sgd(0.01), rw)
  state = steps.TrainState.create(params, optax.sgd(0.01), rw)
  final, metrics = jax.jit(lambda s: jax.lax.scan(lambda s, _: step(s, batch), s, length=3))(state)
  one_by_one = state
  for i in range(3):
    one_by_one, expected = jax.jit(step)(one_by_one, batch)
    np.testing.assert_allclose(metrics['loss_sum'][i], expected['loss_sum'], rtol=1e-5)
  np.testing.assert_allclose(final.params, one_by_one.params, rtol=1e-5)


# The convergence bound


@functools.cache
def _least_squares(name, *temperature):
  """Full-batch descent on 40 consistent equations in 10 unknowns at the step size 1 / max L_i.

  Returns (gaps [200, M] f_i - f_i*, weights [200, M] of sum 1, ||theta_0 - theta*||^2 / (2 eta)).
  """
  rw = getattr(jaxrw, name)(*temperature)
  rng = np.random.default_rng(0)
  a, solution = rng.normal(size=(40, 10)), rng.normal(size=10)
  eta = 1 / np.max(np.sum(a**2, axis=1))
  loss = lambda theta, row: (row['a'] @ theta - row['b']) ** 2 / 2
  with jax.enable_x64(True):
    tx = optax.sgd(eta)
    batch = {'a': jnp.asarray(a), 'b': jnp.asarray(a @ solution)}
    step = steps.make_train_step(loss, tx, rw)

    def body(state, _):
      state, metrics = step(state, batch)
      return state, (metrics['losses'], metrics['weights'])

    state = steps.TrainState.create(jnp.zeros(10), tx, rw)
    _, (gaps, weights) = jax.jit(lambda s: jax.lax.scan(body, s, length=200))(state)
  return np.asarray(gaps), np.asarray(weights) / 40, np.sum(solution**2) / (2 * eta)


@pytest.mark.parametrize(
  ('name', 'temperature', 'sign'),
  [
    ('uniform', [], 0),
    ('linupper', [1.0], -1),
    ('linupper', [0.4], -1),
    ('upper', [0.4], -1),
    ('kl_dro', [0.4], -1),
    ('quadratic', [0.4], None),
    ('extremes', [0.4], None),
  ],
)
def test_the_derived_bound_holds_at_every_prefix(name, temperature, sign):
  """mean_t f <= |theta_0 - theta*|^2 / (2 eta T) + mean_t sum_i (1/M - w_i) gap_i; the last term is
  never positive for weights that grow with the loss."""
  gaps, weights, start = _least_squares(name, *temperature)
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
  correction = np.sum((1 / 40 - weights) * gaps, axis=1)
  prefix = np.arange(1, len(gaps) + 1)
  average = np.cumsum(gaps.mean(1)) / prefix
  bound = start / prefix + np.cumsum(correction) / prefix
  assert np.all(average <= bound * (1 + 1e-12))
  if sign == 0:
    np.testing.assert_allclose(correction, 0, atol=1e-12)
  if sign == -1:
    assert np.all(correction <= 1e-15)
    assert correction.sum() < -0.01


def test_sharper_linupper_weights_converge_faster_here_and_the_control_does_not():
  """Average losses on this problem: r = .4 < r = 1 < uniform, and r = .4 < Extremes."""
  average = lambda *weighting: _least_squares(*weighting)[0].mean()
  sharp, mild = average('linupper', 0.4), average('linupper', 1.0)
  assert sharp < mild < average('uniform')
  assert average('extremes', 0.4) > sharp
