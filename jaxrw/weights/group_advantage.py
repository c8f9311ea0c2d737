"""Group-relative advantages (GRPO, RLOO): rewards of sampled completions as signed weights.

Several completions of one prompt form a group. With r the rewards of the group and n its size:

  A_i = (r_i - mean r) / (std r + eps)               normalize_std=True (GRPO)
  A_i = r_i - mean of the others' rewards            leave_one_out=True, normalize_std=False (RLOO)
      = (r_i - mean r) * n / (n - 1)

A weighted loss with these as weights and the negative log likelihood of a completion as its loss
has the gradient of REINFORCE with the group's mean as baseline. Nothing is clipped here: that
belongs to the loss of off-policy steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, check_range, declare, stateless
from jaxrw.weights._rows import fill_in


def group_advantage_weights(
  rewards: jax.Array,
  group_ids: jax.Array,
  num_groups: int,
  *,
  normalize_std: bool = True,
  leave_one_out: bool = False,
  eps: float = 1e-6,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """Advantage of each completion within its group. Sums to 0 over the valid rows of every group.

  A group whose rewards are all equal, or with a single valid member, has advantages of exactly 0.

  Args:
    rewards: float[B].
    group_ids: int[B], 0 .. num_groups - 1. -1 is a row without a group: weight 1, as everywhere in
      this library, so it is trained on as plain likelihood; give it base 0 to leave it out. Any
      other id: an error, or NaN for that row when the ids are traced.
    num_groups: G, the number of groups (a batch may lack some). Memory grows as B * G.
    normalize_std: divide by the group's standard deviation (of the population: divisor n) + eps.
    leave_one_out: the baseline is the mean of the *other* rewards.
    eps: added to the standard deviation, in the rewards' unit.
    base: float[B] or float[B, T]. Rows without base have no part in the statistics and get 0; the
      others count once each, whatever their length: a baseline must not depend on it. Default: ones
      [B].
    weights: float, shape of the base: weights so far, multiplied in. Default: ones.

  Returns:
    float32 (float64 for float64 rewards), shape of the base. Signed.

  Raises:
    ValueError, IndexError: shapes that do not match, ids out of range.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> rewards, groups = jnp.array([1.0, 0.0, 0.0, 5.0, 5.0]), jnp.array([0, 0, 0, 1, 1])
    >>> a = jaxrw.weights.group_advantage_weights(rewards, groups, 2)
    >>> [round(float(x), 3) for x in a]
    [1.414, -0.707, -0.707, 0.0, 0.0]

  Provenance: reconstructed. Source: the advantage of GRPO (DeepSeekMath, arXiv 2402.03300), as
    recalled; implementations differ in the divisor of the variance (n here, n - 1 in some).
  """
  if rewards.ndim != 1 or group_ids.shape != rewards.shape:
    raise ValueError(
      f'rewards have shape {rewards.shape}, group_ids {group_ids.shape}; expected [B] for both'
    )
  rewards, base, weights = fill_in(rewards, base, weights, 'rewards')
  fine = check_range(group_ids, num_groups, 'group_ids')
  valid = masked.example_level(base, base)[1] > 0
  # Sums over groups as masked sums [B, G]: these work on every mesh, a scatter does not.
  members = valid[:, None] & (group_ids[:, None] == jnp.arange(num_groups))
  total = lambda x: jnp.sum(jnp.where(members, x[:, None], 0), axis=0)
  own = lambda per_group: masked.lookup(per_group, group_ids)
  count = total(jnp.ones_like(rewards))
  # From the group's largest reward on: differences of equal rewards are 0, a mean of them is not.
  top = jnp.max(jnp.where(members, rewards[:, None], -jnp.inf), axis=0)
  below = rewards - own(top)
  advantage = below - own(masked.divide(total(below), count))
  if normalize_std:
    variance = masked.divide(total(advantage**2), count)
    advantage = masked.divide(advantage, own(jnp.sqrt(variance)) + eps)
  if leave_one_out:
    advantage *= own(masked.divide(count, count - 1))
  advantage = jnp.where(group_ids == -1, 1, advantage)
  advantage = jnp.where(valid, jnp.where(fine, advantage, jnp.nan), 0)
  return weights * masked.over_tokens(advantage, weights)


@declare('signed', 'example', 'reconstructed', 'GRPO: DeepSeekMath (arXiv 2402.03300); RLOO')
def group_advantage(
  num_groups: int,
  normalize_std: bool = True,
  leave_one_out: bool = False,
  eps: float = 1e-6,
) -> Weighting:
  """Stage of `group_advantage_weights`, on `group_ids` and `extra['rewards']`; signed, so the last
  of a chain.

  Rewards are rows, so let the loss return them, `batched_loss(params, batch) ->
  (losses, {'rewards': batch['rewards']})`: what it returns beside the known signals arrives in
  `extra`, one row per example also in microbatches.

  Raises:
    TypeError: on tracing, when the rewards are missing.
  """

  def update(weights, *, group_ids, extra=None, base=None, **_):
    if extra is None or 'rewards' not in extra:
      raise TypeError("group_advantage needs extra['rewards']; return 'rewards' from batched_loss")
    new = group_advantage_weights(
      extra['rewards'],
      group_ids,
      num_groups,
      normalize_std=normalize_std,
      leave_one_out=leave_one_out,
      eps=eps,
      base=base,
      weights=weights,
    )
    return new.astype(weights.dtype)

  return stateless(update)
