"""JTT: a weight is what upsampling does, and the error set is that of the first run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw


def test_weights_are_upsampling():
  """The weighted gradient of the whole data is that of data with the error set copied."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(10, 3)), rng.normal(size=10)
  errors = rng.random(10) < 0.3
  w = np.asarray(jaxrw.jtt_weights(jnp.asarray(errors), jnp.arange(10), 6.0))
  gradient = lambda rows, weights: np.average(-2 * y[rows, None] * x[rows], axis=0, weights=weights)
  copied = np.repeat(np.arange(10), np.where(errors, 6, 1))
  np.testing.assert_allclose(
    np.mean(w[:, None] * -2 * y[:, None] * x, axis=0), gradient(copied, None), rtol=1e-5
  )
  np.testing.assert_allclose(w.mean(), 1, rtol=1e-6)


def test_two_runs_in_one_stage():
  rw = jaxrw.jtt(6, 3.0, until=2)
  update, state = jax.jit(rw.update), rw.init()

  def seen(state, step, ids, wrong, base=None):
    logits = jax.nn.one_hot(jnp.array([0] * len(ids)), 2)
    return update(
      jnp.ones(len(ids)),
      state,
      losses=jnp.ones(len(ids)),
      base=jnp.ones(len(ids)) if base is None else jnp.array(base),
      example_ids=jnp.array(ids),
      step=step,
      logits=logits,
      labels=jnp.array(wrong, jnp.int32),
    )

  w, state = seen(state, 0, [0, 1, 2], [1, 1, 0])
  np.testing.assert_array_equal(w, np.ones(3))
  w, state = seen(state, 1, [1, 3, 3, -1, 4], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0])
  np.testing.assert_array_equal(state, [True, False, False, True, False, False])
  w, after = seen(state, 2, [0, 1, 3, -1, 5], [0, 1, 1, 1, 1])
  np.testing.assert_allclose(w, np.array([3, 1, 3, 10 / 6, 1]) * 6 / 10, rtol=1e-6)
  np.testing.assert_array_equal(after, state)


def test_limits():
  """An empty error set, or one that holds everything, is uniform."""
  for errors in (jnp.zeros(4, bool), jnp.ones(4, bool)):
    np.testing.assert_allclose(jaxrw.jtt_weights(errors, jnp.arange(4), 9.0), np.ones(4))
  errors = jnp.array([True, False])
  np.testing.assert_array_equal(jaxrw.jtt_weights(errors, jnp.arange(2), 1.0), np.ones(2))


def test_errors():
  with pytest.raises(ValueError, match='upweight=0 must be greater than 0'):
    jaxrw.jtt(4, 0, until=1)
  with pytest.raises(ValueError, match='until=-1 must be at least 0'):
    jaxrw.jtt(4, 2.0, until=-1)
  with pytest.raises(IndexError, match='example_ids holds 4, but there are 4'):
    jaxrw.jtt_weights(jnp.zeros(4, bool), jnp.array([4]), 2.0)
  with pytest.raises(ValueError, match=r'logits \(2, 3, 4\) must be \[B, C\]'):
    jaxrw.jtt(4, 2.0, until=1).update(
      jnp.ones(2),
      jnp.zeros(4, bool),
      losses=jnp.ones(2),
      example_ids=jnp.arange(2),
      step=0,
      logits=jnp.ones((2, 3, 4)),
      labels=jnp.zeros((2, 3), int),
    )
