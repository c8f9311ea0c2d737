"""The batch planner: which record of which domain fills each row of each step.

A plan is a pure function of a state of K + 1 integers, so every process computes the same global
plan and reads only its own rows, and a restart on another number of processes is exact. No
generator is advanced anywhere: every random number is a hash of what it belongs to, (seed, step,
row) or (seed, domain, epoch), which also keeps plans equal across NumPy versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_OFFSET, _ORDER, _SHUFFLE = 1, 2, 3  # one hash stream per use
_ROUNDS = 6
_SUM_ERROR = 1e-3  # of proportions: far above rounding in float32, far below any real mistake


class PlannerState(NamedTuple):
  """Where the plan stands. Identical on every process."""

  step: int
  used: np.ndarray  # int64[K]: records of each domain planned so far, over all epochs


class Plan(NamedTuple):
  """One global batch, row by row."""

  domain: np.ndarray  # int32[B]
  index: np.ndarray  # int64[B]: record within the domain
  epoch: np.ndarray  # int32[B]: how often the domain had been used up before
  sampling_prob: np.ndarray  # float32[B]: q of the row's domain in this step


class Planner:
  """Plans global batches; the domains' proportions may be others in every step.

  For step t, the row offsets u_j = (j + U_t) / B cut [0, 1) into B equal parts at a random phase
  U_t; row j takes the domain whose share of the cumulative proportions contains u_j (systematic
  sampling), and the rows are then permuted. Hence the count of domain k differs from B * q_k by
  less than 1 in every step and equals it in expectation, however small q_k is. Within a domain,
  records come without replacement in an order shuffled anew each epoch.

  Args:
    sizes: int[K], records per domain.
    batch_size: rows B of the global batch.
    proportions: float[K], q where `plan` is not told another, non-negative; normalized here.
    seed: plans with different seeds are unrelated.
    max_epochs: how often a record may be used at most; 0: as often as the proportions say. What a
      domain may no longer take is shared out among the others, in their proportions.

  Raises:
    ValueError: for an impossible argument, naming the domain where there is one.

  Example:
    >>> planner = Planner(sizes=[100, 10], batch_size=4, proportions=[3.0, 1.0], seed=0)
    >>> plan, state = planner.plan(planner.init())
    >>> sorted(plan.domain.tolist()), state.step, state.used.tolist()
    ([0, 0, 0, 1], 1, [3, 1])
    >>> plan, state = planner.plan(state, [0.0, 1.0])
    >>> plan.domain.tolist(), state.used.tolist()
    ([1, 1, 1, 1], [3, 5])
  """

  def __init__(
    self,
    sizes: Sequence[int],
    batch_size: int,
    proportions: Sequence[float],
    seed: int,
    max_epochs: int = 0,
  ):
    self.sizes = np.asarray(sizes, np.int64)
    if batch_size < 1:
      raise ValueError(f'batch_size={batch_size} must be at least 1')
    if max_epochs < 0:
      raise ValueError(f'max_epochs={max_epochs} must be at least 1, or 0 for no limit')
    self.batch_size = int(batch_size)
    self.seed = int(seed)
    self.max_epochs = int(max_epochs)
    weights = self._checked(proportions)
    self.proportions = weights / weights.sum()

  def init(self) -> PlannerState:
    """The state before the first step."""
    return PlannerState(0, np.zeros(self.sizes.size, np.int64))

  def plan(
    self, state: PlannerState, proportions: Sequence[float] | np.ndarray | None = None
  ) -> tuple[Plan, PlannerState]:
    """Plans the batch of step `state.step`.

    Args:
      state: from `init`, or from the plan before.
      proportions: float[K], q of this step, sums to 1; None for those of the planner.

    Returns:
      (plan, the state after it).

    Raises:
      ValueError: q off the simplex or on an empty domain; or every domain with a share has been
        used `max_epochs` times.
    """
    share = self.proportions if proportions is None else self._on_simplex(proportions)
    share, full = self._within_limit(share, state)
    # Full domains first: what they take are whole numbers of rows, which add up without rounding.
    order = np.argsort(~full, kind='stable')
    rows = np.arange(self.batch_size)
    phase = _uniform(_hash(self.seed, _OFFSET, state.step))
    upper = np.cumsum(share[order] * self.batch_size)
    # Rounding may leave the last sum just below B; an offset beyond it must not fall off the end.
    upper[np.flatnonzero(share[order])[-1] :] = np.inf
    domain = order[np.searchsorted(upper, rows + phase, side='right')]
    domain = domain[np.argsort(_hash(self.seed, _ORDER, state.step, rows), kind='stable')]
    position = state.used[domain] + _rank_within(domain)
    size = self.sizes[domain]
    epoch = position // size
    plan = Plan(
      domain=domain.astype(np.int32),
      index=shuffled_index(position % size, size, self.seed, domain, epoch),
      epoch=epoch.astype(np.int32),
      sampling_prob=share[domain].astype(np.float32),
    )
    used = state.used + np.bincount(domain, minlength=self.sizes.size)
    return plan, PlannerState(state.step + 1, used)

  def expected_counts(self, steps: int) -> np.ndarray:
    """Expected rows per domain over `steps` steps of the planner's own proportions, float64[K].

    Raises:
      ValueError: that is more than `max_epochs` of the domains with a share.
    """
    counts = self.proportions * (self.batch_size * steps)
    return _filled_up(counts, self.max_epochs * self.sizes)[0] if self.max_epochs else counts

  def _checked(self, proportions) -> np.ndarray:
    weights = np.asarray(proportions, np.float64)
    if self.sizes.ndim != 1 or weights.shape != self.sizes.shape or not weights.size:
      raise ValueError(
        f'sizes {self.sizes.shape} and proportions {weights.shape} must be two equally long lists'
      )
    if not np.all(np.isfinite(weights)) or np.any(weights < 0) or weights.sum() <= 0:
      raise ValueError('proportions must be finite and non-negative, and not all zero')
    empty = np.flatnonzero((weights > 0) & (self.sizes < 1))
    if empty.size:
      raise ValueError(f'domain {empty[0]} has no records but proportion {weights[empty[0]]:g}')
    return weights

  def _on_simplex(self, proportions) -> np.ndarray:
    weights = self._checked(proportions)
    total = weights.sum()
    if abs(total - 1) > _SUM_ERROR:
      raise ValueError(f'proportions sum to {total:g}; expected 1: divide by the sum')
    return weights / total

  def _within_limit(self, share: np.ndarray, state: PlannerState) -> tuple[np.ndarray, np.ndarray]:
    """q that leaves every domain within `max_epochs`, and which domains take all they have left."""
    if not self.max_epochs:
      return share, np.zeros(share.size, bool)
    room = self.max_epochs * self.sizes - state.used
    try:
      counts, full = _filled_up(share * self.batch_size, room)
    except ValueError as error:
      raise ValueError(f'step {state.step}: {error}') from None
    return counts / self.batch_size, full


def shuffled_index(position, size, seed: int, domain, epoch) -> np.ndarray:
  """A bijection of range(size) for every (seed, domain, epoch), evaluated point by point.

  A Feistel network permutes the smallest range of 4^h numbers that covers `size`; a result outside
  range(size) is put through it again until it falls inside ("cycle walking", under 4 rounds on
  average).

  Args:
    position, size, domain, epoch: integers or integer arrays that broadcast; 0 <= position < size.
    seed: integer.

  Returns:
    int64 array of the broadcast shape, 0 <= result < size.
  """
  position, size, domain, epoch = np.broadcast_arrays(position, size, domain, epoch)
  bits = np.ceil(np.log2(np.maximum(size, 2)))
  half = np.maximum(1, np.ceil(bits / 2)).astype(np.uint64)
  key = _hash(seed, _SHUFFLE, domain, epoch)
  value, limit = position.astype(np.uint64), size.astype(np.uint64)
  value = np.atleast_1d(_feistel(value, half, key))
  half, key, limit = np.atleast_1d(half), np.atleast_1d(key), np.atleast_1d(limit)
  while (outside := np.flatnonzero(value.ravel() >= limit.ravel())).size:
    at = np.unravel_index(outside, value.shape)
    value[at] = _feistel(value[at], half[at], key[at])
  return value.reshape(position.shape).astype(np.int64)


def state_to_dict(state: PlannerState) -> dict[str, Any]:
  """The state as plain Python numbers, for JSON."""
  return {'step': int(state.step), 'used': [int(n) for n in state.used]}


def state_from_dict(values: Mapping[str, Any]) -> PlannerState:
  """The inverse of `state_to_dict`."""
  return PlannerState(int(values['step']), np.asarray(values['used'], np.int64))


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
  """A keyed permutation of range(4 ** half), elementwise on uint64."""
  mask = (np.uint64(1) << half) - np.uint64(1)
  left, right = value >> half, value & mask
  for i in range(_ROUNDS):
    left, right = right, left ^ (_hash(key, i, right) & mask)
  return (left << half) | right


def _hash(*words) -> np.ndarray:
  """Mixes broadcastable integers into uniform uint64 by multiplying and xor-shifting."""
  state = np.full(1, 0x9E3779B97F4A7C15, np.uint64)  # arrays wrap silently where scalars warn
  for word in words:
    state = state ^ _as_uint64(word)
    state = (state ^ (state >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    state = (state ^ (state >> np.uint64(29))) * np.uint64(0xA0761D6478BD642F)
    state = state ^ (state >> np.uint64(32))
  return state


def _as_uint64(word) -> np.ndarray:
  if isinstance(word, int):
    return np.full(1, word % 2**64, np.uint64)
  return np.asarray(word).astype(np.uint64)


def _uniform(hashed: np.ndarray) -> float:
  """A float64 in [0, 1) from the top 53 bits."""
  return float((hashed >> np.uint64(11))[0]) * 2.0**-53


def _filled_up(wanted: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """min(c * wanted, limits) with the c that keeps the sum, and where the limit is what counts."""
  total, full = wanted.sum(), np.zeros(wanted.size, bool)
  counts = wanted
  while np.any(over := ~full & (wanted > 0) & (counts >= limits)):
    full |= over
    left, rest = total - limits[full].sum(), wanted[~full].sum()
    if rest == 0 and left > 0:
      raise ValueError(
        f'the domains with a share have {limits[full].sum():,} records left for {total:,.0f} rows: '
        'raise max_epochs, train for fewer steps or give other domains a share'
      )
    counts = np.where(full, limits, wanted * (left / rest if rest else 0))
  return counts, full


def _rank_within(groups: np.ndarray) -> np.ndarray:
  """For every row, how many earlier rows have the same value."""
  order = np.argsort(groups, kind='stable')
  ordered = groups[order]
  first = np.searchsorted(ordered, ordered, side='left')
  rank = np.empty_like(order)
  rank[order] = np.arange(groups.size) - first
  return rank
