"""Which examples a score keeps: exact budgets, ties broken by position, NaN never silently in.

All functions return bool[N] with exactly the asked-for number of True. They sort the scores, so a
sharded vector is gathered first: they are for between epochs, not for inside a step, where
`jaxrw.weights` has thresholds without a sort.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw.core import check_range

Side = Literal['high', 'low']


def keep_window(
  scores: jax.Array,
  budget: int,
  *,
  side: Side = 'high',
  skip: int = 0,
  valid: jax.Array | None = None,
) -> jax.Array:
  """The `budget` best after the `skip` very best: ranks skip .. skip + budget - 1.

  Of a score that rises with difficulty: side 'high' keeps the hard, 'low' the easy ones; a skip
  leaves out the hardest, which with noisy labels are the mislabeled.

  Args:
    scores: float[N]; ±inf are the extremes.
    budget: examples to keep, 0 .. N - skip.
    side: the end of the ranking to start from.
    skip: examples to pass over at that end.
    valid: bool[N], False for padding, which is never kept. Default: all.

  Returns:
    bool[N]. Ties are broken by position, the first is the better.

  Raises:
    ValueError: more to keep and skip than there are examples; a concrete NaN; a wrong shape. In a
      traced program NaN and padding rank last.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> selection.keep_window(jnp.array([0.1, 0.9, 0.5, 0.7]), 2, skip=1)
    Array([False, False,  True,  True], dtype=bool)

  Source: official code of Paul et al., Deep Learning on a Data Diet, NeurIPS 2021.
  """
  scores, valid = _checked(scores, valid)
  _check_side(side)
  _check_budget(budget, skip, valid)
  rank = _ranks(scores if side == 'low' else -scores, valid)
  return (rank >= skip) & (rank < skip + budget) & valid


def keep_by_group(
  scores: jax.Array,
  group_ids: jax.Array,
  budgets: jax.Array | np.ndarray,
  *,
  side: Side = 'high',
) -> jax.Array:
  """The best budgets[g] of every group g.

  With equal budgets and side 'low' it is the class-balanced, easy-first choice that wins where very
  little is kept; with `group_budgets` a ranking over all that leaves no group out.

  Args:
    scores: float[N].
    group_ids: int[N], classes, clusters or domains; -1 (unknown) is never kept.
    budgets: int[G], at least 0. A group that has fewer gives all it has.
    side: the end of the ranking to start from.

  Returns:
    bool[N].

  Raises:
    IndexError: a concrete group id out of range.
    ValueError: concrete NaN, budgets that are not [G] or negative, shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import selection
    >>> scores, groups = jnp.array([0.1, 0.9, 0.5, 0.7]), jnp.array([0, 0, 1, 1])
    >>> selection.keep_by_group(scores, groups, jnp.array([1, 1]), side='low')
    Array([ True, False,  True, False], dtype=bool)

  Source: Zhao et al., Rethinking Large-Scale Dataset Compression (arXiv 2502.06434), as recalled.
  """
  scores, _ = _checked(scores, None)
  _check_side(side)
  budgets = jnp.asarray(budgets)
  if group_ids.shape != scores.shape or budgets.ndim != 1:
    raise ValueError(
      f'scores have shape {scores.shape}, group_ids {group_ids.shape}, budgets {budgets.shape}; '
      'expected [N], [N] and [G]'
    )
  if not isinstance(budgets, jax.core.Tracer) and np.any(np.asarray(budgets) < 0):
    raise ValueError(f'budgets={np.asarray(budgets)} must be at least 0')
  known = check_range(group_ids, budgets.size, 'group_ids') & (group_ids >= 0)
  groups = jnp.where(known, group_ids, budgets.size)
  order = jnp.lexsort((scores if side == 'low' else -scores, groups))  # stable
  sizes = jnp.bincount(groups, length=budgets.size + 1)
  start = jnp.cumsum(sizes) - sizes
  rank = jnp.zeros(scores.size, jnp.int32).at[order].set(jnp.arange(scores.size, dtype=jnp.int32))
  within = rank - start[groups]
  return known & (within < jnp.append(budgets, 0)[groups])


def group_budgets(sizes: np.ndarray, wanted: np.ndarray, budget: int, floor: float) -> np.ndarray:
  """Whole numbers of examples for groups, near what is wanted, none below its floor.

  A group's floor is `floor` times its part of an even division, which is budget / G but for groups
  too small for that. What is above the floors shrinks in proportion to pay for it; fractions are
  rounded by largest remainder.

  Args:
    sizes: int[G], examples of each group.
    wanted: [G], how many a ranking over all would keep: at most the sizes.
    budget: examples to keep, at most sum(sizes).
    floor: in [0, 1]: 0 keeps what is wanted, 1 is even as far as the sizes allow.

  Returns:
    int64[G] of sum `budget`, at most the sizes.

  Raises:
    ValueError: numbers that do not fit.

  Example:
    >>> import numpy as np
    >>> from jaxrw import selection
    >>> selection.group_budgets(np.array([50, 50]), np.array([20, 0]), 20, floor=0.5)
    array([15,  5])

  Source: Sorscher et al., NeurIPS 2022, keep at least half of the even share, as recalled; the
    division of the rest is ours.
  """
  sizes, wanted = np.asarray(sizes, np.int64), np.asarray(wanted, np.float64)
  if sizes.ndim != 1 or wanted.shape != sizes.shape or np.any(wanted < 0) or np.any(sizes < 0):
    raise ValueError(f'sizes={sizes} and wanted={wanted} must be [G] and at least 0')
  if not 0 <= budget <= sizes.sum():
    raise ValueError(f'budget={budget} must be between 0 and {sizes.sum()}, all examples')
  if not 0 <= floor <= 1:
    raise ValueError(f'floor={floor} must be in [0, 1]')
  least = floor * _even(sizes, budget)
  share = least + _poured(budget - least.sum(), np.maximum(wanted - least, 0), sizes - least)
  whole = np.floor(share + 1e-9).astype(np.int64)
  order = np.argsort(whole - share, kind='stable')  # largest remainder first
  room = order[whole[order] < sizes[order]]
  whole[room[: budget - whole.sum()]] += 1
  return whole


def _poured(total: float, weight: np.ndarray, room: np.ndarray) -> np.ndarray:
  """`total` divided in proportion to the weights, none above its room; what overflows, and what has
  no weight to go by, goes on in proportion to the room left."""
  out = np.zeros_like(room, np.float64)
  for _ in range(2 * len(room) + 2):
    left, free = total - out.sum(), room - out
    if left <= 1e-9 * max(1.0, total):
      break
    portion = np.where(free > 1e-12, weight, 0)
    portion = portion if portion.sum() > 0 else np.maximum(free, 0)
    out += np.minimum(free, left * portion / portion.sum())
  return out


def stratified(
  key: jax.Array, scores: jax.Array, budget: int, *, strata: int = 50, skip: float = 0.0
) -> jax.Array:
  """Even over the range of the scores: the budget is divided over equally wide bins of them.

  The `skip` hardest (highest) are left out first. Bins with fewer examples than their part give all
  they have, and the rest is divided over the others; within a bin chance decides.

  Args:
    key: draws within bins.
    scores: float[N], concrete and finite.
    budget: examples to keep.
    strata: bins, > 0.
    skip: share of the highest scores to leave out, in [0, 1).

  Returns:
    bool[N].

  Raises:
    ValueError: a budget above what is left, scores that are not finite, bad numbers.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import selection
    >>> kept = selection.stratified(jax.random.key(0), jnp.arange(100.0) ** 2, 20, strata=10)
    >>> int(kept.sum()), int(kept[:31].sum())       # nearly a third of the scores are in one bin
    (20, 2)

  Source: Zheng et al., Coverage-centric Coreset Selection, ICLR 2023, as recalled.
  """
  values = np.asarray(scores, np.float64)
  if values.ndim != 1 or not np.all(np.isfinite(values)):
    raise ValueError(f'scores of shape {values.shape} must be [N] and finite')
  if strata < 1 or not 0 <= skip < 1:
    raise ValueError(f'strata={strata} must be at least 1 and skip={skip} in [0, 1)')
  left = len(values) - round(skip * len(values))
  if not 0 <= budget <= left:
    raise ValueError(f'budget={budget} must be between 0 and {left}, what skip={skip} leaves')
  usable = np.zeros(len(values), bool)
  usable[np.argsort(values, kind='stable')[:left]] = True
  edges = np.linspace(values[usable].min(), values[usable].max(), strata + 1)
  bins = np.clip(np.searchsorted(edges, values, side='right') - 1, 0, strata - 1)
  sizes = np.bincount(bins[usable], minlength=strata)
  budgets = _even(sizes, budget)
  noise = jax.random.uniform(key, (len(values),))
  return keep_by_group(noise, jnp.asarray(np.where(usable, bins, -1)), budgets)


def _even(sizes: np.ndarray, budget: int) -> np.ndarray:
  """Parts of the budget as even as the sizes allow; smallest groups are served first."""
  parts, left = np.zeros_like(sizes), budget
  for served, g in enumerate(np.argsort(sizes, kind='stable')):
    parts[g] = min(sizes[g], left // (len(sizes) - served))
    left -= parts[g]
  return parts


def _ranks(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Position of each entry in ascending order, invalid ones last; ties by position."""
  order = jnp.lexsort((values, ~valid))
  return jnp.zeros(values.size, jnp.int32).at[order].set(jnp.arange(values.size, dtype=jnp.int32))


