"""CVaR and chi-square DRO: the worst distribution over examples, within a limit.

Both maximize sum(q_i l_i) over distributions q that stay near the ordinary one, p_i = base *
incoming weights / their sum; the weights are q_i / p_i.

  CVaR:        q_i <= p_i / share                   the mean of the `share` with the highest losses
  chi-square:  sum p_i (q_i / p_i - 1)^2 / 2 <= rho     w_i = (l_i - eta)_+ / mean (l - eta)_+

CVaR is flat on the examples it takes and does not look at the others; chi-square grows with the
loss above a threshold eta, and has the square root of the losses' variance as its price:
sum(q l) = mean + sqrt(2 rho var) while no weight is 0. Both follow outliers and mislabeled
examples.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, declare, stateless
from jaxrw.weights._rows import check_share

Scalar = float | jax.Array | Callable[[jax.Array], jax.Array]

_CVAR = 'Rockafellar and Uryasev, Optimization of conditional value-at-risk, 2000; textbook form'
_CHI_SQUARE = 'Namkoong and Duchi, Variance-based regularization, NeurIPS 2017; derived here'
_CANDIDATES, _ROUNDS = 64, 4  # 64^4 = 2^24: the losses' range down to the last bit of a float32


def cvar_weights(
  losses: jax.Array,
  share: float | jax.Array = 0.2,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """1 / share on the examples with the highest losses, what is left over on the boundary, else 0.

  mean(w l) = min over eta of eta + mean (l - eta)_+ / share. Examples that tie on the boundary
  share what is left, so that their order does not matter. In contrast to `trimmed` the share is one
  of the base: an example that counts double is twice as much of it.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    share: in (0, 1]. 1 passes the incoming weights unchanged; at or below the smallest example's
      part of the base only the largest loss is left.
    base: float, same shape: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base. All
    NaN if any valid loss is NaN or inf.

  Raises:
    ValueError: shapes that do not match, a share outside (0, 1].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.cvar_weights(jnp.array([1.0, 4.0, 2.0, 3.0]), share=0.4)
    >>> [round(float(x), 3) for x in w]
    [0.0, 2.5, 0.0, 1.5]

  Source: textbook form.
  """
  check_share(share)
  scores, measure, base, weights = _measured(losses, base, weights)
  above, at = masked.top_mass(scores, measure, share)
  terms = [measure, jnp.where(above, measure, 0), jnp.where(at, measure, 0), scores * 0]
  total, over, on, broken = jnp.sum(jnp.stack(terms), axis=1)  # one collective for all four
  boundary = jnp.clip(masked.divide(share * total - over, on), 0, 1) / share
  factor = jnp.where(above, 1 / share, jnp.where(at, boundary, 0))
  factor = jnp.where(jnp.asarray(share) >= 1, 1, factor) + broken
  return jnp.where(base > 0, weights * masked.over_tokens(factor, weights), 0)


def chi_square_dro_weights(
  losses: jax.Array,
  radius: float | jax.Array = 0.5,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """w = (l - eta)_+ / mean (l - eta)_+, with eta such that mean (w - 1)^2 / 2 = radius.

  Where even all the mass on the largest loss is within the radius, that is the answer. eta is
  bracketed by comparing 64 candidates at a time, four times, then solved in closed form for the
  examples above it: seven to nine small collectives and no sort.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    radius: rho >= 0, without a unit. 0 passes the incoming weights unchanged. An effective sample
      size of 1 / (1 + 2 rho) of the examples is what the constraint allows.
    base: float, same shape: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base. All
    NaN if any valid loss is NaN or inf.

  Raises:
    ValueError: shapes that do not match, a negative radius.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.chi_square_dro_weights(jnp.array([1.0, 2.0, 3.0]), radius=0.5)
    >>> [round(float(x), 3) for x in w]
    [0.0, 0.634, 2.366]

  Source: derived from the definition (the first-order conditions of the problem above).
  """
  _check_radius(radius)
  scores, measure, base, weights = _measured(losses, base, weights)
  total, broken = jnp.sum(jnp.stack([measure, scores * 0]), axis=1)
  p = measure * masked.divide(jnp.ones_like(total), total)
  low, high = masked.min_max(scores, measure > 0)
  allowed = 1 + 2 * jnp.asarray(radius, scores.dtype)

  def uneven(eta):  # mean w^2, increasing in eta
    excess = p * jnp.maximum(scores - eta, 0)
    return jnp.stack([jnp.sum(excess), jnp.sum(excess * jnp.maximum(scores - eta, 0))])

  left, width, inside = low, high - low, jnp.asarray(True)
  for turn in range(_ROUNDS):
    step = width / _CANDIDATES
    first, second = jax.vmap(uneven, out_axes=1)(left + step * jnp.arange(_CANDIDATES))
    fine = second <= allowed * first**2
    if turn == 0:
      inside = fine[0]  # else no weight is 0, and eta lies below all losses
    left, width = left + step * jnp.maximum(jnp.sum(fine) - 1, 0), step
  active = (measure > 0) & ((scores > left) | (scores == high) | ~inside)
  p = jnp.where(active, p, 0)
  below = jnp.where(active, scores - high, 0)  # exactly 0 for equal losses, unlike their mean
  share, weighted = jnp.sum(jnp.stack([p, p * below]), axis=1)
  centered = jnp.where(active, below - masked.divide(weighted, share), 0)
  variance = masked.divide(jnp.sum(p * centered**2), share)
  slope = jnp.sqrt(masked.divide(jnp.maximum(share * allowed - 1, 0), variance))
  raw = jnp.where(active, jnp.maximum(1 + slope * centered, 0), 0)
  factor = raw * masked.divide(jnp.ones_like(share), jnp.sum(p * raw)) + broken
  factor = jnp.where(jnp.asarray(radius) == 0, 1 + broken, factor)
  return jnp.where(base > 0, weights * masked.over_tokens(factor, weights), 0)


def _measured(losses, base, weights):
  """(example losses, base * weights of the examples, base, weights); padding scores 0."""
  if losses.ndim not in (1, 2):
    raise ValueError(f'losses must be [B] or [B, T], got shape {losses.shape}')
  losses, base, weights = masked.fill_in(losses, base, weights)
  scores, example_base = masked.example_level(losses, base)
  measure = masked.example_level(base, base * weights)[1]
  return jnp.where(example_base > 0, scores, 0), measure, base, weights


@declare('normalized', 'example', 'ours', _CVAR)
def cvar(share: Scalar = 0.2) -> Weighting:
  """Stage of `cvar_weights`; the share may be a schedule, a function of the step."""
  check_share(share)

  def update(weights, *, losses, base=None, step=None, **_):
    return cvar_weights(losses, at_step(share, step, 'share'), base=base, weights=weights)

  return stateless(update)


@declare('normalized', 'example', 'ours', _CHI_SQUARE)
def chi_square_dro(radius: Scalar = 0.5) -> Weighting:
  """Stage of `chi_square_dro_weights`; the radius may be a schedule, a function of the step."""
  _check_radius(radius)

  def update(weights, *, losses, base=None, step=None, **_):
    return chi_square_dro_weights(
      losses, at_step(radius, step, 'radius'), base=base, weights=weights
    )

  return stateless(update)


def _check_radius(radius: Scalar) -> None:
  if isinstance(radius, (int, float)) and not 0 <= radius < jnp.inf:
    raise ValueError(f'radius={radius} must be at least 0 and finite')
