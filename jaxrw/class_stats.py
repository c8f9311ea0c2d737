"""Class statistics of features, calibrated for the tail (RCAL, ICCV 2023), and balanced samples.

Where labels are noisy and classes rare, a classifier on fixed features may be trained on samples of
one Gaussian per class, as many of each:

  1. inlier_weights    leaves out the members of a class that lie farthest from it
  2. class_stats       counts, means and covariances under those weights
  3. calibrate_stats   a tail class borrows from the nearest head classes
  4. sample_classes    draws the same number of every class

In experiments with independent class means, the samples gave most of the gain, robust statistics
some more; borrowing covariances was safe, borrowing *means* was not: the two have separate shares.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import check_range


class ClassStats(NamedTuple):
  """counts float[C] (sums of weights), means float[C, D], covariances float[C, D, D]."""

  counts: jax.Array
  means: jax.Array
  covariances: jax.Array


def class_stats(
  features: jax.Array, labels: jax.Array, num_classes: int, weights: jax.Array | None = None
) -> ClassStats:
  """Weighted counts, means and covariances (divisor: the sum of weights) of each class.

  Sums over rows only, so rows may be sharded; memory grows as C D^2.

  Args:
    features: float[N, D].
    labels: int[N]; -1 is unknown and has no part.
    num_classes: C.
    weights: float[N], >= 0, 0 for padding. Default: ones.

  Returns:
    ClassStats; zeros for a class without members.

  Raises:
    IndexError: a concrete label out of range.
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import class_stats
    >>> stats = class_stats.class_stats(jnp.array([[1.0], [3.0], [5.0]]), jnp.array([0, 0, 1]), 2)
    >>> stats.counts, stats.means[:, 0], stats.covariances[:, 0, 0]
    (Array([2., 1.], dtype=float32), Array([2., 5.], dtype=float32), Array([1., 0.], dtype=float32))

  Source: textbook form.
  """
  weights = _checked(features, labels, num_classes, weights)
  member = jnp.where(labels[:, None] == jnp.arange(num_classes), weights[:, None], 0)
  counts = jnp.sum(member, axis=0)
  # A broken row makes the statistics of its own class NaN, and of no other.
  broken = ~jnp.all(jnp.isfinite(features), axis=1)
  clean = jnp.where(broken[:, None], 0, features)
  spoiled = jnp.where((member * broken[:, None]).sum(axis=0) > 0, jnp.nan, 0)[:, None]
  means = masked.divide(member.T @ clean, counts[:, None]) + spoiled

  def covariance(own, mean):  # around the class's own mean: sums of squares would cancel
    centered = jnp.where(own[:, None] != 0, clean - mean, 0)
    return (own[:, None] * centered).T @ centered

  scatter = jax.vmap(covariance, in_axes=(1, 0))(member, means)
  return ClassStats(counts, means, masked.divide(scatter, counts[:, None, None]))


def inlier_weights(
  features: jax.Array,
  labels: jax.Array,
  num_classes: int,
  share: float = 0.8,
  *,
  ridge: float = 1e-3,
  rounds: int = 2,
  weights: jax.Array | None = None,
) -> jax.Array:
  """1 for the `share` of each class nearest to it by Mahalanobis distance, 0 for the others.

  Statistics and selection take turns, as in a minimum covariance determinant. A stand-in for the
  paper's local outlier factor.

  Args:
    features, labels, num_classes, weights: as in `class_stats`.
    share: of each class that is kept, in (0, 1].
    ridge: added to the covariances' diagonal, > 0.
    rounds: how often, at least 1.

  Returns:
    float[N]: the incoming weight or 0. Rows of unknown class get 0.

  Raises:
    ValueError: shapes that do not match, a number out of its range.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import class_stats
    >>> features = jnp.array([[0.0], [0.1], [-0.1], [9.0], [5.0]])
    >>> class_stats.inlier_weights(features, jnp.array([0, 0, 0, 0, 1]), 2, share=0.75)
    Array([1., 1., 1., 0., 1.], dtype=float32)

  Provenance: ours.
  """
  if not 0 < share <= 1 or not ridge > 0 or rounds < 1:
    raise ValueError(
      f'share={share} must be in (0, 1], ridge={ridge} above 0, rounds={rounds} at least 1'
    )
  weights = _checked(features, labels, num_classes, weights)
  member = (labels[:, None] == jnp.arange(num_classes)) & (weights[:, None] > 0)
  kept = weights
  for _ in range(rounds):
    stats = class_stats(features, labels, num_classes, kept)
    spread = stats.covariances + ridge * jnp.eye(features.shape[1], dtype=features.dtype)

    def distance(mean, covariance):
      centered = jnp.where(weights[:, None] > 0, features - mean, 0)
      return jnp.sum(centered * jnp.linalg.solve(covariance, centered.T).T, axis=1)

    distances = jax.vmap(distance)(stats.means, spread)
    near = jax.vmap(lambda d, m: masked.top_share(-d, m, share))(distances, member.T)
    kept = jnp.where(jnp.any(near, axis=0), weights, 0)
  return kept


def calibrate_stats(
  stats: ClassStats,
  head: jax.Array,
  *,
  neighbors: int = 2,
  mean_share: float = 0.0,
  covariance_share: float = 0.5,
  ridge: float = 1e-3,
) -> ClassStats:
  """Tail classes with means and covariances drawn towards those of the nearest head classes.

    omega_c ∝ n_c / |mean_c - mean_k|           over the `neighbors` nearest head classes c
    mean'   = s sum_c omega_c mean_c + (1 - s) mean_k             and the same for covariances

  Args:
    stats: from `class_stats`.
    head: bool[C]: those classes keep their statistics.
    neighbors: q, at least 1; at most as many as there are head classes are used.
    mean_share: s of the means, in [0, 1].
    covariance_share: s of the covariances, in [0, 1].
    ridge: added to the diagonal of a tail class's covariance, >= 0.

  Returns:
    ClassStats; counts unchanged. Without a head class, as it came but for the ridge.

  Raises:
    ValueError: a number out of its range, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import class_stats
    >>> stats = class_stats.ClassStats(
    ...   jnp.array([90.0, 10.0]), jnp.array([[0.0], [2.0]]), jnp.array([[[1.0]], [[3.0]]]))
    >>> new = class_stats.calibrate_stats(
    ...   stats, jnp.array([True, False]), mean_share=0.25, covariance_share=0.5, ridge=0.0)
    >>> new.means[:, 0], new.covariances[:, 0, 0]
    (Array([0. , 1.5], dtype=float32), Array([1., 2.], dtype=float32))

  Provenance: reconstructed. Source: RCAL, ICCV 2023 (arXiv 2211.10955), from a reading note; the
    paper adds its ridge to all entries of the covariance, here it goes on the diagonal.
  """
  for name, value in (('mean_share', mean_share), ('covariance_share', covariance_share)):
    if not 0 <= value <= 1:
      raise ValueError(f'{name}={value} must be in [0, 1]')
  if neighbors < 1 or not ridge >= 0 or head.shape != stats.counts.shape:
    raise ValueError(
      f'neighbors={neighbors} must be at least 1, ridge={ridge} at least 0, head {head.shape} '
      f'{stats.counts.shape}'
    )
  gaps = jnp.linalg.norm(stats.means[:, None] - stats.means[None], axis=-1)
  usable = head & (stats.counts > 0)
  away = jnp.where(usable, gaps, jnp.inf)
  rank = jnp.argsort(jnp.argsort(away, axis=1), axis=1)
  chosen = usable & (rank < neighbors)
  close = jnp.maximum(gaps, jnp.finfo(gaps.dtype).tiny ** 0.5)
  omega = jnp.where(chosen, stats.counts / close, 0)
  total = jnp.sum(omega, axis=1, keepdims=True)
  omega = masked.divide(omega, total)
  borrows = ~head & (total[:, 0] > 0)

  def drawn(values, share):
    shape = (-1,) + (1,) * (values.ndim - 1)
    mixed = share * jnp.tensordot(omega, values, 1) + (1 - share) * values
    return jnp.where(borrows.reshape(shape), mixed, values)

  diagonal = jnp.where(head, 0, ridge)[:, None, None] * jnp.eye(stats.means.shape[1])
  covariances = drawn(stats.covariances, covariance_share) + diagonal.astype(gaps.dtype)
  return ClassStats(stats.counts, drawn(stats.means, mean_share), covariances)


def sample_classes(
  key: jax.Array, stats: ClassStats, per_class: int
) -> tuple[jax.Array, jax.Array]:
  """As many Gaussian samples of every class.

  Args:
    key: of the draw.
    stats: with covariances that are positive definite: add a ridge in `calibrate_stats`, or the
      samples of a class with fewer members than features are NaN.
    per_class: at least 1.

  Returns:
    (features float[C * per_class, D], labels int32[C * per_class]), class by class.

  Raises:
    ValueError: fewer than 1 of each, a class without members.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import class_stats
    >>> stats = class_stats.ClassStats(jnp.ones(2), jnp.zeros((2, 3)), jnp.stack([jnp.eye(3)] * 2))
    >>> features, labels = class_stats.sample_classes(jax.random.key(0), stats, 4)
    >>> features.shape, labels.tolist()
    ((8, 3), [0, 0, 0, 0, 1, 1, 1, 1])

  Source: textbook form.
  """
  if per_class < 1:
    raise ValueError(f'per_class={per_class} must be at least 1')
  if not isinstance(stats.counts, jax.core.Tracer) and not bool(jnp.all(stats.counts > 0)):
    raise ValueError(
      f'class {int(jnp.argmin(stats.counts))} has no members, so there is nothing to sample it by'
    )
  number, width = stats.means.shape
  noise = jax.random.normal(key, (number, per_class, width), stats.means.dtype)
  roots = jnp.linalg.cholesky(stats.covariances)
  samples = stats.means[:, None] + jnp.einsum('cij,cnj->cni', roots, noise)
  labels = jnp.repeat(jnp.arange(number, dtype=jnp.int32), per_class)
  return samples.reshape(-1, width), labels


def _checked(features, labels, num_classes, weights):
  weights = jnp.ones(labels.shape, features.dtype) if weights is None else weights
  if features.ndim != 2 or labels.shape != features.shape[:1] or weights.shape != labels.shape:
    raise ValueError(
      f'features {features.shape} must be [N, D], labels {labels.shape} and weights '
      f'{weights.shape} [N]'
    )
  check_range(labels, num_classes, 'labels')
  return weights
