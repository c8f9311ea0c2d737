"""Importance weights: what is drawn by q counts as if it had been drawn by p.

  w_i = p_g / q_g      for an example i of domain g, drawn with probability q_g

The weighted mean then estimates sum_g p_g L_g without bias, whatever q is, as long as q_g > 0
wherever p_g > 0. It is never normalized over a batch: that would bring the bias back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, check_groups, declare, stateless


def importance_weights(
  objective_prob: jax.Array, sampling_prob: jax.Array, group_ids: jax.Array
) -> jax.Array:
  """objective_prob[group] / sampling_prob, one factor per example.

  Args:
    objective_prob: float[G], p, the domains' shares in the loss.
    sampling_prob: float[B], q of each example's domain when it was drawn, > 0. It belongs to the
      example and not to the moment, because data are drawn some steps before they are used.
    group_ids: int[B], each example's domain. -1 is an unknown one: weight 1. Or float[B, G], how
      far it belongs to each domain: sum_g m_g p_g / q, and 1 as far as it is unknown.

  Returns:
    float32[B] (float64 for float64 p). A traced id out of range, or a traced q <= 0, gives NaN.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.8, 0.8, 0.2])
    >>> jaxrw.importance_weights(p, q, jnp.array([0, 0, 1]))
    Array([0.625, 0.625, 2.5  ], dtype=float32)

  Source: importance sampling, textbook form.
  """
  if objective_prob.ndim != 1 or sampling_prob.ndim != 1:
    raise ValueError(
      f'objective_prob {objective_prob.shape} must be [G], sampling_prob {sampling_prob.shape} [B]'
    )
  fine = check_groups(group_ids, objective_prob.size, sampling_prob.size)
  dtype = jnp.promote_types(jnp.float32, objective_prob.dtype)
  member = masked.membership(group_ids, objective_prob.size).astype(dtype)
  known = jnp.sum(member, axis=1)
  fine &= (sampling_prob > 0) | (known == 0)
  shares = jnp.sum(jnp.where(member != 0, member * objective_prob, 0), axis=1)
  factor = masked.divide(shares, jnp.where(fine, sampling_prob, 1)) + (1 - known)
  return jnp.where(fine, factor, jnp.nan)


@declare('absolute', 'example', 'ours', 'importance sampling, textbook form')
def importance() -> Weighting:
  """Stage of `importance_weights`; needs the signals `objective_prob`, `sampling_prob` and
  `group_ids`. Padding gets weight 0. Stateless."""

  def update(weights, *, objective_prob, sampling_prob, group_ids, losses, base=None, **_):
    factor = importance_weights(objective_prob, sampling_prob, group_ids).astype(weights.dtype)
    _, base, _ = masked.fill_in(losses, base, None)
    return jnp.where(base > 0, weights * masked.over_tokens(factor, weights), 0)

  return stateless(update)
