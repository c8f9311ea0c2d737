"""What a value does over time or over seeds, for every example of a table: counts, mean, spread.

One table serves three uses. The values may be

  scores of several models       the mean is what is ranked
  losses at several times        mean and spread: always hard, or still being learned
  the label's probability        mean = confidence, spread = variability (dataset cartography)

and `Forgetting` counts how often an example went from right to wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw import masked
from jaxrw.core import check_range


class Trajectories(NamedTuple):
  """count int32[N], mean float32[N], squares float32[N] (sum of squared distances to the mean)."""

  count: jax.Array
  mean: jax.Array
  squares: jax.Array

  def sd(self) -> jax.Array:
    """Standard deviation over what was seen, with divisor count; 0 before the second value."""
    return jnp.sqrt(masked.divide(self.squares, self.count.astype(self.squares.dtype)))


def trajectories(size: int) -> Trajectories:
  """An empty table for examples 0 .. size - 1."""
  return Trajectories(jnp.zeros(size, jnp.int32), jnp.zeros(size), jnp.zeros(size))


def record(table: Trajectories, example_ids: jax.Array, values: jax.Array) -> Trajectories:
  """The table with one more value for each of the ids.

  Welford's update: mean += (v - mean) / count, squares += (v - old mean) (v - new mean).

  Args:
    table: from `trajectories`.
    example_ids: int[B], each at most once; -1 (padding) is passed over.
    values: float[B].

  Returns:
    The new table.

  Raises:
    IndexError: a concrete id out of range. A traced one is passed over.
    ValueError: concrete ids with duplicates, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> table = scores.trajectories(3)
    >>> for losses in ([4.0, 1.0], [2.0, 1.0]):
    ...   table = scores.record(table, jnp.array([0, 2]), jnp.array(losses))
    >>> table.mean, table.sd()
    (Array([3., 0., 1.], dtype=float32), Array([1., 0., 0.], dtype=float32))

  Source: Welford, 1962; Swayamdipta et al., Dataset Cartography, EMNLP 2020, as recalled.
  """
  rows = _rows(example_ids, values, table.count.size)
  at = lambda column: column.at[rows].get(mode='fill', fill_value=0)
  values = values.astype(table.mean.dtype)
  count, old = at(table.count) + 1, at(table.mean)
  new = old + (values - old) / count
  squares = at(table.squares) + (values - old) * (values - new)
  put = lambda column, value: column.at[rows].set(value, mode='drop')
  return Trajectories(put(table.count, count), put(table.mean, new), put(table.squares, squares))


class Forgetting(NamedTuple):
  """was_right bool[N], ever_right bool[N], events int32[N]."""

  was_right: jax.Array
  ever_right: jax.Array
  events: jax.Array

  def score(self) -> jax.Array:
    """Forgetting events, float32[N]; inf for what was never right. High = hard."""
    return jnp.where(self.ever_right, self.events.astype(jnp.float32), jnp.inf)


def forgetting(size: int) -> Forgetting:
  """An empty table for examples 0 .. size - 1."""
  return Forgetting(jnp.zeros(size, bool), jnp.zeros(size, bool), jnp.zeros(size, jnp.int32))


def record_correct(table: Forgetting, example_ids: jax.Array, correct: jax.Array) -> Forgetting:
  """The table after the model was right or wrong on some examples.

  An event is a transition from right to wrong between two times at which the example was seen.

  Args:
    table: from `forgetting`.
    example_ids: int[B], each at most once; -1 (padding) is passed over.
    correct: bool[B].

  Returns:
    The new table.

  Raises:
    IndexError: a concrete id out of range. A traced one is passed over.
    ValueError: concrete ids with duplicates, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import scores
    >>> table = scores.forgetting(2)
    >>> for correct in ([True, False], [False, False], [True, False]):
    ...   table = scores.record_correct(table, jnp.array([0, 1]), jnp.array(correct))
    >>> table.score()
    Array([ 1., inf], dtype=float32)

  Source: Toneva et al., ICLR 2019; official code of Paul et al., NeurIPS 2021.
  """
  rows = _rows(example_ids, correct, table.events.size)
  at = lambda column: column.at[rows].get(mode='fill', fill_value=0)
  events = at(table.events) + (at(table.was_right) & ~correct)
  put = lambda column, value: column.at[rows].set(value, mode='drop')
  return Forgetting(
    put(table.was_right, correct),
    put(table.ever_right, at(table.ever_right) | correct),
    put(table.events, events),
  )


def _rows(example_ids: jax.Array, values: jax.Array, size: int) -> jax.Array:
  """The ids, with what is to be passed over moved behind the end of the table."""
  if example_ids.ndim != 1 or values.shape != example_ids.shape:
    raise ValueError(
      f'example_ids have shape {example_ids.shape}, values {values.shape}; both must be [B]'
    )
  fine = check_range(example_ids, size, 'example_ids')
  if not isinstance(example_ids, jax.core.Tracer):
    known = np.asarray(example_ids)[np.asarray(example_ids) >= 0]
    different, counts = np.unique(known, return_counts=True)
    if np.any(counts > 1):
      raise ValueError(f'example_ids hold {different[counts > 1][0]} twice; give each once')
  return jnp.where(fine & (example_ids >= 0), example_ids, size)
