"""Tables over time: a NumPy history, a hand-made table of right and wrong, padding, bad ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import scores


def test_mean_and_spread_are_those_of_the_history():
  rng = np.random.default_rng(0)
  table, history = scores.trajectories(9), [[] for _ in range(9)]
  step = jax.jit(scores.record)
  for _ in range(12):
    ids, values = rng.permutation(8)[:5], 1e3 + rng.normal(size=5)
    table = step(table, jnp.asarray(ids), jnp.asarray(values, jnp.float32))
    for i, v in zip(ids, np.float32(values)):
      history[i].append(float(v))
  for i in range(8):
    assert table.count[i] == len(history[i])
    np.testing.assert_allclose(table.mean[i], np.mean(history[i]), rtol=1e-6)
    np.testing.assert_allclose(table.sd()[i], np.std(history[i]), rtol=1e-2)
  assert (table.count[8], table.mean[8], table.sd()[8]) == (0, 0, 0)


def test_forgetting_events():
  right = np.array([
    #  always, never, forgotten twice, learned late, forgotten at the end
    [1, 0, 1, 0, 1],
    [1, 0, 0, 0, 1],
    [1, 0, 1, 1, 1],
    [1, 0, 0, 1, 0],
  ], bool)  # fmt: skip
  table = scores.forgetting(5)
  for row in right:
    table = jax.jit(scores.record_correct)(table, jnp.arange(5), jnp.asarray(row))
  np.testing.assert_array_equal(table.score(), [0, np.inf, 2, 0, 1])


def test_padding_is_passed_over():
  """-1 would be the last example."""
  ids = jnp.array([-1, 0, -1])
  table = scores.record(scores.trajectories(2), ids, jnp.array([7.0, 1.0, 9.0]))
  np.testing.assert_array_equal(table.count, [1, 0])
  events = scores.record_correct(scores.forgetting(2), ids, jnp.array([True, False, True]))
  np.testing.assert_array_equal(events.ever_right, [False, False])


def test_what_is_seen_at_other_times_is_not_touched():
  table = scores.forgetting(2)
  for ids, correct in (([0, 1], [True, True]), ([0], [False]), ([0], [True]), ([1], [False])):
    table = scores.record_correct(table, jnp.array(ids), jnp.array(correct))
  np.testing.assert_array_equal(table.score(), [1, 1])


def test_errors():
  table = scores.trajectories(3)
  for ids, values, error, message in (
    ([0, 0], [1.0, 2.0], ValueError, 'example_ids hold 0 twice; give each once'),
    ([3], [1.0], IndexError, 'example_ids holds 3, but there are 3 entries'),
    ([0], [1.0, 2.0], ValueError, r'both must be \[B\]'),
    ([0.5], [1.0], TypeError, 'expected integers'),
  ):
    with pytest.raises(error, match=message):
      scores.record(table, jnp.array(ids), jnp.array(values))
