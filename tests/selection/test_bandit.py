"""The bandit over clusters: a Python loop, its limits, and whether it finds the good clusters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import selection


def test_a_loop_step_by_step():
  rng = np.random.default_rng(0)
  near = np.maximum(0, 1 - np.abs(np.subtract.outer(np.arange(6), np.arange(6))) / 2)
  state, total, visits = selection.cluster_bandit(6), np.zeros(6), np.zeros(6)
  for _ in range(10):
    mean = np.where(visits > 0, total / np.maximum(visits, 1), 0)
    bonus = np.sqrt(2 * np.log(max(visits.sum(), 1)) / (visits + 1))
    np.testing.assert_allclose(
      selection.bandit_scores(state, 0.7), mean + 0.7 * bonus, rtol=1e-5, atol=1e-6
    )
    clusters, rewards = rng.integers(0, 6, 3), rng.normal(size=3)
    for c, r in zip(clusters, rewards):
      total += near[c] * r
      visits += near[c] > 0
    state = selection.bandit_update(
      state, jnp.asarray(clusters), jnp.asarray(rewards), jnp.asarray(near)
    )
  assert visits.sum() == float(state.visits.sum())


def test_greedy_and_taking_turns():
  state = selection.bandit_update(
    selection.cluster_bandit(3), jnp.arange(3), jnp.array([1.0, 3.0, 2.0])
  )
  np.testing.assert_array_equal(selection.bandit_pick(state, 0.0, 3), [1, 2, 0])
  seen = []
  for _ in range(6):
    c = selection.bandit_pick(state, 1e6, 1)
    seen.append(int(c[0]))
    state = selection.bandit_update(state, c, jnp.zeros(1))
  assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]


def test_exhausted_clusters_are_not_picked():
  state = selection.cluster_bandit(3)._replace(exhausted=jnp.array([True, False, False]))
  np.testing.assert_array_equal(selection.bandit_pick(state, 1.0, 2), [1, 2])


def test_it_regrets_less_than_visiting_all_alike():
  """Thirty clusters, noisy rewards, 150 visits; ten repetitions."""
  clusters, visits = 30, 150

  @jax.jit
  def play(key):
    means = jax.random.normal(key, (clusters,))

    def step(state, key):
      c = selection.bandit_pick(state, 0.5, 1)
      reward = means[c] + jax.random.normal(key, (1,))
      return selection.bandit_update(state, c, reward), means[c[0]]

    _, got = jax.lax.scan(step, selection.cluster_bandit(clusters), jax.random.split(key, visits))
    return jnp.max(means) - jnp.mean(got), jnp.max(means) - jnp.mean(means)

  regret, even = np.array([play(jax.random.key(s)) for s in range(10)]).T
  assert np.all(regret < even)
  assert regret.mean() < 0.6 * even.mean()


def test_errors():
  state = selection.cluster_bandit(3)
  for call, message in (
    (lambda: selection.cluster_bandit(0), 'clusters=0'),
    (lambda: selection.bandit_pick(state, 1.0, 4), 'number=4 must be between 1 and 3'),
    (lambda: selection.bandit_update(state, jnp.array([0]), jnp.ones(2)), r'rewards \(2,\)'),
    (lambda: selection.bandit_update(state, jnp.array([0]), jnp.ones(1), jnp.eye(2)), 'neighbors'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
