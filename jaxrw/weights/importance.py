"""Importance weights: what is drawn by q counts as if it had been drawn by p.

  w_i = p_g / q_g      for an example i of domain g, drawn with probability q_g

The weighted mean then estimates sum_g p_g L_g without bias, whatever q is, as long as q_g > 0
wherever p_g > 0. It is never normalized over a batch: that would bring the bias back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, check_range, declare, stateless


def importance_weights(
  objective_prob: jax.Array, sampling_prob: jax.Array, group_ids: jax.Array
) -> jax.Array:
  """objective_prob[group] / sampling_prob, one factor per example.

  Args:
    objective_prob: float[G], p, the domains' shares in the loss.
    sampling_prob: float[B], q of each example's domain when it was drawn, > 0. It belongs to the
      example and not to the moment, because data are drawn some steps before they are used.
    group_ids: int[B], each example's domain. -1 is an unknown one: weight 1.

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
  if objective_prob.ndim != 1 or sampling_prob.shape != group_ids.shape or group_ids.ndim != 1:
    raise ValueError(
      f'objective_prob {objective_prob.shape} must be [G], sampling_prob {sampling_prob.shape} and '
      f'group_ids {group_ids.shape} both [B]'
    )
  fine = check_range(group_ids, objective_prob.size, 'group_ids') & (sampling_prob > 0)
  dtype = jnp.promote_types(jnp.float32, objective_prob.dtype)
  shares = masked.lookup(objective_prob.astype(dtype), group_ids)
  factor = jnp.where(fine, shares / jnp.where(fine, sampling_prob, 1), jnp.nan)
  return jnp.where(group_ids == -1, 1, factor)


@declare('absolute', 'example', 'ours', 'importance sampling, textbook form')
def importance() -> Weighting:
  """Stage of `importance_weights`; needs the signals `objective_prob`, `sampling_prob` and
  `group_ids`. Padding gets weight 0. Stateless."""

  def update(weights, *, objective_prob, sampling_prob, group_ids, losses, base=None, **_):
    factor = importance_weights(objective_prob, sampling_prob, group_ids).astype(weights.dtype)
    _, base, _ = masked.fill_in(losses, base, None)
    return jnp.where(base > 0, weights * masked.over_tokens(factor, weights), 0)

  return stateless(update)