def _checked(scores: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
  """(scores, valid), NaN invalid."""
  scores = jnp.asarray(scores)
  valid = jnp.ones(scores.shape, bool) if valid is None else jnp.asarray(valid)
  if scores.ndim != 1 or valid.shape != scores.shape:
    raise ValueError(f'scores have shape {scores.shape}, valid {valid.shape}; both must be [N]')
  broken = jnp.isnan(scores) & valid
  if not isinstance(broken, jax.core.Tracer) and bool(jnp.any(broken)):
    rows = np.flatnonzero(np.asarray(broken))
    raise ValueError(
      f'scores hold NaN ({len(rows)} of {scores.size}, the first at {rows[0]}); '
      'mark such examples as not valid, or mend the score'
    )
  return scores, valid & ~broken


def _check_budget(budget: int, skip: int, valid: jax.Array) -> None:
  most = valid.size if isinstance(valid, jax.core.Tracer) else int(jnp.sum(valid))
  if budget < 0 or skip < 0 or budget + skip > most:
    raise ValueError(
      f'budget={budget} and skip={skip} must be at least 0 and together at most {most}, the '
      'examples there are'
    )


def _check_side(side: str) -> None:
  if side not in ('high', 'low'):
    raise ValueError(f"side={side!r} must be 'high' or 'low'")
