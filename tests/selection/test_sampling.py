"""Selection by chance: enumerated probabilities, meshes, rounds."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrw import selection

LOG_W = np.log([0.1, 0.2, 0.3, 0.4])


def _draws(budget, number=4000, **settings):
  draw = lambda key: selection.gumbel_top_k(key, jnp.asarray(LOG_W), budget, **settings)
  return np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), number)))


@pytest.mark.parametrize(('budget', 'temperature'), [(1, 1.0), (2, 1.0), (2, 0.5), (3, 2.0)])
def test_inclusion_probabilities_are_enumerated(budget, temperature):
  """Plackett-Luce: one after the other, in proportion to what is left."""
  w, expected = np.exp(LOG_W / temperature), np.zeros(4)
  for order in itertools.permutations(range(4), budget):
    p, left = 1.0, w.sum()
    for i in order:
      p *= w[i] / left
      left -= w[i]
    expected[list(order)] += p
  found = _draws(budget, temperature=temperature)
  assert np.all(found.sum(axis=1) == budget)
  error = np.sqrt(expected * (1 - expected) / len(found))
  assert np.all(np.abs(found.mean(axis=0) - expected) < 4 * error + 1e-9)


def test_the_smallest_of_negated_weights_is_another_distribution():
  """What MATES' code keeps: the k smallest of -log w + Gumbel noise."""
  noise = np.random.default_rng(0).gumbel(size=(40_000, 4))
  naive = np.bincount(np.argmin(-LOG_W + noise, axis=1), minlength=4) / 40_000
  assert np.abs(naive - np.exp(LOG_W)).max() > 0.02
  right = _draws(1, 10_000).mean(axis=0)
  assert np.abs(right - np.exp(LOG_W)).max() < 0.02


def test_temperatures_at_the_ends():
  np.testing.assert_array_equal(_draws(2, 5, temperature=0)[0], [False, False, True, True])
  even = _draws(2, 4000, temperature=float('inf')).mean(axis=0)
  assert np.abs(even - 0.5).max() < 0.04


def test_the_noise_hangs_on_the_id():
  """On eight devices, in shards, in another order: the same examples."""
  rng = np.random.default_rng(1)
  log_w, ids, key = rng.normal(size=64), rng.permutation(1000)[:64], jax.random.key(3)
  take = lambda rows: selection.gumbel_top_k(
    key, jnp.asarray(log_w[rows]), 10, example_ids=jnp.asarray(ids[rows])
  )
  whole = set(ids[np.asarray(take(np.arange(64)))])
  mixed = rng.permutation(64)
  assert set(ids[mixed][np.asarray(take(mixed))]) == whole
  tops = [i for part in np.split(np.arange(64), 4) for i in part[np.asarray(take(part))]]
  tops = np.array(tops)
  assert set(ids[tops][np.asarray(take(tops))]) == whole
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  spread = jax.jit(lambda w, i: selection.gumbel_top_k(key, w, 10, example_ids=i))(
    jax.device_put(jnp.asarray(log_w), rows), jax.device_put(jnp.asarray(ids), rows)
  )
  assert set(ids[np.asarray(spread)]) == whole


def test_ids_of_two_words():
  """Beyond 2^31 examples: (high, low)."""
  key, w = jax.random.key(0), jnp.zeros(3)
  ids = jnp.array([[0, 5], [1, 5], [0, 6]], jnp.uint32)
  noisy = selection.perturbed(key, w, example_ids=ids)
  assert len(np.unique(noisy)) == 3
  np.testing.assert_array_equal(selection.perturbed(key, w[:1], example_ids=ids[1:2])[0], noisy[1])


def test_impossible_examples_come_last():
  kept = selection.gumbel_top_k(jax.random.key(0), jnp.array([-jnp.inf, 0.0, 0.0]), 2)
  np.testing.assert_array_equal(kept, [False, True, True])


