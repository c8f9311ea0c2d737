"""Diagnostics of weights by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import diagnostics


@pytest.mark.parametrize('token_base', [False, True])
def test_summary_against_numpy(token_base):
  rng = np.random.default_rng(0)
  w = rng.gamma(1.0, 1.0, 12)
  base = rng.integers(1, 6, 12).astype(float) if token_base else np.ones(12)
  base[3] = 0
  out = jax.jit(diagnostics.summarize)(
    jnp.asarray(np.where(base > 0, w, np.nan), jnp.float32), jnp.asarray(base, jnp.float32)
  )
  b, w = base[base > 0], w[base > 0]
  shares = b * w / np.sum(b * w)
  effective = np.sum(b * w) ** 2 / (np.sum(b) * np.sum(b * w**2))
  entropy = -np.sum(shares * np.log(shares)) / np.log(w.size)
  np.testing.assert_allclose(out, [effective, entropy, shares.max()], rtol=1e-5)


def test_effective_fraction_is_kish_over_n():
  w = jnp.array([2.0, 1.0, 1.0, 0.0])
  assert float(diagnostics.summarize(w).effective_fraction) == pytest.approx(16 / 6 / 4)


@pytest.mark.parametrize(
  ('weights', 'base', 'expected'),
  [
    (np.ones(5), None, [1, 1, 0.2]),
    ([7.0], None, [1, 1, 1]),  # a single example
    ([0.0, 3.0, 0.0, 0.0], None, [0.25, 0, 1]),  # everything on one of four
    ([2.0, 2.0, 0.0, 0.0], None, [0.5, 0.5, 0.5]),
    ([1.0, 1.0, 9.0, np.nan], [1.0, 1.0, 0.0, 0.0], [1, 1, 0.5]),  # padding
    ([1.0, 2.0], [0.0, 0.0], [0, 0, 0]),  # nothing valid
    ([0.0, 0.0], None, [0, 0, 0]),  # all weights 0
  ],
)
def test_corner_cases(weights, base, expected):
  base = None if base is None else jnp.asarray(base)
  out = diagnostics.summarize(jnp.asarray(weights, jnp.float32), base)
  np.testing.assert_allclose(out, expected, atol=1e-6)


def test_token_weights_count_as_their_examples_mean():
  weights = jnp.array([[1.0, 3.0, 9.0], [2.0, 2.0, 2.0]])
  base = jnp.array([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]])
  np.testing.assert_allclose(diagnostics.summarize(weights, base), [1, 1, 0.5], rtol=1e-6)


def test_uniform_weights_on_examples_of_uneven_base():
  """The effective fraction sees weights only; shares, and so entropy, see the base as well."""
  out = diagnostics.summarize(jnp.ones(2), jnp.array([3.0, 1.0]))
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(2)
  np.testing.assert_allclose(out, [1, entropy, 0.75], rtol=1e-6)


def test_group_sums_against_a_loop():
  rng = np.random.default_rng(0)
  values, ids = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(-1, 5, 20)
  out = jax.jit(diagnostics.group_sums, static_argnums=2)(values, ids, 4)
  expected = [values[ids == g].sum(0) for g in range(4)]  # ids -1 and 4: nobody's
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_group_keeps_its_nan_to_itself():
  out = diagnostics.group_sums(jnp.array([[jnp.nan], [2.0]]), jnp.array([-1, 0]), 2)
  np.testing.assert_array_equal(out, [[2.0], [0.0]])
