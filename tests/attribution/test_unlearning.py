"""Unlearning: exact in least squares, and a divergence with known values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import attribution


def test_predictions_are_those_of_a_retrained_ridge_regression():
  """To first order in what is forgotten, with the error that the second order says."""
  rng = np.random.default_rng(0)
  n, d = 400, 5
  x, y = rng.normal(size=(n, d)), rng.normal(size=n)
  curve = x.T @ x / n + 0.1 * np.eye(d)
  w = np.linalg.solve(curve, x.T @ y / n)
  points = rng.normal(size=(7, d))
  # What training on i adds to the output: x^T H^-1 x_i (y_i - x_i w) / n.
  effects = points @ np.linalg.solve(curve, (x * (y - x @ w)[:, None]).T) / n
  for number, allowed in ((1, 0.05), (10, 0.2)):
    forget = np.arange(n) < number
    kept = ~forget
    again = np.linalg.solve(x[kept].T @ x[kept] / n + 0.1 * np.eye(d), x[kept].T @ y[kept] / n)
    with jax.enable_x64(True):
      found = attribution.predicted(*map(jnp.asarray, (points @ w, effects, forget)))
    moved = np.linalg.norm(points @ again - points @ w)
    assert np.linalg.norm(np.asarray(found) - points @ again) < allowed * moved


def test_nothing_to_forget_changes_nothing():
  outputs = jnp.array([[1.0, 2.0]])
  effects = jnp.full((1, 2, 3), jnp.nan)
  np.testing.assert_array_equal(
    attribution.predicted(outputs, effects, jnp.zeros(3, bool)), outputs
  )


def test_matching_reaches_the_targets():
  """Least squares on as many points as parameters: the outputs are met exactly."""
  rng = np.random.default_rng(1)
  x, targets = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.normal(size=(4, 2)))
  targets = x @ targets
  loss = lambda w: jnp.mean(attribution.match_loss(x @ w, targets))
  w = jnp.zeros((4, 2))
  step = jax.jit(lambda w: w - 0.5 * jax.grad(loss)(w))
  for _ in range(2000):
    w = step(w)
  assert loss(w) < 1e-6
  frozen = jax.grad(lambda t: jnp.sum(attribution.match_loss(x @ w + 1, t)))(targets)
  np.testing.assert_array_equal(frozen, np.zeros((6, 2)))


def test_klom():
  rng = np.random.default_rng(2)
  margins = jnp.asarray(rng.normal(size=(50, 8)))
  np.testing.assert_allclose(attribution.klom(margins, margins), np.zeros(8), atol=1e-6)
  apart = attribution.klom(margins - 50, margins + 50)
  assert np.all(apart > 5)  # no oracle where the unlearned are
  many = jnp.asarray(rng.normal(size=(20_000, 2)))
  shifted = jnp.asarray(rng.normal(0.5, 1, (20_000, 2)))
  np.testing.assert_allclose(attribution.klom(shifted, many, bins=40), [0.125, 0.125], rtol=0.15)
  far = attribution.klom(jnp.array([[1e9]]), jnp.array([[100.0]]))
  np.testing.assert_allclose(far, [0], atol=1e-6)  # clipped
  for place in (0, 1):
    broken = [margins, margins]
    broken[place] = margins.at[3, 2].set(jnp.nan)
    assert np.flatnonzero(np.isnan(attribution.klom(*broken))).tolist() == [2]


def test_klom_is_a_loop_with_the_largest_in_the_last_bin():
  rng = np.random.default_rng(3)
  p, q = rng.normal(size=(30, 1)), rng.normal(0.3, 1.2, (25, 1))
  edges = np.linspace(min(p.min(), q.min()), max(p.max(), q.max()), 21)
  share = lambda x: np.histogram(x, edges)[0] / len(x)
  a, b = share(p), share(q)
  expected = sum(a[i] * np.log(a[i] / (b[i] or 1e-5)) for i in range(20) if a[i])
  np.testing.assert_allclose(
    attribution.klom(jnp.asarray(p), jnp.asarray(q)), [expected], rtol=1e-4
  )
  digitized = np.digitize(np.append(p, q), edges)  # what the benchmark's code counts by
  assert (digitized > 20).sum() == 1  # the largest has vanished


def test_errors():
  ones = jnp.ones((2, 3))
  for call, message in (
    (lambda: attribution.predicted(ones, ones, jnp.ones(3, bool)), r'forget \(3,\)'),
    (lambda: attribution.match_loss(ones, ones[:1]), r'targets \(1, 3\)'),
    (lambda: attribution.klom(ones, ones[:, :2]), r'oracle \(2, 2\)'),
    (lambda: attribution.klom(ones[:0], ones), '0 and 2 models'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
