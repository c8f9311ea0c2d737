"""Paired comparison of two sets of runs: mean difference, its interval, what could have been seen.

Run i of both sets shares its seed (same initial parameters, same batches), so the noise they share
cancels in the difference and n differences are the whole sample.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.80


class Paired(NamedTuple):
  """`a - b` over n pairs. With fewer than two pairs everything but the mean is unknown: None."""

  mean: float
  low: float | None
  high: float | None
  sd: float | None
  n: int
  detectable: float | None

  @property
  def verdict(self) -> str:
    """'lower', 'higher' or 'unresolved' (the interval holds 0), or 'single' without an interval."""
    if self.low is None or self.high is None:
      return 'single'
    if self.high < 0:
      return 'lower'
    return 'higher' if self.low > 0 else 'unresolved'


def paired(a, b) -> Paired:
  """Mean of a - b with its 95% t interval and the smallest effect n such pairs could detect.

  interval = mean ± t_{0.975, n-1} sd / sqrt(n);  detectable = detectable_shift(n) sd / sqrt(n).

  Args:
    a: f[n], finite, n >= 1.
    b: f[n], the values paired with `a`.

  Raises:
    ValueError: shapes differ, nothing to compare, or a value is not finite.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or a.ndim != 1 or a.size == 0:
    raise ValueError(f'paired needs two equally long, non-empty vectors, got {a.shape}, {b.shape}')
  if not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise ValueError('paired needs finite values; count diverged runs before averaging')
  difference, n = a - b, a.size
  mean = float(difference.mean())
  if n == 1:
    return Paired(mean, None, None, None, 1, None)
  sd = float(difference.std(ddof=1))
  error = sd / math.sqrt(n)
  half = critical(n) * error
  return Paired(mean, mean - half, mean + half, sd, n, detectable_shift(n) * error)


def critical(n: int) -> float:
  """Two-sided 95% point of Student's t with n - 1 degrees of freedom."""
  return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1))


@functools.cache
def detectable_shift(n: int) -> float:
  """True difference, in standard errors, that a two-sided 5% paired t test finds 80% of the time.

  Solves power(d) = E_s[Phi(d - t s) + Phi(-d - t s)] = 0.8 for d, where t = critical(n) and
  s^2 ~ chi^2_{n-1} / (n-1). The textbook shortcut t_{0.975} + t_{0.80} reaches only 73% power
  at n = 2 and 77% at n = 3, which is where comparisons of training runs live.
  """
  quantiles = (np.arange(4096) + 0.5) / 4096
  threshold = critical(n) * np.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))

  def shortfall(shift: float) -> float:
    found = stats.norm.cdf(shift - threshold) + stats.norm.cdf(-shift - threshold)
    return float(found.mean()) - POWER

  return float(optimize.brentq(shortfall, 0.0, 100.0))


def auc(values: np.ndarray, positive: np.ndarray) -> float:
  """How often one of the positive has the higher value; .5 is chance. Ties go by position.

  Args:
    values: f[n].
    positive: bool[n], some True and some False.
  """
  ranks = np.argsort(np.argsort(values, kind='stable'), kind='stable') + 1
  yes = int(positive.sum())
  return float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * (len(values) - yes)))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
  """Spearman's, with mean ranks at ties; 0 where one side does not vary."""
  if np.ptp(a) == 0 or np.ptp(b) == 0:
    return 0.0
  return float(stats.spearmanr(a, b).statistic)
