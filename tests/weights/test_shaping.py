"""The cap against bisection, and unit mean against torch's definition."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

INF = float('inf')


@functools.cache
def _jitted(redistribute=True):
  return jax.jit(functools.partial(jaxrw.cap_weights, redistribute=redistribute))


def _cap(weights, limit, base=None, redistribute=True):
  base = np.ones(np.shape(weights)) if base is None else base
  return np.asarray(
    _jitted(redistribute)(jnp.asarray(weights), limit, base=jnp.asarray(base, weights.dtype))
  )


def _bisection(weights, limit, base):
  """min(c w, limit) with the c that keeps sum(base * w), found by halving."""
  weights, base = np.where(base > 0, weights, 0).astype(float), np.asarray(base, float)
  goal = np.sum(base * weights)
  if limit * np.sum(base[weights > 0]) <= goal:
    return np.where(weights > 0, limit, 0.0)
  low, high = 0.0, 1e30
  for _ in range(400):
    c = np.sqrt(max(low, 1e-30) * high) if high > 4 * max(low, 1e-30) else (low + high) / 2
    low, high = (c, high) if np.sum(base * np.minimum(c * weights, limit)) < goal else (low, c)
  return np.minimum(high * weights, limit)


entries = st.one_of(st.just(0.0), st.sampled_from([0.5, 1.0, 2.0]), st.floats(2**-10, 64, width=32))


@hypothesis.given(
  weights=st.lists(entries, min_size=9, max_size=9),
  base=st.lists(st.sampled_from([0.0, 0.25, 1.0, 6.0]), min_size=9, max_size=9),
  limit=st.sampled_from([0.5, 1.0, 1.3, 2.0, 8.0]),
)
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
def test_water_filling_equals_bisection(weights, base, limit):
  """Feasible or not, with zeros, ties, padding and uneven base."""
  weights, base = np.asarray(weights), np.asarray(base)
  with jax.enable_x64(True):
    w = _cap(weights, limit, base)
  np.testing.assert_allclose(w, _bisection(weights, limit, base), rtol=1e-9)
  assert np.all(w <= limit)
  assert np.all(w[(weights == 0) | (base == 0)] == 0)
  if limit * np.sum(base[weights > 0]) >= np.sum(base * weights):
    np.testing.assert_allclose(np.sum(base * w), np.sum(base * weights), rtol=1e-9)


@pytest.mark.parametrize('seed', range(5))
def test_float32_keeps_the_sum_the_limit_and_the_order(seed):
  rng = np.random.default_rng(seed)
  weights = rng.gamma(0.3, 1.0, 64).astype(np.float32)
  weights /= weights.mean()
  base = rng.integers(1, 9, 64).astype(np.float32)
  w = _cap(weights, 2.0, base)
  assert w.dtype == np.float32
  assert w.max() <= 2
  np.testing.assert_allclose(np.sum(base * w), np.sum(base * weights), rtol=2e-6)
  assert np.all(np.diff(w[np.argsort(weights)]) >= 0)
  free = w < 2
  np.testing.assert_allclose(w[free] / weights[free], (w[free] / weights[free])[0], rtol=1e-5)


def test_a_person_can_check_these():
  def check(weights, limit, expected, base=None):
    np.testing.assert_allclose(_cap(np.float32(weights), limit, base), expected, rtol=1e-6)

  check([3.0, 0.5, 0.5, 0.0], 2.0, [2.0, 1.0, 1.0, 0.0])
  check([8.0, 1.0, 0.0, 0.0], 2.0, [2.0, 2.0, 0.0, 0.0])  # infeasible: 9 > 2 * 2
  check([4.0, 4.0, 1.0, 1.0], 3.0, [3.0, 3.0, 2.0, 2.0])  # ties
  check([3.0, 1.9, 0.1], 2.0, [2.0, 2.0, 1.0])  # the second reaches the cap only when refilled
  check([3.0, 1.0, 1.0], 2.0, [2.0, 1.5, 1.5], np.array([1, 1, 1]))
  check([3.0, 1.0, 1.0], 2.0, [2.0, 1.25, 1.25], np.array([1, 2, 2]))
  check([3.0, 9.0, 1.0], 2.0, [2.0, 0.0, 2.0], np.array([1, 0, 1]))  # padding has no part
  check([1.0, 1.0, 1.0], 1.0, [1.0, 1.0, 1.0])
  check([0.0, 0.0, 0.0], 1.0, [0.0, 0.0, 0.0])


@pytest.mark.parametrize('limit', [1.7, 1e30, INF])
def test_weights_within_the_limit_pass_bit_for_bit(limit):
  weights = np.array([1.7, 0.3, 0.0, 1.1, 1 / 3], np.float32)
  np.testing.assert_array_equal(_cap(weights, limit), weights)
  np.testing.assert_array_equal(_cap(weights[:1], limit), weights[:1])
  lone = np.array([1.5, 0, 0], np.float32)
  np.testing.assert_array_equal(_cap(lone, limit), lone)


def test_token_entries_are_capped_together():
  weights = np.array([[4.0, 0.5], [0.5, 9.0]], np.float32)
  base = np.array([[1.0, 1.0], [1.0, 0.0]])
  np.testing.assert_allclose(_cap(weights, 2.0, base), [[2.0, 1.5], [1.5, 0.0]], rtol=1e-6)


@pytest.mark.parametrize('value', [np.nan, INF])
def test_nonfinite_weights_are_not_hidden(value):
  """Zeros in their place would train on nothing and look healthy."""
  w = _cap(np.array([value, 1.0, 0.5], np.float32), 2.0)
  assert np.all(np.isnan(w))
  assert np.isnan(_cap(np.array([np.nan, 1.0], np.float32), 2.0, redistribute=False)[0])
  padded = _cap(np.array([value, 3.0, 0.5, 0.5], np.float32), 2.0, np.array([0, 1, 1, 1]))
  np.testing.assert_allclose(padded, [0, 2, 1, 1], rtol=1e-6)


def test_clipping_leaves_the_sum_alone():
  weights = np.array([3.0, 0.5, 0.0], np.float32)
  np.testing.assert_array_equal(_cap(weights, 2.0, redistribute=False), [2.0, 0.5, 0.0])
  stage = jaxrw.cap(2.0, redistribute=False)
  np.testing.assert_array_equal(stage.update(jnp.asarray(weights), ())[0], [2.0, 0.5, 0.0])


def test_cap_imposes_the_bound_of_the_theorem_on_sharp_weights():
  losses = jnp.asarray(np.random.default_rng(0).gamma(4.0, 0.7, 32), jnp.float32)
  rw = jaxrw.chain(loss=jaxrw.upper(0.1), cap=jaxrw.cap(2.0))
  w, _ = rw.update(jnp.ones(32), rw.init(), losses=losses)
  assert jnp.max(jaxrw.upper_weights(losses, 0.1)) > 4
  assert jnp.max(w) == 2
  np.testing.assert_allclose(jnp.sum(w), 32, rtol=1e-6)


def test_the_limit_may_follow_the_step():
  stage = jaxrw.cap(lambda step: 4.0 - step)
  weights = jnp.array([3.0, 0.5, 0.5, 0.0])
  np.testing.assert_array_equal(stage.update(weights, (), step=0)[0], weights)
  np.testing.assert_allclose(stage.update(weights, (), step=2)[0], [2, 1, 1, 0], rtol=1e-6)
  with pytest.raises(TypeError, match='step'):
    stage.update(weights, ())


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match='limit=0'):
    jaxrw.cap(0)
  with pytest.raises(ValueError, match='limit=-2'):
    jaxrw.cap_weights(jnp.ones(2), -2)
  with pytest.raises(ValueError, match=r'base has shape \(3,\)'):
    jaxrw.cap_weights(jnp.ones(2), 2.0, base=jnp.ones(3))


def test_unit_mean_divides_by_the_weighted_mean():
  """torch.nn.CrossEntropyLoss(weight): sum(w l) / sum(w)."""
  rng = np.random.default_rng(0)
  weights, losses = rng.uniform(0, 3, 7), rng.gamma(2.0, 1.0, 7)
  base = np.array([1.0, 2, 0, 1, 1, 3, 1])
  with jax.enable_x64(True):
    w = np.asarray(jaxrw.unit_mean_weights(jnp.asarray(weights), base=jnp.asarray(base)))
  np.testing.assert_allclose(np.sum(base * w), np.sum(base), rtol=1e-12)
  ours = np.sum(base * w * losses) / np.sum(base)
  np.testing.assert_allclose(ours, np.average(losses, weights=base * weights), rtol=1e-12)


def test_unit_mean_corner_cases():
  f = jaxrw.unit_mean_weights
  np.testing.assert_array_equal(f(jnp.zeros(3)), np.zeros(3))
  np.testing.assert_array_equal(f(jnp.ones(3)), np.ones(3))
  np.testing.assert_array_equal(f(jnp.ones(2), base=jnp.zeros(2)), np.zeros(2))
  token = f(jnp.array([[2.0, 2.0], [4.0, 9.0]]), base=jnp.array([[1.0, 1.0], [1.0, 0.0]]))
  np.testing.assert_allclose(token, np.array([[2, 2], [4, 9]]) * 3 / 8, rtol=1e-6)
  padded = f(jnp.array([1.0, 3.0, jnp.nan]), base=jnp.array([1.0, 1.0, 0.0]))
  np.testing.assert_allclose(padded[:2], [0.5, 1.5])
  assert np.all(np.isnan(f(jnp.array([1.0, jnp.nan]))))
