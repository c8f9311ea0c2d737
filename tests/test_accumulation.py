"""Microbatches: what each scope computes, what it costs, and the order of rows and states."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from experiments import compiled
from jaxrw import steps
from tests import line, oracles
from tests.line import B, D, M


@pytest.mark.parametrize(('tokens', 'example_base'), [(False, 'any'), (True, 'tokens')])
def test_global_scope_equals_one_big_batch(tokens, example_base):
  params, batch = line.data(tokens)
  options = {'example_base': example_base}
  if tokens:
    options |= {'loss': None, 'batched_loss': line.token_loss}
  rw = jaxrw.chain(loss=jaxrw.linupper(0.4), cap=jaxrw.cap(1.5))
  one, metrics = line.run(rw, params, batch, **options)
  many, split = line.run(rw, params, batch, microbatches=M, **options)
  np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)
  for name in metrics:
    np.testing.assert_allclose(split[name], metrics[name], rtol=1e-5, err_msg=name)


def test_microbatch_scope_weighs_each_part_alone_and_divides_once():
  params, batch, losses, gradients, base = line.by_hand()
  numerator, weights = np.zeros(D), np.zeros(B)
  for part in range(M):
    rows = np.arange(part, B, M)  # interleaved
    weights[rows] = oracles.base_mean_one('linupper', losses[rows], 0.4, base[rows])
    numerator += np.sum((base * weights)[rows, None] * gradients[rows], axis=0)
  grad, metrics = line.run(line.LINUPPER, params, batch, microbatches=M, scope='microbatch')
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
  params, batch = line.data(tokens)
  batch['weights'] = jnp.linspace(0.0, 2.0, B)
  if tokens:
    options = {'loss': None, 'batched_loss': line.token_loss, 'example_base': 'tokens'}
  results = []
  for microbatches, scope in ((1, 'global'), (M, 'online')):
    step = line.step(rw, microbatches=microbatches, scope=scope, **options)
    state = steps.TrainState.create(params, line.SGD, rw)
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
  params, batch = line.data()
  options = {'microbatches': M, 'scope': 'online'}
  grad, _ = line.run(ONLINE['kl_dro'], params, {**batch, 'y': batch['y'].at[5].set(bad)}, **options)
  assert np.all(np.isnan(grad))
  grad, metrics = line.run(ONLINE['kl_dro'], params, {**batch, 'base': jnp.zeros(B)}, **options)
  np.testing.assert_array_equal(grad, np.zeros(D))
  assert metrics['base_sum'] == 0


def test_online_scope_is_for_weights_of_the_softmax_type():
  for rw in (line.LINUPPER, jaxrw.chain(a=jaxrw.kl_dro(1.0), cap=jaxrw.cap(2.0))):
    with pytest.raises(ValueError, match="use scope='global'"):
      steps.make_train_step(line.loss, line.SGD, rw, microbatches=M, scope='online')


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
    step = jax.jit(
      steps.make_train_step(loss, line.SGD, rw, microbatches=microbatches, scope=scope)
    )
    state = steps.TrainState.create(params, line.SGD, rw)
    return compiled.costs(step.lower(state, batch).compile()).matmul_flops

  ratio = flops(M, scope) / flops(1, 'global')
  assert ratio == pytest.approx(COSTS[name, scope], rel=1e-3)


def test_row_signals_are_computed_at_the_parameters_of_the_step_and_not_differentiated():
  params, batch, _, gradients, base = line.by_hand()
  direction = jnp.array([1.0, -2.0, 0.5])

  def row_signals(params, batch, signals):
    row_losses = lambda p: jax.vmap(line.loss, in_axes=(None, 0))(p, batch)
    return {'alignment': jax.jvp(row_losses, (params,), (signals['direction'],))[1]}

  rw = jaxrw.Weighting(lambda: (), lambda w, s, *, alignment, **_: (w * jnp.tanh(alignment), s))
  weights = np.tanh(gradients @ np.asarray(direction))
  expected = np.sum((base * weights)[:, None] * gradients, 0) / base.sum()
  for options in ({}, {'microbatches': M}, {'microbatches': M, 'scope': 'microbatch'}):
    grad, metrics = line.run(
      rw, params, batch, {'direction': direction}, row_signals=row_signals, **options
    )
    np.testing.assert_allclose(metrics['weights'], weights, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)
  with pytest.raises(ValueError, match=r"row_signals returned 'alignment' with shape \(\)"):
    line.run(rw, params, batch, row_signals=lambda *_: {'alignment': jnp.float32(1)})


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
  _, metrics = line.run(jaxrw.upper(0.4), jnp.zeros(D), batch, microbatches=M, scope='microbatch')
  np.testing.assert_array_equal(metrics['weights'], np.ones(B))
  np.testing.assert_array_equal(metrics['losses'], (np.arange(B) % M) ** 2)


@pytest.mark.parametrize(('scope', 'updates'), [('global', 1), ('microbatch', M)])
def test_state_passes_through_the_updates_in_order(scope, updates):
  params, batch = line.data()
  rw = line.counting()
  step = line.step(rw, microbatches=M, scope=scope)
  state, metrics = step(steps.TrainState.create(params, line.SGD, rw), batch)
  assert state.weighting == updates
  np.testing.assert_array_equal(metrics['weights'], 1 + np.arange(B) % updates)
  state, _ = step(state, batch)
  assert (int(state.weighting), int(state.step)) == (2 * updates, 2)
