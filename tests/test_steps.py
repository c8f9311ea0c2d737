"""The train step against gradients put together by hand, on one device and on eight."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from jaxrw import steps
from tests import line, oracles
from tests.line import B, D, M, T

# The weighted gradient


@pytest.mark.parametrize('name', ['linupper', 'quadratic', 'kl_dro'])
def test_gradient_is_the_weighted_mean_of_the_examples_gradients(name):
  params, batch, losses, gradients, base = line.by_hand()
  weights = oracles.base_mean_one(name, losses, 0.4, base)
  grad, metrics = line.run(getattr(jaxrw, name)(0.4), params, batch)
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
  params, batch, *_ = line.by_hand()
  batch = {**batch, 'base': jnp.ones(B)}

  def leaky(params):
    losses = jax.vmap(line.loss, in_axes=(None, 0))(params, batch)
    low, high = jnp.min(losses), jnp.max(losses)
    h = (2 * losses - low - high) / (high - low)
    return jnp.sum(jax.nn.softmax(jnp.minimum(h + 1, 1) / 0.4) * losses)

  wrong = np.asarray(jax.jit(jax.grad(leaky))(params))
  grad, _ = line.run(line.LINUPPER, params, batch)
  assert np.linalg.norm(grad - wrong) > 0.1 * np.linalg.norm(grad)


def test_uniform_is_bit_for_bit_the_plain_mean():
  params, batch, *_ = line.by_hand()
  batch = {k: v for k, v in batch.items() if k != 'base'}
  grad, metrics = line.run(line.UNIFORM, params, batch)
  plain = jax.grad(lambda p: jnp.sum(jax.vmap(line.loss, in_axes=(None, 0))(p, batch)))
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
  params, batch, losses, gradients, _ = line.by_hand()
  step_gradient, _ = line.run(line.LINUPPER, params, {**batch, 'base': jnp.ones(B)})
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
  for instruction in text.splitlines():
    match = re.search(r'= (\(?[a-z0-9]+\[.*?) ([a-z-]+)\(', instruction)
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
  params, batch = line.data(tokens=True)
  _, metrics = line.run(
    line.LINUPPER, params, batch, loss=None, batched_loss=line.token_loss, example_base=example_base
  )
  valid = np.asarray(batch['base'])
  losses = np.asarray(line.token_loss(params, batch), float)
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
  params, batch, *_ = line.by_hand()
  batched = lambda params, batch: (batch['x'] @ params - batch['y']) ** 2
  one, _ = line.run(line.LINUPPER, params, batch)
  other, _ = line.run(line.LINUPPER, params, batch, batched_loss=batched)
  np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-7)


def test_padding_rows_do_not_reach_the_gradient():
  params, batch, _, _, base = line.by_hand()
  kept = np.flatnonzero(base)
  grad, _ = line.run(line.LINUPPER, params, jax.tree.map(lambda x: x[kept], batch))
  garbage = jax.tree.map(lambda x: x.copy(), batch)
  garbage['y'] = jnp.where(batch['base'] > 0, batch['y'], 1e6)
  padded, metrics = line.run(line.LINUPPER, params, garbage)
  np.testing.assert_allclose(padded, grad, rtol=1e-5, atol=1e-6)
  assert metrics['base_sum'] == kept.size


def test_an_all_padding_batch_changes_nothing():
  params, batch = line.data()
  for options in ({}, {'microbatches': M}):
    grad, metrics = line.run(line.LINUPPER, params, {**batch, 'base': jnp.zeros(B)}, **options)
    np.testing.assert_array_equal(grad, np.zeros(D))
    assert metrics['loss_sum'] == metrics['weighted_loss_sum'] == metrics['base_sum'] == 0


# Weights and losses that are not clean


def test_weights_of_the_dataset_start_the_chain():
  params, batch, losses, gradients, base = line.by_hand()
  own = np.random.default_rng(5).uniform(0, 2, B).astype(np.float32)
  grad, metrics = line.run(line.UNIFORM, params, {**batch, 'weights': jnp.asarray(own)})
  np.testing.assert_array_equal(metrics['weights'], own)
  expected = np.sum((base * own)[:, None] * gradients, 0) / base.sum()
  np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)
  _, metrics = line.run(
    line.LINUPPER, params, {**batch, 'weights': jnp.asarray(own)}, microbatches=M
  )
  expected = oracles.base_mean_one('linupper', losses, 0.4, base, own)
  np.testing.assert_allclose(metrics['weights'], expected, rtol=3e-5)


@pytest.mark.parametrize('per_token', [False, True])
def test_weights_of_the_dataset_spread_over_tokens(per_token):
  params, batch = line.data(tokens=True)
  shape = (B, T) if per_token else (B,)
  own = np.random.default_rng(5).uniform(0, 2, shape)
  options = {'loss': None, 'batched_loss': line.token_loss}
  for dtype in (jnp.float32, jnp.bfloat16):
    given = jnp.asarray(own, dtype)
    _, metrics = line.run(line.UNIFORM, params, {**batch, 'weights': given}, **options)
    expected = np.asarray(given, np.float32)
    expected = expected if per_token else np.tile(expected[:, None], T)
    np.testing.assert_array_equal(metrics['weights'], expected)
    assert metrics['weights'].dtype == np.float32


@pytest.mark.parametrize('shape', [(B,), (B, T)])
def test_weights_of_the_dataset_must_be_floats(shape):
  params, batch = line.data(tokens=True)
  batch['weights'] = jnp.ones(shape, jnp.int32)
  with pytest.raises(TypeError, match='has dtype int32; store weights as floats'):
    line.run(line.UNIFORM, params, batch, loss=None, batched_loss=line.token_loss)


def test_token_weights_need_token_losses():
  params, batch = line.data()
  with pytest.raises(ValueError, match='return per-token losses from batched_loss'):
    line.run(line.UNIFORM, params, {**batch, 'weights': jnp.ones((B, T))})


@pytest.mark.parametrize('options', [{}, {'microbatches': M}])
def test_a_nan_row_is_masked_or_spoils_the_step(options):
  """The NaN comes after the differentiable part; inside it, 0 * nan would reach the gradient."""
  params, batch, losses, gradients, base = line.by_hand()
  assert base[1] == 1
  batch = {**batch, 'fault': jnp.zeros(B).at[1].set(jnp.nan)}
  faulty = lambda params, example: line.loss(params, example) + example['fault']
  grad, metrics = line.run(
    jaxrw.linupper(0.4, nonfinite='mask'), params, batch, loss=faulty, **options
  )
  present = base * (np.arange(B) != 1)
  weights = oracles.base_mean_one('linupper', losses, 0.4, present) * base.sum() / present.sum()
  np.testing.assert_allclose(metrics['weights'], weights, rtol=3e-5)
  expected = np.sum((present * weights)[:, None] * gradients, 0) / base.sum()
  np.testing.assert_allclose(grad, expected, rtol=2e-5, atol=1e-6)
  assert np.isfinite(metrics['weighted_loss_sum'])
  assert np.isnan(metrics['loss_sum']), 'the plain loss keeps the evidence'
  for rw in (line.LINUPPER, jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(2.0))):
    grad, metrics = line.run(rw, params, batch, loss=faulty, **options)
    assert np.isnan(metrics['weighted_loss_sum'])
    assert np.all(np.isnan(grad))


def test_bfloat16_losses_are_weighed_in_float32():
  params, batch, *_ = line.by_hand()
  half = lambda params, example: line.loss(params, example).astype(jnp.bfloat16)
  grad, metrics = line.run(line.LINUPPER, params, batch, loss=half)
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
  params, batch = line.data()
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
  line.run(_recorder(seen), params, batch, whole, batched_loss=batched, **options)
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
  params, batch, _, gradients, base = line.by_hand()

  def batched(params, part):
    prediction = part['x'] @ params
    return (prediction - part['y']) ** 2, {'prediction': prediction}

  rw = jaxrw.Weighting(lambda: (), lambda w, s, *, extra, **_: (w * extra['prediction'] ** 2, s))
  weights = np.asarray(batch['x'] @ params, float) ** 2
  expected = np.sum((base * weights)[:, None] * gradients, 0) / base.sum()
  for microbatches in (1, M):
    grad, metrics = line.run(rw, params, batch, batched_loss=batched, microbatches=microbatches)
    np.testing.assert_allclose(metrics['weights'], weights, rtol=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=2e-5, atol=1e-5)


def test_misplaced_and_misspelled_signals_are_refused():
  params, batch = line.data()
  with pytest.raises(TypeError, match="unknown signal 'anchors': did you mean 'anchor'"):
    line.run(line.UNIFORM, params, batch, {'anchors': jnp.ones(2)})
  with pytest.raises(TypeError, match=r"unknown signal 'mine'.*extra=\{'mine': \.\.\.\}"):
    line.run(line.UNIFORM, params, batch, {'mine': jnp.ones(2)})
  with pytest.raises(TypeError, match="'group_ids' has one row per example"):
    line.run(line.UNIFORM, params, batch, {'group_ids': jnp.ones(B)})
  missing = jaxrw.Weighting(lambda: (), lambda w, s, *, ref_losses, **_: (w, s))
  with pytest.raises(TypeError, match='ref_losses'):
    line.run(missing, params, batch)


@pytest.mark.parametrize('options', [{}, {'microbatches': M}])
def test_what_batched_loss_returns_is_checked(options):
  params, batch = line.data()
  losses = lambda p, b: (b['x'] @ p - b['y']) ** 2
  run = functools.partial(line.run, line.UNIFORM, params, batch, **options)
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
  build = functools.partial(steps.make_train_step, line.loss, line.SGD, jaxrw.uniform())
  with pytest.raises(ValueError, match='microbatches=0'):
    build(microbatches=0)
  with pytest.raises(ValueError, match=r'microbatches=2\.0'):
    build(microbatches=2.0)
  with pytest.raises(ValueError, match="scope='local'"):
    build(scope='local')
  with pytest.raises(ValueError, match="example_base='rows'"):
    build(example_base='rows')
  with pytest.raises(ValueError, match='batched_loss'):
    steps.make_train_step(None, line.SGD, jaxrw.uniform())


def test_batches_that_do_not_fit_are_refused():
  params, batch = line.data()
  with pytest.raises(ValueError, match='16 rows does not split into microbatches=5'):
    line.run(line.UNIFORM, params, batch, microbatches=5)
  with pytest.raises(ValueError, match='same leading axis B'):
    line.run(line.UNIFORM, params, {**batch, 'y': batch['y'][:8]})
  with pytest.raises(ValueError, match='same leading axis B'):
    line.run(line.UNIFORM, params, {**batch, 'temperature': jnp.float32(1.0)})
  with pytest.raises(ValueError, match=r'base has shape \(16, 2\)'):
    line.run(
      line.UNIFORM,
      *line.data(tokens=True)[:1],
      {**line.data(tokens=True)[1], 'base': jnp.ones((B, 2))},
      loss=None,
      batched_loss=line.token_loss,
    )


# Compilation


@pytest.mark.parametrize('options', [{}, {'microbatches': M}])
def test_steps_compile_once_and_give_their_state_away(options):
  traces = []

  def loss(params, example):
    traces.append(1)
    return line.loss(params, example)

  rw = jaxrw.chain(
    loss=jaxrw.after(2, jaxrw.linupper(jaxrw.temperature_schedule(10.0, 0.4, begin=2, steps=3))),
    count=line.counting(),
  )
  tx = optax.adam(0.01)
  params, batch = line.data()
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
  params, batch = line.data()
  rw = jaxrw.chain(loss=jaxrw.linupper(0.4), count=line.counting())
  step = steps.make_train_step(line.loss, optax.sgd(0.01), rw)
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
