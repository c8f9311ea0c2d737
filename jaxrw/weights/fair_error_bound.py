"""Fair error-bound scaling (FairSeg, ICLR 2024): groups with a larger error count more.

As weights on any loss, with L_g the mean loss of group g in the step:

  w_i = L_g^gamma M / sum_h mass_h L_h^gamma         for an example i of group g

with mass_g the group's sum(base * incoming) and M their sum, so that sum(base * w) stays. The
paper's own form is tied to the Dice loss, `fair_error_bound_dice`: it multiplies the *predictions*
of a group by tanh((min_h L_h / L_g)^gamma), which shrinks their overlap and so makes the loss of
bad groups larger.

Both look at the groups of the step alone, so small batches make them noisy.

Where the official code differs: it takes the minimum over all groups, with 0 for those without
examples in the batch; then every scale is tanh(0) = 0 and the gradient vanishes. It codes unknown
groups as -1, which indexes the last group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import diagnostics, masked
from jaxrw.core import Weighting, check_groups, declare, stateless

_PAPER = 'FairSeg, ICLR 2024 (arXiv 2311.02189): the form its code mentions, on losses'
_SMOOTH = 1e-5


def fair_error_bound_weights(
  losses: jax.Array,
  group_ids: jax.Array,
  num_groups: int,
  gamma: float | jax.Array = 1.0,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """w = L_g^gamma over its mean: each group by its own mean loss in the step.

  Args:
    losses: float[B], or float[B, T], whose mean over T is the loss of an example; >= 0.
    group_ids: int[B]. -1 is an unknown group: weight 1, part of no mean. Or float[B, G], how far
      each example belongs to each group, at most 1 in sum; what is missing is unknown.
    num_groups: G.
    gamma: >= 0. 0 passes the incoming weights unchanged.
    base: float, shape of the losses, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for padding. A traced id outside
    -1 .. G - 1 makes its weight NaN.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match, a negative gamma.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> losses, ids = jnp.array([1.0, 1.0, 3.0, 9.0]), jnp.array([0, 0, 1, -1])
    >>> jaxrw.fair_error_bound_weights(losses, ids, num_groups=2)
    Array([0.6, 0.6, 1.8, 1. ], dtype=float32)

  Provenance: ours, after a line the official code has as a comment; see the module.
  """
  _check(gamma)
  if losses.ndim not in (1, 2):
    raise ValueError(f'losses must be [B] or [B, T], got shape {losses.shape}')
  fine = check_groups(group_ids, num_groups, losses.shape[0])
  losses, base, weights = masked.fill_in(losses, base, weights)
  measure = base * weights
  tokens = tuple(range(1, losses.ndim))
  columns = (measure, jnp.where(measure != 0, measure * losses, 0))
  columns = jnp.stack([jnp.sum(x, axis=tokens) for x in columns], axis=1)
  sums = diagnostics.group_sums(columns, group_ids, num_groups)
  mass, mean = sums[:, 0], masked.divide(sums[:, 1], sums[:, 0])
  # Over the largest, so that a power neither over- nor underflows; equal groups give exactly 1.
  raw = jnp.where(mass > 0, masked.divide(mean, masked.largest(mean, mass > 0)) ** gamma, 0)
  raw = jnp.where(jnp.sum(raw) == 0, 1, raw)  # no group makes an error: all alike
  per_group = raw * masked.divide(jnp.sum(mass), jnp.sum(mass * raw))
  factor = masked.of_groups(per_group, masked.membership(group_ids, num_groups))
  out = weights * masked.over_tokens(jnp.where(fine, factor, jnp.nan), weights)
  return jnp.where(base > 0, out, 0)


@declare('normalized', 'example', 'ours', _PAPER)
def fair_error_bound(num_groups: int, gamma: float = 1.0) -> Weighting:
  """Stage of `fair_error_bound_weights`; needs the signal `group_ids`. Stateless."""
  _check(gamma)

  def update(weights, *, losses, group_ids, base=None, **_):
    return fair_error_bound_weights(
      losses, group_ids, num_groups, gamma, base=base, weights=weights
    )

  return stateless(update)


def fair_error_bound_dice(
  probabilities: jax.Array,
  targets: jax.Array,
  group_ids: jax.Array,
  num_groups: int,
  gamma: float = 1.0,
) -> jax.Array:
  """Dice loss of each class with every group's predictions scaled by its error bound.

    dice(p, t) = 1 - (2 sum p t + e) / (sum p^2 + sum t^2 + e)         e = 1e-5, over all pixels
    L_g        = sum over classes of dice over the group's examples
    scale_g    = tanh((min L / L_g)^gamma), the minimum over the groups present; constant for
                 differentiation
    result_c   = dice(scale_g(i) p_ic, t_ic) over the whole batch

  Args:
    probabilities: float[B, ..., C].
    targets: float[B, ..., C], one-hot.
    group_ids: int[B]. An unknown group, -1, has scale 1 and no part in the minimum.
    num_groups: G.
    gamma: >= 0. 0 scales all known groups by tanh(1).

  Returns:
    float32[C], differentiable; its mean over the classes is the loss.

  Raises:
    IndexError, ValueError: ids out of range, shapes that do not match, a negative gamma.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> targets = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> p = jnp.array([[[0.9, 0.1]], [[0.4, 0.6]]])
    >>> [round(float(x), 3) for x in jaxrw.fair_error_bound_dice(p, targets, jnp.array([0, 1]), 2)]
    [0.117, 0.278]

  Source: official code of FairSeg, but for absent and unknown groups (see the module).
  """
  _check(gamma)
  if probabilities.shape != targets.shape or probabilities.ndim < 2 or group_ids.ndim != 1:
    raise ValueError(
      f'probabilities {probabilities.shape} and targets {targets.shape} must be alike, [B, ..., C]'
      f', group_ids {group_ids.shape} [B]'
    )
  fine = check_groups(group_ids, num_groups, targets.shape[0])
  pixels = tuple(range(1, targets.ndim - 1))

  def sums(p):  # float[B, 3, C]: overlap, squares of p, squares of t
    return jnp.stack([jnp.sum(x, axis=pixels) for x in (p * targets, p * p, targets * targets)], 1)

  def dice(totals):
    return 1 - (2 * totals[0] + _SMOOTH) / (totals[1] + totals[2] + _SMOOTH)

  member = masked.membership(group_ids, num_groups)
  own = jax.lax.stop_gradient(sums(probabilities))
  of_group = jnp.sum(jnp.where(member[:, :, None, None], own[:, None], 0), axis=0)
  present = jnp.any(member, axis=0)
  errors = jnp.maximum(jnp.sum(jax.vmap(dice)(of_group), axis=-1), _SMOOTH)
  best = -masked.largest(-errors, present)
  scale = masked.of_groups(jnp.tanh((best / errors) ** gamma), member)
  scale = jnp.where(fine, scale, jnp.nan)
  shape = (-1,) + (1,) * (targets.ndim - 1)
  return dice(jnp.sum(sums(scale.reshape(shape) * probabilities), axis=0))


def _check(gamma) -> None:
  if isinstance(gamma, (int, float)) and not 0 <= gamma < jnp.inf:
    raise ValueError(f'gamma={gamma} must be at least 0 and finite')
