"""Fair error bounds: closed forms, and the two defects of the official loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw import diagnostics

_weights = jax.jit(jaxrw.fair_error_bound_weights, static_argnums=2)
_dice = jax.jit(jaxrw.fair_error_bound_dice, static_argnums=3)


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.5])
def test_equals_a_loop(gamma):
  rng = np.random.default_rng(0)
  losses, base = rng.gamma(2.0, 1.0, 12), rng.integers(0, 3, 12).astype(float)
  incoming, ids = rng.uniform(0.5, 2, 12), rng.integers(-1, 4, 12)
  measure = base * incoming
  groups = [g for g in range(5) if measure[ids == g].sum() > 0]  # group 4 is always absent
  mean = {g: np.average(losses[ids == g], weights=measure[ids == g]) for g in groups}
  known = np.isin(ids, groups)
  factor = np.array([mean[g] ** gamma if g in mean else 1.0 for g in ids])
  factor[known] *= measure[known].sum() / np.sum(measure * factor * known)
  w = _weights(
    *map(jnp.asarray, (losses, ids)),
    5,
    gamma,
    base=jnp.asarray(base),
    weights=jnp.asarray(incoming),
  )
  np.testing.assert_allclose(w, np.where(base > 0, incoming * factor, 0), rtol=2e-5)
  if gamma == 0:
    np.testing.assert_allclose(w, np.where(base > 0, incoming, 0), rtol=1e-6)


def test_no_errors_at_all_are_uniform():
  np.testing.assert_array_equal(_weights(jnp.zeros(4), jnp.array([0, 0, 1, -1]), 2), np.ones(4))


def _images(groups, seed=0):
  """Discs of two classes with noisy predictions; float[B, 5, 5, 2] twice."""
  rng = np.random.default_rng(seed)
  inside = rng.random((len(groups), 5, 5)) < 0.4
  noise = np.array([0.1, 0.4, 0.2])[groups][:, None, None] * rng.random(inside.shape)
  p = np.where(inside, 1 - noise, noise)
  return np.stack([p, 1 - p], -1), np.stack([inside, ~inside], -1).astype(float)


def _dice_by_hand(p, t):
  return 1 - (2 * np.sum(p * t) + 1e-5) / (np.sum(p * p) + np.sum(t * t) + 1e-5)


@pytest.mark.parametrize('gamma', [0.0, 1.0, 2.0])
def test_dice_equals_a_loop(gamma):
  ids = np.array([0, 1, 1, 0, -1])
  p, t = _images(np.maximum(ids, 0))
  of_class = lambda rows, c: _dice_by_hand(p[rows, ..., c], t[rows, ..., c])
  errors = [of_class(ids == g, 0) + of_class(ids == g, 1) for g in (0, 1)]
  scale = np.array([np.tanh((min(errors) / errors[g]) ** gamma) if g >= 0 else 1 for g in ids])
  expected = [_dice_by_hand(scale[:, None, None] * p[..., c], t[..., c]) for c in (0, 1)]
  np.testing.assert_allclose(_dice(*map(jnp.asarray, (p, t, ids)), 3, gamma), expected, rtol=1e-4)
  if gamma == 0:
    known = ids >= 0
    np.testing.assert_allclose(scale[known], np.tanh(1.0))


def _naive_scale(errors, ids):
  """As published: the minimum over all groups, 0 for an absent one; -1 indexes the last."""
  return jnp.tanh(jnp.min(errors) / errors)[ids]


def test_a_group_that_is_absent_takes_no_part():
  """With the published rule its error of 0 is the minimum, and the gradient vanishes."""
  ids = jnp.array([0, 1, 1, 0])
  p, t = map(jnp.asarray, _images(np.asarray(ids)))
  two, three = (_dice(p, t, ids, groups) for groups in (2, 3))
  np.testing.assert_allclose(two, three)

  scale = _naive_scale(jnp.array([0.2, 0.5, 0.0]), ids)[:, None, None, None]

  def naive(p):
    overlap, size = jnp.sum(scale * p * t), jnp.sum((scale * p) ** 2 + t * t)
    return 1 - (2 * overlap + 1e-5) / (size + 1e-5)

  ours = lambda p: jnp.mean(_dice(p, t, ids, 3))
  assert np.abs(jax.grad(naive)(p)).max() == 0
  assert np.abs(jax.grad(ours)(p)).max() > 1e-3


def test_unknown_is_not_the_last_group():
  errors = jnp.array([0.2, 0.5])
  assert np.ptp(_naive_scale(errors, jnp.array([-1, 1]))) == 0
  ids = np.array([0, 1, -1])
  p, t = _images(np.array([0, 1, 2]))
  ours = lambda ids: np.asarray(_dice(jnp.asarray(p), jnp.asarray(t), jnp.asarray(ids), 2))
  assert np.abs(ours(ids) - ours(np.array([0, 1, 1]))).max() > 1e-4


def test_equity_scaled_performance():
  same = diagnostics.equity_scaled(0.8, jnp.full(3, 0.8))
  np.testing.assert_allclose(same, 0.8, rtol=1e-6)
  gaps = [float(diagnostics.equity_scaled(0.8, jnp.array([0.8, 0.8 - d]))) for d in (0, 0.1, 0.3)]
  np.testing.assert_allclose(gaps, [0.8, 0.8 / 1.1, 0.8 / 1.3], rtol=1e-6)
  absent = diagnostics.equity_scaled(0.8, jnp.array([0.8, jnp.nan]), jnp.array([True, False]))
  np.testing.assert_allclose(absent, 0.8, rtol=1e-6)
  with pytest.raises(ValueError, match='alpha=-1 must be at least 0'):
    diagnostics.equity_scaled(0.8, jnp.ones(2), alpha=-1)


def test_errors():
  with pytest.raises(ValueError, match='gamma=-1 must be at least 0'):
    jaxrw.fair_error_bound(2, -1)
  with pytest.raises(IndexError, match='group_ids holds 2'):
    jaxrw.fair_error_bound_weights(jnp.ones(1), jnp.array([2]), 2)
  with pytest.raises(ValueError, match='must be alike'):
    jaxrw.fair_error_bound_dice(jnp.ones((2, 3, 2)), jnp.ones((2, 3)), jnp.zeros(2, int), 2)