def test_stochastic_rounding_is_unbiased_and_within_one():
  weights = jnp.array([0.0, 0.3, 1.0, 2.75])
  draws = jax.vmap(lambda k: selection.stochastic_round(k, weights))(
    jax.random.split(jax.random.key(0), 4000)
  )
  assert np.abs(draws - weights).max() < 1
  np.testing.assert_allclose(draws.mean(axis=0), weights, atol=0.03)
  np.testing.assert_array_equal(draws[:, ::2].std(axis=0), [0, 0])


def test_noisy_threshold_has_the_distribution_it_says():
  quality = jnp.tile(jnp.array([0.0, 0.5, 0.9, 0.99]), (20_000, 1))
  kept = np.asarray(selection.noisy_threshold(jax.random.key(0), quality, 4.0)).mean(axis=0)
  expected = (2 - np.array([0.0, 0.5, 0.9, 0.99])) ** -4.0
  np.testing.assert_allclose(kept, expected, atol=0.012)


def test_copies_count_as_one():
  """Soft deduplication gives the mean gradient of the corpus without copies."""
  rng = np.random.default_rng(0)
  values, times = rng.normal(size=6), np.array([1, 4, 2, 1, 1, 3])
  copied, cluster = np.repeat(values, times), np.repeat(np.arange(6), times)
  w = np.asarray(selection.soft_dedup(jnp.asarray(cluster), 6))
  np.testing.assert_allclose(np.average(copied, weights=w), values.mean(), rtol=1e-6)
  np.testing.assert_allclose(selection.soft_dedup(jnp.array([-1, -1]), 6), [1, 1])


@pytest.mark.parametrize('replacement', [False, True])
def test_rs2_rounds(replacement):
  key = jax.random.key(0)
  draw = jax.jit(lambda t: selection.rs2(key, t, 23, 5, replacement=replacement))
  rounds = np.stack([np.asarray(draw(t)) for t in range(400)])
  assert all(len(set(rows)) == 5 for rows in rounds)
  frequency = np.bincount(rounds.reshape(-1), minlength=23) / 400
  assert np.abs(frequency - 5 / 23).max() < 4.5 * np.sqrt(5 / 23 * 18 / 23 / 400)
  cycles = rounds.reshape(100, 20)  # of 4 rounds
  unique = np.mean([len(set(c)) for c in cycles])
  if replacement:
    np.testing.assert_allclose(unique / 23, 1 - (1 - 5 / 23) ** 4, atol=0.03)
  else:
    assert unique == 20


def test_rs2_of_everything_is_an_epochs_shuffle():
  key = jax.random.key(4)
  for epoch in range(3):
    rows = selection.rs2(key, epoch, 10, 10)
    expected = jax.random.permutation(jax.random.fold_in(key, epoch), 10)
    np.testing.assert_array_equal(rows, expected)


def test_errors():
  key, w = jax.random.key(0), jnp.zeros(3)
  for call, error, message in (
    (lambda: selection.gumbel_top_k(key, w, 4), ValueError, 'budget=4'),
    (lambda: selection.gumbel_top_k(key, w, 1, temperature=-1), ValueError, 'temperature=-1'),
    (lambda: selection.gumbel_top_k(key, w.at[0].set(jnp.nan), 1), ValueError, 'hold NaN'),
    (lambda: selection.gumbel_top_k(key, w, 1, example_ids=jnp.ones(2, int)), ValueError, 'of N'),
    (lambda: selection.stochastic_round(key, -w - 1), ValueError, 'at least 0'),
    (lambda: selection.noisy_threshold(key, w, 0), ValueError, 'alpha=0 must be greater than 0'),
    (lambda: selection.soft_dedup(jnp.array([2]), 2), IndexError, 'cluster_ids holds 2'),
    (lambda: selection.rs2(key, 0, 5, 6), ValueError, 'budget=6 must be between 1 and 5'),
  ):
    with pytest.raises(error, match=message):
      call()
