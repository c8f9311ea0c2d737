"""Trimming against a sort in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw


def _by_sorting(losses, base, weights, share, side):
  """Keep the k best valid rows, then scale so that sum(base * w) stays; floats, one by one."""
  rows = [i for i in range(len(losses)) if base[i] > 0]
  rows.sort(key=lambda i: losses[i], reverse=side == 'high')
  kept = rows[: max(1, int(np.ceil(share * len(rows) - 1e-6)))]
  total = sum(base[i] * weights[i] for i in rows)
  mass = sum(base[i] * weights[i] for i in kept)
  return np.array([weights[i] * total / mass if i in kept else 0 for i in range(len(losses))])


@pytest.mark.parametrize('side', ['high', 'low'])
@pytest.mark.parametrize('share', [0.01, 0.3, 0.5, 0.6, 1.0])
@pytest.mark.parametrize('seed', range(3))
def test_against_sorting(share, side, seed):
  rng = np.random.default_rng(seed)
  losses, weights = rng.normal(size=(2, 15))
  base = rng.integers(0, 3, 15)
  weights = np.abs(weights)
  got = jaxrw.trimmed_weights(
    *(jnp.asarray(losses, jnp.float32), share, side),
    base=jnp.asarray(base, jnp.float32),
    weights=jnp.asarray(weights, jnp.float32),
  )
  expected = _by_sorting(losses, base, weights, share, side)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_tokens_share_the_fate_of_their_example():
  losses = jnp.array([[1.0, 9.0, 50.0], [6.0, 6.0, 0.0], [0.0, 0.0, 0.0]])
  base = jnp.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])  # means 5, 6, nothing
  got = jaxrw.trimmed_weights(losses, 0.5, base=base)
  np.testing.assert_array_equal(got, [[0, 0, 0], [2, 2, 0], [0, 0, 0]])


def test_full_share_is_uniform_and_ties_stay_together():
  losses = jnp.array([1.0, 2.0, 2.0, 3.0])
  np.testing.assert_array_equal(jaxrw.trimmed_weights(losses, 1.0), np.ones(4))
  np.testing.assert_allclose(jaxrw.trimmed_weights(losses, 0.5), np.array([0, 1, 1, 1]) * 4 / 3)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'share': 0.0}, r'share=0.0 must be in \(0, 1\]'),
    ({'share': 1.5}, 'share=1.5'),
    ({'side': 'up'}, "side='up' must be 'high' or 'low'"),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(ValueError, match=message):
    jaxrw.trimmed(**arguments)
