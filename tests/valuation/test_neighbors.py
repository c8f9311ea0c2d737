"""KNN-Shapley against all subsets, K > N included, where the common recursion is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import valuation


def _data(seed, n, m, classes=2, dims=3):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(n, dims)), rng.integers(0, classes, n),
    rng.normal(size=(m, dims)), rng.integers(0, classes, m),
  )  # fmt: skip


def _brute(x, y, test_x, test_y, k):
  total = np.zeros(len(x))
  for point, label in zip(test_x, test_y):
    order = np.argsort(np.linalg.norm(x - point, axis=1), kind='stable')

    def utility(present, order=order, label=label):
      nearest = [i for i in order if present[i]][:k]
      return np.sum(y[nearest] == label) / k

    total += valuation.exact_values(valuation.all_utilities(utility, len(x)))
  return total / len(test_x)


def _recursion(x, y, test_x, test_y, k, start_at_k):
  """The formula in a loop; `start_at_k`: s_N = m_N min(K, N) / (N K), else m_N / N."""
  total, n = np.zeros(len(x)), len(x)
  for point, label in zip(test_x, test_y):
    order = np.argsort(np.linalg.norm(x - point, axis=1), kind='stable')
    m, s = (y[order] == label).astype(float), np.zeros(n)
    s[-1] = m[-1] / n * (min(k, n) / k if start_at_k else 1)
    for j in range(n - 1, 0, -1):
      s[j - 1] = s[j] + (m[j - 1] - m[j]) / k * min(k, j) / j
    total[order] += s
  return total / len(test_x)


@pytest.mark.parametrize('k', [1, 3, 8, 20])
def test_all_subsets(k):
  data = _data(k, 8, 5)
  with jax.enable_x64(True):
    found = valuation.knn_shapley(*map(jnp.asarray, data), k, chunk=2)
  np.testing.assert_allclose(found, _brute(*data, k), rtol=1e-12, atol=1e-14)


def test_the_common_start_is_wrong_for_more_neighbors_than_examples():
  data = _data(0, 4, 3)
  expected = _brute(*data, 7)
  np.testing.assert_allclose(_recursion(*data, 7, start_at_k=True), expected, atol=1e-14)
  naive = _recursion(*data, 7, start_at_k=False)
  assert np.abs(naive - expected).max() > 0.05


@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
def test_chunks_and_sum(chunk):
  data = _data(1, 60, 31, classes=3)
  with jax.enable_x64(True):
    found = valuation.knn_shapley(*map(jnp.asarray, data), 5, chunk=chunk)
  np.testing.assert_allclose(found, _recursion(*data, 5, True), rtol=1e-10, atol=1e-13)
  x, y, test_x, test_y = data
  nearest = np.argsort(np.linalg.norm(x - test_x[:, None], axis=2), axis=1)[:, :5]
  right = np.mean(y[nearest] == test_y[:, None])
  np.testing.assert_allclose(np.asarray(found).sum(), right, rtol=1e-12)


def test_equal_distances_go_by_position():
  x = jnp.zeros((3, 2))
  found = valuation.knn_shapley(x, jnp.array([1, 0, 1]), jnp.ones((1, 2)), jnp.array([1]), 1)
  np.testing.assert_allclose(found, [5 / 6, -1 / 6, 1 / 3], rtol=1e-6)


def test_far_from_zero():
  x, y, test_x, test_y = _data(2, 50, 20)
  near = valuation.knn_shapley(*map(jnp.asarray, (x, y, test_x, test_y)), 5)
  far = valuation.knn_shapley(jnp.asarray(x) + 300, y, jnp.asarray(test_x) + 300, test_y, 5)
  np.testing.assert_allclose(far, near, atol=1e-4)


def test_flipped_labels_have_the_lowest_values():
  rng = np.random.default_rng(3)
  y = rng.integers(0, 2, 300)
  x = rng.normal(size=(300, 5)) + 2 * y[:, None]
  flipped = rng.random(300) < 0.1
  labels = np.where(flipped, 1 - y, y)
  test_y = rng.integers(0, 2, 200)
  test_x = rng.normal(size=(200, 5)) + 2 * test_y[:, None]
  values = np.asarray(valuation.knn_shapley(*map(jnp.asarray, (x, labels, test_x, test_y)), 5))
  auc = np.mean(values[flipped][:, None] < values[~flipped])
  assert auc > 0.95


def test_errors():
  x, y = jnp.ones((3, 2)), jnp.ones(3, int)
  for arguments, message in (
    ((x, y, x, y, 0), 'neighbors=0 must be at least 1'),
    ((x, y[:2], x, y), r'labels have shape \(2,\) for 3 examples'),
    ((x, y, x[:0], y[:0]), r'test_x \(0, 2\)'),
    ((x, y, jnp.ones((3, 5)), y), r'test_x \(3, 5\)'),
  ):
    with pytest.raises(ValueError, match=message):
      valuation.knn_shapley(*arguments)
