"""Retrieval importance: all 2^M present sets, differences, limits, groups, and what it is for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import valuation


def _enumerated(p, u, k):
  """Expectation over all sets of present sources, in float64."""
  total = 0.0
  for present in itertools.product([0, 1], repeat=len(p)):
    chance = np.prod(np.where(present, p, 1 - np.asarray(p)))
    total += chance * sum(u[i] for i in np.flatnonzero(present)[:k]) / k
  return total


def _lists(seed, queries=7, ranks=6, sources=9):
  rng = np.random.default_rng(seed)
  ids = np.stack([rng.permutation(sources)[:ranks] for _ in range(queries)])
  return rng.uniform(0, 1, sources), ids, rng.normal(size=ids.shape)


@pytest.mark.parametrize('k', [1, 3, 6, 10])
@pytest.mark.parametrize('chunk', [1, 4, 100])
def test_value_and_gradient_are_enumerated(k, chunk):
  v, ids, u = _lists(k)
  with jax.enable_x64(True):
    value, gradient = valuation.retrieval_gradient(
      *map(jnp.asarray, (v, ids, u)), neighbors=k, chunk=chunk
    )
  mean = lambda v: np.mean([_enumerated(v[row], worth, k) for row, worth in zip(ids, u)])
  np.testing.assert_allclose(value, mean(v), rtol=1e-12)
  # F is affine in each v, so its derivative is exactly the difference of the ends.
  for i in range(9):
    ends = [mean(np.where(np.arange(9) == i, end, v)) for end in (1.0, 0.0)]
    np.testing.assert_allclose(gradient[i], ends[0] - ends[1], rtol=1e-10, atol=1e-14)


def test_the_gradient_is_that_of_the_soft_top_k():
  v, ids, u = _lists(0)

  def mean(v):
    return jnp.mean(
      jnp.stack([valuation.expected_utility(v[row], w, 3) for row, w in zip(ids, jnp.asarray(u))])
    )

  with jax.enable_x64(True):
    value, slope = jax.value_and_grad(mean)(jnp.asarray(v))
    found = valuation.retrieval_gradient(*map(jnp.asarray, (v, ids, u)), neighbors=3)
  np.testing.assert_allclose(found[0], value, rtol=1e-12)
  np.testing.assert_allclose(found[1], slope, rtol=1e-10, atol=1e-15)


def test_closed_forms():
  rng = np.random.default_rng(1)
  p, u = rng.uniform(size=8), rng.normal(size=8)
  all_in = valuation.expected_utility(jnp.asarray(p), jnp.asarray(u), 9)
  np.testing.assert_allclose(all_in, p @ u / 9, rtol=1e-5)
  first = np.sum(p * u * np.cumprod(np.append(1, 1 - p[:-1])))
  one = valuation.expected_utility(jnp.asarray(p), jnp.asarray(u), 1)
  np.testing.assert_allclose(one, first, rtol=1e-5)


def test_lists_that_are_shorter():
  v, ids, u = _lists(2)
  short = np.where(np.arange(6) < 4, ids, -1)
  with jax.enable_x64(True):
    cut = valuation.retrieval_gradient(*map(jnp.asarray, (v, ids[:, :4], u[:, :4])), neighbors=2)
    filled = valuation.retrieval_gradient(
      *map(jnp.asarray, (v, short, np.where(short < 0, np.nan, u))), neighbors=2
    )
  for a, b in zip(cut, filled):
    np.testing.assert_allclose(a, b, rtol=1e-12)


def test_learning_keeps_groups_alike_and_stays_in_bounds():
  _, ids, u = _lists(3, queries=40)
  groups = jnp.array([0, 0, 1, 1, 1, 2, -1, -1, 2])
  found = valuation.learn_importance(
    jnp.asarray(ids), jnp.asarray(u, jnp.float32), 9, 2, rate=5.0, steps=7, groups=groups
  )
  assert np.all((found >= 0) & (found <= 1))
  for g in range(3):
    assert np.ptp(found[np.asarray(groups) == g]) == 0
  free = np.full(9, 0.5)
  for _ in range(7):
    with jax.enable_x64(True):
      _, slope = valuation.retrieval_gradient(*map(jnp.asarray, (free, ids, u)), neighbors=2)
    free = np.clip(free + 5.0 * np.asarray(slope), 0, 1)
    for g in range(3):
      free[np.asarray(groups) == g] = free[np.asarray(groups) == g].mean()
  np.testing.assert_allclose(found, free, atol=1e-4)


def test_ranks_that_do_not_matter():
  rng = np.random.default_rng(4)
  v, ids, u = rng.uniform(0.3, 1, 60), np.stack([rng.permutation(60) for _ in range(5)]), None
  u = rng.choice([-1.0, 1.0], ids.shape)
  for error in (1e-2, 1e-4):
    needed = np.asarray(valuation.ranks_needed(jnp.asarray(v), jnp.asarray(ids), 5, error=error))
    assert 5 < needed.max() < 60
    for row in range(5):
      _, gradient = valuation.retrieval_gradient(
        *map(jnp.asarray, (v, ids[row : row + 1], u[row : row + 1])), neighbors=5
      )
      beyond = ids[row, needed[row] :]
      assert np.abs(np.asarray(gradient)[beyond]).max() <= error
  _, ids, u = _lists(5)
  whole = valuation.ranks_needed(jnp.zeros(9), jnp.asarray(ids), 3, error=0.1)
  np.testing.assert_array_equal(whole, np.full(7, 6))


def test_reliable_sources_are_told_from_others_and_pruning_helps():
  """200 queries, answers of sources that are right with probability .9 or .2."""
  rng = np.random.default_rng(6)
  sources, queries, k = 60, 400, 10
  reliable = rng.random(sources) < 0.4
  ids = np.stack([rng.permutation(sources)[:30] for _ in range(queries)])
  right = rng.random(ids.shape) < np.where(reliable[ids], 0.9, 0.2)
  v = np.asarray(
    valuation.learn_importance(
      jnp.asarray(ids[:200]), jnp.asarray(right[:200], jnp.float32), sources, k, rate=50.0, steps=50
    )
  )
  assert np.mean(v[reliable][:, None] > v[~reliable]) > 0.97
  counts = np.bincount(ids[:200].reshape(-1), minlength=sources)
  kept = valuation.kept_sources(v, counts, drop=0.5)

  def accuracy(kept):
    votes = [row[kept[own]][:k] for row, own in zip(right[200:], ids[200:])]
    return np.mean([np.mean(vote) > 0.5 for vote in votes])

  assert accuracy(kept) > accuracy(np.ones(sources, bool)) + 0.2


def test_kept_sources():
  v, counts = np.array([0.2, 0.9, 0.2, 0.5]), np.array([3, 3, 2, 2])
  np.testing.assert_array_equal(valuation.kept_sources(v, counts, 0.0), [True] * 4)
  np.testing.assert_array_equal(valuation.kept_sources(v, counts, 0.3), [False, True, True, True])
  np.testing.assert_array_equal(valuation.kept_sources(v, counts, 0.5), [False, True, False, True])


def test_errors():
  v, ids, u = _lists(0)
  learn = lambda ids=ids, u=u, sources=9, k=2, **settings: valuation.learn_importance(
    jnp.asarray(ids), jnp.asarray(u), sources, k, **({'rate': 1.0, 'steps': 1} | settings)
  )
  for call, error, message in (
    (lambda: learn(sources=5), IndexError, 'there are 5 sources'),
    (lambda: learn(k=0), ValueError, 'neighbors=0 must be at least 1'),
    (lambda: learn(u=u[:2]), ValueError, r'utilities \(2, 6\)'),
    (lambda: learn(u=u * np.nan), ValueError, 'utilities must be finite'),
    (lambda: learn(rate=0), ValueError, 'rate=0 must be greater than 0'),
    (lambda: learn(groups=jnp.zeros(3, int)), ValueError, r'groups have shape \(3,\)'),
    (lambda: valuation.kept_sources(v, v, 1.0), ValueError, r'drop=1\.0'),
    (lambda: valuation.expected_utility(jnp.ones(3), jnp.ones(2), 1), ValueError, r'\(2,\)'),
    (lambda: valuation.ranks_needed(v, ids, 2, error=0), ValueError, 'error=0'),
  ):
    with pytest.raises(error, match=message):
      call()


@pytest.mark.parametrize('cuts', [[3], [1, 2, 6], []])
def test_shards_are_as_good_as_the_whole(cuts):
  _, ids, u = _lists(3)
  groups = jnp.array([0, 0, 1, 1, 1, -1, 2, 2, -1])
  settings = dict(rate=3.0, steps=4, groups=groups)
  reads = []

  def read():
    reads.append(1)
    yield from zip(np.split(ids, cuts), np.split(u, cuts))

  with jax.enable_x64(True):
    whole = valuation.learn_importance(ids, u, 9, 2, **settings)
    found = valuation.streamed_importance(read, 9, 2, **settings)
  np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-14)
  assert len(reads) == 4


def test_errors_of_shards():
  _, ids, u = _lists(4)
  run = lambda *shards: valuation.streamed_importance(lambda: shards, 9, 2, rate=1.0, steps=1)
  with pytest.raises(ValueError, match='read\\(\\) gives no shards'):
    run()
  with pytest.raises(IndexError, match='shard 1'):
    run((ids, u), (ids + 1, u))
  with pytest.raises(ValueError, match='finite \\(shard 1\\)'):
    run((ids, u), (ids, np.where(ids == 0, np.nan, u)))
