"""Statistics against closed forms, scipy's own t test, and simulation of what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from experiments import stats


def test_three_pairs_by_hand():
  # Differences 1, 2, 3: mean 2, sd 1, t(.975, 2) = 4.30265, so 2 ± 4.30265 / sqrt(3).
  result = stats.paired([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
  assert (result.mean, result.sd, result.n) == (2.0, 1.0, 3)
  assert result.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
  assert result.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
  assert result.verdict == 'unresolved'


@pytest.mark.parametrize('n', [2, 3, 5, 12])
def test_interval_agrees_with_scipy(n):
  rng = np.random.default_rng(n)
  a, b = rng.normal(size=n), rng.normal(size=n)
  result = stats.paired(a, b)
  expected = scipy_stats.ttest_rel(a, b).confidence_interval(0.95)
  np.testing.assert_allclose([result.low, result.high], [expected.low, expected.high], rtol=1e-10)


def test_verdict_follows_the_interval():
  noise = np.array([0.0, 0.01, -0.01])
  assert stats.paired(noise - 1, np.zeros(3)).verdict == 'lower'
  assert stats.paired(noise + 1, np.zeros(3)).verdict == 'higher'
  assert stats.paired(noise, np.zeros(3)).verdict == 'unresolved'


def test_one_pair_has_no_interval():
  result = stats.paired([3.0], [1.0])
  assert result == stats.Paired(2.0, None, None, None, 1, None)
  assert result.verdict == 'single'


def test_identical_runs_are_not_distinguishable():
  result = stats.paired([1.0, 2.0], [1.0, 2.0])
  assert (result.mean, result.low, result.high, result.detectable) == (0.0, 0.0, 0.0, 0.0)
  assert result.verdict == 'unresolved'


@pytest.mark.parametrize(
  ('a', 'b'), [([], []), ([1.0], [1.0, 2.0]), ([math.inf], [1.0]), ([math.nan, 1.0], [1.0, 1.0])]
)
def test_rejects_what_it_cannot_compare(a, b):
  with pytest.raises(ValueError, match='paired needs'):
    stats.paired(a, b)


@pytest.mark.parametrize('n', [2, 3, 6])
def test_interval_covers_95_percent(n):
  rng = np.random.default_rng(n)
  trials = 4000
  results = [stats.paired(rng.normal(0.3, 1.0, n), np.zeros(n)) for _ in range(trials)]
  covered = np.mean([r.low <= 0.3 <= r.high for r in results])
  assert covered == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / trials))


@pytest.mark.parametrize('n', [2, 3, 5])
def test_smallest_detectable_effect_is_found_80_percent_of_the_time(n):
  rng = np.random.default_rng(10 + n)
  trials, sigma = 4000, 0.7
  effect = stats.detectable_shift(n) * sigma / math.sqrt(n)
  results = [stats.paired(rng.normal(effect, sigma, n), np.zeros(n)) for _ in range(trials)]
  found = np.mean([r.verdict in ('lower', 'higher') for r in results])
  assert found == pytest.approx(0.80, abs=4 * math.sqrt(0.8 * 0.2 / trials))


def test_detectable_shift_approaches_the_normal_limit():
  # z_.975 + z_.80 = 1.95996 + 0.84162
  assert stats.detectable_shift(2000) == pytest.approx(2.80158, abs=5e-3)
  shifts = [stats.detectable_shift(n) for n in (2, 3, 4, 8, 50)]
  assert shifts == sorted(shifts, reverse=True)
