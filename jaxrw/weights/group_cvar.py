"""CVaR over groups: greedy Group DRO, the worst groups up to a share of the data.

A running mean follows each group's loss; the groups with the highest (plus an adjustment) are
trained on until their shares of the data add up to `share`, the last one (or those that tie) in
part:

  q_g = share_g / share               for the worst groups; what is left of 1 on the boundary
  w_i = q_g M / mass_g                for an example i of group g

with mass_g the group's sum(base * incoming) in the step and M their sum, and q normalized over the
groups present, as in `group_dro`: a group without examples keeps its mean, and its mass is not
lost. In contrast to `group_dro` what is left of q does not depend on how long a group was bad.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import diagnostics, masked
from jaxrw.core import Weighting, check_groups, declare
from jaxrw.weights._rows import check_share

_PAPER = 'Sagawa et al., Distributionally Robust Neural Networks, ICLR 2020: the greedy variant'


class GroupMeans(NamedTuple):
  """float32[G], running mean loss of each group; bool[G], whether it was seen yet."""

  losses: jax.Array
  seen: jax.Array


def group_cvar_weights(
  means: GroupMeans,
  group_ids: jax.Array,
  losses: jax.Array,
  group_shares: jax.Array,
  share: float | jax.Array = 0.2,
  *,
  decay: float = 0.9,
  adjustment: float | np.ndarray | jax.Array = 0.0,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, GroupMeans]:
  """Weights q_g M / mass_g of the worst groups, and the running means they were chosen by.

  Args:
    means: of the steps before; this step's losses go in first. A group's first step sets it.
    group_ids: int[B]. -1 is an unknown group: weight 1, part of no mean. Or float[B, G], how far
      each example belongs to each group, at most 1 in sum; what is missing is unknown.
    losses: float[B], or float[B, T], whose mean over T is the loss of an example.
    group_shares: float[G] of sum 1, the groups' shares of the data.
    share: in (0, 1]. 1 takes every group by its share; at or below the smallest, only the worst.
    decay: of the running means, in [0, 1).
    adjustment: float[] or float[G], added where groups are compared and nowhere else.
    base: float, shape of the losses, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights)
      of the groups' rows unless none of the chosen groups is present: then all their weights are 0.
      Default: ones.

  Returns:
    (weights, means). A traced id outside -1 .. G - 1 makes its weight NaN.

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match, a share outside (0, 1].

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> rw = jaxrw.group_cvar((0.5, 0.3, 0.2), share=0.4)
    >>> losses, ids = jnp.array([1.0, 1.0, 2.0, 3.0]), jnp.array([0, 0, 1, 2])
    >>> w, means = rw.update(jnp.ones(4), rw.init(), losses=losses, group_ids=ids)
    >>> w, means.losses
    (Array([0., 0., 2., 2.], dtype=float32), Array([1., 2., 3.], dtype=float32))

  Source: official code of Sagawa et al., but for groups without examples (see the module).
  """
  check_share(share)
  number = means.losses.size
  if losses.ndim not in (1, 2) or group_shares.shape != (number,):
    raise ValueError(
      f'losses must be [B] or [B, T], got {losses.shape}; group_shares [{number}], got '
      f'{group_shares.shape}'
    )
  fine = check_groups(group_ids, number, losses.shape[0])
  losses, base, weights = masked.fill_in(losses, base, weights)
  measure = base * weights
  tokens = tuple(range(1, losses.ndim))
  columns = [
    jnp.sum(x, axis=tokens) for x in (measure, jnp.where(measure != 0, measure * losses, 0))
  ]
  sums = diagnostics.group_sums(jnp.stack(columns, axis=1), group_ids, number)
  mass, present = sums[:, 0], sums[:, 0] > 0
  now = masked.divide(sums[:, 1], mass).astype(means.losses.dtype)
  followed = jnp.where(means.seen, decay * means.losses + (1 - decay) * now, now)
  usable = present & jnp.isfinite(now)  # a broken step must not spoil those to come
  means = GroupMeans(jnp.where(usable, followed, means.losses), means.seen | usable)

  score = means.losses + adjustment
  taken = lambda groups: jnp.sum(jnp.where(groups & means.seen, group_shares, 0), axis=1)
  left = share - taken(score > score[:, None])
  q = group_shares * jnp.clip(masked.divide(left, taken(score == score[:, None])), 0, 1)
  # A NaN must not be left out with its group.
  q = jnp.where(present, q + 0 * now, 0)
  per_group = masked.divide(q, mass) * masked.divide(jnp.sum(mass), jnp.sum(q))
  member = masked.membership(group_ids, number)
  factor = masked.of_groups(per_group.astype(losses.dtype), member)
  out = weights * masked.over_tokens(jnp.where(fine, factor, jnp.nan), weights)
  return jnp.where(base > 0, out, 0), means


@declare('normalized', 'example', 'official_code', _PAPER)
def group_cvar(
  group_shares: Sequence[float] | np.ndarray | jax.Array,
  share: float = 0.2,
  decay: float = 0.9,
  adjustment: float | Sequence[float] | np.ndarray = 0.0,
) -> Weighting:
  """Stage of `group_cvar_weights`; needs the signal `group_ids`. State: `GroupMeans`.

  Raises:
    ValueError: shares that are negative or do not sum to 1, a share or a decay out of its range.
  """
  check_share(share)
  shares, shift = np.asarray(group_shares, np.float32), np.asarray(adjustment, np.float32)
  if shares.ndim != 1 or not np.all(shares >= 0) or not abs(shares.sum() - 1) < 1e-3:
    raise ValueError(f'group_shares={group_shares} must be [G], at least 0 and 1 in sum')
  if shift.shape not in ((), shares.shape):
    raise ValueError(f'adjustment has shape {shift.shape}; expected one number for each group')
  if not 0 <= decay < 1:
    raise ValueError(f'decay={decay} must be in [0, 1)')

  def init():
    return GroupMeans(jnp.zeros(shares.size, jnp.float32), jnp.zeros(shares.size, bool))

  def update(weights, means, *, losses, group_ids, base=None, **_):
    return group_cvar_weights(
      means,
      group_ids,
      losses,
      jnp.asarray(shares),
      share,
      decay=decay,
      adjustment=shift,
      base=base,
      weights=weights,
    )

  return Weighting(init, update)
