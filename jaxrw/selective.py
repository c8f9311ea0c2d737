"""Selective backward: spend the backward pass only on the rows that carry weight.

Rows are kept per fixed group of rows, k of every group whatever the devices, so shapes are static
and 1 device keeps the same rows as 256. The groups are contiguous rows; with a number of groups
that is a multiple of the data-parallel devices, no row moves between devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrw.weights.shaping import cap_weights


@dataclasses.dataclass(frozen=True)
class Keep:
  """Which rows get a backward pass: `rows` of each of `groups` equal groups of consecutive rows.

  The denominator of the step stays the base of all rows.

  Attributes:
    rows: k, rows kept of each group, > 0.
    groups: S, into which the batch divides; a multiple of the devices that share the batch.
    sampled: False keeps the k rows of largest |base * w|: exact if no group has more than k rows of
      non-zero weight, else the others are dropped (the metric `overflow` counts them). True draws
      row i with probability pi_i = min(1, c |base w|_i), where c makes them sum to k, and divides
      its weight by pi_i: the gradient of all rows in expectation (Horvitz and Thompson), exact in
      every group with at most k rows of non-zero weight. With uniform weights that is k random
      rows.
    reuse: False runs a forward pass on all rows, then an ordinary step on the kept: 1 + 3 k / n
      forward passes, in the memory of k rows. True runs the forward pass once and the backward pass
      on the residuals of the kept rows: 1 + 2 k / n forward passes, in the memory of all n rows; it
      needs one microbatch and residuals that keep the batch as an axis of their own. Which is
      faster depends on the backend: measure.
  """

  rows: int
  groups: int = 1
  sampled: bool = False
  reuse: bool = False

  def __post_init__(self) -> None:
    for name in ('rows', 'groups'):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f'keep: {name}={value!r} must be a whole number of at least 1')

  def check(self, batch_size: int, microbatches: int) -> None:
    """Raises ValueError where a batch does not divide as asked."""
    if batch_size % self.groups:
      raise ValueError(f'a batch of {batch_size} rows does not split into groups={self.groups}')
    if self.rows > batch_size // self.groups:
      raise ValueError(
        f'keep: rows={self.rows} of each group, but a group has {batch_size // self.groups} '
        f'(a batch of {batch_size} in groups={self.groups})'
      )
    if self.reuse and microbatches > 1:
      raise ValueError(
        f'keep: reuse=True holds the residuals of all rows, so microbatches={microbatches} would '
        'save nothing: use reuse=False'
      )
    if self.rows * self.groups % microbatches:
      raise ValueError(
        f'{self.rows * self.groups} kept rows do not split into microbatches={microbatches}'
      )


def choose_rows(mass: jax.Array, keep: Keep, key: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The kept rows of every group.

  Args:
    mass: float[B], |base * w| of the rows; a NaN stays visible in the factors.
    keep: how many, and how.
    key: of the step; unused unless `keep.sampled`.

  Returns:
    (indices int32[S, k] within the group, factors float[S, k] for the weights: 1, or 1 / pi_i; 0
    for a row that only fills its place).

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import selective
    >>> mass = jnp.array([0.0, 2.0, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    >>> indices, factors = selective.choose_rows(
    ...     mass, selective.Keep(rows=2, groups=2), jax.random.key(0))
    >>> indices.tolist(), factors.tolist()
    ([[1, 3], [0, 1]], [[1.0, 1.0], [1.0, 0.0]])
  """
  mass = mass.reshape(keep.groups, -1)
  if not keep.sampled:
    visible = jnp.where(jnp.isnan(mass), jnp.inf, mass)
    _, indices = jax.lax.top_k(visible, keep.rows)
    indices = jnp.sort(indices, axis=1)
    kept = jnp.take_along_axis(mass, indices, axis=1)
    return indices, jnp.where(kept == 0, 0, jnp.ones_like(kept))

  def draw(mass, offset):
    """Systematic sampling: equal steps along the cumulated probabilities, from a random start."""
    total = jnp.sum(mass)
    even = mass * jnp.where(total > 0, keep.rows / jnp.where(total > 0, total, 1), 0)
    probability = cap_weights(even, 1.0)
    ticks = jnp.floor(jnp.concatenate([jnp.zeros(1), jnp.cumsum(probability)]) + offset)
    drawn = (ticks[1:] > ticks[:-1]) & (probability > 0)
    indices = jnp.sort(jnp.argsort(~drawn, stable=True)[: keep.rows])
    factors = jnp.where(drawn, 1 / jnp.where(drawn, probability, 1), 0)[indices]
    return indices, jnp.where(jnp.isfinite(total), factors, jnp.nan)

  offsets = jax.random.uniform(key, (keep.groups,))
  return jax.vmap(draw)(mass, offsets)


