"""Weights of outputs and bins of examples: published values, loops, and the official defects."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw.weights import balanced_bins


def test_published_values():
  w = jaxrw.vertex_class_balance_weights([0.05, 0.02, 0.5, 0.0], blend=1.0)
  expected = [[0.0522, 0.9478], [0.021, 0.979], [0.5, 0.5], [0.021, 0.979]]  # floor of 20
  np.testing.assert_allclose(w, expected, atol=6e-4)
  np.testing.assert_allclose(w.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize('blend', [0.0, 0.3, 1.0])
def test_equals_a_loop(blend):
  shares, beta = np.random.default_rng(0).uniform(0, 0.3, 6), 0.999
  counts = [(1000 * (1 - s), 1000 * s) for s in shares]
  total = [np.mean([c[k] for c in counts]) for k in (0, 1)]
  table = jaxrw.vertex_class_balance_weights(shares, blend, beta=beta)
  for pair, own in zip(counts, table):
    mixed = [max(20, blend * n + (1 - blend) * t) for n, t in zip(pair, total)]
    mixed = [1000 * m / sum(mixed) for m in mixed]
    u = [(1 - beta) / (1 - beta**m) for m in mixed]
    np.testing.assert_allclose(own, np.array(u) / sum(u), rtol=1e-5)
  if blend == 0:  # one table for all outputs: the class-balanced loss of their average
    assert np.ptp(jaxrw.vertex_class_balance_weights(shares, 0.0)[:, 0]) == 0


def test_limits():
  even = jaxrw.vertex_class_balance_weights([0.5, 0.5], 1.0)
  np.testing.assert_allclose(even, 0.5)
  np.testing.assert_array_equal(
    jaxrw.vertex_class_balance_weights([0.1, 0.2], 1.0, beta=0.0), np.full((2, 2), 0.5)
  )


def test_stage_weighs_each_output_by_its_label():
  table = jaxrw.vertex_class_balance_weights([0.05, 0.5], 1.0)
  rw = jaxrw.vertex_class_balance([0.05, 0.5], 1.0)
  labels = jnp.array([[1, 0], [0, -1]])
  w, _ = rw.update(jnp.ones((2, 2)), (), losses=jnp.ones((2, 2)), labels=labels)
  np.testing.assert_allclose(w, [[table[0, 1], table[1, 0]], [table[0, 0], 1]], rtol=1e-6)
  w, _ = rw.update(jnp.ones((1, 2)), (), losses=jnp.ones((1, 2)), labels=jnp.array([[2, 0]]))
  np.testing.assert_array_equal(np.isnan(w), [[True, False]])


def test_bins_lose_nobody():
  """The published edges start above the lowest score, and the last bin ends before the highest."""
  rng = np.random.default_rng(0)
  scores = rng.normal(size=200)
  t = np.linspace(1e-5, 1, 6)
  edges = scores.min() + np.ptp(scores) * np.log1p(5 * t) / np.log1p(5)
  np.testing.assert_allclose(
    (edges - scores.min()) / np.ptp(scores), [2.8e-5, 0.387, 0.613, 0.774, 0.898, 1], atol=6e-4
  )
  naive = [np.sum((scores >= a) & (scores < b)) for a, b in itertools.pairwise(edges)]
  assert sum(naive) == 198
  ours = balanced_bins.bins(scores)
  assert np.bincount(ours, minlength=5).sum() == 200
  assert ours[np.argmin(scores)] == 0
  assert ours[np.argmax(scores)] == 4
  np.testing.assert_array_less(np.abs(np.bincount(ours, minlength=5) - naive), 2)


def test_drawing_balances_and_an_empty_bin_is_left_out():
  scores = np.r_[np.zeros(70), np.full(20, 0.5), np.ones(9)]  # two of five bins are empty
  drawn = balanced_bins.draw_balanced(scores, seed=1)
  assert [int(np.sum(scores[drawn] == s)) for s in (0, 0.5, 1)] == [33, 33, 33]
  assert len(np.unique(drawn[scores[drawn] == 0])) == 33  # without replacement
  counts = np.bincount(drawn, minlength=99)[scores == 1]
  assert np.ptp(counts) <= 1  # all examples of a small bin, as evenly as can be
  np.testing.assert_array_equal(drawn, balanced_bins.draw_balanced(scores, seed=1))


def test_weights_are_drawing_in_expectation():
  scores = np.random.default_rng(2).exponential(size=60)
  w = balanced_bins.bin_weights(scores)
  draws = [balanced_bins.draw_balanced(scores, seed=seed) for seed in range(500)]
  times = np.mean([np.bincount(drawn, minlength=60) for drawn in draws], axis=0)
  np.testing.assert_allclose(times / times.mean(), w, rtol=0.25)
  np.testing.assert_allclose(w.mean(), 1, rtol=1e-6)


def test_rarity_is_its_definition():
  on = np.random.default_rng(3).random((30, 8)) < 0.3
  mean = on.mean(axis=0)
  expected = (on * (1 - mean)).mean(axis=1) - (on * mean).mean(axis=1)
  np.testing.assert_allclose(balanced_bins.rarity_scores(on), expected)


def test_errors():
  for call, message in (
    (lambda: jaxrw.vertex_class_balance([0.1, 1.2]), r'shares=.* must be \[V\], each in \[0, 1\]'),
    (lambda: jaxrw.vertex_class_balance([0.1], blend=2), r'blend=2 must be in \[0, 1\]'),
    (lambda: jaxrw.vertex_class_balance([0.1], floor=0), r'floor=0 must be in'),
    (lambda: jaxrw.vertex_class_balance([0.1], beta=1), r'beta=1 must be in \[0, 1\)'),
    (lambda: balanced_bins.bins([np.nan]), r'scores must be \[N\], finite'),
    (lambda: balanced_bins.bins([1.0], 0), 'count=0 must be at least 1'),
    (lambda: balanced_bins.rarity_scores(np.ones(3)), r'expected \[N, V\]'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(ValueError, match=r'must be \[B, 1\], one column for each output'):
    jaxrw.vertex_class_balance([0.1]).update(
      jnp.ones(2), (), losses=jnp.ones(2), labels=jnp.zeros(2, int)
    )
