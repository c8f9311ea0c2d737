"""Exact values: axioms, games whose values are known, and sums over permutations."""

import itertools
import math

import numpy as np
import pytest

from jaxrw import valuation


def _by_permutations(utility, players):
  """The definition: mean gain over all orders."""
  values = np.zeros(players)
  for order in itertools.permutations(range(players)):
    present = np.zeros(players, bool)
    before = utility(present)
    for i in order:
      present[i] = True
      now = utility(present)
      values[i] += now - before
      before = now
  return values / math.factorial(players)


def _random_game(seed, players):
  table = np.random.default_rng(seed).normal(size=2**players)
  return table, lambda present: table[int(np.sum(present * 2 ** np.arange(players)))]


@pytest.mark.parametrize('players', [1, 2, 5])
def test_shapley_is_the_mean_over_all_orders(players):
  table, utility = _random_game(players, players)
  np.testing.assert_array_equal(valuation.all_utilities(utility, players), table)
  np.testing.assert_allclose(
    valuation.exact_values(table), _by_permutations(utility, players), rtol=1e-12, atol=1e-14
  )


def test_other_semivalues_are_sums_over_sets():
  players = 5
  table, utility = _random_game(7, players)
  for coefficients in (
    valuation.banzhaf_coefficients(players),
    valuation.beta_coefficients(players, 4.0, 1.0),
    valuation.loo_coefficients(players),
  ):
    sizes = [math.comb(players - 1, s) for s in range(players)]
    np.testing.assert_allclose(np.dot(sizes, coefficients), 1)
    expected = np.zeros(players)
    for i in range(players):
      others = [j for j in range(players) if j != i]
      for size in range(players):
        for chosen in itertools.combinations(others, size):
          present = np.isin(np.arange(players), chosen)
          with_ = present | (np.arange(players) == i)
          expected[i] += coefficients[size] * (utility(with_) - utility(present))
    np.testing.assert_allclose(valuation.exact_values(table, coefficients), expected, rtol=1e-10)


def test_beta_one_one_is_shapley_and_large_alpha_looks_at_small_sets():
  expected = [1 / (6 * math.comb(5, s)) for s in range(6)]
  np.testing.assert_allclose(valuation.shapley_coefficients(6), expected, rtol=1e-12)
  masses = lambda c: c * [math.comb(5, s) for s in range(6)]
  assert np.all(np.diff(masses(valuation.beta_coefficients(6, 16.0, 1.0))) < 0)


def test_axioms():
  players = 6
  table, utility = _random_game(3, players)
  values = valuation.exact_values(table)
  np.testing.assert_allclose(values.sum(), table[-1] - table[0], rtol=1e-12)
  other = np.random.default_rng(4).normal(size=64)
  both = valuation.exact_values(2 * table + other)
  np.testing.assert_allclose(both, 2 * values + valuation.exact_values(other), rtol=1e-10)
  # A player without effect, and two who do the same.
  null = valuation.all_utilities(lambda s: utility(np.append(s[:5], False)), players)
  np.testing.assert_allclose(valuation.exact_values(null)[5], 0, atol=1e-12)
  twins = valuation.all_utilities(
    lambda s: utility(np.append(s[:4], [s[4] | s[5], False])), players
  )
  found = valuation.exact_values(twins)
  np.testing.assert_allclose(found[4], found[5], rtol=1e-10)


def test_known_games():
  voting = valuation.all_utilities(lambda s: float(s.sum() > 3.5), 7)
  np.testing.assert_allclose(valuation.exact_values(voting), np.full(7, 1 / 7), rtol=1e-12)
  # Airport: a runway as long as the largest plane needs; each length is shared by who needs it.
  lengths = np.array([1.0, 2.0, 4.0, 4.0])
  airport = valuation.all_utilities(lambda s: -np.max(lengths * s), 4)
  shares = [1 / 4, 1 / 4 + 1 / 3, 1 / 4 + 1 / 3 + 2 / 2, 1 / 4 + 1 / 3 + 2 / 2]
  np.testing.assert_allclose(valuation.exact_values(airport), -np.array(shares), rtol=1e-12)
  # Shoes: two left, one right.
  shoes = valuation.all_utilities(lambda s: float(min(s[0] + s[1], s[2])), 3)
  np.testing.assert_allclose(valuation.exact_values(shoes), [1 / 6, 1 / 6, 2 / 3], rtol=1e-12)
  additive = valuation.all_utilities(lambda s: s @ np.arange(5.0), 5)
  for coefficients in (None, valuation.banzhaf_coefficients(5), valuation.loo_coefficients(5)):
    np.testing.assert_allclose(
      valuation.exact_values(additive, coefficients), np.arange(5), atol=1e-12
    )


def test_errors():
  for call, message in (
    (lambda: valuation.all_utilities(sum, 25), 'players=25 must be at least 1 and at most 24'),
    (lambda: valuation.shapley_coefficients(0), 'players=0'),
    (lambda: valuation.beta_coefficients(3, 0.0, 1.0), r'alpha=0\.0'),
    (lambda: valuation.exact_values(np.ones(3)), r'utilities have shape \(3,\); expected \[2\^n\]'),
    (lambda: valuation.exact_values(np.ones(4), np.ones(3)), r'coefficients have shape \(3,\)'),
    (lambda: valuation.exact_values(np.array([0, np.nan])), 'utility of subset 1 is not finite'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
