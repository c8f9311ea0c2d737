"""CVaR against its definition as a minimum, chi-square DRO against a solver; defects and limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy import optimize

import jaxrw
from experiments import compiled
from jaxrw import masked

_cvar = jax.jit(jaxrw.cvar_weights)
_chi_square = jax.jit(jaxrw.chi_square_dro_weights)


def _problem(seed, ties=False, n=12):
  rng = np.random.default_rng(seed)
  losses = rng.integers(0, 4, n).astype(float) if ties else rng.gamma(2.0, 1.0, n)
  base = rng.integers(0, 4, n).astype(float)
  incoming = rng.uniform(0.5, 2.0, n)
  return losses, base, incoming


@pytest.mark.parametrize('ties', [False, True])
@pytest.mark.parametrize('share', [1e-3, 0.2, 0.5, 0.9, 1.0])
def test_cvar_is_the_minimum_over_eta(share, ties):
  """mean(w l) = min over eta of eta + mean (l - eta)_+ / share, reached at one of the losses."""
  losses, base, incoming = _problem(0, ties)
  p = base * incoming / np.sum(base * incoming)
  w = _cvar(
    *map(jnp.asarray, (losses, share)), base=jnp.asarray(base), weights=jnp.asarray(incoming)
  )
  factor = np.asarray(w) / incoming
  expected = min(eta + p @ np.maximum(losses - eta, 0) / share for eta in losses)
  np.testing.assert_allclose(p @ (factor * losses), expected, rtol=1e-5)
  np.testing.assert_allclose(p @ factor, 1, rtol=1e-5)
  assert factor.max() <= (1 + 1e-6) / share
  for loss in set(losses):  # ties are treated alike
    alike = factor[(losses == loss) & (base > 0)]
    assert alike.size == 0 or np.ptp(alike) <= 1e-5


def test_cvar_of_a_share_is_one_of_the_base_and_not_of_the_rows():
  """The row that counts 8 is the boundary; a share of rows, as in trimming, would drop it."""
  losses, base = jnp.array([3.0, 2.0, 1.0]), jnp.array([1.0, 8.0, 1.0])
  np.testing.assert_allclose(_cvar(losses, 0.5, base=base), [2, 1, 0], rtol=1e-6)
  trimmed = jaxrw.trimmed_weights(losses, 1 / 3, base=base)
  np.testing.assert_allclose(trimmed, [10, 0, 0], rtol=1e-6)


def test_cvar_limits():
  losses = jnp.array([1.0, 4.0, 4.0, 2.0])
  incoming = jnp.array([0.3, 1.0, 0.7, 2.0])
  np.testing.assert_array_equal(_cvar(losses, 1.0, weights=incoming), incoming)
  np.testing.assert_allclose(_cvar(losses, 0.25), [0, 2, 2, 0])  # the largest loss, which ties
  np.testing.assert_allclose(_cvar(losses, 0.75), [0, 4 / 3, 4 / 3, 4 / 3], rtol=1e-6)
  np.testing.assert_allclose(  # small-loss trimming is the 0/1 CVaR of -l
    _cvar(-losses, 0.5), jaxrw.trimmed_weights(losses, 0.5, 'low'), rtol=1e-6
  )


@pytest.mark.parametrize('radius', [0.01, 0.3, 1.0, 4.0, 50.0])
def test_chi_square_is_what_a_solver_finds(radius):
  losses, base, incoming = _problem(3)
  measure = base * incoming
  present = measure > 0
  p = measure[present] / measure.sum()
  seen = losses[present]
  solved = optimize.minimize(
    lambda w: -(p * w) @ seen,
    np.ones(len(p)),
    jac=lambda w: -p * seen,
    bounds=[(0, None)] * len(p),
    constraints=[
      {'type': 'eq', 'fun': lambda w: p @ w - 1},
      {'type': 'ineq', 'fun': lambda w: radius - p @ (w - 1) ** 2 / 2},
    ],
    method='SLSQP',
    options={'maxiter': 1000, 'ftol': 1e-13},
  )
  with jax.enable_x64(True):
    w = _chi_square(
      jnp.asarray(losses), radius, base=jnp.asarray(base), weights=jnp.asarray(incoming)
    )
  factor = np.asarray(w)[present] / incoming[present]
  np.testing.assert_allclose((p * factor) @ seen, -solved.fun, rtol=1e-7)
  np.testing.assert_allclose(factor, solved.x, atol=2e-4)
  assert p @ (factor - 1) ** 2 / 2 <= radius * (1 + 1e-9)
  np.testing.assert_array_equal(np.asarray(w)[~present], 0)


def _by_sorting(losses, p, radius):
  """The examples from the k-th lowest on, for the k at which the closed form holds, in float64."""
  order = np.argsort(losses)
  for k in range(len(losses)):
    rows = order[k:]
    share = p[rows].sum()
    mean = p[rows] @ losses[rows] / share
    variance = p[rows] @ (losses[rows] - mean) ** 2 / share
    over = share * (1 + 2 * radius) - 1
    if over <= 0 or variance <= 0:
      break
    width = np.sqrt(variance / over)
    if mean - width < losses[rows[0]] and (k == 0 or mean - width >= losses[order[k - 1]]):
      return np.maximum(losses - mean + width, 0) / (share * width)
  top = losses == losses.max()
  return top / p[top].sum()


@pytest.mark.parametrize('kind', ['gamma', 'ties', 'heavy tails', 'narrow'])
def test_chi_square_equals_a_search_over_sorted_losses(kind):
  rng, n = np.random.default_rng(5), 24
  draw = {
    'gamma': lambda: rng.gamma(2, 1, n),
    'ties': lambda: rng.integers(0, 3, n) * 1.0,
    'heavy tails': lambda: rng.standard_cauchy(n),
    'narrow': lambda: 5 + 1e-3 * rng.random(n),
  }[kind]
  for _ in range(25):
    losses = draw().astype(np.float32)
    base = rng.integers(1, 4, n).astype(np.float32)
    radius = float(rng.choice([1e-3, 0.01, 0.1, 0.5, 2.0, 10.0]))
    p, w = (
      base.astype(float) / base.sum(),
      np.asarray(_chi_square(losses, radius, base=base), float),
    )
    expected = _by_sorting(losses.astype(float), p, radius)
    centered = losses.astype(float) - np.mean(losses, dtype=float)
    assert abs(p @ ((w - expected) * centered)) < 2e-4 * np.std(centered)
    np.testing.assert_allclose(p @ w, 1, rtol=1e-5)


def test_chi_square_adds_the_deviation_of_the_losses():
  """While no weight is 0: sum(q l) = mean + sqrt(2 rho var)."""
  losses, rho = np.random.default_rng(4).uniform(2, 3, 50), 0.05
  w = np.asarray(_chi_square(jnp.asarray(losses, jnp.float32), rho))
  assert w.min() > 0
  np.testing.assert_allclose(
    np.mean(w * losses), losses.mean() + np.sqrt(2 * rho) * losses.std(), rtol=1e-5
  )


def test_chi_square_limits():
  losses = jnp.array([1.0, 4.0, 4.0, 2.0])
  incoming = jnp.array([0.3, 1.0, 0.7, 2.0])
  np.testing.assert_array_equal(_chi_square(losses, 0.0, weights=incoming), incoming)
  np.testing.assert_allclose(_chi_square(losses, 100.0), [0, 2, 2, 0])
  np.testing.assert_array_equal(_chi_square(jnp.full(3, 7.0), 1.0), np.ones(3))
  spread = jnp.array([1e6, 1e6 + 1, 1e6 + 3])  # differences are what counts
  np.testing.assert_allclose(
    _chi_square(spread, 0.2), _chi_square(jnp.array([0.0, 1.0, 3.0]), 0.2), rtol=1e-3
  )


@pytest.mark.parametrize('weights_of', [_cvar, _chi_square])
def test_broken_and_empty_batches(weights_of):
  assert np.all(np.isnan(weights_of(jnp.array([1.0, jnp.nan, 3.0]), 0.5)))
  np.testing.assert_array_equal(
    weights_of(jnp.array([jnp.nan, jnp.inf]), 0.5, base=jnp.zeros(2)), np.zeros(2)
  )


def test_top_mass_is_that_of_a_sort():
  rng = np.random.default_rng(5)
  for _ in range(20):
    values = rng.integers(-3, 4, 15).astype(np.float32)
    measure = rng.integers(0, 3, 15).astype(np.float32)
    share = rng.uniform(0.05, 1)
    above, at = jax.jit(masked.top_mass)(values, measure, share)
    boundary = next(
      v for v in sorted(set(values), reverse=True)
      if measure[values >= v].sum() >= np.float32(share) * measure.sum()
    )  # fmt: skip
    np.testing.assert_array_equal(above, (values > boundary) & (measure > 0))
    np.testing.assert_array_equal(at, (values == boundary) & (measure > 0))


def test_collectives_do_not_grow_with_the_batch():
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  for function, most in ((jaxrw.cvar_weights, 5), (jaxrw.chi_square_dro_weights, 9)):
    batch = jax.device_put(jnp.ones(1024), rows)
    found = compiled.costs(jax.jit(function).lower(batch, 0.3).compile()).collectives
    assert sum(c.count for c in found) <= most, found
    assert {c.kind for c in found} == {'all-reduce'}
    assert max(c.bytes for c in found) <= 1024


def test_errors():
  with pytest.raises(ValueError, match=r'share=0 must be in \(0, 1\]'):
    jaxrw.cvar(0)
  with pytest.raises(ValueError, match='radius=-1 must be at least 0'):
    jaxrw.chi_square_dro_weights(jnp.ones(2), -1)
  with pytest.raises(ValueError, match=r'losses must be \[B\] or \[B, T\]'):
    jaxrw.cvar_weights(jnp.ones((2, 2, 2)))
