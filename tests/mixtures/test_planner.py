"""The planner's promises: unbiased, within one row, without replacement, resumable."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrw.mixtures import Planner, shuffled_index, state_from_dict, state_to_dict


def run(planner, steps, state=None):
  """All plans of `steps` steps, joined, and the last state."""
  state = planner.init() if state is None else state
  plans = []
  for _ in range(steps):
    plan, state = planner.plan(state)
    plans.append(plan)
  return [np.stack(field) for field in zip(*plans)], state


@given(
  st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda p: sum(p) > 1e-6),
  st.integers(1, 64),
  st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_within_one_of_the_proportions_in_every_step(weights, batch_size, seed):
  planner = Planner([1000] * len(weights), batch_size, weights, seed)
  (domain, _, _, prob), state = run(planner, 3)
  wanted = batch_size * np.asarray(weights) / np.sum(weights)
  for row in domain:
    counts = np.bincount(row, minlength=len(weights))
    assert np.all(np.abs(counts - wanted) < 1 + 1e-9)
    assert np.all(counts[np.asarray(weights) == 0] == 0)
  np.testing.assert_allclose(prob, (wanted / batch_size)[domain], rtol=1e-6)
  assert state.used.sum() == 3 * batch_size


def test_counts_are_unbiased():
  weights = np.array([0.5, 0.3, 0.13, 0.07])
  planner = Planner([50] * 4, 5, weights, seed=3)
  steps = 2000
  _, state = run(planner, steps)
  np.testing.assert_allclose(planner.expected_counts(steps), steps * 5 * weights)
  # Each step's count is one of two neighboring integers, so its variance is at most 1/4.
  np.testing.assert_allclose(state.used, steps * 5 * weights, atol=4 * np.sqrt(steps / 4))


def test_every_row_sees_the_mixture():
  """The permutation leaves no row to one domain, which would tie domains to devices."""
  (domain, *_), _ = run(Planner([100] * 2, 4, [0.75, 0.25], seed=0), 2000)
  np.testing.assert_allclose((domain == 1).mean(axis=0), 0.25, atol=0.04)


def test_tiny_proportions_are_honored():
  planner = Planner([10, 10**6], 1024, [1e-5, 1 - 1e-5], seed=1)
  _, state = run(planner, 1500)  # expected: 15.36 rows
  assert 5 <= state.used[0] <= 30


@pytest.mark.parametrize('size', [1, 2, 3, 16, 17, 100, 1025])
def test_shuffle_is_a_bijection_that_differs_by_seed_domain_and_epoch(size):
  orders = [
    tuple(shuffled_index(np.arange(size), size, seed, domain, epoch))
    for seed, domain, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
  ]
  assert all(sorted(order) == list(range(size)) for order in orders)
  if size >= 100:
    assert len(set(orders)) == 4
    assert np.mean(np.asarray(orders[0]) == np.arange(size)) < 0.05


def test_shuffle_sends_every_record_everywhere():
  size, epochs = 7, 7000
  order = shuffled_index(np.arange(size)[None], size, 0, 0, np.arange(epochs)[:, None])
  for record in range(size):
    hits = np.bincount(np.argwhere(order == record)[:, 1], minlength=size)
    np.testing.assert_allclose(hits, epochs / size, rtol=0.12)  # about 4 standard deviations


def test_no_replacement_inside_an_epoch_and_all_records_used():
  sizes = [7, 20, 1]
  (domain, index, epoch, _), _ = run(Planner(sizes, 6, [1, 1, 1], seed=5), 40)
  for k, size in enumerate(sizes):
    mine = domain == k
    for e in range(epoch[mine].max()):  # all complete epochs
      assert sorted(index[mine & (epoch == e)]) == list(range(size))


@given(st.integers(0, 2**40), st.integers(1, 32), st.data())
@settings(max_examples=40, deadline=None)
def test_live_proportions_keep_every_promise(seed, batch_size, data):
  """Other proportions in every step: each step within one row, nothing drawn at 0, no record twice
  in an epoch, and a restart at any step, from JSON, plans the same."""
  sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
  rng = np.random.default_rng(seed)
  shares = rng.dirichlet(np.full(len(sizes), 0.3), size=8)
  shares[shares < 0.02] = 0
  shares[np.arange(8), shares.argmax(1)] += 1 - shares.sum(1)
  planner, state, seen = Planner(sizes, batch_size, np.ones(len(sizes)), seed), None, set()
  restart_at = data.draw(st.integers(0, 7))
  for step, share in enumerate(shares):
    state = planner.init() if state is None else state
    if step == restart_at:
      state = state_from_dict(json.loads(json.dumps(state_to_dict(state))))
      planner = Planner(sizes, batch_size, np.ones(len(sizes)), seed)
    plan, state = planner.plan(state, share)
    counts = np.bincount(plan.domain, minlength=len(sizes))
    assert np.all(np.abs(counts - batch_size * share) < 1 + 1e-9)
    assert not np.any(counts[share == 0])
    np.testing.assert_allclose(plan.sampling_prob, share[plan.domain], rtol=1e-6)
    rows = set(zip(plan.domain.tolist(), plan.epoch.tolist(), plan.index.tolist()))
    assert len(rows) == batch_size
    assert not rows & seen
    seen |= rows
  whole = Planner(sizes, batch_size, np.ones(len(sizes)), seed)
  again = whole.init()
  for share in shares:
    _, again = whole.plan(again, share)
  assert state_to_dict(again) == state_to_dict(state)


def test_live_counts_are_unbiased_down_to_a_millionth():
  """Proportions that swing between steps, one of them 1e-6: expected 4 rows in 1000 steps."""
  rare, steps, batch_size = 1e-6, 1000, 4096
  planner = Planner([10**6] * 3, batch_size, [1, 1, 1], seed=2)
  state, wanted = planner.init(), np.zeros(3)
  for step in range(steps):
    share = np.array([rare, 0.5 + 0.3 * np.sin(step), 0])
    share[2] = 1 - share.sum()
    wanted += batch_size * share
    _, state = planner.plan(state, share)
  assert 1 <= state.used[0] <= 9
  np.testing.assert_allclose(state.used[1:], wanted[1:], atol=4 * np.sqrt(steps / 4))


def test_equal_parts_of_the_rows_are_the_same_for_any_number_of_hosts():
  planner = Planner([50, 9], 8, [0.7, 0.3], seed=3)
  plan, _ = planner.plan(planner.init(), [0.2, 0.8])
  for hosts in (1, 2, 4):
    again, _ = Planner([50, 9], 8, [0.7, 0.3], seed=3).plan(planner.init(), [0.2, 0.8])
    parts = [again.index[h * 8 // hosts : (h + 1) * 8 // hosts] for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), plan.index)


@pytest.mark.slow
@given(st.integers(0, 2**40), st.integers(1, 16), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_a_limit_of_epochs_is_kept_to_the_record_and_shared_out(seed, batch_size, max_epochs):
  sizes, weights = np.array([3, 40, 200, 5]), np.array([0.5, 0.3, 0.2, 0.0])
  planner = Planner(sizes, batch_size, weights, seed, max_epochs)
  state, steps = planner.init(), max_epochs * 243 // batch_size
  expected = planner.expected_counts(steps)
  for _ in range(steps):
    before = state
    plan, state = planner.plan(state)
    open_ = (before.used < max_epochs * sizes) & (weights > 0)
    if np.all(before.used + batch_size <= max_epochs * sizes, where=open_):
      np.testing.assert_allclose(  # what is shut goes to the others in their proportions
        plan.sampling_prob, (weights * open_ / weights[open_].sum())[plan.domain], rtol=1e-5
      )
  assert np.all(state.used <= max_epochs * sizes)
  assert state.used[3] == 0
  assert state.used[0] == 3 * max_epochs or expected[0] < 3 * max_epochs
  left = max_epochs * sizes[:3].sum() - state.used.sum()
  if left < batch_size:
    with pytest.raises(ValueError, match=f'step {steps}: .* {left} records left for {batch_size}'):
      planner.plan(state)
    with pytest.raises(ValueError, match='raise max_epochs'):
      planner.expected_counts(steps + 1)


def test_expected_counts_under_a_limit_are_what_a_run_uses():
  planner = Planner([10, 30, 1000], 6, [0.5, 0.3, 0.2], seed=0, max_epochs=2)
  expected = planner.expected_counts(100)
  np.testing.assert_allclose(expected, [20, 60, 520])
  _, state = run(planner, 100)
  np.testing.assert_array_equal(state.used, expected)


def test_resume_from_json_is_exact():
  planner = Planner([11, 5], 4, [0.6, 0.4], seed=9)
  _, middle = run(planner, 5)
  expected, last = run(planner, 6, middle)
  restored = state_from_dict(json.loads(json.dumps(state_to_dict(middle))))
  again, last_again = run(Planner([11, 5], 4, [0.6, 0.4], seed=9), 6, restored)
  for a, b in zip(expected, again):
    np.testing.assert_array_equal(a, b)
  assert state_to_dict(last) == state_to_dict(last_again)


def test_seeds_differ_and_plans_do_not_depend_on_the_numpy_version():
  """Golden numbers: a change of any of them breaks the exact resume of every stored checkpoint."""
  plan, _ = Planner([100, 1000], 6, [0.4, 0.6], seed=0).plan(
    Planner([100, 1000], 6, [0.4, 0.6], seed=0).init()
  )
  other, _ = Planner([100, 1000], 6, [0.4, 0.6], seed=1).plan(
    Planner([100, 1000], 6, [0.4, 0.6], seed=1).init()
  )
  assert plan.index.tolist() != other.index.tolist()
  assert plan.domain.tolist() == [1, 1, 0, 0, 1, 0]
  assert plan.index.tolist() == [482, 710, 5, 43, 281, 4]


def test_thousands_of_domains_are_fast():
  weights = np.random.default_rng(0).random(4096)
  planner = Planner([10**7] * 4096, 1024, weights, seed=0)
  start = time.perf_counter()
  _, state = run(planner, 20)
  assert (time.perf_counter() - start) / 20 < 0.05  # about 2 ms on a quiet core
  assert state.used.sum() == 20 * 1024


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    (dict(sizes=[5, 0], proportions=[0.5, 0.5]), 'domain 1 has no records'),
    (dict(sizes=[5], proportions=[0.5, 0.5]), 'equally long'),
    (dict(sizes=[5, 5], proportions=[0.0, 0.0]), 'all zero'),
    (dict(sizes=[5, 5], proportions=[1.0, -0.1]), 'non-negative'),
    (dict(sizes=[5, 5], proportions=[1.0, np.nan]), 'finite'),
    (dict(sizes=[5, 5], proportions=[1, 1], batch_size=0), 'batch_size=0'),
    (dict(sizes=[5, 5], proportions=[1, 1], max_epochs=-1), 'max_epochs=-1'),
  ],
)
def test_impossible_arguments(kwargs, message):
  with pytest.raises(ValueError, match=message):
    Planner(**{'batch_size': 4, 'seed': 0, **kwargs})


@pytest.mark.parametrize(
  ('share', 'message'),
  [
    ([0.5, 0.4], r'sum to 0\.9; expected 1'),
    ([np.nan, 1.0], 'finite'),
    ([1.5, -0.5], 'non-negative'),
    ([0.5, 0.5, 0.0], 'equally long'),
    ([0.0, 0.0], 'all zero'),
  ],
)
def test_impossible_live_proportions(share, message):
  planner = Planner([5, 5], 4, [1, 1], seed=0)
  with pytest.raises(ValueError, match=message):
    planner.plan(planner.init(), share)


def test_live_proportions_of_an_empty_domain():
  planner = Planner([5, 0], 4, [1, 0], seed=0)
  with pytest.raises(ValueError, match='domain 1 has no records'):
    planner.plan(planner.init(), [0.9, 0.1])


def test_an_empty_domain_without_a_share_is_fine():
  (domain, *_), _ = run(Planner([5, 0, 5], 4, [0.5, 0.0, 0.5], seed=0), 50)
  assert set(domain.ravel()) == {0, 2}
