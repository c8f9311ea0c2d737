"""Selective backprop: its probabilities against a loop, its history against a deque."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw


def test_history_is_that_of_a_deque():
  rw = jaxrw.selective_backprop(history=5)
  update, state = jax.jit(rw.update), rw.init()
  rng, remembered = np.random.default_rng(0), collections.deque(maxlen=5)
  for size in (3, 3, 8, 1):
    losses = rng.normal(size=size).astype(np.float32)
    base = rng.integers(0, 2, size).astype(np.float32)
    losses[0], base[0] = np.nan, 1  # broken: not remembered
    key = jax.random.key(size)
    _, state = update(jnp.ones(size), state, losses=losses, base=base, key=key)
    remembered.extend(x for x, b in zip(losses, base) if b > 0 and np.isfinite(x))
    held = np.asarray(state.losses)
    np.testing.assert_array_equal(np.sort(held[~np.isnan(held)]), np.sort(remembered))


@pytest.mark.parametrize(('power', 'least'), [(1.0, 0.0), (3.0, 0.2)])
def test_examples_are_kept_as_often_as_the_percentile_says(power, least):
  """Frequencies over many keys, within 4 standard errors; ties count as not below."""
  seen = jnp.array([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
  rw = jaxrw.selective_backprop(power, least, history=8)
  _, state = rw.update(jnp.ones(8), rw.init(), losses=seen, key=jax.random.key(0))
  losses = np.array([0.5, 1.0, 3.5, 7.0, 9.0], np.float32)
  expected = np.maximum(([0, 0, 4, 7, 8] / np.float64(8)) ** power, least)
  draws = 4000
  kept = jax.jit(jax.vmap(lambda key: rw.update(jnp.ones(5), state, losses=losses, key=key)[0] > 0))
  frequency = np.mean(kept(jax.random.split(jax.random.key(1), draws)), axis=0)
  error = np.sqrt(expected * (1 - expected) / draws)
  np.testing.assert_array_less(np.abs(frequency - expected), 4 * error + 1e-9)


def test_the_kept_examples_share_the_mass():
  rw = jaxrw.selective_backprop(1.0, history=8)
  base = jnp.arange(1.0, 9.0)
  _, state = rw.update(jnp.ones(8), rw.init(), losses=jnp.arange(8.0), key=jax.random.key(0))
  w, _ = rw.update(jnp.ones(8), state, losses=jnp.arange(8.0), base=base, key=jax.random.key(5))
  assert 0 < np.sum(w > 0) < 8
  assert np.ptp(w[w > 0]) == 0
  np.testing.assert_allclose(np.sum(base * w), np.sum(base), rtol=1e-6)


def test_limits():
  """Power 0 keeps all; the lowest loss ever has no chance, and a batch of those keeps nothing."""
  for rw, expected in ((jaxrw.selective_backprop(0.0), 1), (jaxrw.selective_backprop(3.0), 0)):
    _, state = rw.update(jnp.ones(4), rw.init(), losses=jnp.full(4, 2.0), key=jax.random.key(0))
    w, _ = rw.update(jnp.ones(4), state, losses=jnp.ones(4), key=jax.random.key(1))
    np.testing.assert_array_equal(w, np.full(4, expected))


def test_a_broken_loss_is_not_left_out_by_chance():
  rw = jaxrw.selective_backprop(3.0)
  _, state = rw.update(jnp.ones(4), rw.init(), losses=jnp.ones(4), key=jax.random.key(0))
  w, _ = rw.update(jnp.ones(2), state, losses=jnp.array([jnp.nan, 0.0]), key=jax.random.key(1))
  assert np.all(np.isnan(w))


def test_errors():
  with pytest.raises(ValueError, match='power=-1 must be at least 0'):
    jaxrw.selective_backprop(-1)
  with pytest.raises(ValueError, match=r'least=2 must be in \[0, 1\]'):
    jaxrw.selective_backprop(1.0, 2)
  with pytest.raises(ValueError, match='history=0 must be greater than 0'):
    jaxrw.selective_backprop(history=0)
  with pytest.raises(TypeError, match='key'):
    jaxrw.selective_backprop().update(jnp.ones(2), None, losses=jnp.ones(2))
