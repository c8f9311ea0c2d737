"""Group DRO (Sagawa et al., ICLR 2020): train for the worst group, known by its id.

A distribution q over groups follows the groups' losses by exponentiated gradient:

  L_g     = mean loss of the group's examples in the step, under base * incoming weights
  log q_g = log q_g + rate * L_g, then normalized         a group without examples adds nothing
  w_i     = q_g M / mass_g                                for an example i of group g

where mass_g is the group's sum(base * incoming), M their sum, and q, already updated, is normalized
over the groups present; so sum(base * w) stays, and the loss of the step is sum_g q_g L_g.

Where the official code differs: it leaves q normalized over all groups, so that the mass of a group
without examples in the step is lost and the step is smaller by it. Group-balanced sampling, which
the authors advise together with strong L2, makes the two the same.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import diagnostics, masked
from jaxrw.core import Weighting, at_step, check_groups, declare

_PAPER = 'Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020 (arXiv 1911.08731)'


def group_dro_weights(
  log_q: jax.Array,
  group_ids: jax.Array,
  losses: jax.Array,
  rate: float | jax.Array = 0.01,
  base: jax.Array | None = None,
  *,
  weights: jax.Array | None = None,
  adjustment: float | np.ndarray | jax.Array = 0.0,
) -> tuple[jax.Array, jax.Array]:
  """Weights q_g M / mass_g from the updated q, and its logarithm.

  Args:
    log_q: float32[G], logarithm of a distribution over groups.
    group_ids: int[B]. -1 is an unknown group: weight 1, part of no mean. Or float[B, G], how far
      each example belongs to each group, at most 1 in sum; what is missing is unknown.
    losses: float[B], or float[B, T], whose mean over T is the loss of an example.
    rate: step size of q, >= 0, in 1 / the losses' unit. At 0 every group present counts alike.
    base: float, shape of the losses: how much each entry counts in the ordinary mean, 0 for
      padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.
    adjustment: float[] or float[G], added to the group losses that q sees. The paper's for groups
      of n examples is C / sqrt(n): small groups generalize worse than their training loss says.

  Returns:
    (weights, log_q). Weights float32 (float64 for float64 losses), shape of the losses, 0 for
    padding. A traced id outside -1 .. G - 1 makes its weight NaN. A loss that is not finite makes
    weights NaN and leaves log q as it was.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match, memberships that are no shares.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> log_q = jnp.log(jnp.array([0.5, 0.5]))
    >>> ids, losses = jnp.array([0, 0, 0, 1]), jnp.array([1.0, 1.0, 1.0, 2.0])
    >>> w, log_q = jaxrw.group_dro_weights(log_q, ids, losses, rate=1.0)
    >>> [round(float(x), 3) for x in w], [round(float(x), 3) for x in jnp.exp(log_q)]
    ([0.359, 0.359, 0.359, 2.924], [0.269, 0.731])

  Source: official code of Sagawa et al., but for groups without examples (see the module).
  """
  if losses.ndim not in (1, 2):
    raise ValueError(f'losses must be [B] or [B, T], got shape {losses.shape}')
  fine = check_groups(group_ids, log_q.size, losses.shape[0])
  losses, base, weights = masked.fill_in(losses, base, weights)
  measure = base * weights
  tokens = tuple(range(1, losses.ndim))
  per_example = [
    jnp.sum(x, axis=tokens) for x in (measure, jnp.where(measure != 0, measure * losses, 0))
  ]
  # A row that will be NaN must not move the others.
  columns = jnp.where(fine[:, None], jnp.stack(per_example, axis=1), 0)
  sums = diagnostics.group_sums(columns, group_ids, log_q.size)
  mass, weighted = sums[:, 0], sums[:, 1]  # one collective for all groups and both columns
  present = mass > 0
  moved = log_q + rate * jnp.where(present, masked.divide(weighted, mass) + adjustment, 0)
  new = jax.nn.log_softmax(moved).astype(log_q.dtype)
  q = jnp.where(present, jnp.exp(new - masked.largest(new, present)), 0)  # the largest is 1
  # A broken loss is seen in this batch's weights and leaves no trace in q.
  log_q = jnp.where(jnp.all(jnp.isfinite(jnp.where(present, weighted, 0))), new, log_q)
  per_group = masked.divide(q, mass) * masked.divide(jnp.sum(mass), jnp.sum(q))
  member = masked.membership(group_ids, log_q.size)
  factor = masked.of_groups(per_group.astype(losses.dtype), member)
  out = weights * masked.over_tokens(jnp.where(fine, factor, jnp.nan), weights)
  return jnp.where(base > 0, out, 0), log_q


@declare('normalized', 'example', 'official_code', _PAPER)
def group_dro(
  num_groups: int,
  rate: float | jax.Array | Callable[[jax.Array], jax.Array] = 0.01,
  adjustment: float | np.ndarray | jax.Array | tuple[float, ...] = 0.0,
) -> Weighting:
  """Stage of `group_dro_weights`, from uniform q; needs the signal `group_ids`. The rate may be a
  schedule, a function of the step. State: log q, float32[G].

  Raises:
    ValueError: a rate < 0, or an adjustment that is not one number or one per group.
  """
  if isinstance(rate, (int, float)) and not rate >= 0:
    raise ValueError(f'rate={rate} must be at least 0')
  shift = np.asarray(adjustment, np.float32)
  if shift.shape not in ((), (num_groups,)):
    raise ValueError(f'adjustment has shape {shift.shape}; expected one number for each group')

  def init():
    return jnp.full(num_groups, -np.log(num_groups), jnp.float32)

  def update(weights, log_q, *, losses, group_ids, base=None, step=None, **_):
    now = at_step(rate, step, 'rate')
    return group_dro_weights(log_q, group_ids, losses, now, base, weights=weights, adjustment=shift)

  return Weighting(init, update)
