"""Selective backward: the gradient of some rows, against the gradient of all."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled
from experiments.models import gpt2, lm
from jaxrw import selective, steps

B, D = 16, 3
SGD = optax.sgd(1.0)  # new parameters = old - gradient
UNIFORM = jaxrw.uniform()
HALF = {'rows': 4, 'groups': 2}


def _loss(params, example):
  return jnp.sum((jnp.tanh(example['x'] @ params['in']) @ params['out'] - example['y']) ** 2)


def _data():
  rng = np.random.default_rng(0)
  params = {'in': rng.normal(size=(D, 8)), 'out': rng.normal(size=(8, 2))}
  batch = {'x': rng.normal(size=(B, D)), 'y': rng.normal(size=(B, 2)), 'base': np.ones(B)}
  batch['base'][3] = 0
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


@functools.cache
def _step(keep=None, microbatches=1, rw=UNIFORM):
  return jax.jit(steps.make_train_step(_loss, SGD, rw, keep=keep, microbatches=microbatches))


def _run(params, batch, keep=None, microbatches=1, rw=UNIFORM, step=0):
  """(gradient, metrics) of one step."""
  state = steps.TrainState.create(params, SGD, rw)._replace(step=jnp.int32(step))
  new, metrics = _step(keep, microbatches, rw)(state, batch)
  return jax.tree.map(lambda a, b: np.asarray(a - b), params, new.params), metrics


WAYS = [
  {'reuse': False},
  {'reuse': True},
  {'sampled': True},
  {'sampled': True, 'reuse': True},
]


@pytest.mark.parametrize('microbatches', [1, 2])
@pytest.mark.parametrize('way', WAYS, ids=str)
def test_weights_of_zero_and_one_give_the_exact_gradient(way, microbatches):
  if way.get('reuse') and microbatches > 1:
    pytest.skip('refused; see below')
  params, batch = _data()
  chosen = np.isin(np.arange(B), [0, 2, 5, 6, 9, 15])  # four of the first group, two of the second
  batch['weights'] = jnp.asarray(chosen, jnp.float32)
  expected, plain = _run(params, batch)
  got, metrics = _run(params, batch, selective.Keep(**HALF, **way), microbatches)
  for name in params:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
  assert metrics['overflow'] == 0
  for name in ('loss_sum', 'weighted_loss_sum', 'base_sum', 'losses', 'weights'):
    np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-6)  # of all rows


@pytest.mark.parametrize('reuse', [False, True])
def test_rows_that_do_not_fit_are_dropped_and_counted(reuse):
  params, batch = _data()
  chosen = np.isin(np.arange(B), [0, 1, 2, 4, 5, 6, 9])
  batch['weights'] = jnp.asarray(chosen * np.linspace(2, 1, B), jnp.float32)
  got, metrics = _run(params, batch, selective.Keep(**HALF, reuse=reuse))
  assert metrics['overflow'] == 2
  smallest_dropped = np.isin(np.arange(B), [0, 1, 2, 4, 9])  # of the first group the largest four
  expected, _ = _run(params, {**batch, 'weights': batch['weights'] * smallest_dropped})
  for name in params:
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)


def test_sampling_probabilities_are_proportional_to_mass_and_at_most_one():
  mass = jnp.array([10.0, 1.0, 2.0, 0.5, 0.0, 0.5, 3.0, 0.0])
  keep = selective.Keep(rows=3, sampled=True)
  keys = jax.random.split(jax.random.key(0), 20_000)
  indices, factors = jax.jit(jax.vmap(lambda k: selective.choose_rows(mass, keep, k)))(keys)
  drawn = np.zeros((len(keys), 8))
  np.put_along_axis(drawn, np.asarray(indices[:, 0]), np.asarray(factors[:, 0]), axis=1)
  # By hand: the row of 10 is certain; 2 places are left for a mass of 7, and 3 * 2 / 7 < 1.
  probability = np.array([1, 2 / 7, 4 / 7, 1 / 7, 0, 1 / 7, 6 / 7, 0])
  np.testing.assert_allclose(np.mean(drawn > 0, axis=0), probability, atol=0.02)
  assert np.all(np.sum(drawn > 0, axis=1) == 3)
  seen = probability > 0
  np.testing.assert_allclose(np.max(drawn, axis=0)[seen], 1 / probability[seen], rtol=1e-5)


@pytest.mark.parametrize('reuse', [False, True])
def test_sampling_is_unbiased(reuse):
  """The mean gradient over many steps is the gradient of all rows, within its standard error."""
  params, batch = _data()
  rw = jaxrw.linupper(0.4)
  expected, _ = _run(params, batch, rw=rw)
  step = steps.make_train_step(
    _loss, SGD, rw, keep=selective.Keep(**HALF, sampled=True, reuse=reuse)
  )

  def gradient(i):
    state = steps.TrainState.create(params, SGD, rw)._replace(step=i)
    return jax.tree.map(jnp.subtract, params, step(state, batch)[0].params)

  draws = jax.jit(jax.vmap(gradient))(jnp.arange(4000))
  for name in params:
    error = np.mean(draws[name], axis=0) - expected[name]
    standard_error = np.std(draws[name], axis=0) / np.sqrt(4000)
    assert np.max(np.abs(error) / standard_error) < 5
    assert np.max(standard_error) > 0, 'nothing was sampled'


def test_the_noise_of_sampling_depends_on_the_step_and_the_seed():
  params, batch = _data()
  keep = selective.Keep(**HALF, sampled=True)
  grads = [_run(params, batch, keep, step=i)[0]['in'] for i in (0, 0, 1, 2)]
  np.testing.assert_array_equal(grads[0], grads[1])
  assert not np.array_equal(grads[0], grads[2]) or not np.array_equal(grads[0], grads[3])


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_a_nan_row_is_not_left_out(way):
  params, batch = _data()
  batch['y'] = batch['y'].at[5].set(jnp.nan)
  got, _ = _run(params, batch, selective.Keep(**HALF, **way), rw=jaxrw.linupper(0.4))
  assert np.all(np.isnan(got['out']))


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_an_empty_batch_changes_nothing(way):
  params, batch = _data()
  batch['base'] = jnp.zeros(B)
  got, metrics = _run(params, batch, selective.Keep(**HALF, **way))
  assert not np.any(got['in'])
  assert metrics['overflow'] == 0


@pytest.mark.parametrize('way', WAYS, ids=str)
def test_eight_devices_keep_the_same_rows_and_move_none(way):
  params, batch = _data()
  keep, rw = selective.Keep(rows=1, groups=8, **way), jaxrw.linupper(0.4)
  expected, _ = _run(params, batch, keep, rw=rw)
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())
  step = jax.jit(steps.make_train_step(_loss, SGD, rw, keep=keep), in_shardings=(whole, rows))
  state = jax.device_put(steps.TrainState.create(params, SGD, rw), whole)
  batch = jax.device_put(batch, rows)
  new, _ = step(state, batch)
  for name in params:
    np.testing.assert_allclose(
      params[name] - new.params[name], expected[name], rtol=1e-4, atol=1e-5
    )
  text = step.lower(state, batch).compile().as_text()
  moved = re.findall(r'(all-to-all|collective-permute)\S*\(', text)
  assert not moved, moved
  # What is gathered is one number a row (the metrics' arrays leave as the compiler likes).
  gathered = [c for c in compiled.costs(step.lower(state, batch).compile()).collectives]
  assert all(c.kind == 'all-reduce' or c.bytes <= 4 * B for c in gathered), gathered


CFG = gpt2.GPT2Config(vocab_size=64, max_len=16, n_layer=2, n_head=2, n_embd=32, attention='xla')


def _gpt_step(keep=None, **changes):
  cfg = CFG if not changes else dataclasses.replace(CFG, **changes)
  losses = lambda params, batch: lm.token_losses(params, batch, cfg)
  return steps.make_train_step(None, SGD, jaxrw.linupper(0.4), batched_loss=losses, keep=keep)


def _gpt_data():
  params = lm.init(jax.random.key(0), CFG)
  tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 64)
  return steps.TrainState.create(params, SGD, jaxrw.linupper(0.4)), {
    'tokens': tokens,
    'weights': (jnp.arange(8) % 2).astype(jnp.float32),
  }


@pytest.mark.parametrize(
  'changes',
  [{}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({'scan': False}, {'remat': 'full'}))],
  ids=str,
)
@pytest.mark.parametrize('reuse', [False, True])
def test_a_transformer_trains_on_the_kept_rows_exactly(reuse, changes):
  state, batch = _gpt_data()
  expected, _ = jax.jit(_gpt_step(**changes))(state, batch)
  keep = selective.Keep(rows=4, reuse=reuse)
  got, metrics = jax.jit(_gpt_step(keep, **changes))(state, batch)
  assert metrics['overflow'] == 0
  for a, b in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_what_half_a_backward_pass_costs(remat):
  """In forward passes of the batch, a backward pass being two; remat adds one of the blocks."""
  state, batch = _gpt_data()
  flops = lambda step: compiled.costs(jax.jit(step).lower(state, batch).compile()).matmul_flops
  plain = flops(_gpt_step())
  backward = 2 + (flops(_gpt_step(remat='full')) / plain - 1) * 3 * (remat == 'full')
  for reuse, kept_forward in ((False, 0.5), (True, 0)):
    ours = flops(_gpt_step(selective.Keep(rows=4, reuse=reuse), remat=remat))
    assert ours / plain == pytest.approx((1 + kept_forward + backward / 2) / 3, rel=0.002)


def test_reuse_refuses_what_it_cannot_take_apart():
  params, batch = _data()

  def merged(params, batch):
    """Rows merged into one axis with the outputs: whose residual is whose cannot be told."""
    out = jnp.tanh(batch['x'] @ params['in']) @ params['out']
    return jnp.sum(((jnp.sin(out.reshape(-1))).reshape(-1, 2) - batch['y']) ** 2, axis=1)

  keep = selective.Keep(**HALF, reuse=True)
  step = steps.make_train_step(None, SGD, UNIFORM, batched_loss=merged, keep=keep)
  with pytest.raises(ValueError, match=r'cannot tell the rows apart.*use reuse=False'):
    step(steps.TrainState.create(params, SGD, UNIFORM), batch)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'rows': 0}, 'rows=0 must be a whole number of at least 1'),
    ({'rows': 2, 'groups': 1.5}, 'groups=1.5 must be a whole number'),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    selective.Keep(**arguments)


@pytest.mark.parametrize(
  ('keep', 'microbatches', 'message'),
  [
    (selective.Keep(rows=2, groups=3), 1, '16 rows does not split into groups=3'),
    (selective.Keep(rows=9, groups=2), 1, 'rows=9 of each group, but a group has 8'),
    (selective.Keep(rows=3), 2, '3 kept rows do not split into microbatches=2'),
    (selective.Keep(rows=4, reuse=True), 2, 'use reuse=False'),
  ],
)
def test_what_does_not_fit_the_batch(keep, microbatches, message):
  params, batch = _data()
  step = steps.make_train_step(_loss, SGD, UNIFORM, keep=keep, microbatches=microbatches)
  with pytest.raises(ValueError, match=message):
    step(steps.TrainState.create(params, SGD, UNIFORM), batch)


def test_keep_needs_all_weights_first():
  keep = selective.Keep(rows=4)
  with pytest.raises(ValueError, match="keep needs scope='global'"):
    steps.make_train_step(_loss, SGD, UNIFORM, keep=keep, microbatches=2, scope='microbatch')
