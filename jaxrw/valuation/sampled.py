"""Values of games by chance: permutations and random subsets, with standard errors.

The utility is a function of a mask, `utility(present float[n]) -> number`: it trains a model of
which absent examples have weight 0 and returns its score on held-out data. Written in JAX, with
shapes that do not depend on the mask, it runs for a hundred subsets at once under `vmap`, and that
is the whole trick: a library that trains one model after the other cannot do it.

  permutation_values   along random orders (TMC-Shapley): truncation, all semivalues of `games`
  subset_values        Banzhaf: every random subset says something about every player
  gradient_values      one pass of SGD along each order instead of training anew (G-Shapley)

All return `Estimate`s, which merge: more samples, other machines, a resumed run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrw.core import check_positive

Utility = Callable[[jax.Array], jax.Array]


class Estimate(NamedTuple):
  """Values with their uncertainty.

  Attributes:
    mean: float64[n], positive = helpful.
    squares: float64[n], sum of squared distances of the samples to their mean.
    count: float64[n], samples of each player.
    calls: models trained.
  """

  mean: np.ndarray
  squares: np.ndarray
  count: np.ndarray
  calls: int = 0

  @property
  def standard_error(self) -> np.ndarray:
    """Standard error of each mean, float64[n]; inf with fewer than two samples."""
    with np.errstate(divide='ignore', invalid='ignore'):
      out = np.sqrt(self.squares / (self.count - 1) / self.count)
    return np.where(self.count > 1, out, np.inf)

  def merge(self, other: Estimate) -> Estimate:
    """Both samples as one. The official code of Data Shapley averages its means over chunks of
    growing memory, so that early samples count several times."""
    count = self.count + other.count
    safe = np.maximum(count, 1)
    apart = other.mean - self.mean
    return Estimate(
      self.mean + apart * other.count / safe,
      self.squares + other.squares + apart**2 * self.count * other.count / safe,
      count,
      self.calls + other.calls,
    )


def empty(players: int) -> Estimate:
  """The estimate of no samples."""
  return Estimate(np.zeros(players), np.zeros(players), np.zeros(players))


def permutation_values(
  key: jax.Array,
  utility: Utility,
  players: int,
  *,
  permutations: int,
  coefficients: np.ndarray | None = None,
  truncation: float = 0.0,
  patience: int = 5,
  together: int = 8,
  chunk: int = 16,
  antithetic: bool = False,
  wanted_error: float = 0.0,
  start: Estimate | None = None,
) -> Estimate:
  """Mean gain of each player over random orders: Shapley values, truncated Monte Carlo (TMC).

  Along an order the players come in one by one; a player's sample is V(after) - V(before). With the
  coefficients p of another semivalue the sample at place s counts n C(n - 1, s) p(s) times.

  Args:
    key: draws the orders.
    utility: (present float[n] of 0 and 1) -> number; must work under vmap. It is called for the
      empty and the full set, too. Compiled once for each function object: define it once.
    players: n.
    permutations: orders to draw, > 0, at most.
    coefficients: float[n]. Default: Shapley.
    truncation: once V has been within truncation * |V(all)| of V(all) for more than `patience`
      places, the rest of the order gets 0. 0 never stops. Only for Shapley values.
    patience: see truncation.
    together: orders at a time.
    chunk: places at a time, of all orders; together * chunk models are trained by one program.
    antithetic: every second order is the reverse of the one before.
    wanted_error: stop when all standard errors are at most this; needs two batches of orders. The
      errors are those of independent orders; antithetic ones are summed in pairs.
    start: an estimate to go on from.

  Returns:
    Estimate. Without truncation the means sum to V(all) - V(none), exactly.

  Raises:
    ValueError: numbers that do not fit; truncation with other coefficients; a utility that is not
      finite.

  Example:
    In an additive game one order is enough:

    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> worth = jnp.array([3.0, 1.0, -2.0])
    >>> valuation.permutation_values(
    ...   jax.random.key(0), lambda present: present @ worth, 3, permutations=1).mean
    array([ 3.,  1., -2.])

  Source: Ghorbani and Zou, Data Shapley, ICML 2019 (arXiv 1904.02868), official code: truncation
    and patience. There the score of the full set is a mean over bootstrap samples of the test set.
  """
  check_positive(permutations=permutations, together=together, chunk=chunk)
  if players < 1 or truncation < 0 or patience < 0:
    raise ValueError(f'{players=}, {truncation=} and {patience=} must be at least 1, 0 and 0')
  scale = np.ones(players)
  if coefficients is not None:
    if np.shape(coefficients) != (players,):
      raise ValueError(f'coefficients have shape {np.shape(coefficients)}; expected [{players}]')
    if truncation:
      raise ValueError(
        'truncation stops where gains are small; other semivalues enlarge them there'
      )
    scale = np.asarray(coefficients, np.float64) * players * _binomials(players - 1)
  together = min(together, permutations)
  if antithetic:
    together += together % 2
  along = _compiled(utility, players, min(chunk, players))
  ends = np.asarray(_compiled_masks(utility)(jnp.stack([jnp.zeros(players), jnp.ones(players)])))
  _check_finite(ends)
  estimate = start or empty(players)
  estimate = estimate._replace(calls=estimate.calls + 2)
  for batch in range(-(-permutations // together)):
    orders = _orders(jax.random.fold_in(key, batch), players, together, antithetic)
    orders = orders[: permutations - batch * together] if not antithetic else orders
    estimate = estimate.merge(
      _walk(along, ends, orders, scale, truncation, patience, min(chunk, players), antithetic)
    )
    if wanted_error and batch and np.max(estimate.standard_error) <= wanted_error:
      break
  return estimate


def _walk(
  along: Callable[[jax.Array, int], jax.Array],
  ends: np.ndarray,
  orders: np.ndarray,
  scale: np.ndarray,
  truncation: float,
  patience: int,
  chunk: int,
  antithetic: bool,
) -> Estimate:
  """One batch of orders, int[P, n], `chunk` places at a time."""
  number, players = orders.shape
  before, still = np.full(number, ends[0]), np.zeros(number, int)
  gains, calls = np.zeros((number, players)), 0
  for place in range(0, players, chunk):
    width = min(chunk, players - place)
    running = still <= patience
    if truncation and not running.any():
      break
    found = np.asarray(along(jnp.asarray(orders), place))[:, :width]
    _check_finite(found)
    calls += int(running.sum()) * width if truncation else number * width
    for j in range(width):
      open_ = still <= patience
      now = np.where(open_, found[:, j], before)
      gains[np.arange(number), orders[:, place + j]] = now - before
      if truncation:
        near = np.abs(now - ends[1]) <= truncation * abs(ends[1])
        still = np.where(open_, np.where(near, still + 1, 0), still)
      before = now
  gains *= scale[np.argsort(orders, axis=1)]
  if antithetic:
    gains = (gains[::2] + gains[1::2]) / 2
  mean = gains.mean(axis=0)
  return Estimate(
    mean, ((gains - mean) ** 2).sum(axis=0), np.full(players, float(len(gains))), calls
  )


@functools.lru_cache(maxsize=16)
def _compiled(utility: Utility, players: int, chunk: int) -> Callable[[Any, Any], jax.Array]:
  """(orders int[P, n], place) -> utilities [P, chunk] of the prefixes of place + 1, ... players."""

  def along(orders, place):
    rank = jnp.argsort(orders, axis=1)
    lengths = place + 1 + jnp.arange(chunk)
    present = (rank[:, None, :] < lengths[:, None]).astype(jnp.float32)
    return jax.vmap(jax.vmap(utility))(present)

  return jax.jit(along)


def subset_values(
  key: jax.Array,
  utility: Utility,
  players: int,
  *,
  subsets: int,
  together: int = 128,
  start: Estimate | None = None,
) -> Estimate:
  """Banzhaf values by maximum sample reuse: mean V of the sets with i minus that of those without.

  Args:
    key: draws the sets, every player in with probability 1/2.
    utility: (present float[n]) -> number; must work under vmap.
    players: n.
    subsets: how many, > 0; in pairs of a set and its complement, so an even number is used.
    together: models trained at a time.
    start: an estimate to go on from.

  Returns:
    Estimate, of which a sample is (V(S) - V(complement)) or its negative: unbiased, its standard
    error honest.

  Raises:
    ValueError: numbers that do not fit, a utility that is not finite.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> present_and = lambda present: present[0] * present[1]
    >>> found = valuation.subset_values(jax.random.key(0), present_and, 2, subsets=2000)
    >>> found.mean.round(1)
    array([0.5, 0.5])

  Source: Wang and Jia, Data Banzhaf, AISTATS 2023 (arXiv 2205.15466), as recalled; the pairs are
    ours: with both of a pair the two means have the same number of sets.
  """
  check_positive(subsets=subsets, together=together)
  pairs, estimate = -(-subsets // 2), start or empty(players)
  step = max(1, min(together // 2, pairs))
  many = _compiled_masks(utility)
  for batch, first in enumerate(range(0, pairs, step)):
    number = min(step, pairs - first)
    inside = jax.random.bernoulli(jax.random.fold_in(key, batch), 0.5, (step, players))[:number]
    with_, without = (
      np.asarray(many(side.astype(jnp.float32)), np.float64) for side in (inside, ~inside)
    )
    _check_finite(with_)
    _check_finite(without)
    samples = np.where(np.asarray(inside), 1.0, -1.0) * (with_ - without)[:, None]
    mean = samples.mean(axis=0)
    estimate = estimate.merge(
      Estimate(
        mean,
        ((samples - mean) ** 2).sum(axis=0),
        np.full(players, float(number)),
        2 * number,
      )
    )
  return estimate


@functools.lru_cache(maxsize=16)
def _compiled_masks(utility: Utility) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jax.vmap(utility))


def gradient_values(
  key: jax.Array,
  loss: Callable[[Any, Any], jax.Array],
  score: Callable[[Any], jax.Array],
  params: Any,
  data: Any,
  *,
  rate: float,
  permutations: int,
  together: int = 8,
  start: Estimate | None = None,
) -> Estimate:
  """What one SGD step on each example changes the score by, along random orders: G-Shapley.

  The order's model starts at `params` and takes one step per example; a player's sample is
  score(after its step) - score(before).

  Args:
    key: draws the orders.
    loss: (params, example) -> scalar.
    score: params -> number, higher = better.
    params: where every order starts.
    data: a tree whose leaves have a leading axis n.
    rate: learning rate, > 0, such that one pass over the data learns well.
    permutations: orders, > 0.
    together: orders at a time.
    start: an estimate to go on from.

  Returns:
    Estimate. The means sum to the mean final score minus the first.

  Raises:
    ValueError: numbers that do not fit, a score that is not finite.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import valuation
    >>> data = jnp.array([1.0, 1.0, -1.0])
    >>> found = valuation.gradient_values(
    ...   jax.random.key(0), lambda w, x: (w - x) ** 2 / 2, lambda w: -((w - 1) ** 2),
    ...   jnp.zeros(()), data, rate=0.1, permutations=200)
    >>> bool(found.mean[0] > 0 > found.mean[2])
    True

  Source: Ghorbani and Zou, Data Shapley, ICML 2019, official code; there the first example of an
    order gets 0.
  """
  check_positive(rate=rate, permutations=permutations, together=together)
  players = len(jax.tree.leaves(data)[0])
  together = min(together, permutations)

  def along(order):
    def step(carry, i):
      params, before = carry
      slope = jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[i], data))
      params = jax.tree.map(lambda p, g: p - rate * g, params, slope)
      now = score(params)
      return (params, now), now - before

    _, gains = jax.lax.scan(step, (params, score(params)), order)
    return jnp.zeros(players, gains.dtype).at[order].set(gains)

  many, estimate = jax.jit(jax.vmap(along)), start or empty(players)
  for batch, first in enumerate(range(0, permutations, together)):
    orders = _orders(jax.random.fold_in(key, batch), players, together, False)
    gains = np.asarray(many(jnp.asarray(orders)), np.float64)[: permutations - first]
    _check_finite(gains)
    mean = gains.mean(axis=0)
    count = np.full(players, float(len(gains)))
    estimate = estimate.merge(Estimate(mean, ((gains - mean) ** 2).sum(axis=0), count, len(gains)))
  return estimate


def unsettled(history: np.ndarray, window: int = 100) -> float:
  """Data Shapley's own stopping rule: how far the running means still moved, relatively.

  max over the last `window` estimates t of mean_i |phi_i^t - phi_i^now| / (|phi_i^now| + 1e-12). It
  stops at .05 or so. Standard errors say more: values near 0 make this ratio large for ever.

  Args:
    history: float[T, n], running means after each permutation.
    window: T must be above it.

  Returns:
    The maximum; inf for a history that is too short.

  Example:
    >>> import numpy as np
    >>> from jaxrw import valuation
    >>> valuation.unsettled(np.ones((101, 3)))
    0.0

  Source: official code of Ghorbani and Zou, ICML 2019.
  """
  if len(history) <= window:
    return float('inf')
  now = history[-1]
  moved = np.abs(history[-window - 1 : -1] - now) / (np.abs(now) + 1e-12)
  return float(moved.mean(axis=1).max())


def _orders(key: jax.Array, players: int, number: int, antithetic: bool) -> np.ndarray:
  drawn = number // 2 if antithetic else number
  keys = jax.random.split(key, drawn)
  orders = np.asarray(jax.vmap(lambda k: jax.random.permutation(k, players))(keys))
  if not antithetic:
    return orders
  return np.stack([orders, orders[:, ::-1]], axis=1).reshape(-1, players)


def _binomials(n: int) -> np.ndarray:
  """C(n, 0 .. n), float64."""
  out = np.ones(n + 1)
  for s in range(1, n + 1):
    out[s] = out[s - 1] * (n - s + 1) / s
  return out


def _check_finite(values: np.ndarray) -> None:
  if not np.all(np.isfinite(values)):
    raise ValueError(
      'the utility is not finite for some subset; for too few examples or a missing class return '
      'the score of a guess'
    )
