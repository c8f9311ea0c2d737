"""Reductions under a base measure, safe on empty sets, in Auto and Explicit meshes.

`base` says how much each entry counts in the ordinary mean; an entry with `base == 0` is padding
and never influences anything, whatever it holds (NaN included). Every function masks *before* it
multiplies, because `0 * nan` is `nan`.
"""

from __future__ import annotations

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
