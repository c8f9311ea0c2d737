"""What the weights are doing: how uneven, and on which groups.

Everything here returns sums or ratios of sums over the whole batch and works on sharded arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import masked


class WeightSummary(NamedTuple):
  """How uneven weights are, over the examples.

  Attributes:
    effective_fraction: effective sample size over the number of examples, in (0, 1]; 1 for uniform
      weights.
    entropy: entropy of the examples' shares over its maximum log n, in [0, 1]; 1 for uniform
      weights on examples of equal base (it sees an uneven base, as `max_share` does).
    max_share: largest share of one example in the step, in (0, 1].
  """

  effective_fraction: jax.Array
  entropy: jax.Array
  max_share: jax.Array


def summarize(weights: jax.Array, base: jax.Array | None = None) -> WeightSummary:
  """Effective sample size, entropy and top share of weights.

  With shares p = base w / sum(base w) over the n examples of non-zero base:
  effective_fraction = (sum base w)^2 / (sum base * sum base w^2), entropy = -sum p log p / log n,
  max_share = max p.

  Args:
    weights: float[B] or float[B, T], non-negative.
    base: float, same shape. Default: ones.

  Returns:
    WeightSummary of float32[]; all zero for an all-masked batch, entropy 1 for a single example.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> summary = jaxrw.diagnostics.summarize(jnp.array([2.0, 2.0, 0.0, 0.0]))
    >>> [round(float(x), 3) for x in summary]
    [0.5, 0.5, 0.5]

  Source: Kish's effective sample size.
  """
  base = jnp.ones_like(weights) if base is None else base
  w, b = masked.example_level(weights, base)  # the base-mean of an example's weights, and its base
  mass = jnp.where(b > 0, b * w, 0)
  sums = jnp.sum(jnp.stack([b, mass, jnp.where(b > 0, mass * w, 0), b > 0]), axis=1)
  total_base, total_mass, total_square, count = sums
  shares = masked.divide(mass, total_mass)
  entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.where(shares > 0, shares, 1)), 0))
  return WeightSummary(
    effective_fraction=masked.divide(total_mass**2, total_base * total_square),
    entropy=jnp.where(count > 1, masked.divide(entropy, jnp.log(count)), count),
    max_share=jnp.max(shares),
  )


def group_sums(values: jax.Array, group_ids: jax.Array, num_groups: int) -> jax.Array:
  """Sums of the columns of `values` over the examples of each group.

  Args:
    values: float[B, C], already multiplied by base.
    group_ids: int[B]; an id outside 0 .. num_groups - 1 (-1: unknown) belongs to no group.
    num_groups: G.

  Returns:
    float[G, C]. One collective on a sharded batch, for all groups and columns.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.diagnostics.group_sums(jnp.array([[1.0], [2.0], [4.0]]), jnp.array([1, 0, 1]), 2)
    Array([[2.],
           [5.]], dtype=float32)
  """
  member = group_ids[:, None] == jnp.arange(num_groups)
  return jnp.sum(jnp.where(member[:, :, None], values[:, None, :], 0), axis=0)
