"""Reductions under a base measure, safe on empty sets, in Auto and Explicit meshes.

`base` says how much each entry counts in the ordinary mean; an entry with `base == 0` is padding
and never influences anything, whatever it holds (NaN included). Every function masks *before* it
multiplies, because `0 * nan` is `nan`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec


def total(values: jax.Array, base: jax.Array, axis: int | None = None) -> jax.Array:
  """sum(base * values) over the entries with base != 0."""
  return jnp.sum(jnp.where(base != 0, base * values, 0), axis=axis)


def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """numerator / denominator, and 0 where the denominator is 0 (an empty set)."""
  empty = denominator == 0
  return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


def mean(values: jax.Array, base: jax.Array, axis: int | None = None) -> jax.Array:
  """Base-weighted mean; 0 for an empty set."""
  return divide(total(values, base, axis), jnp.sum(base, axis=axis))


def min_max(values: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(min, max) of the valid entries of a vector; (0, 0) when there are none.

  Both come from one reduction, max of the pair (x, -x): one collective on a sharded vector instead
  of two. A NaN among the valid entries gives (NaN, NaN) on one device; the max collective between
  devices may drop it, so let it reach a sum as well (sums never lose one).
  """
  pair = jnp.where(valid, jnp.stack([values, -values]), -jnp.inf)
  high, negated_low = jnp.max(pair, axis=1)
  empty = high < -negated_low  # False for NaN
  return jnp.where(empty, 0, -negated_low), jnp.where(empty, 0, high)


def largest(values: jax.Array, valid: jax.Array) -> jax.Array:
  """max of the valid entries; 0 when there are none. For a NaN among them see `min_max`."""
  top = jnp.max(jnp.where(valid, values, -jnp.inf))
  return jnp.where(top == -jnp.inf, 0, top)


