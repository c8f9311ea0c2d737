"""Hedging between the loss terms of each example: closed forms, a NumPy loop, regret, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled

_hedge = jax.jit(jaxrw.hedge_weights)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _loop(table, ids, losses, rate, base, incoming):
  """One update as nested loops over float64 cumulated losses, without centering or clipping."""
  for i, losses_i, base_i in zip(ids, losses, base):
    for j in range(table.shape[1]):
      if i >= 0 and base_i[j] > 0:
        table[i, j] += rate * losses_i[j]
  out = incoming.copy()
  for row, i in enumerate(ids):
    if i < 0:
      continue
    tilt = np.where(base[row] > 0, np.exp(table[i] - table[i].max()), 0)
    mass = np.sum(base[row] * incoming[row])
    tilted = np.sum(base[row] * incoming[row] * tilt)
    out[row] = incoming[row] * tilt * (mass / tilted if tilted else 0)
  return np.where(base > 0, out, 0)


def test_two_terms_follow_the_sigmoid_of_all_differences_so_far():
  """beta = sigmoid(rate * sum(ce - ac)), as the official multiplicative update gives it."""
  rng = np.random.default_rng(0)
  rw, rate, n = jaxrw.adawac(5, rate=0.7), 0.7, 5
  update = jax.jit(rw.update)
  state, total, beta = rw.init(), np.zeros(n), np.full((n, 2), 0.5)
  for step in range(6):
    order = rng.permutation(n)
    losses = rng.gamma(2.0, 1.0, (n, 2))
    w, state = update(
      jnp.ones((n, 2)), state, losses=jnp.asarray(losses[order]), example_ids=jnp.asarray(order)
    )
    difference = losses[:, 0] - losses[:, 1]
    total += difference
    beta[:, 0] *= np.exp(rate * difference)
    beta /= beta.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(beta[:, 0], _sigmoid(rate * total), rtol=1e-12)
    np.testing.assert_allclose(w, 2 * beta[order], rtol=1e-5, err_msg=f'step {step}')


def test_equals_a_numpy_loop_with_repeated_ids_missing_terms_and_incoming_weights():
  rng = np.random.default_rng(1)
  n, rows, terms, rate = 7, 12, 4, 0.3
  table = np.zeros((n, terms))
  with jax.enable_x64(True):
    logits = jnp.zeros((n, terms), jnp.float64)
    for _ in range(5):
      ids = rng.integers(-1, n, rows)
      assert len(set(ids)) < rows, 'no id is repeated'
      losses = rng.gamma(2.0, 1.0, (rows, terms))
      base = rng.integers(0, 3, (rows, terms)) / 2
      base[3] = 0
      incoming = rng.uniform(0, 2, (rows, terms))
      w, logits = _hedge(
        logits,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(np.where(base > 0, losses, np.nan)),
        rate,
        jnp.asarray(base),
        weights=jnp.asarray(incoming),
      )
      expected = _loop(table, ids, losses, rate, base, incoming)
      np.testing.assert_allclose(w, expected, rtol=1e-12)
      kept, before = np.sum(base * w, axis=1), np.sum(base * incoming, axis=1)
      np.testing.assert_allclose(kept, before, rtol=1e-12)
    shifted = table - table.max(axis=1, keepdims=True)
    np.testing.assert_allclose(logits, shifted, rtol=1e-11, atol=1e-14)
    assert shifted.min() > -20, 'clipped: the loop does not do that'


def test_the_order_of_a_batch_with_repeated_ids_does_not_matter():
  rng = np.random.default_rng(2)
  ids, losses = rng.integers(0, 3, 9), rng.gamma(2.0, 1.0, (9, 2)).astype(np.float32)
  order = rng.permutation(9)
  w, logits = _hedge(jnp.zeros((3, 2)), jnp.asarray(ids), jnp.asarray(losses), 0.5)
  permuted, same = _hedge(
    jnp.zeros((3, 2)), jnp.asarray(ids[order]), jnp.asarray(losses[order]), 0.5
  )
  np.testing.assert_allclose(permuted, np.asarray(w)[order], rtol=1e-5)
  np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-6)
  for i in range(3):  # copies of an example agree
    assert np.ptp(np.asarray(w)[ids == i], axis=0).max() == 0


@pytest.mark.parametrize('towards', ['larger', 'smaller'])
def test_regret_is_within_the_bound_of_hedge(towards):
  """ln J / eta + eta T / 8 against any losses in [0, 1], playing the weights of the step before."""
  n, terms, steps = 6, 4, 200
  eta = np.sqrt(8 * np.log(terms) / steps)
  sign = 1 if towards == 'larger' else -1
  rng = np.random.default_rng(3)
  p = rng.random((n, terms))
  logits, played, total = jnp.zeros((n, terms)), np.zeros(n), np.zeros((n, terms))
  ids = jnp.arange(n)
  for t in range(steps):
    losses = (rng.random((n, terms)) < p).astype(np.float32)
    losses[0] = np.arange(terms) == t % terms  # the hardest sequence: each term ahead in turn
    before, _ = _hedge(logits, ids, jnp.asarray(losses), 0.0)
    _, logits = _hedge(logits, ids, jnp.asarray(losses), sign * eta)
    played += np.sum(np.asarray(before) / terms * losses, axis=1)
    total += losses
  best = total.max(axis=1) if sign > 0 else total.min(axis=1)
  regret = sign * (best - played)
  bound = np.log(terms) / eta + eta * steps / 8
  assert np.all(regret <= bound), f'{regret} against {bound}'
  assert regret.max() > 0.2 * bound, 'easy losses test nothing'


def test_a_term_far_ahead_comes_back_after_twenty_over_rate():
  ids = jnp.array([0])
  w, logits = _hedge(jnp.zeros((1, 2)), ids, jnp.array([[1e30, 0.0]]), 1.0)
  np.testing.assert_array_equal(logits, [[0, -20]])
  np.testing.assert_allclose(w, [[2, 2 * _sigmoid(-20.0)]], rtol=1e-6)
  halfway, _ = _hedge(logits, ids, jnp.array([[0.0, 10.0]]), 1.0)
  np.testing.assert_allclose(halfway, [[2 * _sigmoid(10.0), 2 * _sigmoid(-10.0)]], rtol=1e-5)
  even, _ = _hedge(logits, ids, jnp.array([[0.0, 20.0]]), 1.0)
  np.testing.assert_array_equal(even, [[1, 1]])


def test_equal_losses_and_rate_zero_leave_everything_as_it_is():
  incoming, ids = jnp.array([[0.3, 1.7], [2.0, 0.1]]), jnp.array([0, 1])
  for losses, rate in ((jnp.full((2, 2), 3.0), 1.0), (jnp.array([[1.0, 2], [3, 4]]), 0.0)):
    w, logits = _hedge(jnp.zeros((2, 2)), ids, losses, rate, weights=incoming)
    np.testing.assert_array_equal(w, incoming)
    np.testing.assert_array_equal(logits, np.zeros((2, 2)))


def test_rows_without_an_example_and_terms_without_base_store_nothing():
  logits = jnp.asarray(np.random.default_rng(4).uniform(-3, 0, (4, 2)), jnp.float32)
  logits = logits - logits.max(axis=1, keepdims=True)
  losses = jnp.full((3, 2), 5.0)
  _, same = _hedge(logits, jnp.array([-1, 4, -7]), losses, 1.0)  # unknown, and traced: out of range
  np.testing.assert_array_equal(same, logits)
  w, same = _hedge(logits, jnp.array([0, 1, 2]), losses * jnp.nan, 1.0, jnp.zeros((3, 2)))
  np.testing.assert_array_equal(same, logits)
  np.testing.assert_array_equal(w, np.zeros((3, 2)))


def test_errors_say_what_to_do():
  table, ids = jnp.zeros((4, 2)), jnp.array([0, 1])
  with pytest.raises(ValueError, match=r'shape \(2,\); expected \[B, 2\].*batched_loss'):
    jaxrw.hedge_weights(table, ids, jnp.zeros(2), 1.0)
  with pytest.raises(ValueError, match=r'shape \(2, 3\); expected \[B, 2\]'):
    jaxrw.hedge_weights(table, ids, jnp.zeros((2, 3)), 1.0)
  with pytest.raises(ValueError, match=r'example_ids has shape \(3,\)'):
    jaxrw.hedge_weights(table, jnp.array([0, 1, 2]), jnp.zeros((2, 2)), 1.0)
  with pytest.raises(IndexError, match='example_ids holds 4, but there are 4'):
    jaxrw.hedge_weights(table, jnp.array([0, 4]), jnp.zeros((2, 2)), 1.0)
  with pytest.raises(TypeError, match='example_ids'):
    jaxrw.adawac(4).update(jnp.ones((2, 2)), table, losses=jnp.zeros((2, 2)))
  with pytest.raises(TypeError, match='rate is a schedule'):
    rw = jaxrw.hedge(4, 2, lambda step: 1.0 / step)
    rw.update(jnp.ones((2, 2)), table, losses=jnp.zeros((2, 2)), example_ids=ids)


def test_gradients_flow_to_the_rate_and_not_to_the_losses():
  losses, ids = jnp.array([[2.0, 0.5]]), jnp.array([0])
  first = lambda losses, rate: jaxrw.hedge_weights(jnp.zeros((1, 2)), ids, losses, rate)[0][0, 0]
  to_losses, to_rate = jax.jit(jax.grad(first, argnums=(0, 1)))(losses, 0.8)
  np.testing.assert_array_equal(to_losses, [[0, 0]])
  s = _sigmoid(0.8 * 1.5)
  np.testing.assert_allclose(to_rate, 2 * s * (1 - s) * 1.5, rtol=1e-5)


def test_a_sharded_table_is_updated_in_place_by_ids_of_any_device():
  """Repeated and unknown ids on eight devices: the numbers of one device; nothing that travels has
  the size of the table."""
  n, rows, terms = 4096, 32, 2
  rng = np.random.default_rng(5)
  ids = rng.integers(-1, n, rows).astype(np.int32)
  ids[[3, 17, 30]] = 4095  # the same example, on three devices; its row is on the last
  losses = rng.gamma(2.0, 1.0, (rows, terms)).astype(np.float32)
  logits = rng.uniform(-2, 0, (n, terms)).astype(np.float32)
  w, expected = _hedge(jnp.asarray(logits), jnp.asarray(ids), jnp.asarray(losses), 0.5)
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('data'))
  step = jax.jit(jaxrw.hedge_weights, out_shardings=sharding, donate_argnums=0)
  arguments = (*jax.device_put((jnp.asarray(logits), ids, losses), sharding), 0.5)
  moved = compiled.costs(step.lower(*arguments).compile()).collectives
  assert moved
  assert all(c.bytes <= 4 * rows * terms for c in moved), moved
  out, table = step(*arguments)
  assert table.sharding.is_equivalent_to(sharding, 2)
  np.testing.assert_allclose(out, w, rtol=1e-6)
  np.testing.assert_allclose(table, expected, rtol=1e-6)


def test_a_broken_loss_leaves_its_row_as_it_was():
  logits, ids = jnp.array([[0.0, -1.0], [0.0, -2.0], [0.0, 0.0]]), jnp.array([0, 1, 1])
  losses = jnp.array([[1.0, 2.0], [jnp.nan, 1.0], [1.0, 1.0]])
  w, after = jaxrw.hedge_weights(logits, ids, losses, rate=1.0)
  np.testing.assert_allclose(after, [[0, 0], [0, -2], [0, 0]])
  assert np.isfinite(w[::2]).all()
  assert np.isnan(w[1]).all()
