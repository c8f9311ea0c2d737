"""How much repeating helps: the utility law, and how strictly to filter for a given compute.

A pool of E examples, of which n have been seen in total, so that n_k = min(k E, n) after epoch k:

  error(n) = a n_1^b_1 (n_2 / n_1)^b_2 (n_3 / n_2)^b_3 ... + d        b_k = b 0.5^((k - 1) / tau)

b < 0, the utility, says how fast the error falls with fresh data; it halves every tau epochs. So
the best pool wears out with much compute, and a second one of lower utility becomes worth its
place. A mixture of p pools of E examples each need not be trained to be predicted: an example comes
back p times less often,

  b_k = mean_i b_i 0.5^((k - 1) / (p tau_i))      and the mixture has p E examples

All n are in units of 100 000 examples. For one pool this only sets what `scale` means; where
several pools share a scale, their curves meet after one unit.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrw import masked
from jaxrw.mixtures._simplex import Vector

Variant = Literal['paper', 'released']

_UNIT = 100_000  # examples, as in the official code


class RepeatedDataFit(NamedTuple):
  """Of `fit_repeated_data_error`; the first four are arguments of `repeated_data_error`."""

  utility: jax.Array  # float32[], b < 0
  half_life: jax.Array  # float32[], tau in epochs
  scale: jax.Array  # float32[], a
  floor: jax.Array  # float32[], d
  loss: jax.Array  # float32[], mean squared difference to the errors given


def repetition_weights(counts: Any, half_life: float | jax.Array) -> jax.Array:
  """w = 0.5^(count / half_life): an example counts less each time it was seen before.

  The same factor by which the law lets the utility of an epoch fall; as a weight of examples it is
  absolute, not normalized to mean 1.

  Args:
    counts: int or float, any shape: how often the example was seen before, >= 0; its epoch.
    half_life: > 0, broadcasts; inf gives ones exactly.

  Returns:
    float32, in [0, 1]; 1 for a count of 0.

  Raises:
    ValueError: concrete counts < 0 or half_life <= 0.

  Example:
    >>> repetition_weights([0, 1, 2, 4], half_life=2.0).round(3).tolist()
    [1.0, 0.7070000171661377, 0.5, 0.25]

  Source: the utility law of Scaling Laws for Data Filtering, CVPR 2024 (arXiv 2404.07177).
  Provenance: ours as a weight.
  """
  _check(counts, 'counts', zero=True)
  _check(half_life, 'half_life')
  return jnp.exp2(-jnp.asarray(counts, float) / half_life)


def mixed_pools(
  utilities: float | Vector, half_lives: float | Vector, max_epochs: int
) -> jax.Array:
  """b_k = mean_i b_i 0.5^((k - 1) / (p tau_i)): utility of each epoch over p equal pools, mixed.

  Args:
    utilities: float[p], b of each pool, or a number for one.
    half_lives: float[p], tau of each, in epochs over its own pool; or a number for all.
    max_epochs: K, epochs over the mixture.

  Returns:
    float32[K].

  Raises:
    ValueError: shapes that do not match, concrete half_lives <= 0, max_epochs < 1.

  Example:
    >>> mixed_pools([-0.2, -0.1], [1.0, 1.0], 3).round(3).tolist()
    [-0.15000000596046448, -0.10600000619888306, -0.07500000298023224]

  Source: Scaling Laws for Data Filtering, CVPR 2024 (arXiv 2404.07177). Provenance: official_code.
  """
  if max_epochs < 1:
    raise ValueError(f'max_epochs={max_epochs} must be at least 1')
  _check(half_lives, 'half_lives')
  utilities = jnp.atleast_1d(jnp.asarray(utilities, float))
  half_lives = jnp.asarray(half_lives, float)
  if utilities.ndim != 1 or half_lives.shape not in ((), utilities.shape) or not utilities.size:
    raise ValueError(
      f'half_lives has shape {half_lives.shape}, utilities {utilities.shape}; expected [p] both'
    )
  return _prefix_utilities(utilities, half_lives, utilities.size, max_epochs)


def repeated_data_error(
  samples: Any,
  pool_size: Any,
  utility: float | Vector,
  half_life: float | Vector,
  scale: float | jax.Array,
  floor: float | jax.Array,
  *,
  variant: Variant = 'paper',
  max_epochs: int | None = None,
) -> jax.Array:
  """Predicted error after n samples from one pool, or from several equal ones mixed.

    'paper':     a n_1^b_1 prod_k (n_k / n_(k-1))^b_k + d
    'released':  ((a n_1)^b_1 + d) prod_k (n_k / n_(k-1))^b_k

  The released code multiplies the whole first epoch by the product, d included, so its error falls
  below d; parameters of one variant are not those of the other.

  Args:
    samples: n > 0, number of examples seen, repetitions included; broadcasts with pool_size.
    pool_size: E > 0, examples in one pool.
    utility: float[], b, or float[p] for p pools of E examples each: see `mixed_pools`.
    half_life: float[] or float[p], tau > 0 in epochs. inf: repeating is as good as fresh data, the
      power law a n^b + d. Towards 0: only the first epoch counts.
    scale: float[], a > 0.
    floor: float[], d, what no amount of data takes away.
    variant: 'paper' or 'released'.
    max_epochs: bound of n / E. Default: what samples and pool_size need; they must be concrete.

  Returns:
    float32, shape of samples with pool_size. NaN where traced samples are not above 0, or need more
    than max_epochs.

  Raises:
    ValueError: concrete samples, pool_size, half_life <= 0; max_epochs too small, or missing where
      samples or pool_size are traced; an unknown variant.

  Example:
    >>> error = repeated_data_error([1e6, 1e7, 1e8], 1e6, -0.2, 2.0, scale=0.5, floor=0.1)
    >>> error.round(3).tolist()
    [0.4150000214576721, 0.3620000183582306, 0.3620000183582306]

  Source: Scaling Laws for Data Filtering, CVPR 2024 (arXiv 2404.07177). Provenance: official_code
  for 'released'; 'paper' is the formula as we remember it, with the code's structure.
  """
  _check_variant(variant)
  _check(samples, 'samples')
  _check(pool_size, 'pool_size')
  exponents = mixed_pools(utility, half_life, _epochs(samples, pool_size, max_epochs))
  size = jnp.asarray(pool_size, float) * np.size(utility)
  return _error(samples, size, exponents, scale, floor, variant)


def best_prefix(
  utilities: Vector,
  half_lives: float | Vector,
  samples: float | jax.Array,
  pool_size: float | jax.Array,
  scale: float | jax.Array = 1.0,
  floor: float | jax.Array = 0.0,
  *,
  variant: Variant = 'paper',
  max_epochs: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """How many of the best pools to mix for n samples: the number with the lowest predicted error.

  Pools are taken in the order of their utility, the most negative first. For 'paper', scale and
  floor change the errors but not the choice.

  Args:
    utilities: float[P], b of each pool.
    half_lives: float[P], or one for all.
    samples: float[], n.
    pool_size: float[], E, the examples of each pool; the law is for equal pools only.
    scale, floor, variant, max_epochs: as in `repeated_data_error`, the same for all pools.

  Returns:
    (k int32[], errors float32[P]): errors[p - 1] is that of the p best pools, k the p of the least.

  Raises:
    ValueError: as `repeated_data_error`.

  Example:
    >>> utilities = [-0.18, -0.15, -0.12, -0.09]
    >>> choose = lambda n: best_prefix(utilities, 3.0, n, 12.8e6, max_epochs=50)[0]
    >>> [int(choose(n)) for n in (32e6, 64e6, 128e6, 640e6)]
    [1, 1, 2, 2]

  Source: Scaling Laws for Data Filtering, CVPR 2024 (arXiv 2404.07177). Provenance: official_code.
  """
  _check_variant(variant)
  _check(samples, 'samples')
  _check(pool_size, 'pool_size')
  _check(half_lives, 'half_lives')
  epochs = _epochs(samples, pool_size, max_epochs)
  utilities = jnp.asarray(utilities, float)
  if utilities.ndim != 1 or not utilities.size:
    raise ValueError(f'utilities has shape {utilities.shape}; expected [P], not empty')
  order = jnp.argsort(utilities)
  utilities = utilities[order]
  half_lives = jnp.broadcast_to(jnp.asarray(half_lives, float), utilities.shape)[order]

  def of_prefix(pools):
    exponents = _prefix_utilities(utilities, half_lives, pools, epochs)
    size = jnp.asarray(pool_size, float) * pools
    return _error(samples, size, exponents, scale, floor, variant)

  errors = jax.vmap(of_prefix)(jnp.arange(1, utilities.size + 1))
  return jnp.argmin(errors) + 1, errors


def fit_repeated_data_error(
  samples: Any,
  errors: Any,
  pool_size: Any,
  *,
  scale: float | jax.Array | None = None,
  floor: float | jax.Array | None = None,
  variant: Variant = 'paper',
  max_epochs: int | None = None,
  utilities: tuple[float, float] = (-0.5, -0.005),
  half_lives: tuple[float, float] = (0.5, 50.0),
  grid: int = 48,
  steps: int = 60,
) -> RepeatedDataFit:
  """Least squares fit of the law to errors measured during training on one pool.

  For given b and tau both variants are linear in d and in a, or a^b; so these two are solved for,
  and only b and tau are searched: the best of a grid x grid of them, then L-BFGS from there. The
  official code takes the best point of a grid over all four.

  Four parameters of a smooth curve are hard to tell apart: measure at several epochs, and give
  `floor` or `scale` where known. The official fits have d = 0.1, and one `scale` for all pools. If
  no sample is repeated, the half-life comes out anywhere.

  Args:
    samples: float[m], n > 0 at each measurement.
    errors: float[m].
    pool_size: float[] or float[m], E.
    scale, floor: a > 0 and d, if they are not to be fitted. Fitted ones are at least 0.
    variant, max_epochs: as in `repeated_data_error`.
    utilities, half_lives: the corners of the grid, spaced geometrically. L-BFGS may leave it.
    grid: points for each of them.
    steps: of L-BFGS; 0 gives the best grid point.

  Returns:
    `RepeatedDataFit`. All NaN if an error is.

  Raises:
    ValueError: fewer measurements than parameters, shapes that do not match, bad corners; else as
      `repeated_data_error`.

  Example:
    >>> n = 1e6 * np.arange(1, 9)
    >>> errors = repeated_data_error(n, 1e6, -0.2, 2.0, scale=0.5, floor=0.1)
    >>> fit = fit_repeated_data_error(n, errors, 1e6, floor=0.1)
    >>> [round(float(x), 2) for x in fit]
    [-0.2, 2.0, 0.5, 0.1, 0.0]

  Source: Scaling Laws for Data Filtering, CVPR 2024 (arXiv 2404.07177). Provenance: ours; only
  the law is theirs.
  """
  _check_variant(variant)
  _check(samples, 'samples')
  _check(pool_size, 'pool_size')
  epochs = _epochs(samples, pool_size, max_epochs)
  samples, errors = jnp.asarray(samples, float), jnp.asarray(errors, float)
  free = 2 + (scale is None) + (floor is None)
  if samples.ndim != 1 or errors.shape != samples.shape or samples.size < free:
    raise ValueError(
      f'samples has shape {samples.shape}, errors {errors.shape}; expected [m] both, with m at '
      f'least {free}, the number of parameters'
    )
  if not utilities[0] < utilities[1] < 0 < half_lives[0] < half_lives[1] or grid < 2 or steps < 0:
    raise ValueError(
      f'utilities={utilities} must be two negative numbers in order, half_lives={half_lives} two '
      f'positive ones, grid={grid} at least 2 and steps={steps} at least 0'
    )
  spread = jnp.mean((errors - jnp.mean(errors)) ** 2)

  def solved(point):
    """(a or a^b, d, mean squared residual) at (log -b, log tau)."""
    utility, half_life = -jnp.exp(point[0]), jnp.exp(point[1])
    exponents = mixed_pools(utility, half_life, epochs)
    first, repeats = _factors(samples, pool_size, exponents)
    tilt = repeats if variant == 'released' else jnp.ones_like(repeats)
    given = scale if scale is None or variant == 'paper' else scale**utility
    level, base = _two_terms(first * repeats, tilt, errors, given, floor)
    return level, base, jnp.mean((level * first * repeats + base * tilt - errors) ** 2)

  relative = lambda point: masked.divide(solved(point)[2], spread)  # near 1: what L-BFGS expects
  axes = [
    jnp.linspace(np.log(low), np.log(high), grid)
    for low, high in ((-utilities[1], -utilities[0]), half_lives)
  ]
  points = jnp.stack(jnp.meshgrid(*axes, indexing='ij'), axis=-1).reshape(-1, 2)
  start = points[jnp.argmin(jax.lax.map(relative, points, batch_size=grid))]
  point = _polish(relative, start, steps) if steps else start
  level, base, loss = solved(point)
  utility = -jnp.exp(point[0])
  factor = level ** (1 / utility) if variant == 'released' else level
  fitted = factor if scale is None else scale
  fit = RepeatedDataFit(utility, jnp.exp(point[1]), jnp.asarray(fitted, float), base, loss)
  return jax.tree.map(lambda x: jnp.where(jnp.isnan(loss), jnp.nan, x), fit)


def _polish(objective, point, steps):
  """The best point that L-BFGS meets in so many steps."""
  optimizer = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def one(carry, _):
    point, state, best = carry
    value, grad = value_and_grad(point, state=state)
    updates, state = optimizer.update(
      grad, state, point, value=value, grad=grad, value_fn=objective
    )
    point = point + updates
    # At the optimum of rounded numbers a line search may fail and step anywhere.
    best = jnp.where(objective(point) < objective(best), point, best)
    return (point, state, best), None

  carry = (point, optimizer.init(point), point)
  return jax.lax.scan(one, carry, length=steps)[0][2]


def _two_terms(x, z, y, level, base):
  """Least squares of level x + base z to y, both at least 0 unless given."""
  along = lambda v, u: jnp.sum(v * u) / jnp.sum(u * u)
  if level is not None:
    return level, jnp.maximum(along(y - level * x, z), 0) if base is None else base
  if base is not None:
    return jnp.maximum(along(y - base * z, x), 0), base
  rest = x - along(x, z) * z
  level = along(y, rest)
  base = along(y - level * x, z)
  # On the border the other term alone is the solution.
  alone = jnp.maximum(along(y, x), 0)
  level, base = jnp.where(base < 0, alone, level), jnp.maximum(base, 0)
  return jnp.maximum(level, 0), jnp.where(level < 0, jnp.maximum(along(y, z), 0), base)


def _prefix_utilities(utilities, half_lives, pools, max_epochs):
  """`mixed_pools` of the first `pools` of them, which may be traced: float[K]."""
  before = jnp.arange(max_epochs)[:, None]
  each = utilities * repetition_weights(before, pools * half_lives)
  return jnp.sum(jnp.where(jnp.arange(utilities.size) < pools, each, 0), axis=1) / pools


def _error(samples, size, exponents, scale, floor, variant):
  first, repeats = _factors(samples, size, exponents)
  if variant == 'paper':
    return scale * first * repeats + floor
  return (scale ** exponents[0] * first + floor) * repeats


def _factors(samples, size, exponents):
  """(n_1^b_1, the product over later epochs of (n_k / n_(k-1))^b_k), shape of samples with size."""
  samples, size = jnp.asarray(samples, float), jnp.asarray(size, float)
  epochs = samples / size
  last = exponents.size
  seen = jnp.minimum(epochs[..., None], jnp.arange(1, last + 1))
  growth = jnp.log1p((seen[..., 1:] - seen[..., :-1]) / seen[..., :-1])
  first = jnp.exp(exponents[0] * jnp.log(jnp.minimum(samples, size) / _UNIT))
  # A quotient of rounded numbers may lie just above a whole number of epochs.
  fits = (epochs > 0) & (epochs <= last * (1 + 1e-6))
  repeats = jnp.exp(jnp.sum(exponents[1:] * growth, axis=-1))
  return jnp.where(fits, first, jnp.nan), jnp.where(fits, repeats, jnp.nan)


def _epochs(samples, size, max_epochs: int | None) -> int:
  """max_epochs, or as many as concrete samples need."""
  if isinstance(samples, jax.core.Tracer) or isinstance(size, jax.core.Tracer):
    if max_epochs is None:
      raise ValueError('max_epochs is needed where samples or pool_size are traced')
    return max_epochs
  quotient = np.max(np.asarray(samples, np.float64) / np.asarray(size, np.float64))
  needed = max(1, int(np.ceil(quotient * (1 - 1e-6))))
  if max_epochs is not None and max_epochs < needed:
    raise ValueError(f'max_epochs={max_epochs} is less than the {needed} epochs that samples need')
  return needed if max_epochs is None else max_epochs


def _check(values, name: str, zero: bool = False) -> None:
  """Holds concrete numbers to be above 0, or at least 0; traced ones pass."""
  if isinstance(values, jax.core.Tracer):
    return
  array = np.asarray(values)
  wrong = ~((array >= 0) if zero else (array > 0))
  if np.any(wrong):
    bound = 'at least 0' if zero else 'greater than 0'
    raise ValueError(f'{name} holds {np.extract(wrong, array)[0]:g}; it must be {bound}')


def _check_variant(variant: str) -> None:
  if variant not in get_args(Variant):
    raise ValueError(f'variant={variant!r} must be one of {get_args(Variant)}')