def example_level(losses: jax.Array, base: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Losses and base of the examples: `[B, T]` becomes the base-mean and the base-sum over T.

  Args:
    losses: float[B] or float[B, T].
    base: the same shape.

  Returns:
    (losses [B], base [B]).
  """
  if losses.ndim == 1:
    return losses, base
  return mean(losses, base, axis=1), jnp.sum(base, axis=1)


def over_tokens(per_example: jax.Array, like: jax.Array) -> jax.Array:
  """Broadcasts `[B]` over T when `like` is `[B, T]`."""
  return per_example if like.ndim == 1 else per_example[:, None]


def fill_in(
  losses: jax.Array, base: jax.Array | None, weights: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What a weight function computes with: (losses, base, weights), the latter ones if None.

  Args:
    losses: float[B] or float[B, T]; become constants for differentiation, in at least float32.
    base: float, same shape, or None.
    weights: float, same shape, or None.

  Raises:
    ValueError: shapes that do not match.
  """
  dtype = jnp.promote_types(jnp.float32, losses.dtype)
  losses = jax.lax.stop_gradient(losses.astype(dtype))
  base = jnp.ones_like(losses) if base is None else base.astype(dtype)
  weights = jnp.ones_like(losses) if weights is None else weights
  for name, array in (('base', base), ('weights', weights)):
    if array.shape != losses.shape:
      raise ValueError(f'{name} has shape {array.shape}, losses {losses.shape}; they must agree')
  return losses, base, weights


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
  """table[ids] for a small table, elementwise: works on batch-sharded ids in Explicit meshes, too.

  Args:
    table: float[G], on every device.
    ids: int[B].

  Returns:
    [B]; 0 where an id is outside 0 .. G - 1 (plain indexing would count -1 from the end).
  """
  member = ids[:, None] == jnp.arange(table.size)
  return jnp.sum(jnp.where(member, table, 0), axis=1)


def membership(group_ids: jax.Array, num_groups: int) -> jax.Array:
  """How far each row belongs to each group: `[B, G]`, from ids int[B] or as given, float[B, G].

  A row of an id outside 0 .. G - 1 (-1: unknown) belongs to none.
  """
  if group_ids.ndim == 2:
    return jax.lax.stop_gradient(group_ids)
  return group_ids[:, None] == jnp.arange(num_groups)


def of_groups(per_group: jax.Array, member: jax.Array) -> jax.Array:
  """sum_g member_ig f_g + 1 - sum_g member_ig: each row's own factor; 1 as far as it is unknown.

  Args:
    per_group: float[G], on every device.
    member: from `membership`.

  Returns:
    [B], for ids the same as `lookup` with 1 instead of 0. No collective.
  """
  share = member.astype(per_group.dtype)
  return jnp.sum(jnp.where(share != 0, share * per_group, 0), axis=1) + (1 - jnp.sum(share, axis=1))


def top_share(values: jax.Array, valid: jax.Array, share: float | jax.Array) -> jax.Array:
  """Which valid entries are among the `share` with the largest values.

  Kept is what is at least the k-th largest, k = ceil(share * number valid) but at least 1, so ties
  with the k-th are all kept. No sort, no gather: see `_select`.

  Args:
    values: float, any shape. NaN counts as the largest.
    valid: bool, same shape.
    share: in (0, 1]; 1 keeps all. `share * number valid` is rounded up after forgiving the rounding
      of floats, so that 0.6 of 5 is 3.

  Returns:
    bool, the shape of the values; all False when nothing is valid.
  """
  eps = float(jnp.finfo(jnp.float32).eps)

  def needed(number):
    least = jnp.ceil(share * number * (1 - 2 * eps)).astype(jnp.int32)
    return jnp.where(share >= 1, number, jnp.clip(least, 1, number))

  keys, threshold = _select(values, valid.astype(jnp.int32), needed)
  return valid & (keys >= threshold)


def top_mass(
  values: jax.Array, measure: jax.Array, share: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(above, at): the entries above the upper `share` quantile under a measure, and those on it.

  The measure above is at most share * sum(measure); with what lies on the quantile (ties) it is at
  least that. No sort, no gather: see `_select`.

  Args:
    values: float, any shape. NaN counts as the largest.
    measure: float, same shape, non-negative; entries of measure 0 are in neither set.
    share: in (0, 1].

  Returns:
    Two bool arrays of the shape of the values; all False when the measure is 0.
  """
  keys, threshold = _select(values, measure, lambda total: share * total)
  return (measure > 0) & (keys > threshold), (measure > 0) & (keys == threshold)


def _select(
  values: jax.Array, measure: jax.Array, needed: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """(keys, threshold): the largest key such that the keys from it up have the measure needed.

  Floats, read as integers, are in order, and each round settles eight bits of the threshold by
  summing the measure at or above each of 256 candidates. That is one collective of 1 kB per round,
  four of them for float32, and nothing is sorted, which would gather a sharded array; the first
  round also gives the whole measure, from which `needed` says how much.
  """
  bits = jnp.finfo(values.dtype).bits
  unsigned = jnp.dtype(f'uint{bits}')
  sign = unsigned.type(1 << (bits - 1))
  raw = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0, values), unsigned)  # -0 is 0
  keys = jnp.where(raw >= sign, ~raw, raw | sign)  # in the order of the floats
  keys = jnp.where(jnp.isnan(values), unsigned.type(2**bits - 1), keys)
  threshold, least = unsigned.type(0), None
  for shift in range(bits - 8, -1, -8):
    candidates = threshold | (jnp.arange(256, dtype=unsigned) << shift)
    from_up = jax.vmap(lambda c: jnp.sum(jnp.where(keys >= c, measure, 0)))(candidates)
    if least is None:
      least = needed(from_up[0])  # nothing is below the first candidate, 0
    # The first candidate has enough; rounding of float sums must not say otherwise.
    threshold |= jnp.maximum(jnp.sum(from_up >= least) - 1, 0).astype(unsigned) << shift
  return keys, threshold


def replicate(array: jax.Array) -> jax.Array:
  """Gives every device the whole array, where the mesh needs to be told (Explicit axes).

  Order-based code (sort, gather) cannot run on a batch-sharded vector in an Explicit mesh. A `[B]`
  vector is a few kilobytes, so it is gathered first. In an Auto mesh, or without one, this does
  nothing.
  """
  axis_types = jax.typeof(array).sharding.mesh.axis_types
  if AxisType.Explicit not in axis_types:
    return array
  return jax.sharding.reshard(array, PartitionSpec(*(None,) * array.ndim))


def reshard_like(array: jax.Array, like: jax.Array) -> jax.Array:
  """Lays a replicated array out as `like` again; the inverse of `replicate`."""
  sharding = jax.typeof(like).sharding
  if AxisType.Explicit not in sharding.mesh.axis_types:
    return array
  return jax.sharding.reshard(array, sharding.spec)
