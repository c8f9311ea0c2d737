"""Tilted weights against NumPy in float64, the derivative of the risk, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

_weights = jax.jit(jaxrw.tilted_weights)


def _by_hand(losses, t, measure):
  tilts = [np.exp(t * (loss - np.max(t * losses) / t)) if t else 1.0 for loss in losses]
  mean = sum(m * w for m, w in zip(measure, tilts)) / sum(measure)
  return np.array(tilts) / mean


@pytest.mark.parametrize('t', [-30.0, -1.0, 0.0, 0.3, 50.0])
def test_equals_numpy(t):
  rng = np.random.default_rng(0)
  losses, base = rng.gamma(2.0, 1.0, 9), rng.integers(0, 3, 9).astype(float)
  incoming = rng.uniform(0.5, 2, 9)
  present = base > 0
  w = _weights(
    *map(jnp.asarray, (losses, t)), base=jnp.asarray(base), weights=jnp.asarray(incoming)
  )
  expected = incoming[present] * _by_hand(losses[present], t, (base * incoming)[present])
  np.testing.assert_allclose(w[present], expected, rtol=2e-5, atol=1e-30)
  np.testing.assert_array_equal(w[~present], 0)


@pytest.mark.parametrize('t', [-2.0, 0.7])
def test_is_the_derivative_of_the_tilted_risk(t):
  with jax.enable_x64(True):
    losses = jnp.asarray(np.random.default_rng(1).gamma(2.0, 1.0, 7))
    risk = lambda x: jnp.log(jnp.mean(jnp.exp(t * x))) / t
    np.testing.assert_allclose(_weights(losses, t), 7 * jax.grad(risk)(losses), rtol=1e-12)


def test_limits():
  losses = jnp.array([1.0, 3.0, 2.0, 3.0])
  np.testing.assert_array_equal(_weights(losses, 0.0), np.ones(4))
  np.testing.assert_allclose(_weights(losses, 1e4), [0, 2, 0, 2])
  np.testing.assert_allclose(_weights(losses, -1e4), [4, 0, 0, 0])
  np.testing.assert_allclose(
    _weights(losses, 1 / 0.4), jaxrw.kl_dro_weights(losses, 0.4), rtol=1e-5
  )


@pytest.mark.parametrize(('t', 'inner'), [(0.7, -1.3), (-2.0, 0.0), (1.1, 0.4)])
def test_groups_are_the_derivative_of_the_hierarchical_risk(t, inner):
  ids = np.array([0, 1, 1, 2, 2, 2, -1])
  with jax.enable_x64(True):
    losses = jnp.asarray(np.random.default_rng(1).gamma(2.0, 1.0, 7))

    def risk(x):
      of = [x[ids == g] for g in range(3)]
      r = [jnp.log(jnp.mean(jnp.exp(inner * v))) / inner if inner else jnp.mean(v) for v in of]
      return jnp.log(sum(len(v) * jnp.exp(t * u) for v, u in zip(of, r)) / 6) / t

    w = jaxrw.tilted_groups_weights(losses, jnp.asarray(ids), 4, t, inner)
    np.testing.assert_allclose(w[:6], 6 * jax.grad(risk)(losses)[:6], rtol=1e-10)
  assert w[6] == 1


def test_limits_of_tilted_groups():
  losses, ids = jnp.array([1.0, 3.0, 2.0, 2.5]), jnp.array([0, 0, 1, 1])
  of = lambda *args: jaxrw.tilted_groups_weights(losses, ids, 2, *args)
  np.testing.assert_allclose(of(0.9, 0.9), _weights(losses, 0.9), rtol=1e-5)
  np.testing.assert_allclose(of(0.0, 0.0), np.ones(4), rtol=1e-6)
  np.testing.assert_allclose(of(1e3, 0.0), [0, 0, 2, 2], rtol=1e-6)
  one = jaxrw.tilted_groups_weights(losses, jnp.zeros(4, int), 1, 5.0, -0.7)
  np.testing.assert_allclose(one, _weights(losses, -0.7), rtol=1e-5)


def test_a_stream_carries_the_normalizer_of_the_data():
  """Z is the exponential average of mean exp(t l), in logarithms; large t do not overflow."""
  rng, t, rate = np.random.default_rng(2), 40.0, 0.3
  rw = jaxrw.tilted_stream(t, rate)
  update, state, log_z = jax.jit(rw.update), rw.init(), None
  for _ in range(6):
    losses, base = rng.uniform(5, 9, 8), rng.integers(0, 3, 8).astype(float)
    own = np.log(np.sum(base * np.exp(t * (losses - 9))) / base.sum()) + 9 * t
    log_z = own if log_z is None else np.logaddexp(np.log(1 - rate) + log_z, np.log(rate) + own)
    w, state = update(jnp.ones(8), state, losses=jnp.asarray(losses), base=jnp.asarray(base))
    np.testing.assert_allclose(state, log_z, rtol=1e-5)
    np.testing.assert_allclose(
      w, np.where(base > 0, np.exp(t * losses - log_z), 0), rtol=2e-3, atol=1e-20
    )


def test_a_stream_of_all_news_is_the_batch():
  losses = jnp.array([0.3, 1.0, 2.5])
  rw = jaxrw.tilted_stream(-1.2, rate=1.0)
  w, state = rw.update(jnp.ones(3), rw.init(), losses=losses)
  np.testing.assert_allclose(w, _weights(losses, -1.2), rtol=1e-5)
  w, _ = rw.update(jnp.ones(3), state, losses=losses + 1)
  np.testing.assert_allclose(w, _weights(losses, -1.2), rtol=1e-5)


def test_a_broken_batch_leaves_the_stream_alone():
  rw = jaxrw.tilted_stream(1.0)
  _, state = rw.update(jnp.ones(2), rw.init(), losses=jnp.array([1.0, 2.0]))
  for losses, base in (([jnp.nan, 1.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0])):
    w, new = rw.update(jnp.ones(2), state, losses=jnp.array(losses), base=jnp.array(base))
    assert new == state
    assert np.isnan(w[0]) == np.isnan(losses[0])


def test_a_loss_of_infinity_does_not_hide_where_low_losses_count():
  assert np.all(np.isnan(_weights(jnp.array([1.0, jnp.inf]), -1.0)))


def test_errors():
  with pytest.raises(ValueError, match='t=nan must be a finite number'):
    jaxrw.tilted(float('nan'))
  with pytest.raises(ValueError, match='t=inf must be'):
    jaxrw.tilted_weights(jnp.ones(2), float('inf'))
  with pytest.raises(ValueError, match='rate=0 must be'):
    jaxrw.tilted_stream(1.0, 0)


def test_small_tilts_within_groups_go_to_none():
  """log(mean(exp(inner l))) / inner by plain exp and log is rounding noise for inner = 1e-6."""
  rng = np.random.default_rng(0)
  losses, ids = jnp.asarray(rng.exponential(size=2000), jnp.float32), jnp.arange(2000) % 2
  none = jaxrw.tilted_groups_weights(losses, ids, 2, t=5.0, inner=0.0)
  for inner in (1e-7, 1e-6, 1e-5, jnp.array(0.0), np.float32(0)):
    found = jaxrw.tilted_groups_weights(losses, ids, 2, t=5.0, inner=inner)
    np.testing.assert_allclose(found, none, rtol=1e-3)
