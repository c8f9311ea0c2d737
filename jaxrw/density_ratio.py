"""Importance weights from unlabeled target data: w(x) = density of the target / of the source at x.

Training data (the source) and the data a model is for (the target) differ in their inputs. A mean
over the source under w estimates the one over the target. Three estimators that never estimate the
densities themselves, all with Gaussian kernels K(x, c) = exp(-|x - c|^2 / (2 sigma^2)):

  kliep   w = sum_l alpha_l K(x, c_l), alpha >= 0, mean w on the source = 1: the largest mean log w
          on the target, the smallest KL divergence from the target
  ulsif   the same w without the constraints, the smallest mean square of w - ratio, in closed form;
          negative values are cut off
  kmm     one w_i in [0, limit] for each source row, such that the source's mean of all kernels is
          that of the target

The centers c_l are target points. The weights have mean 1 over the source and go into training as
the batch's `weights`; where they are needed anew for new data, use `density_ratio_weights`. Look at
`diagnostics.summarize(w).effective_fraction` first: far from the target little is left of the
source, and the variance of the weighted mean grows as that number falls. Weights help a model that
cannot fit both ends of the inputs, and only add noise to one that can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrw.core import check_positive

_FLOOR = 1e-12  # of a weight whose logarithm is taken


class DensityRatio(NamedTuple):
  """w(x) = sum_l alpha_l K(x, c_l): alpha float[L], centers float[L, d], sigma float[]."""

  alpha: jax.Array
  centers: jax.Array
  sigma: jax.Array


def gaussian_kernel(x: jax.Array, centers: jax.Array, sigma: float | jax.Array) -> jax.Array:
  """exp(-|x_i - c_l|^2 / (2 sigma^2)).

  Args:
    x: float[n, d].
    centers: float[L, d].
    sigma: > 0, in the unit of x. Standardize the columns of x first.

  Returns:
    float[n, L].

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> k = density_ratio.gaussian_kernel(jnp.array([[0.0], [1.0]]), jnp.array([[0.0]]), 1.0)
    >>> [round(float(v), 4) for v in k[:, 0]]
    [1.0, 0.6065]
  """
  squares = jnp.sum((x[:, None, :] - centers[None, :, :]) ** 2, axis=-1)
  return jnp.exp(-squares / (2 * jnp.asarray(sigma) ** 2))


def kliep(
  source: jax.Array,
  target: jax.Array,
  centers: jax.Array,
  sigma: float | jax.Array,
  *,
  steps: int = 1000,
) -> DensityRatio:
  """The ratio of largest likelihood on the target, with mean 1 on the source.

    maximize mean_j log(A alpha)_j     over alpha >= 0 with b alpha = 1
    A = K(target, centers), b = mean of K(source, centers)

  The problem is concave. It is solved by the multiplicative steps of expectation maximization for
  mixtures, which keep both constraints: alpha_l <- alpha_l mean_j(A_jl / (A alpha)_j) / b_l.

  Args:
    source: float[n, d].
    target: float[m, d].
    centers: float[L, d]; up to a hundred of the target points do.
    sigma: > 0, width of the kernel; see `kliep_likelihood`.
    steps: of the solver.

  Returns:
    DensityRatio. If no source row is near any center, alpha is 0 and the weights are 1. NaN in the
    data makes alpha, and so every weight, NaN.

  Raises:
    ValueError: shapes that do not match, a sigma or steps <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> x = jax.random.normal(jax.random.key(0), (200, 1))
    >>> fit = density_ratio.kliep(x, 0.5 * x[:100], 0.5 * x[:20], 0.3)
    >>> w = density_ratio.density_ratio_weights(fit, x)
    >>> round(float(w.mean()), 3), bool(w[jnp.argmin(jnp.abs(x))] > w[jnp.argmax(jnp.abs(x))])
    (1.0, True)

  Source: Sugiyama et al., KLIEP, NIPS 2007: the problem; solver ours. The package `adapt` takes
    gradient steps and projects, to the same optimum.
  """
  _check(source, target, centers)
  check_positive(sigma=sigma, steps=steps)
  kernel = gaussian_kernel(target, centers, sigma)
  mean = jnp.mean(gaussian_kernel(source, centers, sigma), axis=0)
  near = ~(mean <= _FLOOR)  # a center without source rows could take any alpha; NaN stays NaN
  start = jnp.where(near, 1 / jnp.where(near, mean, 1), 0) / jnp.maximum(jnp.sum(near), 1)

  def step(alpha, _):
    fitted = jnp.maximum(kernel @ alpha, _FLOOR)
    moved = alpha * jnp.mean(kernel / fitted[:, None], axis=0) / jnp.where(near, mean, 1)
    return moved / jnp.maximum(mean @ moved, _FLOOR), None

  alpha, _ = jax.lax.scan(step, start, length=steps)
  return DensityRatio(alpha, centers, jnp.asarray(sigma, source.dtype))


def kliep_likelihood(
  key: jax.Array,
  source: jax.Array,
  target: jax.Array,
  centers: jax.Array,
  sigmas: Sequence[float] | jax.Array,
  *,
  folds: int = 5,
  steps: int = 1000,
) -> jax.Array:
  """Mean log w on held-out target points for each width; take the largest.

  Args:
    key: deals the target points to the folds.
    source, target, centers: as in `kliep`.
    sigmas: float[S], widths to compare.
    folds: at least 2 and at most m.
    steps: of the solver.

  Returns:
    float[S].

  Raises:
    ValueError: shapes that do not match, folds that do not fit, a width or steps <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> x = jax.random.normal(jax.random.key(0), (100, 1))
    >>> scores = density_ratio.kliep_likelihood(
    ...   jax.random.key(1), x, 0.5 * x, 0.5 * x[:20], [0.001, 0.5])
    >>> int(scores.argmax())
    1

  Source: Sugiyama et al., KLIEP, NIPS 2007.
  """
  _check(source, target, centers)
  for sigma in sigmas if isinstance(sigmas, Sequence) else ():
    check_positive(sigma=sigma)
  if not 2 <= folds <= len(target):
    raise ValueError(f'folds={folds} must be at least 2 and at most {len(target)}')
  size = len(target) // folds
  shuffled = jax.random.permutation(key, target)[: size * folds].reshape(folds, size, -1)

  def held_out(fold, sigma):
    rest = jnp.roll(shuffled, -fold, axis=0)
    fit = kliep(source, rest[1:].reshape(-1, target.shape[1]), centers, sigma, steps=steps)
    mean = jnp.mean(raw_weights(fit, source))
    w = raw_weights(fit, rest[0]) / jnp.where(mean == 0, 1, mean)
    return jnp.mean(jnp.log(jnp.maximum(w, _FLOOR)))

  score = lambda sigma: jnp.mean(jnp.stack([held_out(fold, sigma) for fold in range(folds)]))
  return jax.lax.map(score, jnp.asarray(sigmas, source.dtype))


def ulsif(
  source: jax.Array,
  target: jax.Array,
  centers: jax.Array,
  sigma: float | jax.Array,
  *,
  penalty: float = 0.1,
) -> DensityRatio:
  """The ratio of least squares: alpha = (H + penalty I)^-1 h, cut off at 0.

  H = mean of k k^T over the source, h = mean of k over the target, k = K(x, centers).

  Args:
    source, target, centers, sigma: as in `kliep`.
    penalty: > 0.

  Returns:
    DensityRatio. Its weights have mean 1 on the source only about; `density_ratio_weights` divides.

  Raises:
    ValueError: shapes that do not match, a sigma or penalty <= 0.

  Example:
    >>> import jax
    >>> from jaxrw import density_ratio
    >>> x = jax.random.normal(jax.random.key(0), (200, 1))
    >>> fit = density_ratio.ulsif(x, 0.5 * x[:100], 0.5 * x[:20], 0.3)
    >>> bool((fit.alpha >= 0).all())
    True

  Provenance: reconstructed. Source: Kanamori et al., uLSIF, JMLR 2009, as recalled.
  """
  _check(source, target, centers)
  check_positive(sigma=sigma, penalty=penalty)
  k = gaussian_kernel(source, centers, sigma)
  second = k.T @ k / len(source)
  first = jnp.mean(gaussian_kernel(target, centers, sigma), axis=0)
  solved = jax.scipy.linalg.solve(
    second + penalty * jnp.eye(len(centers), dtype=k.dtype), first, assume_a='pos'
  )
  return DensityRatio(jnp.maximum(solved, 0), centers, jnp.asarray(sigma, source.dtype))


def raw_weights(fit: DensityRatio, x: jax.Array) -> jax.Array:
  """w(x) as fitted, float[n], on the scale of the source it was fitted on.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> fit = density_ratio.DensityRatio(jnp.ones(1), jnp.zeros((1, 1)), jnp.ones(()))
    >>> density_ratio.raw_weights(fit, jnp.zeros((1, 1)))
    Array([1.], dtype=float32)
  """
  return gaussian_kernel(x, fit.centers, fit.sigma) @ fit.alpha


def density_ratio_weights(fit: DensityRatio, source: jax.Array) -> jax.Array:
  """w of the source rows, divided by their mean: mean exactly 1; ones if all are 0.

  Args:
    fit: from `kliep` or `ulsif`.
    source: float[n, d]: all of the source, since the mean is taken over what is given.

  Returns:
    float[n], to be passed as the batch's `weights`. Not renormalized in training.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> fit = density_ratio.DensityRatio(jnp.ones(1), jnp.zeros((1, 1)), jnp.ones(()))
    >>> w = density_ratio.density_ratio_weights(fit, jnp.array([[0.0], [2.0]]))
    >>> [round(float(v), 3) for v in w]
    [1.762, 0.238]
  """
  return _with_mean_one(raw_weights(fit, source))


def kmm(
  source: jax.Array,
  target: jax.Array,
  sigma: float | jax.Array,
  *,
  limit: float = 1000.0,
  steps: int = 2000,
) -> jax.Array:
  """Weights that match the kernel means: minimize |mean_i w_i K(x_i, .) - mean_j K(t_j, .)|^2.

  Over 0 <= w <= limit, by accelerated projected gradient with restarts; then divided by their mean.
  The objective's distance from its minimum falls at least as 1 / steps^2; single weights are less
  certain than it, since near rows can stand in for each other. Memory grows as n^2.

  Args:
    source: float[n, d].
    target: float[m, d].
    sigma: > 0.
    limit: largest weight before the division, > 0.
    steps: of the solver.

  Returns:
    float[n] of mean 1; ones if no target row is near, NaN for NaN in the data.

  Raises:
    ValueError: shapes that do not match, a sigma, limit or steps <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> x = jnp.linspace(-2, 2, 40)[:, None]
    >>> w = density_ratio.kmm(x, x[30:], 0.5)
    >>> bool(w[35] > 5 * w[5])
    True

  Provenance: reconstructed. Source: Huang et al., Correcting Sample Selection Bias, NIPS 2006, as
    recalled; there the mean is held near 1 by a constraint instead of the division.
  """
  _check(source, target, target)
  check_positive(sigma=sigma, limit=limit, steps=steps)
  count = len(source)
  kernel = gaussian_kernel(source, source, sigma)
  pull = count * jnp.mean(gaussian_kernel(source, target, sigma), axis=1)
  rate = 1 / jnp.maximum(jnp.max(jnp.sum(kernel, axis=1)), _FLOOR)  # above the largest eigenvalue

  def step(carry, _):
    w, ahead, t = carry
    new = jnp.clip(ahead - rate * (kernel @ ahead - pull), 0, limit)
    uphill = jnp.sum((ahead - new) * (new - w)) > 0  # then the momentum points the wrong way
    t = jnp.where(uphill, 1.0, t)
    longer = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
    ahead = new + jnp.where(uphill, 0, (t - 1) / longer) * (new - w)
    return (new, ahead, longer), None

  start = jnp.ones(count, kernel.dtype)
  (w, _, _), _ = jax.lax.scan(step, (start, start, jnp.ones((), kernel.dtype)), length=steps)
  return _with_mean_one(w)


def weighted_ridge(
  x: jax.Array, z: jax.Array, weights: jax.Array, penalty: float | jax.Array
) -> jax.Array:
  """Minimizes sum_i w_i |z_i - x_i W|^2 + penalty |W|^2 in closed form.

  Args:
    x: float[n, d]; add a column of ones for an intercept (which is penalized, too).
    z: float[n, k].
    weights: float[n], >= 0. Whole numbers are what as many copies of the row would do.
    penalty: > 0.

  Returns:
    W, float[d, k].

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import density_ratio
    >>> x, z = jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [4.0]])
    >>> w = density_ratio.weighted_ridge(x, z, jnp.array([1.0, 0.0]), 1e-6)
    >>> round(float(w[0, 0]), 3)
    1.0

  Source: textbook form.
  """
  scaled = x * weights[:, None]
  gram = x.T @ scaled + penalty * jnp.eye(x.shape[1], dtype=x.dtype)
  return jax.scipy.linalg.solve(gram, scaled.T @ z, assume_a='pos')


def _with_mean_one(w: jax.Array) -> jax.Array:
  mean = jnp.mean(w)
  return jnp.where(mean == 0, 1, w / jnp.where(mean == 0, 1, mean))


def _check(source: jax.Array, target: jax.Array, centers: jax.Array) -> None:
  for name, x in (('source', source), ('target', target), ('centers', centers)):
    if x.ndim != 2 or not x.size or x.shape[1] != source.shape[-1]:
      raise ValueError(
        f'{name} has shape {x.shape}; expected [n, {source.shape[-1]}], not empty, with the '
        'columns of the source'
      )
