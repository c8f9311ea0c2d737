"""Rows of the last layer: what aligning keeps, and what it changes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import heads

OLD = jnp.array([True, True, True, False, False])


def _kernel(seed=0):
  return np.random.default_rng(seed).normal(size=(7, 5)).astype(np.float32) * [1, 2, 1, 3, 5]


def test_mean_norms_agree_and_a_second_time_changes_nothing():
  kernel = _kernel()
  aligned, gamma = heads.align_rows(jnp.asarray(kernel), OLD)
  norms = np.linalg.norm(kernel, axis=0)
  np.testing.assert_allclose(gamma, norms[:3].mean() / norms[3:].mean(), rtol=1e-5)
  after = np.linalg.norm(aligned, axis=0)
  np.testing.assert_allclose(after[:3].mean(), after[3:].mean(), rtol=1e-6)
  again, one = heads.align_rows(aligned, OLD)
  np.testing.assert_allclose(one, 1, rtol=1e-6)
  np.testing.assert_allclose(again, aligned, rtol=1e-6)
  np.testing.assert_array_equal(aligned[:, :3], np.float32(kernel[:, :3]))


def test_rankings_within_old_and_new_stay():
  kernel = jnp.asarray(_kernel(1))
  aligned, _ = heads.align_rows(kernel, OLD)
  features = np.random.default_rng(2).normal(size=(50, 7))
  before, after = features @ np.asarray(kernel), features @ np.asarray(aligned)
  for part in (slice(0, 3), slice(3, 5)):
    np.testing.assert_array_equal(before[:, part].argsort(1), after[:, part].argsort(1))


def test_the_mean_is_one_of_norms_and_not_a_norm_of_the_whole():
  """One long row among the new: the norm of the matrix, a naive measure, is off."""
  kernel = jnp.diag(jnp.array([1.0, 1.0, 9.0, 1.0]))
  _, gamma = heads.align_rows(kernel, jnp.array([True, True, False, False]))
  naive = np.sqrt(2) / np.sqrt(82)
  np.testing.assert_allclose(gamma, 1 / 5)
  assert abs(naive - 1 / 5) > 0.04


def test_where_there_is_nothing_to_align():
  kernel = jnp.asarray(_kernel())
  for old in (jnp.ones(5, bool), jnp.zeros(5, bool)):  # a first task has no old classes
    same, gamma = heads.align_rows(kernel, old)
    assert gamma == 1
    np.testing.assert_array_equal(same, kernel)
  zeros, gamma = heads.align_rows(kernel.at[:, 3:].set(0), OLD)
  assert gamma == 1
  assert np.all(np.isfinite(zeros))


def test_rows_of_the_same_norm_stay_bit_by_bit():
  kernel = jnp.diag(jnp.array([3.0, -3, 3, 3, -3])) + 4 * jnp.roll(jnp.eye(5), 1, axis=0)
  same, gamma = heads.align_rows(kernel, OLD)
  assert gamma == 1
  np.testing.assert_array_equal(same, kernel)


def test_a_broken_row_is_seen():
  for column in (0, 3):
    assert np.isnan(heads.align_rows(jnp.asarray(_kernel()).at[0, column].set(jnp.nan), OLD)[1])


def test_any_axis_and_dtype():
  kernel = _kernel()
  columns, _ = heads.align_rows(jnp.asarray(kernel), OLD)
  rows, _ = heads.align_rows(jnp.asarray(kernel.T), OLD, axis=0)
  np.testing.assert_allclose(rows.T, columns, rtol=1e-6)
  half, gamma = heads.align_rows(jnp.asarray(kernel, jnp.bfloat16), OLD)
  assert half.dtype == jnp.bfloat16
  assert gamma.dtype == jnp.float32


def test_tau():
  kernel = jnp.asarray(_kernel()).at[:, 1].set(0)
  np.testing.assert_array_equal(heads.tau_normalize(kernel, 0.0), kernel)
  norms = np.linalg.norm(heads.tau_normalize(kernel), axis=0)
  np.testing.assert_allclose(norms, [1, 0, 1, 1, 1], rtol=1e-6)
  half = np.linalg.norm(heads.tau_normalize(kernel, 0.5), axis=0)
  np.testing.assert_allclose(half, np.linalg.norm(kernel, axis=0) ** 0.5, rtol=1e-5)
  # With one row in each group, aligning is tau = 1 up to a common factor.
  two = kernel[:, ::3]
  aligned, _ = heads.align_rows(two, jnp.array([True, False]))
  np.testing.assert_allclose(
    aligned / np.linalg.norm(two[:, 0]), heads.tau_normalize(two), rtol=1e-5
  )


def test_errors():
  with pytest.raises(ValueError, match=r'old has shape \(4,\); expected \[5\]'):
    heads.align_rows(jnp.asarray(_kernel()), jnp.ones(4, bool))
