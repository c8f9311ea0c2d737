"""Masks from scores: sorting by hand, exact budgets, ties, floors, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import selection


@pytest.mark.parametrize('side', ['high', 'low'])
@pytest.mark.parametrize('skip', [0, 3])
def test_a_window_of_the_ranking(side, skip):
  scores = np.random.default_rng(0).permutation(20) / 3
  order = np.argsort(-scores if side == 'high' else scores)
  kept = jax.jit(
    lambda s: selection.keep_window(s, 5, side=side, skip=skip)  # all three are static
  )(jnp.asarray(scores))
  assert set(np.flatnonzero(kept)) == set(order[skip : skip + 5])


def test_ties_go_by_position_and_budgets_are_exact():
  for budget in range(6):
    kept = selection.keep_window(jnp.zeros(5), budget)
    np.testing.assert_array_equal(kept, np.arange(5) < budget)
  infinite = jnp.array([jnp.inf, 0, -jnp.inf, jnp.inf])
  np.testing.assert_array_equal(selection.keep_window(infinite, 3), [True, True, False, True])


def test_padding_is_never_kept():
  scores, valid = jnp.array([9.0, 1.0, jnp.nan, 2.0]), jnp.array([False, True, False, True])
  np.testing.assert_array_equal(
    selection.keep_window(scores, 2, valid=valid), [False, True, False, True]
  )
  with pytest.raises(ValueError, match='together at most 2, the examples there are'):
    selection.keep_window(scores, 3, valid=valid)


def test_nan_in_a_traced_program_ranks_last():
  kept = jax.jit(lambda s: selection.keep_window(s, 2))(jnp.array([jnp.nan, 1.0, 2.0]))
  np.testing.assert_array_equal(kept, [False, True, True])


@pytest.mark.parametrize('side', ['high', 'low'])
def test_by_group_is_a_loop(side):
  rng = np.random.default_rng(1)
  scores, groups = rng.normal(size=60), rng.integers(-1, 4, 60)
  budgets = np.array([3, 0, 100, 7])
  kept = np.asarray(
    jax.jit(lambda *a: selection.keep_by_group(*a, side=side))(
      jnp.asarray(scores), jnp.asarray(groups), jnp.asarray(budgets)
    )
  )
  for g in range(4):
    rows = np.flatnonzero(groups == g)
    best = rows[np.argsort(scores[rows] if side == 'low' else -scores[rows])][: budgets[g]]
    assert set(np.flatnonzero(kept & (groups == g))) == set(best)
  assert not kept[groups == -1].any()


def test_easy_and_hard_halves_do_not_meet():
  rng = np.random.default_rng(2)
  scores, labels = jnp.asarray(rng.normal(size=40)), jnp.asarray(np.arange(40) % 4)
  easy, hard = (
    selection.keep_by_group(scores, labels, jnp.full(4, 5), side=side) for side in ('low', 'high')
  )
  assert not (easy & hard).any()
  assert easy.sum() == hard.sum() == 20


def test_groups_by_rank_lose_a_class_and_floors_do_not():
  """Kept by rank alone, a class whose scores are low vanishes."""
  rng = np.random.default_rng(3)
  labels = np.repeat([0, 1, 2], [100, 100, 100])
  scores = rng.normal(size=300) + np.array([4.0, 4.0, 0.0])[labels]
  naive = np.asarray(selection.keep_window(jnp.asarray(scores), 60))
  wanted = np.bincount(labels[naive], minlength=3)
  assert wanted[2] == 0
  budgets = selection.group_budgets(np.full(3, 100), wanted, 60, floor=0.5)
  assert budgets.sum() == 60
  assert budgets[2] == 10
  kept = selection.keep_by_group(jnp.asarray(scores), jnp.asarray(labels), budgets)
  assert kept.sum() == 60


def test_group_budgets():
  sizes = np.array([3, 50, 50])
  np.testing.assert_array_equal(  # nothing to pay for: what is wanted
    selection.group_budgets(sizes, np.array([2, 20, 8]), 30, floor=0.0), [2, 20, 8]
  )
  np.testing.assert_array_equal(  # even, as far as there are any
    selection.group_budgets(sizes, np.array([0, 30, 0]), 31, floor=1.0), [3, 14, 14]
  )
  for seed in range(50):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 30, 6)
    budget, floor = int(rng.integers(0, sizes.sum() + 1)), rng.random()
    wanted = rng.multinomial(budget, np.full(6, 1 / 6))
    found = selection.group_budgets(sizes, np.minimum(wanted, sizes), budget, floor)
    assert found.sum() == budget
    assert np.all(found <= sizes)
    even = np.minimum(sizes, budget // 6)  # at least
    assert np.all(found >= np.floor(floor * even))


def test_stratified_is_even_over_the_scores():
  rng = np.random.default_rng(4)
  scores = np.concatenate([rng.uniform(0, 0.1, 900), rng.uniform(0.1, 1, 90), [1.0]])
  kept = np.asarray(selection.stratified(jax.random.key(0), jnp.asarray(scores), 100, strata=10))
  assert kept.sum() == 100
  bins = np.bincount(np.minimum(9, (scores[kept] * 10).astype(int)), minlength=10)
  assert bins.max() <= 12
  skipped = selection.stratified(jax.random.key(0), jnp.asarray(scores), 50, skip=0.05)
  assert scores[np.asarray(skipped)].max() <= np.sort(scores)[-51]
  other = selection.stratified(jax.random.key(1), jnp.asarray(scores), 100, strata=10)
  assert (other != kept).any()


def test_stratified_of_equal_scores_is_a_random_subset():
  kept = selection.stratified(jax.random.key(0), jnp.ones(30), 7)
  assert kept.sum() == 7


def test_errors():
  scores, groups = jnp.arange(4.0), jnp.array([0, 0, 1, 1])
  one = jnp.array([1, 1])
  nan = scores.at[2].set(jnp.nan)
  for call, error, message in (
    (lambda: selection.keep_window(scores, 5), ValueError, 'budget=5 and skip=0 .* at most 4'),
    (lambda: selection.keep_window(scores, 3, skip=2), ValueError, 'skip=2'),
    (lambda: selection.keep_window(scores, -1), ValueError, 'budget=-1'),
    (lambda: selection.keep_window(nan, 2), ValueError, r'hold NaN \(1 of 4, the first at 2\)'),
    (lambda: selection.keep_window(scores, 2, side='top'), ValueError, "side='top' must be"),
    (lambda: selection.keep_window(scores[None], 2), ValueError, r'both must be \[N\]'),
    (lambda: selection.keep_by_group(scores, groups + 1, one), IndexError, 'group_ids holds 2'),
    (lambda: selection.keep_by_group(scores, groups, -one), ValueError, 'at least 0'),
    (lambda: selection.keep_by_group(scores, groups[:2], one), ValueError, r'\[N\], \[N\]'),
    (lambda: selection.group_budgets([3], [2], 4, 0.0), ValueError, 'budget=4 must be between'),
    (lambda: selection.group_budgets([3], [2], 2, 2.0), ValueError, 'floor=2.0 must be in'),
    (lambda: selection.stratified(jax.random.key(0), nan, 2), ValueError, 'finite'),
    (lambda: selection.stratified(jax.random.key(0), scores, 4, skip=0.5), ValueError, 'and 2'),
  ):
    with pytest.raises(error, match=message):
      call()
