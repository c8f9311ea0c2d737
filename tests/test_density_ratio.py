"""Density ratios: other solvers for the same problems, known ratios, and what weights win back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy import optimize

from jaxrw import density_ratio, diagnostics

_kliep = jax.jit(density_ratio.kliep, static_argnames='steps')
_kmm = jax.jit(density_ratio.kmm, static_argnames='steps')


def _gaussians(seed, n=200, m=150, dtype=np.float64):
  rng = np.random.default_rng(seed)
  source, target = rng.normal(size=(n, 1)), 0.8 + 0.6 * rng.normal(size=(m, 1))
  ratio = np.exp(-0.5 * ((source - 0.8) / 0.6) ** 2 + 0.5 * source**2)[:, 0] / 0.6
  return source.astype(dtype), target.astype(dtype), ratio


def _weights(method, source, target, centers, sigma):
  if method == 'kmm':
    return _kmm(source, target, sigma, limit=20.0, steps=500)
  if method == 'kliep':
    fit = _kliep(source, target, centers, sigma)
  else:
    fit = density_ratio.ulsif(source, target, centers, sigma, penalty=1e-3)
  return density_ratio.density_ratio_weights(fit, source)


def _kernel(x, c, sigma):
  return np.exp(-((x[:, None] - c[None]) ** 2).sum(-1) / (2 * sigma**2))


def test_kliep_is_what_a_solver_finds():
  source, target, _ = _gaussians(0)
  centers, sigma = target[:5], 0.7
  a, b = _kernel(target, centers, sigma), _kernel(source, centers, sigma).mean(axis=0)
  solved = optimize.minimize(
    lambda alpha: -np.mean(np.log(a @ alpha)),
    np.full(5, 1 / (5 * b.mean())),
    jac=lambda alpha: -(a / (a @ alpha)[:, None]).mean(axis=0),
    bounds=[(0, None)] * 5,
    constraints={'type': 'eq', 'fun': lambda alpha: b @ alpha - 1},
    method='SLSQP',
    options={'ftol': 1e-14, 'maxiter': 500},
  )
  with jax.enable_x64(True):
    fit = _kliep(jnp.asarray(source), jnp.asarray(target), jnp.asarray(centers), sigma, steps=5000)
  alpha = np.asarray(fit.alpha)
  np.testing.assert_allclose(np.mean(np.log(a @ alpha)), -solved.fun, atol=1e-5)
  np.testing.assert_allclose(b @ alpha, 1, rtol=1e-12)


def test_ulsif_is_its_closed_form():
  source, target, _ = _gaussians(1)
  centers = target[:20]
  k, t = _kernel(source, centers, 0.5), _kernel(target, centers, 0.5)
  alpha = np.linalg.solve(k.T @ k / len(source) + 0.1 * np.eye(20), t.mean(axis=0))
  with jax.enable_x64(True):
    fit = density_ratio.ulsif(*map(jnp.asarray, (source, target, centers)), 0.5)
  np.testing.assert_allclose(fit.alpha, np.maximum(alpha, 0), rtol=1e-8, atol=1e-12)


def test_kmm_is_what_a_solver_finds():
  source, target, _ = _gaussians(2, n=25, m=30)
  k, pull = _kernel(source, source, 0.5), 25 * _kernel(source, target, 0.5).mean(axis=1)
  objective = lambda w: 0.5 * w @ k @ w - pull @ w
  solved = optimize.minimize(
    objective,
    np.ones(25),
    jac=lambda w: k @ w - pull,
    bounds=[(0, 3.0)] * 25,
    method='L-BFGS-B',
    options={'ftol': 1e-15, 'gtol': 1e-10, 'maxiter': 10_000},
  )
  with jax.enable_x64(True):
    w = np.asarray(_kmm(jnp.asarray(source), jnp.asarray(target), 0.5, limit=3.0, steps=20_000))
  np.testing.assert_allclose(w.mean(), 1, rtol=1e-12)
  scaled = w * solved.x.mean()
  np.testing.assert_allclose(objective(scaled), solved.fun, rtol=1e-5)
  assert scaled.max() <= 3 * (1 + 1e-3)


@pytest.mark.parametrize('method', ['kliep', 'ulsif', 'kmm'])
def test_follows_a_known_ratio(method):
  source, target, ratio = _gaussians(3, n=400, m=400, dtype=np.float32)
  centers = target[:100]
  w = _weights(method, source, target, centers, 0.5)
  np.testing.assert_allclose(np.mean(w), 1, rtol=1e-5)
  assert np.corrcoef(w, ratio)[0, 1] > 0.9
  assert 0.2 < diagnostics.summarize(jnp.asarray(w)).effective_fraction < 0.9


@pytest.mark.parametrize('method', ['kliep', 'ulsif', 'kmm'])
def test_the_same_data_have_weights_of_one(method):
  x = np.random.default_rng(4).normal(size=(300, 2)).astype(np.float32)
  w = _weights(method, x, x, x[:50], 1.5)
  assert np.mean(np.abs(w - 1)) < 0.1


def test_the_width_of_largest_held_out_likelihood_is_near_the_best():
  source, target, _ = _gaussians(5, dtype=np.float32)
  sigmas = [0.02, 0.5, 20.0]
  scores = density_ratio.kliep_likelihood(
    jax.random.key(0), jnp.asarray(source), jnp.asarray(target), target[:30], sigmas, steps=200
  )
  assert int(np.argmax(scores)) == 1


def test_source_rows_that_are_far_from_everything():
  """b = 0: every weight would be 0 / 0. They are 1, and say so by their effective fraction."""
  source, target = jnp.full((5, 1), 1e3), jnp.zeros((4, 1))
  fit = _kliep(source, target, target, 1.0, steps=5)
  assert np.all(np.isfinite(fit.alpha))
  np.testing.assert_array_equal(density_ratio.density_ratio_weights(fit, source), np.ones(5))


def test_ridge_weights_are_copies():
  rng = np.random.default_rng(6)
  x, z, times = rng.normal(size=(8, 3)), rng.normal(size=(8, 2)), rng.integers(0, 4, 8)
  with jax.enable_x64(True):
    solve = jax.jit(density_ratio.weighted_ridge)
    ours = solve(*map(jnp.asarray, (x, z, times.astype(float))), 0.3)
    plain = solve(*map(jnp.asarray, (x, z, np.ones(8))), 0.3)
  copied, labels = np.repeat(x, times, axis=0), np.repeat(z, times, axis=0)
  expected = np.linalg.solve(copied.T @ copied + 0.3 * np.eye(3), copied.T @ labels)
  np.testing.assert_allclose(ours, expected, rtol=1e-9)
  np.testing.assert_allclose(plain, np.linalg.solve(x.T @ x + 0.3 * np.eye(3), x.T @ z), rtol=1e-9)


def test_weights_win_back_a_misspecified_regression():
  """A line for a curve, trained left and tested right of its middle: ten repetitions. Only few of
  the source rows are left to learn from, and the effective fraction says so."""

  def one(seed):
    rng = np.random.default_rng(seed)
    curve = lambda x: np.sinc(x)
    source, target = rng.normal(1, 0.5, (150, 1)), rng.normal(2, 0.25, (200, 1))
    z = curve(source) + 0.1 * rng.normal(size=source.shape)
    fit = _kliep(*(jnp.asarray(v, jnp.float32) for v in (source, target, target[:50])), 0.3)
    w = np.asarray(density_ratio.density_ratio_weights(fit, jnp.asarray(source, jnp.float32)))
    features = lambda x: np.float32(np.concatenate([x, np.ones_like(x)], axis=1))

    def error(weights):
      line = density_ratio.weighted_ridge(features(source), z, weights, 1e-6)
      return np.mean((features(target) @ np.asarray(line) - curve(target)) ** 2)

    return error(np.ones(150)), error(w), diagnostics.summarize(jnp.asarray(w)).effective_fraction

  plain, weighted, effective = np.array([one(seed) for seed in range(10)]).T
  assert np.all(weighted < plain)
  assert weighted.mean() < plain.mean() / 10
  assert effective.mean() < 0.4


@pytest.mark.parametrize('method', ['kliep', 'ulsif', 'kmm'])
def test_rows_over_eight_devices_give_the_same_weights(method):
  source, target, _ = _gaussians(7, n=160, m=80, dtype=np.float32)
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  weigh = jax.jit(functools.partial(_weights, method, centers=jnp.asarray(target[:10]), sigma=0.5))
  one = weigh(source=jnp.asarray(source), target=jnp.asarray(target))
  eight = weigh(source=jax.device_put(source, rows), target=jax.device_put(target, rows))
  np.testing.assert_allclose(eight, one, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize('part', ['source', 'target'])
@pytest.mark.parametrize('method', ['kliep', 'ulsif', 'kmm'])
def test_a_broken_row_is_seen_in_the_weights(method, part):
  """A mean that is not above 0 is no mean of 0: `mean > 0` would turn NaN into weights of 1."""
  source, target, _ = _gaussians(8, n=30, m=20, dtype=np.float32)
  broken = {'source': source, 'target': target}
  broken[part] = broken[part].copy()
  broken[part][3] = np.nan
  w = _weights(method, **broken, centers=target[5:10], sigma=0.5)
  assert np.isnan(w).any()


def test_errors():
  x = jnp.ones((4, 2))
  for call, message in (
    (lambda: density_ratio.kliep(x, jnp.ones((3, 1)), x, 1.0), r'target has shape \(3, 1\)'),
    (lambda: density_ratio.ulsif(x, x, jnp.ones((0, 2)), 1.0), r'centers has shape \(0, 2\)'),
    (lambda: density_ratio.ulsif(x, x, x, 1.0, penalty=0), 'penalty=0 must be greater than 0'),
    (lambda: density_ratio.kmm(x, x, 1.0, limit=0), 'limit=0 must be greater than 0'),
    (lambda: density_ratio.kmm(x, x, 1.0, steps=0), 'steps=0 must be greater than 0'),
    (lambda: density_ratio.kmm(x, x, 0.0), r'sigma=0\.0 must be greater than 0'),
    (lambda: density_ratio.ulsif(x, x, x, -1.0), r'sigma=-1\.0 must be greater than 0'),
    (lambda: density_ratio.kliep(x, x, x, float('nan')), 'sigma=nan must be greater than 0'),
    (lambda: density_ratio.kliep_likelihood(jax.random.key(0), x, x, x, [1, 0]), 'sigma=0 must'),
    (lambda: density_ratio.kliep(jnp.ones(4), x, x, 1.0), 'source has shape'),
    (lambda: density_ratio.kliep_likelihood(jax.random.key(0), x, x, x, [1.0], folds=9), 'folds=9'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
