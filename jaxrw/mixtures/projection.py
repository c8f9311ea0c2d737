"""Performance of a mixture from small pilots: transport distances, a fit, and a line in log N.

A pilot trains on N examples, a share p_i of them from source i, and measures the performance and
the optimal-transport distance D(N, p) of its training examples to the validation set. At each of
two pilot sizes, least squares over many mixtures fits

  L(N, p) = slope(p) D(N, p) + level(p)      slope(p) = sum_i b2_i p_i^2 + b1_i p_i
                                             level(p) = sum_i c2_i p_i^2 + c1_i p_i

and what a run on more examples would reach is the line in log N through the two. A distance needs
data but no training, so mixtures that no pilot was trained on can be predicted and improved: the
potentials of the transport problem say how its distance changes with p.

All gradients here are along the simplex: entry i is the derivative where p_i grows and the others
give way in proportion to what they have,

  g_i = (d_i - <p, d>) / (1 - p_i)      for partial derivatives d,

which a constant added to d, so to the potentials, does not change. Solving the transport problem is
left to a library for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import check_positive, check_range
from jaxrw.mixtures._simplex import Vector, on_simplex
from jaxrw.mixtures.online import exponentiated_step


class MixtureResponse(NamedTuple):
  """Coefficients of `fit_mixture_response`: row 0 is of p_i^2, row 1 of p_i."""

  slope: jax.Array  # float32[2, m], b: what the performance changes per unit of distance
  level: jax.Array  # float32[2, m], c: the performance at distance 0


def fit_mixture_response(mixtures: Any, distances: Any, performance: Any) -> MixtureResponse:
  """Least squares fit of L = slope(p) D + level(p), both quadratic in p, at one pilot size.

  Row k of the design matrix, 4 m columns:

    [D_k p_k1^2 .. D_k p_km^2,  D_k p_k1 .. D_k p_km,  p_k1^2 .. p_km^2,  p_k1 .. p_km]

  The formula also has a constant beside each quadratic form. As the shares sum to 1 a constant is
  linear in p, and columns for it would leave the solution open. Where the columns depend on each
  other all the same (m = 2, equal distances, few different mixtures) the solution of least norm is
  taken, for distances in standard units.

  The published example fits three sources by D, p_1, p_2, p_1 D, p_2 D, p_1^2 D, p_2^2 D and an
  intercept: the last source only as the remainder, and no squares in the level.

  Args:
    mixtures: float[k, m], rows on the simplex.
    distances: float[k], D of each pilot.
    performance: float[k]: an accuracy, a loss, its logarithm.

  Returns:
    `MixtureResponse`. All NaN if a number is.

  Raises:
    ValueError: shapes that do not match, fewer than 4 m pilots, concrete mixtures off the simplex.

  Example:
    >>> p = np.random.default_rng(0).dirichlet(np.ones(3), size=40)
    >>> distances = p @ np.array([1.0, 2.0, 3.0]) + np.linspace(0, 1, 40)
    >>> response = fit_mixture_response(p, distances, 0.9 - 0.1 * distances)
    >>> round(float(predict_performance(response, [0.2, 0.5, 0.3], 2.0)), 3)
    0.7

  Source: Performance Scaling via Optimal Transport, NeurIPS 2023 (arXiv 2307.02460). Provenance:
    paper for the formula; the official example differs as said above.
  """
  p = jnp.asarray(on_simplex(mixtures, 'mixtures', ndim=2))
  distances = jnp.asarray(distances, jnp.float32)
  performance = jnp.asarray(performance, jnp.float32)
  count, sources = p.shape
  if distances.shape != (count,) or performance.shape != (count,):
    raise ValueError(
      f'distances has shape {distances.shape} and performance {performance.shape}; expected '
      f'({count},), one per row of mixtures'
    )
  if count < 4 * sources:
    raise ValueError(f'mixtures has {count} rows; expected at least {4 * sources}, 4 per source')
  # Distances of pilots are nearly equal, so that as they are both halves would be nearly parallel.
  center, spread = jnp.mean(distances), jnp.std(distances)
  # Equal distances have a mean that is rounded, and so a spread of nothing else.
  spread = jnp.where(spread <= 4 * jnp.finfo(jnp.float32).eps * jnp.abs(center), 0, spread)
  standard = masked.divide(distances - center, spread)
  terms = jnp.concatenate([p * p, p], axis=1)
  design = jnp.concatenate([standard[:, None] * terms, terms], axis=1)
  slope, level = jnp.linalg.lstsq(design, performance)[0].reshape(2, 2, sources)
  slope = masked.divide(slope, spread)
  return MixtureResponse(slope, level - center * slope)


def predict_performance(response: MixtureResponse, mixture: Any, distance: Any) -> jax.Array:
  """slope(p) D + level(p), at the size of the pilots that were fitted.

  Args:
    response: of `fit_mixture_response`.
    mixture: float[..., m], p.
    distance: float[...], D of a sample of that mixture and size.

  Returns:
    float32[...].

  Raises:
    ValueError: mixtures of another number of sources.

  Example:
    >>> response = MixtureResponse(jnp.full((2, 2), -0.1), jnp.array([[0.0, 0.0], [1.0, 0.8]]))
    >>> round(float(predict_performance(response, [0.5, 0.5], 2.0)), 3)
    0.6

  Source: Performance Scaling via Optimal Transport, NeurIPS 2023 (arXiv 2307.02460). Provenance:
    paper.
  """
  p, distance = jnp.asarray(mixture, jnp.float32), jnp.asarray(distance, jnp.float32)
  _check_sources(response, p.shape[-1:], 'mixture')
  return _quadratic(response.slope, p) * distance + _quadratic(response.level, p)


def project_log(low: Any, high: Any, size_low: Any, size_high: Any, size: Any) -> jax.Array:
  """The line in log N through two pilot sizes:

    [log(N / N0) L1 - log(N / N1) L0] / log(N1 / N0)

  Exact where L = a - b log N, and L0, L1 themselves at N = N0, N1. It is linear in the two, so a
  gradient at N is the projection of the gradients. Noise of the pilots grows with log(N / N0): for
  N1 = 1.5 N0 and N = 4.5 N0 to 4.6 times that of one of them.

  Args:
    low, high: float, L0 and L1, any shape; they broadcast.
    size_low, size_high: N0 < N1, examples in a pilot.
    size: N > 0; broadcasts.

  Returns:
    float32, the broadcast shape.

  Raises:
    ValueError: a number <= 0 as a size, or equal concrete pilot sizes.

  Example:
    >>> round(float(project_log(0.80, 0.84, 200, 300, 900)), 3)
    0.948

  Source: Performance Scaling via Optimal Transport, NeurIPS 2023 (arXiv 2307.02460). Provenance:
    official_code.
  """
  check_positive(size_low=size_low, size_high=size_high, size=size)
  traced = any(isinstance(n, jax.core.Tracer) for n in (size_low, size_high))
  if not traced and np.any(np.asarray(size_low) == np.asarray(size_high)):
    raise ValueError(f'size_low={size_low} and size_high={size_high} must differ')
  low, high = jnp.asarray(low, jnp.float32), jnp.asarray(high, jnp.float32)
  size_low, size_high, size = (jnp.asarray(n, jnp.float32) for n in (size_low, size_high, size))
  return low + (high - low) * (jnp.log(size / size_low) / jnp.log(size_high / size_low))


def transport_mixture_gradient(potentials: Any, source_ids: Any, num_sources: int) -> jax.Array:
  """dD/dp_i = mean of the potentials in source i - mean of those in all other sources.

  A potential is the derivative of the transport distance by the mass of a training point. So this
  is the derivative of the distance along the simplex (see the module) at p_i = n_i / n, the shares
  of the points given, where the weights within a source stay equal.

  Args:
    potentials: float[n], dual potentials of the training points, of a sample of the mixture with
      equal weights. A constant added to them changes nothing.
    source_ids: int[n], 0 .. m - 1, or -1 for a point to leave out.
    num_sources: m.

  Returns:
    float32[m]; 0 for a source without points, and for one that has them all, where there is nothing
    to compare with. NaN for all that a NaN potential enters, and throughout if a traced id is out
    of range.

  Raises:
    ValueError: shapes that differ, num_sources < 1.
    TypeError: ids that are not integers.
    IndexError: a concrete id out of range.

  Example:
    >>> transport_mixture_gradient(jnp.array([1.0, 3.0, 4.0, 6.0]), jnp.array([0, 0, 1, 2]), 3)
    Array([-3.       ,  0.6666667,  3.3333333], dtype=float32)

  Source: Performance Scaling via Optimal Transport, NeurIPS 2023 (arXiv 2307.02460), and LAVA, ICLR
    2023 (arXiv 2305.00054), whose calibrated gradients these are per source. Provenance:
    official_code; of LAVA recalled.
  """
  if num_sources < 1:
    raise ValueError(f'num_sources={num_sources} must be at least 1')
  ids = jnp.asarray(source_ids)
  potentials = jnp.asarray(potentials, jnp.float32)
  if ids.ndim != 1 or potentials.shape != ids.shape:
    raise ValueError(
      f'potentials has shape {potentials.shape}, source_ids {ids.shape}; expected [n] both'
    )
  fine = check_range(ids, num_sources, 'source_ids')
  inside = ids[None] == jnp.arange(num_sources)[:, None]
  outside = ~inside & (ids >= 0)
  # Relative to the mean, so that a large constant does not round the differences away.
  centered = potentials - masked.mean(potentials, (ids >= 0).astype(jnp.float32))
  means = lambda members: masked.mean(centered, members.astype(jnp.float32), axis=1)
  both = jnp.any(inside, axis=1) & jnp.any(outside, axis=1)
  gradient = jnp.where(both, means(inside) - means(outside), 0)
  return jnp.where(jnp.all(fine), gradient, jnp.nan)


def performance_gradient(
  response: MixtureResponse, mixture: Vector, distance: Any, distance_gradient: Any
) -> jax.Array:
  """dL/dp_i = slope(p) dD/dp_i + the same of the coefficients, (2 b2 p + b1) D + 2 c2 p + c1.

  Along the simplex (see the module), as `distance_gradient` is. That of a larger size is
  `project_log` of those of the two pilot sizes.

  Args:
    response: of `fit_mixture_response`.
    mixture: float[m], p.
    distance: float[], D.
    distance_gradient: float[m], of `transport_mixture_gradient`.

  Returns:
    float32[m]; the part of the coefficients is 0 for a source with p_i = 1.

  Raises:
    ValueError: another number of sources; a concrete mixture off the simplex.

  Example:
    >>> response = MixtureResponse(jnp.full((2, 2), -0.1), jnp.array([[0.0, 0.0], [1.0, 0.8]]))
    >>> gradient = performance_gradient(response, [0.5, 0.5], 2.0, jnp.array([-0.4, 0.4]))
    >>> [round(float(g), 3) for g in gradient]
    [0.26, -0.26]

  Source: Performance Scaling via Optimal Transport, NeurIPS 2023 (arXiv 2307.02460). Provenance:
    official_code for the terms; there those of the coefficients are partial derivatives with the
    last source as the remainder, and only the smaller pilot size is stepped along.
  """
  p = jnp.asarray(on_simplex(mixture, 'mixture'))
  moved = jnp.asarray(distance_gradient, jnp.float32)
  _check_sources(response, p.shape, 'mixture')
  _check_sources(response, moved.shape, 'distance_gradient')
  partial = _slopes(response.slope, p) * distance + _slopes(response.level, p)
  own = masked.divide(partial - jnp.sum(p * partial), 1 - p)
  return _quadratic(response.slope, p) * moved + own


def improve_mixture(
  mixture: Vector, gradient: Any, rate: float | jax.Array, *, maximize: bool = True
) -> jax.Array:
  """One step of gradient ascent in theta, where p = softmax(theta): always on the simplex.

    dL/dtheta_i = p_i (1 - p_i) g_i      for a gradient along the simplex

  The official code adds the gradient to all shares but the last, which becomes the remainder; such
  steps can leave the simplex.

  Args:
    mixture: float[m], p; a share of 0 stays 0.
    gradient: float[m], of `performance_gradient`, or `project_log` of two.
    rate: step size >= 0, in 1 / performance; 0 keeps p.
    maximize: False for a performance that is better when low.

  Returns:
    float32[m], on the simplex. NaN throughout if the gradient of a source with a share is NaN.

  Raises:
    ValueError: shapes that differ, a concrete mixture off the simplex, rate < 0.

  Example:
    >>> [round(float(x), 3) for x in improve_mixture([0.5, 0.5], jnp.array([0.2, -0.2]), 5.0)]
    [0.622, 0.378]

  Source: Performance Scaling via Optimal Transport, NeurIPS 2023 (arXiv 2307.02460). Provenance:
    ours.
  """
  p = jnp.asarray(on_simplex(mixture, 'mixture'))
  gradient = jnp.asarray(gradient, jnp.float32)
  if gradient.shape != p.shape:
    raise ValueError(f'gradient has shape {gradient.shape}, mixture {p.shape}; they must agree')
  return exponentiated_step(mixture, (1 if maximize else -1) * p * (1 - p) * gradient, rate)


def _quadratic(coefficients, p):
  """sum_i c2_i p_i^2 + c1_i p_i."""
  return (p * p) @ coefficients[0] + p @ coefficients[1]


def _slopes(coefficients, p):
  """Its partial derivatives."""
  return 2 * coefficients[0] * p + coefficients[1]


def _check_sources(response: MixtureResponse, shape: tuple[int, ...], name: str) -> None:
  if shape != response.slope.shape[1:]:
    raise ValueError(
      f'{name} has {shape[-1] if shape else 0} sources, the response {response.slope.shape[1]}; '
      'they must agree'
    )
