"""Clusters, prototypes and neighbors: scikit-learn, invariances, planted structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import scores


def _planted(seed=0, clusters=4, each=30, spread=0.3, dims=5):
  rng = np.random.default_rng(seed)
  centers = rng.normal(size=(clusters, dims)) * 5
  label = np.repeat(np.arange(clusters), each)
  x = centers[label] + spread * rng.normal(size=(len(label), dims))
  return jnp.asarray(x, jnp.float32), label


def _same_partition(a, b):
  pairs = np.unique(np.stack([np.asarray(a), np.asarray(b)]), axis=1)
  return pairs.shape[1] == len(np.unique(a)) == len(np.unique(b))


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_planted_clusters_are_found(metric):
  x, label = _planted()
  _, found = jax.jit(scores.kmeans, static_argnames=('clusters', 'metric'))(
    jax.random.key(1), x, 4, metric=metric
  )
  assert _same_partition(found, label)


def test_the_objective_never_rises_and_is_scikit_learns():
  cluster = pytest.importorskip('sklearn.cluster')
  x, _ = _planted(spread=4.0)
  key = jax.random.key(0)

  def objective(steps):
    centroids, found = scores.kmeans(key, x, 6, steps=steps, metric='euclidean')
    return float(jnp.sum((x - centroids[found]) ** 2))

  values = [objective(steps) for steps in (1, 2, 4, 8, 16, 64)]
  assert np.all(np.diff(values) <= 1e-2)
  start, _ = scores.kmeans(key, x, 6, steps=1, metric='euclidean')
  peer = cluster.KMeans(6, init=np.asarray(start), n_init=1, max_iter=300, tol=0).fit(np.asarray(x))
  np.testing.assert_allclose(values[-1], peer.inertia_, rtol=1e-4)
  _, found = scores.kmeans(key, x, 6, steps=64, metric='euclidean')
  assert _same_partition(found, peer.labels_)


def test_far_from_zero_nothing_changes():
  x, _ = _planted(spread=1.0)
  _, here = scores.kmeans(jax.random.key(2), x, 4, metric='euclidean')
  centroids, there = scores.kmeans(jax.random.key(2), x + 1e4, 4, metric='euclidean')
  assert _same_partition(here, there)
  assert abs(float(centroids.mean()) - 1e4) < 10
  labels = jnp.asarray(here)
  np.testing.assert_array_equal(
    scores.knn_agreement(x, labels, 3), scores.knn_agreement(x + 1e4, labels, 3)
  )


def test_as_many_clusters_as_rows():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 3)), jnp.float32)
  centroids, found = scores.kmeans(jax.random.key(0), x, 7, metric='euclidean')
  assert len(np.unique(found)) == 7
  distance = scores.prototype_distance(x, centroids, metric='euclidean')
  np.testing.assert_allclose(distance, np.zeros(7), atol=1e-5)


def test_duplicates_and_zeros():
  """More clusters than different rows: some run empty. Rows of zeros have no direction."""
  x = jnp.ones((5, 2)).at[3:].set(0)
  for metric in ('cosine', 'euclidean'):
    centroids, found = scores.kmeans(jax.random.key(0), x, 4, metric=metric)
    assert np.all(np.isfinite(centroids))
    assert len(np.unique(found[:3])) == 1
  distance = scores.prototype_distance(jnp.zeros((2, 2)), jnp.ones((1, 2)))
  np.testing.assert_array_equal(distance, [1, 1])


def test_distances_do_not_change_under_rotation():
  x, label = _planted(spread=1.0)
  rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0].astype(np.float32)
  for metric in ('cosine', 'euclidean'):

    def distance(rows, metric=metric):
      own = scores.class_prototypes(rows, jnp.asarray(label), 4, metric=metric)
      return scores.prototype_distance(rows, own, jnp.asarray(label), metric=metric)

    np.testing.assert_allclose(distance(x @ rotation), distance(x), rtol=1e-3, atol=1e-5)


def test_class_prototypes_are_means():
  x, label = _planted()
  found = scores.class_prototypes(x, jnp.asarray(label).at[0].set(-1), 5, metric='euclidean')
  expected = [np.asarray(x)[1:][label[1:] == c].mean(axis=0) for c in range(4)]
  np.testing.assert_allclose(found[:4], expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(found[4], np.zeros(5))


@pytest.mark.parametrize('chunk', [7, 1000])
def test_knn_agreement_is_scikit_learns(chunk):
  neighbors = pytest.importorskip('sklearn.neighbors')
  x, label = _planted(spread=4.0)
  nearest = neighbors.NearestNeighbors(n_neighbors=6).fit(x).kneighbors(return_distance=False)
  expected = np.mean(label[nearest] == label[:, None], axis=1)
  found = scores.knn_agreement(x, jnp.asarray(label), 6, chunk=chunk)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_flipped_labels_disagree_with_their_neighbors():
  x, label = _planted()
  flipped = label.copy()
  flipped[::15] = (label[::15] + 1) % 4
  agreement = np.asarray(scores.knn_agreement(x, jnp.asarray(flipped), 10))
  assert agreement[::15].max() < np.delete(agreement, np.s_[::15]).min()


def test_errors():
  x, label = _planted()
  labels = jnp.asarray(label)
  for call, error, message in (
    (lambda: scores.kmeans(jax.random.key(0), x, 0), ValueError, 'clusters=0 must be at least 1'),
    (lambda: scores.kmeans(jax.random.key(0), x, 121), ValueError, 'at most 120'),
    (lambda: scores.kmeans(jax.random.key(0), x, 2, metric='l1'), ValueError, "metric='l1'"),
    (lambda: scores.knn_agreement(x, labels, 120), ValueError, 'neighbors=120 must be at least 1'),
    (lambda: scores.knn_agreement(x, labels[:3], 1), ValueError, r'labels \(3,\)'),
    (lambda: scores.class_prototypes(x, labels, 2), IndexError, 'labels holds 2'),
    (lambda: scores.prototype_distance(x, x[:2], labels), IndexError, 'assignment holds 2'),
    (lambda: scores.prototype_distance(x[0], x), ValueError, r'expected \[N, D\]'),
  ):
    with pytest.raises(error, match=message):
      call()
