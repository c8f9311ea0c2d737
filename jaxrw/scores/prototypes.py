"""Scores from features: how typical an example is of its cluster, its class, its neighbors.

  prototype_distance   1 - cos to the nearest centroid: high = atypical = hard
  knn_agreement        share of the nearest neighbors with the same label: low = suspicious

Which end to keep depends on how much data there is: the hard end when plentiful, the easy one when
scarce (Sorscher et al.); `experiments/prune` draws where the two cross.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import check_positive, check_range

Metric = Literal['cosine', 'euclidean']


def kmeans(
  key: jax.Array, x: jax.Array, clusters: int, *, steps: int = 50, metric: Metric = 'cosine'
) -> tuple[jax.Array, jax.Array]:
  """Lloyd's algorithm from a start by k-means++: (centroids, cluster of each row).

  Args:
    key: draws the start.
    x: float[N, D].
    clusters: K, at most N.
    steps: of Lloyd.
    metric: 'cosine' clusters directions (rows and centroids have norm 1; a row of zeros stays
      zero), 'euclidean' points.

  Returns:
    (float[K, D], int32[N]). The sum of squared distances never rises from step to step. A cluster
    that runs empty keeps its centroid.

  Raises:
    ValueError: more clusters than rows, a wrong shape, an unknown metric.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import scores
    >>> x = jnp.array([[0.0], [0.1], [5.0], [5.1]])
    >>> _, cluster = scores.kmeans(jax.random.key(0), x, 2, metric='euclidean')
    >>> bool(cluster[0] == cluster[1] != cluster[2]), bool(cluster[2] == cluster[3])
    (True, True)

  Source: textbook form; Arthur and Vassilvitskii, k-means++, 2007.
  """
  x = _rows(x, metric)
  # Far from 0 the distances would lose their digits.
  center = jnp.mean(x, axis=0) if metric == 'euclidean' else jnp.zeros(x.shape[1], x.dtype)
  x = x - center
  if not 1 <= clusters <= len(x):
    raise ValueError(f'clusters={clusters} must be at least 1 and at most {len(x)}, the rows')
  check_positive(steps=steps)

  def add(carry, inputs):
    centroids, nearest = carry
    i, key = inputs
    # Where every row is a centroid already, all logarithms are -inf, and any row will do.
    row = x[jax.random.categorical(key, jnp.log(nearest))]
    nearest = jnp.minimum(nearest, jnp.sum((x - row) ** 2, axis=1))
    return (centroids.at[i].set(row), nearest), None

  start = jnp.zeros((clusters, x.shape[1]), x.dtype), jnp.full(len(x), 1e30, x.dtype)
  keys = jax.random.split(key, clusters)
  (centroids, _), _ = jax.lax.scan(add, start, (jnp.arange(clusters), keys))

  def step(centroids, _):
    member = jax.nn.one_hot(_nearest(x, centroids), clusters, dtype=x.dtype)
    counts = jnp.sum(member, axis=0)[:, None]
    mean = masked.divide(member.T @ x, counts)
    mean = _unit(mean) if metric == 'cosine' else mean
    return jnp.where(counts > 0, mean, centroids), None

  centroids, _ = jax.lax.scan(step, centroids, length=steps)
  return centroids + center, _nearest(x, centroids)


def class_prototypes(
  x: jax.Array, labels: jax.Array, num_classes: int, *, metric: Metric = 'cosine'
) -> jax.Array:
  """Mean of each class's rows: float[C, D]; zeros for a class without rows.

  Args:
    x: float[N, D].
    labels: int[N]; -1 (unknown) has no part.
    num_classes: C.
    metric: with 'cosine' the mean is of directions.

  Raises:
    IndexError: a concrete label out of range.
    ValueError: wrong shapes, an unknown metric.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> x, labels = jnp.array([[1.0], [3.0], [7.0]]), jnp.array([0, 0, 1])
    >>> scores.class_prototypes(x, labels, 2, metric='euclidean')
    Array([[2.],
           [7.]], dtype=float32)
  """
  x = _rows(x, metric)
  check_range(labels, num_classes, 'labels')
  member = jax.nn.one_hot(labels, num_classes, dtype=x.dtype)
  return masked.divide(member.T @ x, jnp.sum(member, axis=0)[:, None])


def prototype_distance(
  x: jax.Array,
  prototypes: jax.Array,
  assignment: jax.Array | None = None,
  *,
  metric: Metric = 'cosine',
) -> jax.Array:
  """Distance of each row to its prototype: 1 - cos, or Euclidean.

  Args:
    x: float[N, D].
    prototypes: float[K, D], from `kmeans` or `class_prototypes`.
    assignment: int[N], the prototype of each row, e.g. its label. Default: the nearest.
    metric: as for the prototypes.

  Returns:
    float[N], high = atypical = hard. A row or a prototype of zeros has no direction: 1.

  Raises:
    IndexError: a concrete assignment out of range.
    ValueError: wrong shapes, an unknown metric.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> x = jnp.array([[2.0, 0.0], [0.0, 3.0]])
    >>> scores.prototype_distance(x, jnp.array([[1.0, 0.0]]))
    Array([0., 1.], dtype=float32)

  Source: Sorscher et al., Beyond Neural Scaling Laws, NeurIPS 2022 (arXiv 2206.14486), as recalled;
    its published scores have high = worth keeping, too.
  """
  x, prototypes = _rows(x, metric), _rows(prototypes, metric)
  if assignment is None:
    assignment = _nearest(x, prototypes)
  check_range(assignment, len(prototypes), 'assignment')
  own = prototypes[assignment]
  if metric == 'cosine':
    return jnp.maximum(0, 1 - jnp.sum(x * own, axis=1))
  return jnp.linalg.norm(x - own, axis=1)


def knn_agreement(
  x: jax.Array, labels: jax.Array, neighbors: int = 10, *, chunk: int = 512
) -> jax.Array:
  """Share of the nearest other rows (Euclidean) that have the row's own label.

  Args:
    x: float[N, D].
    labels: int[N].
    neighbors: K, at most N - 1.
    chunk: rows at a time; memory is chunk * N.

  Returns:
    float32[N] in [0, 1]; low = suspicious. Of equally near rows the one with the lower index
    counts.

  Raises:
    ValueError: K that is not in 1 .. N - 1, wrong shapes.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> x = jnp.array([[0.0], [0.1], [0.2], [9.0], [9.1]])
    >>> scores.knn_agreement(x, jnp.array([0, 0, 1, 1, 1]), 1)
    Array([1., 1., 0., 1., 1.], dtype=float32)

  Source: textbook form.
  """
  if x.ndim != 2 or labels.shape != x.shape[:1]:
    raise ValueError(f'x has shape {x.shape}, labels {labels.shape}; expected [N, D] and [N]')
  if not 1 <= neighbors < len(x):
    raise ValueError(f'neighbors={neighbors} must be at least 1 and at most {len(x) - 1}')
  x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  x = x - jnp.mean(x, axis=0)  # far from 0 the distances would lose their digits
  squares = jnp.sum(x**2, axis=1)

  def agreement(row):
    own, label, i = row
    distance = squares - 2 * x @ own  # up to a constant
    distance = jnp.where(jnp.arange(len(x)) == i, jnp.inf, distance)
    _, nearest = jax.lax.top_k(-distance, neighbors)
    return jnp.mean((labels[nearest] == label).astype(jnp.float32))

  rows = x, labels, jnp.arange(len(x))
  return jax.lax.map(agreement, rows, batch_size=min(chunk, len(x)))


def _rows(x: jax.Array, metric: Metric) -> jax.Array:
  if metric not in ('cosine', 'euclidean'):
    raise ValueError(f"metric={metric!r} must be 'cosine' or 'euclidean'")
  if x.ndim != 2 or not x.size:
    raise ValueError(f'rows have shape {x.shape}; expected [N, D], not empty')
  x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
  return _unit(x) if metric == 'cosine' else x


def _unit(x: jax.Array) -> jax.Array:
  return masked.divide(x, jnp.linalg.norm(x, axis=1, keepdims=True))


def _nearest(x: jax.Array, centroids: jax.Array) -> jax.Array:
  return jnp.argmin(jnp.sum(centroids**2, axis=1) - 2 * x @ centroids.T, axis=1)
