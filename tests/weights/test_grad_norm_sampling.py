"""Sampling by gradient norm: unbiased by enumeration, its variance, its rule for switching on."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

_weights = jax.jit(jaxrw.grad_norm_sampling_weights, static_argnums=1)


def test_weights_are_counts_over_their_expectation():
  """What is drawn n_i times gets n_i / (b p_i); over all draws of two that is unbiased."""
  norms, base = np.array([1.0, 3.0, 0.5, 4.0]), np.array([1.0, 2.0, 1.0, 0.0])
  p = norms * base / np.sum(norms * base)
  w, tau = _weights(jnp.asarray(norms), 6, jax.random.key(0), base=jnp.asarray(base))
  times = np.asarray(w) * 6 * p
  np.testing.assert_allclose(times, np.round(times), atol=1e-5)
  np.testing.assert_allclose(times.sum(), 6, rtol=1e-6)
  np.testing.assert_allclose(tau, np.sqrt(np.sum(p[:3] ** 2 / (base[:3] / 4))), rtol=1e-6)
  losses = np.array([0.3, 1.0, 2.0, np.nan])
  mean = sum(
    p[i] * p[j] * sum(base[k] * losses[k] / (2 * p[k]) for k in (i, j)) / base.sum()
    for i, j in itertools.product(range(3), repeat=2)
  )
  np.testing.assert_allclose(mean, np.nansum(base * losses) / base.sum())


def test_the_weighted_gradient_is_unbiased():
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(16, 3))), jnp.asarray(rng.normal(size=16) * 2)
  gradients = jax.vmap(jax.grad(lambda p, x, y: (x @ p - y) ** 2), (None, 0, 0))(jnp.zeros(3), x, y)
  norms = jnp.linalg.norm(gradients, axis=1)
  draws = jax.vmap(lambda key: _weights(norms, 4, key)[0])
  w = np.asarray(draws(jax.random.split(jax.random.key(1), 4000)))
  estimates = w @ np.asarray(gradients) / 16
  error = estimates.std(axis=0) / np.sqrt(len(w))
  np.testing.assert_array_less(np.abs(estimates.mean(0) - gradients.mean(0)), 4 * error)
  # ... and varies less than drawing as many at random, as the theory of the bound says.
  plain = np.asarray(gradients)[rng.integers(0, 16, (4000, 4))].mean(axis=1)
  assert estimates.var(axis=0).sum() < plain.var(axis=0).sum()


def test_tau_is_the_published_expression():
  """1 / sqrt(1 - sum (g - u)^2 / sum g^2), with g normalized and u = 1 / B."""
  norms = np.random.default_rng(2).gamma(1.0, 1.0, 20)
  g = norms / norms.sum()
  _, tau = _weights(jnp.asarray(norms), 5, jax.random.key(0))
  np.testing.assert_allclose(
    tau, 1 / np.sqrt(1 - np.sum((g - 1 / 20) ** 2) / np.sum(g**2)), rtol=1e-5
  )


def test_switches_on_where_it_pays():
  """(B + 3 b) / (3 b) = 1.5 for 12 rows and 8 draws; one norm alone has tau = sqrt(12)."""
  rw = jaxrw.grad_norm_sampling(8, decay=0.5)
  signals = {'losses': jnp.ones(12), 'key': jax.random.key(0)}
  even, single = jnp.ones(12), jnp.zeros(12).at[3].set(1.0)
  state, seen = rw.init(), []
  for norms in (even, even, single, single, even):
    w, state = rw.update(jnp.ones(12), state, grad_norms=norms, **signals)
    seen.append((float(state), float(jnp.ptp(w)) > 0))
  average, expected = 0.0, []
  for tau in (1, 1, 12**0.5, 12**0.5, 1):
    average = 0.5 * average + 0.5 * tau
    expected.append((average, average > 1.5))
  np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_norms_of_zero_fall_back_on_the_base():
  w, _ = _weights(jnp.zeros(3), 300, jax.random.key(0), base=jnp.array([1.0, 2.0, 0.0]))
  assert w[2] == 0
  np.testing.assert_allclose(w[:2], 1, atol=0.3)


def test_bad_norms_do_not_go_unnoticed():
  for bad in (jnp.nan, jnp.inf, -1.0):
    assert np.all(np.isnan(_weights(jnp.array([1.0, bad]), 2, jax.random.key(0))[0]))
  padded = _weights(jnp.array([1.0, jnp.nan]), 2, jax.random.key(0), base=jnp.array([1.0, 0.0]))
  np.testing.assert_array_equal(padded[0], [1, 0])


def test_errors():
  with pytest.raises(ValueError, match='draws=0 must be a whole number of at least 1'):
    jaxrw.grad_norm_sampling(0)
  with pytest.raises(ValueError, match=r'decay=1.0 must be in \[0, 1\)'):
    jaxrw.grad_norm_sampling(4, decay=1.0)
  with pytest.raises(ValueError, match='threshold=-1 must be at least 0'):
    jaxrw.grad_norm_sampling(4, threshold=-1)
  with pytest.raises(TypeError, match='grad_norms'):
    jaxrw.grad_norm_sampling(4).update(
      jnp.ones(2), jnp.zeros(()), losses=jnp.ones(2), key=jax.random.key(0)
    )
