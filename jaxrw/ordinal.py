"""Rare ordered levels that borrow from frequent ones: proportional odds, relaxed (PRESTO).

Levels 0 .. K - 1 in order, say from healthy to a rare event. Each of the K - 1 lines has slopes of
its own, written as a sum of differences, and an L1 penalty draws neighbors together:

  P(y <= k | x) = sigmoid(a_k + x . beta_k),   beta_k = psi_0 + ... + psi_k
  objective     = sum_i w_i loss_i / sum_i w_i + penalty * sum |psi|

An infinite penalty that spares psi_0 is the proportional odds model, one slope for all lines; none
makes the lines independent, so that the rare level learns from its own few examples. Here the
remedy for rarity is sharing, and example weights multiply the likelihood as anywhere else.

Lines may cross outside the data, and P(y = k) is negative there: the loss is +inf, which a fit
backs away from, and `presto_probabilities` returns the negative number instead of hiding it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import check_range

_HALVINGS = 60


class OrdinalFit(NamedTuple):
  """A cumulative logit model in the units of its x, and how the fit ended."""

  intercepts: jax.Array  # float[K - 1], a
  differences: jax.Array  # float[K - 1, p], psi
  iterations: jax.Array  # int, fewer than the maximum if it converged


def cumulative_logit_losses(
  intercepts: jax.Array, differences: jax.Array, x: jax.Array, y: jax.Array
) -> jax.Array:
  """-log P(y | x) of each row.

  With u the line above the level and v the one below, P = sigmoid(u) - sigmoid(v) is computed as
  sigmoid(u) sigmoid(-v) (1 - exp(v - u)), in logarithms, so that no digits cancel.

  Args:
    intercepts: float[K - 1], increasing.
    differences: float[K - 1, p], psi.
    x: float[n, p].
    y: int[n], 0 .. K - 1.

  Returns:
    float32[n] (float64 for float64 x). +inf, with gradient 0, where the two lines cross; NaN for
    a level of -1, or a traced one out of range.

  Raises:
    IndexError: a concrete level out of range.
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.ordinal import cumulative_logit_losses
    >>> a, psi = jnp.array([0.0, 2.0]), jnp.zeros((2, 1))
    >>> losses = cumulative_logit_losses(a, psi, jnp.ones((3, 1)), jnp.arange(3))
    >>> [round(float(p), 4) for p in jnp.exp(-losses)]
    [0.5, 0.3808, 0.1192]
  """
  if y.shape != x.shape[:1]:
    raise ValueError(f'y has shape {y.shape}, x {x.shape}: expected [n] and [n, p]')
  lines = _lines(intercepts, differences, x)
  last = intercepts.shape[0]
  fine = check_range(y, last + 1, 'y') & (y >= 0)
  at = jnp.arange(last)
  pick = lambda k: jnp.sum(jnp.where(at == k[:, None], lines, 0), axis=1)
  above, below = pick(y), pick(y - 1)
  inner = (y > 0) & (y < last)
  crossed = inner & (above <= below)
  gap = jnp.where(inner & ~crossed, above - below, 1)
  log_p = (
    jnp.where(y < last, jax.nn.log_sigmoid(above), 0)
    + jnp.where(y > 0, jax.nn.log_sigmoid(-below), 0)
    + jnp.where(inner, jnp.log(-jnp.expm1(-gap)), 0)
  )
  return jnp.where(fine, jnp.where(crossed, jnp.inf, -log_p), jnp.nan)


def presto_probabilities(fit: OrdinalFit, x: jax.Array) -> jax.Array:
  """P(y = k | x) of all levels; they sum to 1, and are negative where lines cross.

  Args:
    fit: from `presto_fit`.
    x: float[n, p], in the units of the fit's x.

  Returns:
    float32[n, K] (float64 for float64 x), never clipped: `(p < 0).any(axis=1).sum()` counts the
    rows where lines cross.
  """
  lines = _lines(fit.intercepts, fit.differences, x)
  under, over = jax.nn.sigmoid(lines), jax.nn.sigmoid(-lines)
  # Of two equal differences the one of small terms, so that no digits cancel.
  between = jnp.where(
    lines[:, 1:] + lines[:, :-1] > 0, over[:, :-1] - over[:, 1:], under[:, 1:] - under[:, :-1]
  )
  return jnp.concatenate([under[:, :1], between, over[:, -1:]], axis=1)


def prox_l1(x: jax.Array, threshold: jax.Array | float) -> jax.Array:
  """sign(x) max(|x| - threshold, 0), the minimizer of |z - x|^2 / 2 + threshold |z|.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.ordinal import prox_l1
    >>> prox_l1(jnp.array([-3.0, 0.5, 2.0]), 1.0)
    Array([-2.,  0.,  1.], dtype=float32)
  """
  return jnp.sign(x) * jnp.maximum(jnp.abs(x) - threshold, 0)


def presto_fit(
  x: jax.Array,
  y: jax.Array,
  num_levels: int,
  penalty: float | jax.Array,
  *,
  weights: jax.Array | None = None,
  penalize_first: bool = True,
  max_iterations: int = 2000,
  tolerance: float = 1e-5,
) -> OrdinalFit:
  """Minimizes the penalized objective of the module on standardized columns.

  FISTA with backtracking and restarts, from the intercepts of a model without slopes. Steps are
  measured by the curvature there, which for a rare level's line is a fraction of the others'.

  Args:
    x: float[n, p]. Columns are standardized inside, by their weighted mean and deviation; the fit
      comes back in their own units.
    y: int[n], 0 .. num_levels - 1, every level present.
    num_levels: K >= 2.
    penalty: lambda >= 0; inf for none of the penalized differences. May be traced, so `jax.vmap`
      takes a whole path.
    weights: float[n], >= 0: a row of weight 2 counts as two rows, one of 0 as none (for folds).
      Default: ones.
    penalize_first: whether psi_0 is penalized, too, as in the official code. Without it no
      direction is preferred: reversing the levels gives the same model.
    max_iterations: at most so many.
    tolerance: stop when no coefficient moves further, in units of 1 / sqrt(curvature).

  Returns:
    `OrdinalFit`.

  Raises:
    IndexError: a level out of range.
    ValueError: fewer than 2 levels, penalty < 0, shapes that do not match, a level without rows.

  Example:
    >>> import numpy as np
    >>> from jaxrw.ordinal import presto_fit, presto_probabilities
    >>> x = np.array([[0.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
    >>> fit = presto_fit(x, np.array([0, 0, 1, 1, 2, 2]), 3, penalty=0.01)
    >>> presto_probabilities(fit, x[:1]).round(3)
    Array([[0.333, 0.333, 0.333]], dtype=float32)

  Source: Faletto and Bien, Predicting Rare Events by Shrinking Towards Proportional Odds, ICML 2023
    (arXiv 2305.18700). Their code turns slopes back to the data's units, and predicts, with psi_k
    where beta_k belongs, which is another model for k >= 1; the solver is ours.
  """
  if isinstance(penalty, (int, float)) and not penalty >= 0:
    raise ValueError(f'penalty={penalty} must be at least 0')
  x, y, weights = _checked(x, y, num_levels, weights)
  return _fit(x, y, weights, penalty, num_levels, penalize_first, max_iterations, tolerance)


@functools.partial(jax.jit, static_argnames=('num_levels', 'penalize_first'))
def _fit(x, y, weights, penalty, num_levels, penalize_first, max_iterations, tolerance):
  problem = _Problem.of(x, y, weights)
  start, curvature = problem.without_slopes(num_levels)
  penalties = _penalties(start, penalty, penalize_first)
  theta, iterations = _fista(problem, start, curvature, penalties, max_iterations, tolerance)
  slopes = jnp.cumsum(theta[:, 1:], axis=0) / problem.scale
  intercepts = theta[:, 0] - jnp.matmul(slopes, problem.center, precision='highest')
  return OrdinalFit(intercepts, theta[:, 1:] / problem.scale, iterations)


def penalty_path(
  x: jax.Array,
  y: jax.Array,
  num_levels: int,
  *,
  weights: jax.Array | None = None,
  penalize_first: bool = True,
  count: int = 20,
  ratio: float = 0.01,
) -> jax.Array:
  """Penalties from the smallest that makes all penalized differences 0, to `ratio` times it.

  Args:
    x, y, num_levels, weights, penalize_first: as for `presto_fit`.
    count: how many, spaced evenly in the logarithm.
    ratio: last over first, in (0, 1).

  Returns:
    float[count], decreasing.

  Raises:
    ValueError: count < 1, a ratio outside (0, 1), and what `presto_fit` raises.
  """
  if count < 1:
    raise ValueError(f'count={count} must be at least 1')
  if not 0 < ratio < 1:
    raise ValueError(f'ratio={ratio} must be in (0, 1)')
  x, y, weights = _checked(x, y, num_levels, weights)
  top = _top_penalty(x, y, weights, num_levels, penalize_first)
  return top * ratio ** jnp.linspace(0, 1, count, dtype=top.dtype)


@functools.partial(jax.jit, static_argnames=('num_levels', 'penalize_first'))
def _top_penalty(x, y, weights, num_levels, penalize_first):
  problem = _Problem.of(x, y, weights)
  theta, curvature = problem.without_slopes(num_levels)
  if not penalize_first:
    theta, _ = _fista(problem, theta, curvature, _penalties(theta, jnp.inf, False), 2000, 1e-6)
  slope = jnp.abs(jax.grad(problem.loss)(theta))
  return jnp.max(jnp.where(_penalties(theta, 1.0, penalize_first) > 0, slope, 0))


def _checked(x: Any, y: Any, num_levels: int, weights: Any) -> tuple[Any, Any, jax.Array]:
  if num_levels < 2:
    raise ValueError(f'num_levels={num_levels} must be at least 2')
  x, y = (v if isinstance(v, jax.Array) else np.asarray(v) for v in (x, y))
  if x.ndim != 2 or y.shape != x.shape[:1]:
    raise ValueError(f'x has shape {x.shape}, y {y.shape}; expected [n, p] and [n]')
  weights = jnp.ones(y.shape) if weights is None else jnp.asarray(weights)
  if weights.shape != y.shape:
    raise ValueError(f'weights has shape {weights.shape}, y {y.shape}; expected the same')
  known = not isinstance(weights, jax.core.Tracer)
  if known and not bool(jnp.all((weights >= 0) & jnp.isfinite(weights))):
    raise ValueError('weights must be at least 0 and finite')
  if not isinstance(y, jax.core.Tracer):
    levels: Any = np.asarray(y)
    check_range(levels, num_levels, 'y')
    if np.any(levels < 0):
      raise ValueError(f'y holds -1; levels are 0 to {num_levels - 1}')
    used = levels[np.asarray(weights) > 0] if known else levels
    counts = np.bincount(used, minlength=num_levels)
    if not np.all(counts):
      raise ValueError(f'y has no row of level {np.argmin(counts)} with a weight above 0')
  return x, y, weights


class _Problem(NamedTuple):
  """Standardized data; parameters are theta [K - 1, 1 + p], intercepts first."""

  x: jax.Array
  y: jax.Array
  weights: jax.Array
  center: jax.Array
  scale: jax.Array

  @classmethod
  def of(cls, x: jax.Array, y: jax.Array, weights: jax.Array) -> _Problem:
    dtype = jnp.promote_types(jnp.float32, x.dtype)
    weights = weights.astype(dtype) / jnp.sum(weights)
    x = jnp.where(weights[:, None] > 0, x, 0).astype(dtype)
    center = jnp.matmul(weights, x, precision='highest')
    scale = jnp.sqrt(jnp.matmul(weights, (x - center) ** 2, precision='highest'))
    scale = jnp.where(scale > 0, scale, 1)  # a constant column: its slope stays 0
    return cls((x - center) / scale, y, weights, center, scale)

  def loss(self, theta: jax.Array) -> jax.Array:
    losses = cumulative_logit_losses(theta[:, 0], theta[:, 1:], self.x, self.y)
    return masked.total(losses, self.weights)

  def without_slopes(self, num_levels: int) -> tuple[jax.Array, jax.Array]:
    """(theta of the best model without slopes, curvature of each parameter there)."""
    shares = jnp.sum(
      jnp.where(self.y[:, None] <= jnp.arange(num_levels - 1), self.weights[:, None], 0), axis=0
    )
    intercepts = jnp.log(shares) - jnp.log1p(-shares)
    theta = jnp.zeros((num_levels - 1, 1 + self.x.shape[1]), self.x.dtype).at[:, 0].set(intercepts)
    density = jnp.broadcast_to(shares * (1 - shares), (num_levels - 1,) * 2)
    levels = jnp.diff(shares, prepend=0, append=1)

    def information(moved):
      """Fisher's, of parameters that move the line in each column by that density."""
      return jnp.sum(jnp.diff(jnp.pad(moved, ((0, 0), (1, 1))), axis=1) ** 2 / levels, axis=1)

    # psi_k moves the lines k, k + 1, ... together, by a column of variance 1.
    curvature = jnp.broadcast_to(information(jnp.triu(density))[:, None], theta.shape)
    return theta, curvature.at[:, 0].set(information(jnp.diag(jnp.diag(density))))


def _penalties(theta: jax.Array, penalty: float | jax.Array, penalize_first: bool) -> jax.Array:
  out = jnp.full(theta.shape, penalty, theta.dtype).at[:, 0].set(0)
  return out if penalize_first else out.at[0].set(0)


def _fista(
  problem: _Problem,
  start: jax.Array,
  curvature: jax.Array,
  penalties: jax.Array,
  max_iterations: int,
  tolerance: float,
) -> tuple[jax.Array, jax.Array]:
  """argmin of loss + sum(penalties * |theta|), and the number of iterations."""
  precision = 4 * jnp.finfo(start.dtype).eps

  def objective(theta, loss):
    return loss + jnp.sum(jnp.where(theta == 0, 0, penalties * jnp.abs(theta)))

  def step_from(point, step):
    """The proximal step of the first safe length among 2 * step, step, step / 2, ..."""
    value, slope = jax.value_and_grad(problem.loss)(point)

    def candidate(step):
      rate = step / curvature
      new = prox_l1(point - rate * slope, rate * penalties)
      move = new - point
      bound = value + jnp.sum(slope * move) + jnp.sum(curvature * move**2) / (2 * step)
      loss = problem.loss(new)
      return new, loss, loss <= bound + precision * jnp.abs(value)

    def halve(carry):
      step, _, count = carry
      return step / 2, candidate(step / 2), count + 1

    unsafe = lambda carry: ~carry[1][2] & (carry[2] < _HALVINGS)
    nothing = point, value, jnp.zeros((), bool)
    step, (new, loss, _), _ = jax.lax.while_loop(unsafe, halve, (4 * step, nothing, 0))
    return new, objective(new, loss), step

  def body(carry):
    count, now, before, momentum, step, value, _ = carry
    next_momentum = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
    ahead = now + (momentum - 1) / next_momentum * (now - before)
    # Lines may cross ahead, though they do not at either point.
    point = jnp.where(jnp.isfinite(problem.loss(ahead)), ahead, now)
    new, new_value, step = step_from(point, step)
    worse = ~(new_value <= value)
    moved = jnp.max(jnp.sqrt(curvature) * jnp.abs(new - now))
    # A step that went up is taken back, and momentum starts anew. Without momentum it only goes up
    # by rounding: nothing is left to gain.
    done = jnp.where(worse, momentum == 1, moved <= tolerance)
    keep = lambda old, fresh: jnp.where(worse, old, fresh)
    return (
      count + 1,
      keep(now, new),
      now,
      keep(jnp.ones_like(momentum), next_momentum),
      step,
      keep(value, new_value),
      done,
    )

  one = jnp.ones((), start.dtype)
  carry = (0, start, start, one, one, objective(start, problem.loss(start)), jnp.zeros((), bool))
  more = lambda carry: (carry[0] < max_iterations) & ~carry[-1]
  count, theta, *_ = jax.lax.while_loop(more, body, carry)
  return theta, jnp.asarray(count)


def _lines(intercepts: jax.Array, differences: jax.Array, x: jax.Array) -> jax.Array:
  """a_k + x . beta_k: float[n, K - 1]."""
  if intercepts.shape != differences.shape[:1] or x.shape[1:] != differences.shape[1:]:
    raise ValueError(
      f'intercepts {jnp.shape(intercepts)} must be [K - 1], differences {differences.shape} '
      f'[K - 1, p] and x {x.shape} [n, p]'
    )
  slopes = jnp.cumsum(differences, axis=0)
  return intercepts + jnp.matmul(x, slopes.T, precision='highest')
