"""Coverage: brute force, a loop, and limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import selection


def _radius(x, rows):
  return np.linalg.norm(x[:, None] - x[list(rows)], axis=-1).min(axis=1).max()


def test_k_center_is_within_twice_the_best():
  x = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
  rows = np.asarray(jax.jit(selection.k_center, static_argnames='budget')(jnp.asarray(x), 3))
  best = min(_radius(x, c) for c in itertools.combinations(range(12), 3))
  assert best <= _radius(x, rows) <= 2 * best + 1e-6


def test_k_center_is_a_loop():
  x = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
  chosen = [7]
  while len(chosen) < 8:
    distance = np.linalg.norm(x[:, None] - x[chosen], axis=-1).min(axis=1)
    chosen.append(int(np.argmax(distance)))
  np.testing.assert_array_equal(selection.k_center(jnp.asarray(x), 8, first=7), chosen)


def test_k_center_of_all_rows_and_of_copies():
  x = jnp.array([[0.0], [0.0], [1.0], [1.0]])
  assert sorted(np.asarray(selection.k_center(x, 4))) == [0, 1, 2, 3]


def test_greedy_interaction_is_a_loop_and_without_overlap_top_k():
  rng = np.random.default_rng(2)
  g, target, rate = rng.normal(size=(9, 4)), rng.normal(size=4), 0.3
  score, taken = rate * g @ target, []
  for _ in range(5):
    taken.append(int(np.argmax(score)))
    score = score - rate**2 * g @ g[taken[-1]]
    score[taken] = -np.inf
  with jax.enable_x64(True):
    found = selection.greedy_interaction(jnp.asarray(g @ target), jnp.asarray(g @ g.T), rate, 5)
  np.testing.assert_array_equal(found, taken)
  none = selection.greedy_interaction(jnp.asarray(g @ target), jnp.zeros((9, 9)), rate, 5)
  np.testing.assert_array_equal(none, np.argsort(-(g @ target))[:5])


def test_errors():
  x = jnp.ones((3, 2))
  for call, message in (
    (lambda: selection.k_center(x, 4), 'budget=4'),
    (lambda: selection.k_center(x[0], 1), r'shape \(2,\)'),
    (lambda: selection.greedy_interaction(jnp.ones(3), x, 1.0, 1), r'similarity \(3, 2\)'),
    (lambda: selection.greedy_interaction(jnp.ones(3), jnp.ones((3, 3)), 1.0, 4), 'budget=4'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
