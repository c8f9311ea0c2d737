"""Tilted empirical risk (TERM, Li et al., ICLR 2021): from the best example to the worst.

  R(t) = (1 / t) log mean exp(t l)          w_i = exp(t l_i) / mean exp(t l)

with the mean under base * incoming weights; w is the derivative of R by l_i, times the number of
examples. t -> inf is the largest loss, t = 0 the mean (weights pass unchanged), t -> -inf the
smallest. t > 0 chases outliers and mislabeled examples, t < 0 drops them. `kl_dro` is t = 1 / r.

The mean of a batch is a biased estimate of the one over the data, more so for large t and small
batches; `tilted_stream` carries log mean exp(t l) over the steps instead.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, check_groups, declare, stateless
from jaxrw.weights._tilt import Nonfinite, prepare, tilt

_PAPER = 'Li et al., Tilted Empirical Risk Minimization, ICLR 2021 (arXiv 2007.01162)'
Tilt = float | jax.Array | Callable[[jax.Array], jax.Array]


def tilted_weights(
  losses: jax.Array,
  t: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  nonfinite: Nonfinite = 'propagate',
) -> jax.Array:
  """w = exp(t l) / mean exp(t l): towards high losses for t > 0, towards low ones for t < 0.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    t: any finite number, in 1 / the losses' unit; 0 passes the incoming weights unchanged.
    base: float, same shape: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.
    nonfinite: 'propagate' turns a NaN or inf among the losses into NaN weights; 'mask' gives that
      example weight 0.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base.

  Raises:
    ValueError: shapes that do not match, a tilt that is not finite, an unknown `nonfinite`.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.tilted_weights(jnp.array([1.0, 2.0, 3.0]), -1.0)
    >>> [round(float(x), 3) for x in w]
    [1.996, 0.734, 0.27]

  Source: official code of Li et al.
  """
  _check(t)
  example_losses, valid, base, weights = prepare(losses, base, weights, nonfinite)
  # An infinite loss must not vanish where t < 0: inf * 0 is NaN.
  return tilt(t * example_losses + 0 * example_losses, 1.0, valid, base, weights, shift=True)


@declare('normalized', 'example', 'official_code', _PAPER)
def tilted(t: Tilt = 1.0, nonfinite: Nonfinite = 'propagate') -> Weighting:
  """Stage of `tilted_weights`; t may be a schedule, a function of the step. Of the softmax type."""
  _check(t)

  def log_weights(*, losses, base=None, step=None, **_):
    scores, valid, *_ = prepare(losses, base, None, nonfinite)
    now = jnp.asarray(at_step(t, step, 't'), scores.dtype)
    return jnp.where(valid, now * scores + 0 * scores, -jnp.inf)

  def update(weights, *, losses, base=None, step=None, **_):
    now = at_step(t, step, 't')
    return tilted_weights(losses, now, base=base, weights=weights, nonfinite=nonfinite)

  return stateless(update, log_weights)


@declare('absolute', 'example', 'official_code', _PAPER)
def tilted_stream(t: float = 1.0, rate: float = 0.2) -> Weighting:
  """`tilted` with the normalizer of all steps so far: w = exp(t l) / Z.

  Z <- (1 - rate) Z + rate mean exp(t l), under base, before the weights are taken; the first step
  sets it. The weights have mean 1 over the data as far as Z is right, not over each batch. A batch
  that is broken or empty leaves Z alone. State: log Z, float32[], -inf before the first step.

  Args:
    t: any finite number, in 1 / the losses' unit.
    rate: share of the newest batch in Z, in (0, 1]; at 1 this is `tilted` where the incoming
      weights are even.

  Raises:
    ValueError: a tilt that is not finite, a rate outside (0, 1].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> rw = jaxrw.tilted_stream(1.0, rate=0.5)
    >>> w, log_z = rw.update(jnp.ones(2), rw.init(), losses=jnp.zeros(2))
    >>> w, log_z = rw.update(jnp.ones(2), log_z, losses=jnp.log(jnp.array([2.0, 4.0])))
    >>> [round(float(x), 3) for x in w], round(float(jnp.exp(log_z)), 3)
    ([1.0, 2.0], 2.0)

  Source: official code of Li et al., whose stochastic solver has rate 0.2 in one application.
  """
  _check(t)
  if not 0 < rate <= 1:
    raise ValueError(f'rate={rate} must be in (0, 1]')

  def update(weights, log_z, *, losses, base=None, **_):
    example_losses, valid, base, weights = prepare(losses, base, weights, 'propagate')
    score = jnp.where(valid, t * example_losses + 0 * example_losses, 0)
    example_base = masked.example_level(base, base)[1]
    top = masked.largest(score, valid)
    mean = masked.mean(jnp.exp(score - top), example_base)
    seen = jnp.where(mean > 0, top + jnp.log(jnp.where(mean > 0, mean, 1)), -jnp.inf)
    both = jnp.logaddexp(log_z + jnp.log1p(-rate), seen + jnp.log(rate)) if rate < 1 else seen
    new = jnp.where(jnp.isneginf(log_z), seen, both).astype(log_z.dtype)
    log_z = jnp.where(jnp.isfinite(seen), new, log_z)
    factor = jnp.where(valid, jnp.exp(score - jnp.where(jnp.isneginf(log_z), 0, log_z)), 0)
    return weights * masked.over_tokens(factor.astype(weights.dtype), weights), log_z

  return Weighting(lambda: jnp.asarray(-jnp.inf, jnp.float32), update)


def tilted_groups_weights(
  losses: jax.Array,
  group_ids: jax.Array,
  num_groups: int,
  t: float | jax.Array = 1.0,
  inner: float | jax.Array = 0.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Hierarchical tilt: the examples of a group by `inner`, the groups by t.

    R_g = (1 / inner) log mean_g exp(inner l)            the mean of the group for inner = 0
    w_i = exp(t R_g) / mean exp(t R) * exp(inner l_i) / mean_g exp(inner l)

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    group_ids: int[B]. -1 is an unknown group: weight 1, part of no mean. Or float[B, G], how far
      each example belongs to each group, at most 1 in sum; what is missing is unknown.
    num_groups: G.
    t: any finite number, in 1 / the losses' unit; at `inner` the groups do not matter.
    inner: any finite number: > 0 for the hard examples of each group, < 0 against its noise.
    base: float, shape of the losses, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for padding. A traced id outside
    -1 .. G - 1 makes its weight NaN.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match, a tilt that is not finite.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> losses, ids = jnp.array([1.0, 3.0, 2.0, 9.0]), jnp.array([0, 0, 1, -1])
    >>> w = jaxrw.tilted_groups_weights(losses, ids, 2, t=0.0, inner=-1.0)
    >>> [round(float(x), 3) for x in w]
    [1.762, 0.238, 1.0, 1.0]

  Source: official code of Li et al.
  """
  _check(t)
  _check(inner)
  fine = check_groups(group_ids, num_groups, losses.shape[0])
  loss, valid, base, weights = prepare(losses, base, weights, 'propagate')
  loss = jnp.where(valid, loss, 0)
  member = masked.membership(group_ids, num_groups).astype(loss.dtype)
  share = jnp.where(fine[:, None] & (member > 0), member, 0)
  measure = masked.example_level(base, base * weights)[1][:, None] * share
  mass = jnp.sum(measure, axis=0)
  total = jnp.sum(mass)
  mean = lambda x: masked.divide(jnp.sum(jnp.where(measure > 0, measure * x, 0), axis=0), mass)
  center = mean(loss[:, None])  # tilts are taken around it, so that none overflows for inner = 0
  score = inner * (loss[:, None] - center)
  top = jnp.max(jnp.where(measure > 0, score, -jnp.inf), axis=0)
  top = jnp.where(mass > 0, top, 0)
  # Of a small tilt, exp and log would leave the rounding errors only.
  log_mean = jnp.log1p(mean(jnp.expm1(score - top))) + top
  inner = jnp.asarray(inner, loss.dtype)
  risk = center + jnp.where(inner == 0, 0, log_mean / jnp.where(inner == 0, 1, inner))
  q = jnp.where(mass > 0, jnp.exp(t * risk - masked.largest(t * risk, mass > 0)), 0)
  q = q * masked.divide(total, jnp.sum(mass * q))
  within = jnp.where(share > 0, jnp.exp(score - log_mean), 0)
  factor = jnp.sum(share * q * within, axis=1) + (1 - jnp.sum(member, axis=1)) + 0 * loss
  out = weights * masked.over_tokens(jnp.where(fine, factor, jnp.nan), weights)
  return jnp.where(base > 0, out, 0)


@declare('normalized', 'example', 'official_code', _PAPER)
def tilted_groups(num_groups: int, t: float = 1.0, inner: float = 0.0) -> Weighting:
  """Stage of `tilted_groups_weights`; needs the signal `group_ids`. Stateless."""
  _check(t)
  _check(inner)
  return stateless(
    lambda weights, *, losses, group_ids, base=None, **_: tilted_groups_weights(
      losses, group_ids, num_groups, t, inner, base=base, weights=weights
    )
  )


def _check(t: Tilt) -> None:
  if isinstance(t, (int, float)) and not -jnp.inf < t < jnp.inf:
    raise ValueError(f't={t} must be a finite number')
