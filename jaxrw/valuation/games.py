"""Exact values of small games: Shapley, Banzhaf, Beta and leave-one-out from all 2^n utilities.

A player's value is a weighted mean of what it adds to every set S of others,

  phi_i = sum_{S without i} p(|S|) (V(S + i) - V(S)),    sum over all S of p(|S|) = 1

and the coefficients p tell the semivalues apart:

  shapley      1 / (n C(n - 1, s))                 sizes count alike; sum phi = V(all) - V(none)
  banzhaf      2^-(n - 1)                          sets count alike
  beta(a, b)   B(s + b, n - 1 - s + a) / B(a, b)   a > b: small sets count more; (1, 1): Shapley
  loo          1 for S = all others                the gain at the very end

NumPy, in float64: these are the references that estimates are held against.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

MOST_PLAYERS = 24  # 2^24 float64 are 128 MB


def shapley_coefficients(players: int) -> np.ndarray:
  """1 / (n C(n - 1, s)) for s = 0 .. n - 1 others, float64[n].

  Example:
    >>> from jaxrw import valuation
    >>> valuation.shapley_coefficients(3).round(4)
    array([0.3333, 0.1667, 0.3333])
  """
  return beta_coefficients(players, 1.0, 1.0)


def banzhaf_coefficients(players: int) -> np.ndarray:
  """2^-(n - 1) for every size, float64[n]."""
  _check_players(players)
  return np.full(players, 0.5 ** (players - 1))


def beta_coefficients(players: int, alpha: float, beta: float) -> np.ndarray:
  """B(s + beta, n - 1 - s + alpha) / B(alpha, beta), float64[n].

  Args:
    players: n.
    alpha, beta: > 0; (16, 1) looks at what an example adds to small sets, where noise is least.

  Raises:
    ValueError: numbers that are not positive.

  Source: Kwon and Zou, Beta Shapley, AISTATS 2022 (arXiv 2110.14049), as recalled.
  """
  _check_players(players)
  if not (alpha > 0 and beta > 0):
    raise ValueError(f'alpha={alpha} and beta={beta} must be greater than 0')
  log_beta = lambda a, b: math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
  return np.array([
    math.exp(log_beta(s + beta, players - 1 - s + alpha) - log_beta(alpha, beta))
    for s in range(players)
  ])  # fmt: skip


def loo_coefficients(players: int) -> np.ndarray:
  """1 for the set of all others, 0 for the rest, float64[n]."""
  _check_players(players)
  return np.eye(players)[-1]


def all_utilities(utility: Callable[[np.ndarray], float], players: int) -> np.ndarray:
  """V of every subset, float64[2^n]: bit i of the index says whether player i is in it.

  Args:
    utility: bool[n] -> number, called 2^n times.
    players: n, at most 24.

  Raises:
    ValueError: too many players.

  Example:
    >>> from jaxrw import valuation
    >>> valuation.all_utilities(lambda present: float(present.sum()), 2)
    array([0., 1., 1., 2.])
  """
  _check_players(players, MOST_PLAYERS)
  bits = np.arange(players)
  return np.array([float(utility((s >> bits & 1).astype(bool))) for s in range(2**players)])


def exact_values(utilities: np.ndarray, coefficients: np.ndarray | None = None) -> np.ndarray:
  """The semivalue of every player, float64[n].

  Args:
    utilities: float[2^n], as from `all_utilities`.
    coefficients: float[n], p by the size of S. Default: Shapley.

  Returns:
    float64[n], in the unit of the utility; positive = helpful.

  Raises:
    ValueError: utilities that are not 2^n finite numbers, coefficients that are not [n].

  Example:
    A left glove is worth nothing without a right one; players 1 and 2 both have a right one.

    >>> from jaxrw import valuation
    >>> pairs = valuation.all_utilities(lambda s: float(min(s[0], s[1] | s[2])), 3)
    >>> valuation.exact_values(pairs).round(4)
    array([0.6667, 0.1667, 0.1667])

  Source: Shapley, 1953; Dubey et al., 1981, for semivalues.
  """
  utilities = np.asarray(utilities, np.float64)
  players = utilities.size.bit_length() - 1
  if utilities.ndim != 1 or utilities.size != 2**players or players < 1:
    raise ValueError(f'utilities have shape {utilities.shape}; expected [2^n], n at least 1')
  if not np.all(np.isfinite(utilities)):
    raise ValueError(f'the utility of subset {np.flatnonzero(~np.isfinite(utilities))[0]} is not '
                     'finite')  # fmt: skip
  if coefficients is None:
    coefficients = shapley_coefficients(players)
  if np.shape(coefficients) != (players,):
    raise ValueError(f'coefficients have shape {np.shape(coefficients)}; expected [{players}]')
  size = np.zeros(1, np.int64)
  for _ in range(players - 1):
    size = np.concatenate([size, size + 1])
  weight = np.asarray(coefficients, np.float64)[size]  # of each set of others
  values = []
  for i in range(players):
    cut = utilities.reshape(-1, 2, 2**i)  # [higher bits, bit i, lower bits]
    values.append(weight @ (cut[:, 1] - cut[:, 0]).reshape(-1))
  return np.array(values)


def _check_players(players: int, most: int | None = None) -> None:
  if players < 1 or (most and players > most):
    limit = f' and at most {most}, since all 2^n subsets are evaluated' if most else ''
    raise ValueError(f'players={players} must be at least 1{limit}')
