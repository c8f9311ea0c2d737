"""Class statistics: moments by loops, calibration by hand, and what balanced samples are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrw import class_stats as stats_lib
from jaxrw import losses

_stats = jax.jit(stats_lib.class_stats, static_argnums=2)


def _data(seed=0, n=64):
  rng = np.random.default_rng(seed)
  labels = rng.integers(-1, 3, n)
  features = 100 + rng.normal(size=(n, 4)) + labels[:, None]
  return features, labels, rng.integers(0, 3, n) / 2


def test_moments_are_numpys():
  features, labels, weights = _data()
  dirty = np.where(weights[:, None] > 0, features, np.nan)
  with jax.enable_x64(True):
    found = _stats(*map(jnp.asarray, (dirty, labels)), 4, jnp.asarray(weights))
  for c in range(3):
    own = (labels == c) & (weights > 0)
    np.testing.assert_allclose(found.counts[c], weights[own].sum())
    mean = np.average(features[own], axis=0, weights=weights[own])
    np.testing.assert_allclose(found.means[c], mean, rtol=1e-12)
    expected = np.cov(features[own].T, aweights=weights[own], ddof=0)
    np.testing.assert_allclose(found.covariances[c], expected, rtol=1e-9)
  for empty in (x[3] for x in found):
    assert np.all(np.asarray(empty) == 0)


def test_rows_over_eight_devices():
  features, labels, weights = _data()
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  arguments = [np.float32(features - 100), labels, np.float32(weights)]
  one = _stats(*arguments[:2], 3, arguments[2])
  placed = [jax.device_put(x, rows) for x in arguments]
  for a, b in zip(_stats(*placed[:2], 3, placed[2]), one):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_inliers_are_the_nearest_of_each_class():
  rng = np.random.default_rng(1)
  clean = rng.normal(size=(80, 3)) * [1, 2, 0.5]
  labels = np.repeat([0, 1], 40)
  clean[labels == 1] += 6
  wrong = np.array([3, 11, 50, 71])
  clean[wrong] = np.where(labels[wrong, None] == 0, 6, 0) + rng.normal(size=(4, 3)) * 0.3
  kept = np.asarray(stats_lib.inlier_weights(jnp.asarray(clean), jnp.asarray(labels), 2, 0.9))
  assert [int(kept[labels == c].sum()) for c in (0, 1)] == [36, 36]
  assert not np.any(kept[wrong])
  everything = stats_lib.inlier_weights(jnp.asarray(clean), jnp.asarray(labels), 2, 1.0)
  np.testing.assert_array_equal(everything, np.ones(80))


def test_calibration_by_hand():
  """One tail class between two of three heads."""
  rng = np.random.default_rng(2)
  means = np.array([[0.0, 0], [4, 0], [50, 50], [1, 0]])
  covariances = np.stack([(a := rng.normal(size=(2, 2))) @ a.T for _ in range(4)])
  stats = stats_lib.ClassStats(*map(jnp.asarray, (np.array([30.0, 60, 90, 3]), means, covariances)))
  head = jnp.array([True, True, True, False])
  new = stats_lib.calibrate_stats(
    stats, head, neighbors=2, mean_share=0.3, covariance_share=0.6, ridge=0.01
  )
  omega = np.array([30 / 1, 60 / 3]) / (30 / 1 + 60 / 3)
  np.testing.assert_allclose(new.means[3], 0.3 * omega @ means[:2] + 0.7 * means[3], rtol=1e-5)
  expected = 0.6 * np.tensordot(omega, covariances[:2], 1) + 0.4 * covariances[3] + 0.01 * np.eye(2)
  np.testing.assert_allclose(new.covariances[3], expected, rtol=1e-5)
  np.testing.assert_array_equal(new.means[:3], stats.means[:3])
  np.testing.assert_array_equal(new.covariances[:3], stats.covariances[:3])
  order = jnp.array([2, 3, 0, 1])  # another order of the classes
  moved = stats_lib.calibrate_stats(
    stats_lib.ClassStats(*(x[order] for x in stats)), head[order],
    neighbors=2, mean_share=0.3, covariance_share=0.6, ridge=0.01,
  )  # fmt: skip
  np.testing.assert_allclose(moved.means, new.means[order], rtol=1e-6)


def test_limits_of_calibration():
  features, labels, _ = _data()
  stats = stats_lib.class_stats(jnp.asarray(features), jnp.asarray(labels), 3)
  same = {'mean_share': 0.0, 'covariance_share': 0.0, 'ridge': 0.0}
  for head in ([True, False, False], [False] * 3):  # no shares, no heads
    options = same if any(head) else {'ridge': 0.0, 'mean_share': 1.0}
    new = stats_lib.calibrate_stats(stats, jnp.array(head), **options)
    for a, b in zip(new, stats):
      np.testing.assert_allclose(a, b, rtol=1e-6)
  many = stats_lib.calibrate_stats(stats, jnp.array([True, True, False]), neighbors=9)
  assert np.all(np.isfinite(many.means))


def test_samples_have_the_moments_asked_for():
  rng = np.random.default_rng(3)
  covariances = np.stack([(a := rng.normal(size=(3, 3))) @ a.T + 0.1 * np.eye(3) for _ in range(2)])
  stats = stats_lib.ClassStats(jnp.ones(2), jnp.asarray(rng.normal(size=(2, 3))), covariances)
  features, labels = stats_lib.sample_classes(jax.random.key(0), stats, 20_000)
  found = stats_lib.class_stats(features, labels, 2)
  np.testing.assert_array_equal(found.counts, [20_000, 20_000])
  np.testing.assert_allclose(found.means, stats.means, atol=0.06)
  np.testing.assert_allclose(found.covariances, covariances, atol=0.15)


@pytest.mark.slow
def test_balanced_samples_win_back_the_tail():
  """Ten Gaussian classes, imbalance 50, labels wrong by frequency in 30%, a linear head."""

  def fit(features, labels):
    tx = optax.adam(0.05)

    def step(carry, _):
      params, state = carry
      loss = lambda p: jnp.mean(losses.cross_entropy(features @ p[0] + p[1], labels))
      updates, state = tx.update(jax.grad(loss)(params), state)
      return (optax.apply_updates(params, updates), state), None

    params = (jnp.zeros((features.shape[1], 10)), jnp.zeros(10))
    return jax.lax.scan(step, (params, tx.init(params)), length=400)[0][0]

  fit = jax.jit(fit)
  rows = []
  for seed in range(5):
    rng = np.random.default_rng(seed)
    means = 1.2 * rng.normal(size=(10, 8))
    counts = np.int64(1000 * 50 ** -(np.arange(10) / 9))
    truth = np.repeat(np.arange(10), counts)
    x = np.float32(means[truth] + rng.normal(size=(len(truth), 8)))
    noisy = np.where(
      rng.random(len(truth)) < 0.3, rng.choice(10, len(truth), p=counts / counts.sum()), truth
    )
    test = np.repeat(np.arange(10), 300)
    test_x = np.float32(means[test] + rng.normal(size=(3000, 8)))
    inliers = stats_lib.inlier_weights(jnp.asarray(x), jnp.asarray(noisy), 10, 0.7)
    plain = stats_lib.class_stats(jnp.asarray(x), jnp.asarray(noisy), 10)
    robust = stats_lib.class_stats(jnp.asarray(x), jnp.asarray(noisy), 10, inliers)
    head = jnp.arange(10) < 4
    calibrated = stats_lib.calibrate_stats(robust, head, covariance_share=0.3)
    borrowed = stats_lib.calibrate_stats(robust, head, mean_share=0.3, covariance_share=0.3)
    key = jax.random.key(seed)
    row = []
    for data in (
      (jnp.asarray(x), jnp.asarray(noisy)),
      *(stats_lib.sample_classes(key, s, 300) for s in (plain, robust, calibrated, borrowed)),
    ):
      w, b = fit(*data)
      row.append(np.mean(np.argmax(test_x @ np.asarray(w) + np.asarray(b), axis=1) == test))
    rows.append(row)
  plain, samples, robust, calibrated, borrowed = np.mean(rows, axis=0)
  print(dict(plain=plain, samples=samples, robust=robust, covariance=calibrated, mean=borrowed))
  assert samples > plain + 0.03
  assert robust > samples
  assert calibrated > borrowed


def test_a_broken_row_spoils_its_own_class_only():
  x = jnp.array([[1.0, 0.0], [3.0, 2.0], [jnp.nan, 0.0], [5.0, 5.0], [7.0, 5.0]])
  clean = stats_lib.class_stats(x[jnp.array([0, 1, 3, 4])], jnp.array([0, 0, 1, 1]), 2)
  for label in (-1, 1):
    found = stats_lib.class_stats(x, jnp.array([0, 0, label, 1, 1]), 2)
    np.testing.assert_allclose(found.means[0], clean.means[0])
    np.testing.assert_allclose(found.covariances[0], clean.covariances[0])
    assert np.isnan(found.means[1]).all() == (label == 1)
  alone = stats_lib.class_stats(x[:2], jnp.zeros(2, int), 2)
  with pytest.raises(ValueError, match='class 1 has no members'):
    stats_lib.sample_classes(jax.random.key(0), alone, 3)


def test_errors():
  x, y = jnp.ones((4, 2)), jnp.zeros(4, int)
  stats = stats_lib.class_stats(x, y, 2)
  for call, error, message in (
    (lambda: stats_lib.class_stats(x, y + 5, 2), IndexError, 'labels holds 5, but there are 2'),
    (lambda: stats_lib.class_stats(x, y[:2], 2), ValueError, r'labels \(2,\)'),
    (lambda: stats_lib.inlier_weights(x, y, 2, 0.0), ValueError, r'share=0\.0 must be in'),
    (lambda: stats_lib.calibrate_stats(stats, jnp.ones(3, bool)), ValueError, r'head \(3,\)'),
    (lambda: stats_lib.calibrate_stats(stats, jnp.ones(2, bool), mean_share=2), ValueError, 'mean'),
    (lambda: stats_lib.sample_classes(jax.random.key(0), stats, 0), ValueError, 'per_class=0'),
  ):  # fmt: skip
    with pytest.raises(error, match=message):
      call()
