"""Mixtures of mixtures: the bilinear form, and a method over it against the method over domains."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw.mixtures import basis_mixture, dga, fixed, importance_mixture, on_basis


def test_basis_mixture_is_the_mean_of_the_rows():
  rng = np.random.default_rng(0)
  weights, basis = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(9), size=5)
  for p in (basis_mixture(weights, basis), jax.jit(basis_mixture)(weights, basis)):
    np.testing.assert_allclose(p, sum(w * row for w, row in zip(weights, basis)), rtol=1e-5)
    np.testing.assert_allclose(np.sum(p), 1, rtol=1e-6)
  np.testing.assert_array_equal(basis_mixture(weights, np.eye(5)), weights.astype(np.float32))
  onehot = importance_mixture([3], 5)
  np.testing.assert_array_equal(basis_mixture(onehot, basis), basis[3].astype(np.float32))


def test_with_the_identity_it_is_the_method_over_domains():
  """K = N and P = I, the documented limit; bit for bit."""
  rng = np.random.default_rng(0)
  plain = dga(4, rate=0.7, ema=0.3, floor=0.1)
  wrapped = on_basis(plain, np.eye(4))
  state, other = plain.init(), wrapped.init()
  for step in range(5):
    told = jnp.asarray(rng.normal(size=4), jnp.float32)
    state = plain.update(state, step=step, domain_alignment=told)
    other = wrapped.update(other, step=step, domain_alignment=told)
  np.testing.assert_array_equal(plain.proportions(state), wrapped.proportions(other))
  np.testing.assert_array_equal(plain.objective(state), wrapped.objective(other))


def test_a_method_over_a_basis_against_numpy():
  rng = np.random.default_rng(1)
  basis = rng.dirichlet(np.ones(6), size=3)
  mixture = on_basis(dga(3, rate=0.5), basis)
  state, alpha = mixture.init(), np.full(3, 1 / 3)
  update = jax.jit(mixture.update)
  for step in range(4):
    told = rng.normal(size=3)
    state = update(state, step=step, domain_alignment=jnp.asarray(told, jnp.float32))
    alpha = alpha * np.exp(0.5 * told)
    alpha /= alpha.sum()
  np.testing.assert_allclose(mixture.proportions(state), basis.T @ alpha, rtol=1e-5)


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    (lambda: basis_mixture([0.5, 0.5], [[1.0, 0], [1, 1]]), r'basis\[1\] sums to 2'),
    (lambda: basis_mixture([1.0], [[1.0, 0], [1, 0]]), r'basis has shape \(2, 2\)'),
    (lambda: basis_mixture([1.0], [1.0]), r'expected \[N, G\]'),
    (lambda: basis_mixture([0.7, 0.7], np.eye(2)), 'weights sums to 1.4'),
    (lambda: on_basis(fixed([1, 1, 1]), np.eye(2)), r'basis has shape \(2, 2\)'),
    (lambda: on_basis(fixed([1, 1]), [[1.0, 0], [1, 1]]), r'basis\[1\] sums to 2'),
  ],
)
def test_bad_input(wrong, message):
  with pytest.raises(ValueError, match=message):
    wrong()
