"""Group DRO against closed forms, a NumPy loop and the official loss; its one collective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled

_weights = jax.jit(jaxrw.group_dro_weights)


def _softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


def _loop(log_q, ids, losses, rate, base, incoming, adjustment):
  """One update in float64, group by group: (weights, log q)."""
  losses, base, incoming = (x.reshape(len(ids), -1) for x in (losses, base, incoming))
  groups = range(len(log_q))
  mass = [sum(np.sum(base[i] * incoming[i]) for i in np.flatnonzero(ids == g)) for g in groups]
  q = np.exp(log_q)
  for g in groups:
    if mass[g] > 0:
      members = np.flatnonzero(ids == g)
      mean = np.nansum((base * incoming * losses)[members]) / mass[g]
      q[g] *= np.exp(rate * (mean + adjustment[g]))
  q /= q.sum()
  present = sum(q[g] for g in groups if mass[g] > 0)
  out = incoming.copy()
  for i, g in enumerate(ids):
    if g >= 0:
      out[i] = incoming[i] * q[g] / present * sum(mass) / mass[g] if mass[g] > 0 else 0
  return np.where(base > 0, out, 0), np.log(q)


def test_constant_losses_give_the_softmax_of_all_losses_so_far():
  losses = np.array([0.5, 1.0, 2.0], np.float32)
  rw = jaxrw.group_dro(3, rate=0.2)
  update, state = jax.jit(rw.update), rw.init()
  np.testing.assert_allclose(np.exp(state), np.full(3, 1 / 3), rtol=1e-6)
  for t in range(1, 8):
    ids = jnp.array([0, 1, 2, 2, 1, 2])
    w, state = update(jnp.ones(6), state, losses=jnp.asarray(losses)[ids], group_ids=ids)
    q = _softmax(0.2 * t * losses)
    np.testing.assert_allclose(np.exp(state), q, rtol=1e-5)
    np.testing.assert_allclose(w, (6 * q / [1, 2, 3])[ids], rtol=1e-5)


@pytest.mark.parametrize('shape', [(12,), (12, 3)])
def test_equals_a_numpy_loop(shape):
  """Absent and unknown groups, padding, incoming weights and an adjustment, over several steps."""
  rng = np.random.default_rng(0)
  groups, rate = 5, 0.4
  adjustment = rng.uniform(0, 1, groups)
  log_q = np.log(_softmax(rng.normal(size=groups)))
  with jax.enable_x64(True):
    ours = jnp.asarray(log_q)
    for step in range(4):
      ids = rng.integers(-1, 4, 12)
      ids[ids == step] = -1  # group 4 is always absent, another one in each step
      losses = rng.gamma(2.0, 1.0, shape)
      base = rng.integers(0, 3, shape) / 2
      incoming = rng.uniform(0, 2, shape)
      dirty = np.where(base > 0, losses, np.nan)
      w, ours = _weights(
        ours,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(dirty),
        rate,
        jnp.asarray(base),
        weights=jnp.asarray(incoming),
        adjustment=jnp.asarray(adjustment),
      )
      expected, log_q = _loop(log_q, ids, losses, rate, base, incoming, adjustment)
      np.testing.assert_allclose(ours, log_q, rtol=1e-12)
      np.testing.assert_allclose(w, expected.reshape(shape), rtol=1e-11)
      np.testing.assert_allclose(np.sum(base * w), np.sum(base * incoming), rtol=1e-12)


def test_one_example_per_group_is_exponentiated_gradient_over_examples():
  rng = np.random.default_rng(1)
  rw, n = jaxrw.group_dro(8, rate=0.5), 8
  update, state, total = jax.jit(rw.update), rw.init(), np.zeros(n)
  for _ in range(5):
    losses = rng.gamma(2.0, 1.0, n)
    total += losses
    w, state = update(
      jnp.ones(n), state, losses=jnp.asarray(losses, jnp.float32), group_ids=jnp.arange(n)
    )
    np.testing.assert_allclose(w, n * _softmax(0.5 * total), rtol=1e-5)


def test_the_weighted_loss_and_its_gradient_are_those_of_the_official_code():
  """It computes sum_g q_g L_g with q detached; a group without examples has L_g = 0, and its mass
  is lost. Ours divides by the mass of the groups present, and is the same when all are."""
  rng = np.random.default_rng(2)
  x, y = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9))
  log_q, rate = jnp.log(jnp.array([0.2, 0.5, 0.3])), 0.3
  losses_of = lambda params: (x @ params - y) ** 2
  params = jnp.array([0.1, -0.4, 0.7])
  for ids in (np.array([0, 1, 2, 2, 2, 0, 1, 1, 1]), np.array([0, 1, 1, 0, 0, 0, 1, 1, 1])):

    def official(params, ids=ids):
      member = jnp.asarray(ids[None] == np.arange(3)[:, None], jnp.float32)
      counts = member.sum(axis=1)
      means = member @ losses_of(params) / (counts + (counts == 0))
      q = jnp.exp(log_q) * jnp.exp(rate * jax.lax.stop_gradient(means))
      q /= q.sum()
      return q @ means, q @ (counts > 0)

    def ours(params, ids=ids):
      losses = losses_of(params)
      w, _ = jaxrw.group_dro_weights(log_q, jnp.asarray(ids), losses, rate)
      return jnp.mean(w * losses)

    (value, mass), gradient = jax.jit(jax.value_and_grad(official, has_aux=True))(params)
    ours_value, ours_gradient = jax.jit(jax.value_and_grad(ours))(params)
    assert (mass < 0.99) == (2 not in ids)
    np.testing.assert_allclose(ours_value, value / mass, rtol=1e-5)
    np.testing.assert_allclose(ours_gradient, gradient / mass, rtol=1e-4, atol=1e-6)


def test_a_batch_of_unknown_groups_passes():
  incoming = jnp.array([0.5, 2.0, 1.0])
  rw = jaxrw.group_dro(2)
  w, state = rw.update(
    incoming, rw.init(), losses=jnp.array([1.0, 2.0, 3.0]), group_ids=jnp.full(3, -1)
  )
  np.testing.assert_array_equal(w, incoming)
  np.testing.assert_allclose(state, rw.init(), rtol=1e-6)


def test_a_group_that_fell_far_behind_still_weighs_when_it_is_alone():
  """exp(-300) is 0 in float32, but only relative to groups that are not there."""
  w, log_q = _weights(
    jnp.array([0.0, -300.0]), jnp.array([1, 1]), jnp.array([1.0, 2.0]), 0.01, weights=None
  )
  np.testing.assert_allclose(w, [1, 1], rtol=1e-6)
  assert np.all(np.isfinite(log_q))


def test_errors_say_what_to_do():
  log_q = jnp.zeros(2)
  with pytest.raises(IndexError, match='group_ids holds 2, but there are 2'):
    jaxrw.group_dro_weights(log_q, jnp.array([0, 2]), jnp.ones(2))
  with pytest.raises(ValueError, match=r'group_ids has shape \(3,\)'):
    jaxrw.group_dro_weights(log_q, jnp.array([0, 1, 1]), jnp.ones(2))
  with pytest.raises(ValueError, match='rate=-1 must be at least 0'):
    jaxrw.group_dro(2, rate=-1)
  with pytest.raises(ValueError, match=r'adjustment has shape \(3,\)'):
    jaxrw.group_dro(2, adjustment=(1.0, 2.0, 3.0))
  with pytest.raises(TypeError, match='group_ids'):
    jaxrw.group_dro(2).update(jnp.ones(2), log_q, losses=jnp.ones(2))


def test_the_rate_may_follow_the_step():
  fixed, schedule = jaxrw.group_dro(2, 0.3), jaxrw.group_dro(2, lambda step: 0.1 * step)
  signals = {'losses': jnp.array([1.0, 2.0]), 'group_ids': jnp.array([0, 1]), 'step': 3}
  expected = fixed.update(jnp.ones(2), fixed.init(), **signals)
  for a, b in zip(schedule.update(jnp.ones(2), fixed.init(), **signals), expected):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_all_groups_take_one_collective():
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows, everywhere = (NamedSharding(mesh, PartitionSpec(*p)) for p in (('data',), ()))
  arguments = (
    jax.device_put(jnp.zeros(5), everywhere),
    jax.device_put(jnp.arange(16) % 5, rows),
    jax.device_put(jnp.ones((16, 3)), rows),
  )
  step = jax.jit(jaxrw.group_dro_weights)
  found = compiled.costs(step.lower(*arguments).compile()).collectives
  assert [(c.kind, c.bytes, c.count) for c in found] == [('all-reduce', 5 * 2 * 4, 1)]


def test_a_broken_loss_leaves_no_trace_in_q():
  """One bad batch must not end the run: its weights are NaN, the next ones are not."""
  rw, ids = jaxrw.group_dro(2, rate=0.5), jnp.array([0, 0, 1])
  _, state = rw.update(jnp.ones(3), rw.init(), losses=jnp.array([1.0, 2.0, 3.0]), group_ids=ids)
  for value in (jnp.nan, jnp.inf):
    w, after = rw.update(jnp.ones(3), state, losses=jnp.array([1.0, value, 3.0]), group_ids=ids)
    assert np.isnan(w).any()
    np.testing.assert_array_equal(after, state)
