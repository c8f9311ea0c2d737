"""The row-shuffled control: the right weights on the wrong rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

INNER = jaxrw.linupper(0.4)
SHUFFLED = jaxrw.row_shuffled(INNER)


@jax.jit
def _both(losses, base, weights, seed):
  key = jax.random.key(seed)
  shuffled, _ = SHUFFLED.update(weights, (), losses=losses, base=base, key=key)
  return shuffled, INNER.update(weights, (), losses=losses, base=base)[0]


def test_a_permutation_of_the_same_weights():
  losses = jnp.asarray(np.random.default_rng(0).gamma(4.0, 0.7, 32), jnp.float32)
  ones = jnp.ones(32)
  shuffled, own = _both(losses, ones, ones, 0)
  np.testing.assert_allclose(np.sort(shuffled), np.sort(own), rtol=1e-6)
  assert np.mean(np.asarray(shuffled) == np.asarray(own)) < 0.8
  again, _ = _both(losses, ones, ones, 0)
  other, _ = _both(losses, ones, ones, 1)
  np.testing.assert_array_equal(shuffled, again)
  assert np.any(np.asarray(shuffled) != np.asarray(other))


def test_every_permutation_of_the_valid_rows_is_equally_likely():
  """Chi-square over the 3! orders of three valid rows among padding; 24 draws each on average."""
  losses = jnp.array([9.0, 1.0, 5.0, 1.5, 7.0])
  base = jnp.array([0.0, 1.0, 0.0, 1.0, 1.0])
  keys = jax.vmap(jax.random.key)(jnp.arange(144))
  run = lambda key: SHUFFLED.update(jnp.ones(5), (), losses=losses, base=base, key=key)[0]
  draws = np.asarray(jax.jit(jax.vmap(run))(keys))
  assert np.all(draws[:, [0, 2]] == 0), 'padding took part'
  orders = np.argsort(draws[:, [1, 3, 4]], axis=1)
  counts = [np.sum(np.all(orders == p, axis=1)) for p in itertools.permutations(range(3))]
  assert sum(counts) == 144
  assert np.sum((np.array(counts) - 24) ** 2 / 24) < 20.5  # 99.9% point, 5 degrees of freedom


def test_uneven_base_and_incoming_weights_keep_the_weighted_sum():
  rng = np.random.default_rng(1)
  losses = jnp.asarray(rng.gamma(4.0, 0.7, 32), jnp.float32)
  base = jnp.asarray(rng.integers(0, 6, 32), jnp.float32)
  weights = jnp.asarray(rng.uniform(0, 2, 32), jnp.float32).at[4].set(0)
  shuffled, _ = _both(losses, base, weights, 3)
  np.testing.assert_allclose(jnp.sum(base * shuffled), jnp.sum(base * weights), rtol=1e-6)
  assert shuffled[4] == 0, 'an incoming weight of 0 stays 0'
  own = jaxrw.linupper_weights(losses, 0.4, base=base, weights=weights)
  valid = np.asarray(base * weights) > 0
  ratio = np.sort((shuffled / weights)[valid]) / np.sort((own / weights)[valid])
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)  # the same multipliers, one common factor


def test_whole_examples_are_shuffled_when_losses_are_per_token():
  rng = np.random.default_rng(2)
  losses = jnp.asarray(rng.gamma(4.0, 0.7, (8, 3)), jnp.float32)
  base = jnp.ones((8, 3)).at[2].set(0).at[5, 1].set(0)
  w, _ = SHUFFLED.update(jnp.ones((8, 3)), (), losses=losses, base=base, key=jax.random.key(0))
  assert np.all(np.ptp(np.asarray(w), axis=1) == 0)
  assert np.all(np.asarray(w)[2] == 0)
  np.testing.assert_allclose(jnp.sum(base * w), jnp.sum(base), rtol=1e-6)


def test_the_step_draws_anew_at_every_step_and_repeats_for_a_seed():
  import optax

  losses = jnp.arange(16.0)
  tx = optax.sgd(0.0)
  batch = {'x': losses}

  def run(seed):
    step = jax.jit(jaxrw.make_train_step(lambda p, e: e['x'] + 0 * p, tx, SHUFFLED, seed=seed))
    state, all_weights = jaxrw.TrainState.create(jnp.zeros(()), tx, SHUFFLED), []
    for _ in range(3):
      state, metrics = step(state, batch)
      all_weights.append(np.asarray(metrics['weights']))
    return np.stack(all_weights)

  first = run(0)
  assert not np.array_equal(first[0], first[1])
  np.testing.assert_array_equal(first, run(0))
  assert not np.array_equal(first, run(1))


def test_a_missing_key_is_named():
  with pytest.raises(TypeError, match='key'):
    SHUFFLED.update(jnp.ones(3), (), losses=jnp.arange(3.0))


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_nonfinite_loss_is_not_shuffled_away(bad):
  losses = jnp.arange(8.0).at[2].set(bad)
  shuffled, _ = _both(losses, jnp.ones(8), jnp.ones(8), 0)
  assert np.all(np.isnan(shuffled))
