"""Quantile aggregation: identities between the kinds, isotonic regression, and two defects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxrw import quantiles

LEVELS = np.array([0.05, 0.25, 0.5, 0.75, 0.95])


def _predictions(seed=0, rows=20, models=3):
  rng = np.random.default_rng(seed)
  return np.sort(rng.normal(size=(rows, models, len(LEVELS))), axis=-1)


def test_pinball_is_least_at_the_empirical_quantile():
  y = np.random.default_rng(0).exponential(size=101)
  grid = np.sort(y)
  losses = quantiles.pinball(
    jnp.broadcast_to(y, (101, 101)), jnp.broadcast_to(grid[:, None, None], (101, 101, 5)), LEVELS
  )
  best = grid[np.argmin(losses.sum(axis=1), axis=0)]
  expected = [grid[int(np.ceil(101 * level)) - 1] for level in LEVELS]
  np.testing.assert_allclose(best, expected)


def test_summed_pinball_is_the_weighted_interval_score():
  rng = np.random.default_rng(1)
  q, y = np.sort(rng.normal(size=(50, 5))), rng.normal(size=50)
  score = 0.5 * np.abs(y - q[:, 2])
  for low, high, alpha in ((0, 4, 0.1), (1, 3, 0.5)):
    outside = np.maximum(q[:, low] - y, 0) + np.maximum(y - q[:, high], 0)
    score += alpha / 2 * (q[:, high] - q[:, low] + 2 / alpha * outside)
  with jax.enable_x64(True):
    ours = quantiles.pinball(jnp.asarray(y), jnp.asarray(q), LEVELS).sum(axis=1)
  np.testing.assert_allclose(ours, score, rtol=1e-12)


def test_each_kind_contains_the_one_before():
  predictions = jnp.asarray(_predictions())
  coarse = jnp.array([0.3, -1.0, 0.5])
  medium = jnp.broadcast_to(coarse[:, None], (3, 5))
  fine = jnp.where(jnp.eye(5, dtype=bool), medium[:, :, None], -jnp.inf)
  expected = np.einsum('p,npt->nt', jax.nn.softmax(coarse), predictions)
  for params, kind in ((coarse, 'coarse'), (medium, 'medium'), (fine, 'fine')):
    found = quantiles.aggregate(predictions, params, kind)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', ['coarse', 'medium', 'fine'])
def test_the_start_is_the_mean_of_the_models(kind):
  predictions = jnp.asarray(_predictions())
  start = quantiles.init_aggregation(kind, 3, 5, own_level=50.0)
  found = quantiles.aggregate(predictions, start, kind)
  np.testing.assert_allclose(found, predictions.mean(axis=1), rtol=1e-5, atol=1e-6)
  one = quantiles.init_aggregation(kind, 1, 5, own_level=50.0)
  np.testing.assert_allclose(
    quantiles.aggregate(predictions[:, :1], one, kind), predictions[:, 0], atol=1e-6
  )


def test_fine_weights_that_start_at_zero_make_all_levels_alike():
  predictions = jnp.asarray(_predictions())
  naive = quantiles.aggregate(predictions, jnp.zeros((3, 5, 5)), 'fine')
  assert np.ptp(naive, axis=1).max() < 1e-6
  ours = quantiles.aggregate(predictions, quantiles.init_aggregation('fine', 3, 5), 'fine')
  assert np.ptp(ours, axis=1).min() > 0.5


def test_weights_of_each_example():
  predictions, rng = jnp.asarray(_predictions()), np.random.default_rng(2)
  params = jnp.asarray(rng.normal(size=(20, 3)))
  found = quantiles.aggregate(predictions, params, 'coarse')
  for row in (0, 7):
    np.testing.assert_allclose(
      found[row], quantiles.aggregate(predictions[row], params[row], 'coarse'), rtol=1e-5
    )


def test_isotonize():
  q = np.random.default_rng(3).normal(size=(200, 7))
  with jax.enable_x64(True):
    found = jax.jit(lambda q: quantiles.isotonize(q, 'pava'))(jnp.asarray(q))
    sorted_ = quantiles.isotonize(jnp.asarray(q))
  expected = [optimize.isotonic_regression(row).x for row in q]
  np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
  np.testing.assert_array_equal(sorted_, np.sort(q, axis=1))


def test_isotonize_far_from_zero():
  """float32: cumulative sums around 1e5 would be off by more than the quantiles differ."""
  q = np.random.default_rng(6).normal(size=(100, 25)).astype(np.float32) + np.float32(1e5)
  expected = [optimize.isotonic_regression(row.astype(np.float64)).x for row in q]
  np.testing.assert_allclose(quantiles.isotonize(jnp.asarray(q), 'pava'), expected, rtol=1.5e-7)


def test_isotonizing_never_hurts_and_running_minima_do():
  rng = np.random.default_rng(4)
  q, y = rng.normal(size=(5000, 5)), rng.normal(size=5000)
  score = jax.jit(lambda q: quantiles.pinball(jnp.asarray(y, jnp.float32), q, LEVELS).sum(axis=1))
  before = score(jnp.asarray(q, jnp.float32))
  for how in ('sort', 'pava'):
    after = score(quantiles.isotonize(jnp.asarray(q, jnp.float32), how))
    assert np.max(after - before) < 1e-5
  low = np.minimum.accumulate(q[:, 2::-1], axis=1)[:, ::-1]
  high = np.maximum.accumulate(q[:, 2:], axis=1)
  swept = jnp.asarray(np.concatenate([low, high[:, 1:]], axis=1), jnp.float32)
  assert np.mean(score(swept) > before + 1e-4) > 0.1


def test_crossing_penalty_is_a_loop():
  q = np.random.default_rng(5).normal(size=(4, 5))
  expected = [
    np.mean([max(0, row[j] - row[k] + 0.1) for j in range(5) for k in range(j + 1, 5)]) for row in q
  ]
  np.testing.assert_allclose(quantiles.crossing_penalty(jnp.asarray(q), 0.1), expected, rtol=1e-5)


def test_errors():
  predictions = jnp.asarray(_predictions())
  for call, message in (
    (lambda: quantiles.pinball(jnp.ones(2), jnp.ones((2, 1)), [1.0]), r'levels=\[1\.0\] must be'),
    (lambda: quantiles.pinball(jnp.ones(2), jnp.ones((2, 2)), [0.5]), 'quantiles have shape'),
    (lambda: quantiles.init_aggregation('rough', 1, 1), "kind='rough' must be"),
    (lambda: quantiles.aggregate(predictions, jnp.ones(4), 'coarse'), r'params have shape \(4,\)'),
    (lambda: quantiles.isotonize(jnp.ones(3), 'mean'), "how='mean' must be"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