def take_rows(tree: Any, indices: jax.Array) -> Any:
  """`[B, ...]` leaves -> the kept rows `[S * k, ...]`, group by group; see `choose_rows`."""
  return jax.tree.map(lambda leaf: _take(leaf, indices, 0), tree)


def _take(x: jax.Array, indices: jax.Array, axis: int) -> jax.Array:
  """The kept rows of x, which lie along `axis`; no other axis is moved."""
  before, after = x.shape[:axis], x.shape[axis + 1 :]
  groups = x.reshape(*before, indices.shape[0], -1, *after)
  rows_of = lambda group, kept: jnp.take(group, kept, axis=axis, mode='clip')
  kept = jax.vmap(rows_of, in_axes=(axis, 0), out_axes=axis)(groups, indices)
  return kept.reshape(*before, -1, *after)


def kept_gradient(
  losses_of: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, batch: Any
) -> tuple[jax.Array, Any, Callable[[jax.Array, jax.Array], Any]]:
  """One forward pass on all rows, and a backward pass on some of them, without per-example
  gradients.

  The function that `jax.vjp` returns is a pytree: a program and the residuals it reads. The program
  is traced for the kept number of rows, the residuals are those of all rows, cut down to the kept.

  Args:
    losses_of: (params, batch) -> (losses [B] or [B, T], anything); rows must not depend on each
      other.
    params: pytree.
    batch: pytree of `[B, ...]` leaves.

  Returns:
    losses [B] or [B, T]; anything; and `backward(indices [S, k], cotangents [S * k] or [S * k, T])`
    -> gradient like params of sum(cotangents * losses of the kept rows).

  Raises:
    ValueError: when tracing `backward`, for a residual without an axis that is the batch.

  Source: ours.
  """
  losses, vjp, more = jax.vjp(lambda p: losses_of(p, batch), params, has_aux=True)

  def backward(indices, cotangents):
    rows, kept = losses.shape[0], indices.size
    fewer = jax.tree.map(lambda x: jax.ShapeDtypeStruct((kept, *x.shape[1:]), x.dtype), batch)
    traced = jax.eval_shape(lambda p, b: jax.vjp(lambda p: losses_of(p, b)[0], p)[1], params, fewer)
    leaves, program = jax.tree.flatten(traced)
    residuals = jax.tree.leaves(vjp)
    if len(leaves) != len(residuals):
      raise ValueError(_NO_BATCH_AXIS.format('the program depends on the number of rows'))
    pairs = zip(residuals, leaves)
    backward_kept = program.unflatten([_cut(x, y.shape, rows, indices) for x, y in pairs])
    return backward_kept(cotangents)[0]

  return losses, more, backward


_NO_BATCH_AXIS = 'keep: reuse=True cannot tell the rows apart ({}): use reuse=False'


def _cut(residual: jax.Array, shape: tuple[int, ...], rows: int, indices: jax.Array) -> jax.Array:
  """The kept rows of a residual, along the one axis by which the two traces differ."""
  if residual.shape == shape:
    return residual
  axes = [i for i, (a, b) in enumerate(zip(residual.shape, shape)) if a != b]
  # The axis must be the batch and nothing else: in a merged axis the order of rows is unknown.
  if residual.ndim != len(shape) or len(axes) != 1 or residual.shape[axes[0]] != rows:
    raise ValueError(_NO_BATCH_AXIS.format(f'a residual of shape {residual.shape}'))
  return _take(residual, indices, axes[0])
