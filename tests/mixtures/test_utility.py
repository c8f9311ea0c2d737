"""The utility law against loops in float64, its limits, and planted parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxrw.mixtures.utility import (
  best_prefix,
  fit_repeated_data_error,
  mixed_pools,
  repeated_data_error,
  repetition_weights,
)

E = 12.8e6
K = 64
POOLS = np.array([-0.18, -0.15, -0.12, -0.09])


@functools.partial(jax.jit, static_argnums=6)
def _predict(samples, pool_size, utility, half_life, scale, floor, variant):
  return repeated_data_error(
    samples, pool_size, utility, half_life, scale, floor, variant=variant, max_epochs=K
  )


def predict(samples, pool_size, utility, half_life, scale=0.5, floor=0.1, variant='paper'):
  """`repeated_data_error`, compiled once for each shape."""
  arguments = (samples, pool_size, utility, half_life, scale, floor)
  return np.asarray(_predict(*(jnp.asarray(x, jnp.float32) for x in arguments), variant))


def official(n, size, utilities, half_lives, a, d, variant):
  """Epoch by epoch, in float64; the size is that of the mixture, half-lives are already its own."""
  unit = 100_000
  exponent = lambda k: np.mean(
    [b * 0.5 ** ((k - 1) / tau) for b, tau in zip(utilities, half_lives)]
  )
  first = min(size, n) / unit
  y = a * first ** exponent(1) if variant == 'paper' else (a * first) ** exponent(1) + d
  k = 2
  while (k - 1) * size < n:
    y *= (min(k * size, n) / ((k - 1) * size)) ** exponent(k)
    k += 1
  return y + d if variant == 'paper' else y


VARIANTS = pytest.mark.parametrize('variant', ['paper', 'released'])


# The law ------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize('epochs', [0.3, 1.0, 1.7, 2.0, 10.0, 33.5])
def test_epoch_by_epoch(variant, epochs):
  expected = official(epochs * E, E, [-0.13], [3.0], 0.02, 0.1, variant)
  ours = predict(epochs * E, E, -0.13, 3.0, 0.02, 0.1, variant)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_a_number_of_the_released_code():
  """Its own value for these parameters; .8579 would be the same with d added at the end."""
  released = predict(10 * E, E, -0.13, 3.0, 0.02, 0.1, 'released')
  assert released == pytest.approx(0.8436, abs=6e-5)
  moved = predict(10 * E, E, -0.13, 3.0, 0.02**-0.13, 0.1, 'paper')
  assert moved == pytest.approx(0.8579, abs=6e-5)


@VARIANTS
def test_one_epoch_is_a_power_law(variant):
  n = np.array([0.01, 0.2, 1.0]) * E
  for half_life in (0.5, 3.0):
    ours = predict(n, E, -0.2, half_life, 0.4, 0.1, variant)
    power = (n / 1e5) ** -0.2
    expected = 0.4 * power + 0.1 if variant == 'paper' else 0.4**-0.2 * power + 0.1
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_without_decay_it_telescopes():
  n = np.array([0.5, 1.0, 1.5, 7.0, 20.25, 64.0]) * E
  np.testing.assert_allclose(predict(n, E, -0.2, np.inf), 0.5 * (n / 1e5) ** -0.2 + 0.1, rtol=2e-6)


def test_with_instant_decay_only_the_first_epoch_counts():
  n = np.array([1.0, 2.0, 50.0]) * E
  np.testing.assert_allclose(predict(n, E, -0.2, 1e-3), 0.5 * (E / 1e5) ** -0.2 + 0.1, rtol=2e-6)


@VARIANTS
def test_more_data_is_never_worse_but_ends_somewhere(variant):
  n = np.linspace(0.05, 64, 500) * E
  error = predict(n, E, -0.2, 2.0, variant=variant).astype(np.float64)
  assert np.all(np.diff(error) < 2e-7)
  assert error[-1] == pytest.approx(error[-100], rel=1e-5)
  # The sum of log(k / (k - 1)) 0.5^((k - 1) / tau) converges.
  k = np.arange(2, 4000)
  limit = np.exp(-0.2 * np.sum(np.log(k / (k - 1)) * 0.5 ** ((k - 1) / 2.0)))
  first = (E / 1e5) ** -0.2
  expected = 0.5 * first * limit + 0.1 if variant == 'paper' else (0.5**-0.2 * first + 0.1) * limit
  assert error[-1] == pytest.approx(expected, rel=1e-5)
  assert (variant == 'released') == (predict(64 * E, E, -0.5, 9.0, 1.0, 0.9, variant) < 0.9)


def test_shapes_and_gradients():
  out = repeated_data_error(np.ones((2, 3)) * 1e6, [1e5, 1e6, 1e7], -0.1, 2.0, 1.0, 0.0)
  assert (out.shape, out.dtype) == ((2, 3), jnp.float32)
  np.testing.assert_allclose(
    out, predict(np.ones((2, 3)) * 1e6, [1e5, 1e6, 1e7], -0.1, 2.0, 1.0, 0.0), rtol=1e-5
  )
  law = lambda x: repeated_data_error(
    30_000_000_000, 12_800_000_000, x[0], x[1], x[2], x[3], max_epochs=4
  )
  point = np.array([-0.2, 2.0, 0.5, 0.1])
  with jax.enable_x64(True):
    gradient = jax.jit(jax.grad(law))(jnp.asarray(point))
    plain = lambda x: official(3e10, 1.28e10, [x[0]], [x[1]], x[2], x[3], 'paper')
    np.testing.assert_allclose(gradient, optimize.approx_fprime(point, plain, 1e-7), rtol=1e-5)


def test_what_is_traced_and_impossible_is_nan():
  out = predict([0.0, -1.0, np.nan, (K + 1) * E, K * E, E], E, -0.2, 2.0)
  np.testing.assert_array_equal(np.isnan(out), [True, True, True, True, False, False])


# Pools --------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize('epochs', [0.7, 2.5, 8.0])
def test_mixed_pools_epoch_by_epoch(variant, epochs):
  utilities, half_lives = [-0.2, -0.1, -0.05], [1.0, 2.0, 8.0]
  n = epochs * 3 * E
  longer = [3 * tau for tau in half_lives]
  expected = official(n, 3 * E, utilities, longer, 0.3, 0.1, variant)
  ours = predict(n, E, utilities, half_lives, 0.3, 0.1, variant)
  np.testing.assert_allclose(ours, expected, rtol=1e-5)
  order = [2, 0, 1]
  permuted = predict(
    n, E, np.array(utilities)[order], np.array(half_lives)[order], 0.3, 0.1, variant
  )
  np.testing.assert_allclose(permuted, ours, rtol=1e-6)


def test_a_pool_mixed_with_its_equals_is_a_larger_pool():
  """Of p times the examples, each of which wears out p times more slowly in its own epochs."""
  for p in (1, 3):
    exponents = np.asarray(mixed_pools([-0.2] * p, 1.5, 6))
    np.testing.assert_allclose(exponents, -0.2 * 0.5 ** (np.arange(6) / (1.5 * p)), rtol=1e-6)
  n = np.array([0.5, 4.0, 30.0]) * E
  np.testing.assert_allclose(
    predict(n, E, [-0.2, -0.2], [3.0, 3.0]), predict(n, 2 * E, -0.2, 6.0), rtol=1e-5
  )
  # Fresh data beats repeated data of the same quality.
  assert np.all(predict(n, E, [-0.2, -0.2], 3.0)[1:] < predict(n, E, -0.2, 3.0)[1:])


def test_the_more_compute_the_looser_the_filter():
  budgets = np.array([32e6, 64e6, 128e6, 320e6, 640e6])
  choose = jax.jit(
    jax.vmap(lambda n, pools: best_prefix(pools, 3.0, n, E, 0.5, 0.1, max_epochs=50), (0, None))
  )
  chosen, errors = choose(budgets, POOLS)
  assert chosen.tolist() == [1, 1, 2, 2, 2]
  assert errors.shape == (5, 4)
  again, same_errors = choose(budgets, POOLS[[2, 0, 3, 1]])
  np.testing.assert_array_equal(again, chosen)
  np.testing.assert_allclose(same_errors, errors, rtol=1e-6)
  expected = [
    [official(n, p * E, POOLS[:p], [3.0 * p] * p, 0.5, 0.1, 'paper') for p in (1, 2, 3, 4)]
    for n in budgets
  ]
  np.testing.assert_allclose(errors, expected, rtol=1e-5)
  np.testing.assert_array_equal(chosen, np.argmin(expected, axis=1) + 1)


def test_half_lives_follow_their_pools():
  utilities, half_lives = [-0.1, -0.2, -0.15], [4.0, 1.0, 2.0]
  choose = jax.jit(lambda n: best_prefix(utilities, half_lives, n, E, 0.3, 0.1, max_epochs=5))
  chosen, errors = choose(5 * E)
  expected = [
    official(5 * E, p * E, [-0.2, -0.15, -0.1][:p], [p, 2 * p, 4 * p][:p], 0.3, 0.1, 'paper')
    for p in (1, 2, 3)
  ]
  np.testing.assert_allclose(errors, expected, rtol=1e-5)
  assert int(chosen) == 1 + np.argmin(expected)


# Fit ----------------------------------------------------------------------------------------------

SEEN = np.array([0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 16]) * E


@functools.partial(jax.jit, static_argnames=('variant', 'steps', 'grid'))
def _fit(samples, errors, pool_size, variant='paper', steps=60, grid=24, **given):
  return fit_repeated_data_error(
    samples, errors, pool_size, variant=variant, max_epochs=16, grid=grid, steps=steps, **given
  )


@VARIANTS
@pytest.mark.parametrize('planted', [(-0.18, 3.0, 0.4, 0.1), (-0.09, 6.5, 0.7, 0.02)])
def test_planted_parameters_are_found(variant, planted):
  """All four, from noiseless errors in float64, and so the float64 objective is what is tested."""
  with jax.enable_x64(True):
    errors = [official(n, E, [planted[0]], [planted[1]], *planted[2:], variant) for n in SEEN]
    fit = _fit(SEEN, np.array(errors), E, variant)
    assert fit.loss < 1e-14
    np.testing.assert_allclose(fit[:4], planted, rtol=2e-3)


def test_a_floor_that_is_known_leaves_less_to_find():
  planted = (-0.18, 3.0, 0.4, 0.1)
  errors = np.array([official(n, E, [-0.18], [3.0], 0.4, 0.1, 'paper') for n in SEEN])
  fit = _fit(SEEN, errors, E, floor=0.1)
  np.testing.assert_allclose(fit[:4], planted, rtol=5e-3)
  assert fit.utility.dtype == jnp.float32
  again = predict(SEEN, E, *(float(x) for x in fit[:4]))
  np.testing.assert_allclose(again, errors, rtol=1e-4)


@VARIANTS
@pytest.mark.parametrize('given', [{}, {'floor': 0.05}, {'scale': 0.3}])
@pytest.mark.parametrize('kind', ['law', 'noise', 'rising'])
def test_the_best_grid_point_has_the_best_scale_and_floor(variant, given, kind):
  """Against non-negative least squares, also where a term wants to be negative."""
  rng = np.random.default_rng(0)
  errors = {
    'law': predict(SEEN, E, -0.2, 3.0, 0.5, 0.1, variant),
    'noise': rng.uniform(0.2, 0.4, SEEN.size),
    'rising': np.linspace(0.2, 0.5, SEEN.size),
  }[kind]
  size = 4
  fit = _fit(SEEN, errors, E, variant, steps=0, grid=size, **given)

  def best(b, tau):
    zero, one = (
      np.array([official(n, E, [b], [tau], 1.0, d, variant) for n in SEEN]) for d in (0.0, 1.0)
    )
    base = one - zero  # the law is linear in the floor
    level = given.get('scale')
    level = level if level is None or variant == 'paper' else level**b
    known = np.zeros(SEEN.size)
    free = []
    for column, value in ((zero, level), (base, given.get('floor'))):
      if value is None:
        free.append(column)
      else:
        known = known + value * column
    left = errors - known
    return optimize.nnls(np.stack(free, 1), left)[1] ** 2 / SEEN.size

  at_fit = best(float(fit.utility), float(fit.half_life))
  np.testing.assert_allclose(fit.loss, at_fit, rtol=2e-3, atol=1e-9)
  everywhere = [
    best(-b, tau) for b in np.geomspace(0.005, 0.5, size) for tau in np.geomspace(0.5, 50, size)
  ]
  assert at_fit <= min(everywhere) * (1 + 1e-3) + 1e-9
  if fit.scale > 0 and np.isfinite(fit.scale):
    mine = predict(SEEN, E, *(float(x) for x in fit[:4]), variant)
    np.testing.assert_allclose(np.mean((mine - errors) ** 2), fit.loss, rtol=2e-2, atol=1e-9)


def test_a_noisy_fit_is_as_good_as_another_optimizer():
  planted = (-0.18, 3.0, 0.4, 0.1)
  clean = np.array([official(n, E, [-0.18], [3.0], *planted[2:], 'paper') for n in SEEN])
  plain = lambda x: np.array([official(n, E, [x[0]], [x[1]], x[2], 0.1, 'paper') for n in SEEN])
  for seed in range(3):
    errors = clean + np.random.default_rng(seed).normal(0, 2e-3, clean.size)
    ours = _fit(SEEN, errors, E, floor=0.1)
    other = optimize.least_squares(
      lambda x, y=errors: plain(x) - y, planted[:3], x_scale=np.abs(planted[:3])
    )
    assert ours.loss <= 2 * other.cost / clean.size * (1 + 1e-4)
    np.testing.assert_allclose(ours.utility, -0.18, atol=0.02)


def test_fitted_terms_are_not_negative():
  """A curve that goes below any floor: the best floor is 0."""
  errors = (SEEN / 1e5) ** -0.3 - 0.05
  with jax.enable_x64(True):
    fit = _fit(SEEN, errors, E)
    assert fit.floor == 0
    assert fit.scale > 0
    assert np.isfinite(fit.loss)


def test_a_nan_is_not_fitted():
  errors = np.full(SEEN.size, 0.5)
  errors[3] = np.nan
  assert all(np.isnan(x) for x in _fit(SEEN, errors, E, floor=0.1))


# Weights ------------------------------------------------------------------------------------------


def test_repetition_weights():
  counts = np.array([[0, 1, 2], [3, 6, 300]])
  out = repetition_weights(counts, 3.0)
  assert (out.shape, out.dtype) == ((2, 3), jnp.float32)
  np.testing.assert_allclose(out, 0.5 ** (counts / 3.0), rtol=1e-5)
  np.testing.assert_array_equal(repetition_weights(counts, np.inf), 1)
  np.testing.assert_array_equal(repetition_weights(counts, 1e-6) > 0, counts == 0)
  np.testing.assert_allclose(jax.jit(repetition_weights)(counts, 3.0), out, rtol=1e-6)
  assert repetition_weights(0, 1.0) == 1


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: repetition_weights([0, -1], 1.0), 'counts holds -1; it must be at least 0'),
    (lambda: repetition_weights([0], 0.0), 'half_life holds 0; it must be greater than 0'),
    (lambda: mixed_pools([-0.1], [0.0], 3), 'half_lives holds 0'),
    (lambda: mixed_pools([-0.1], [1.0, 2.0], 3), r'half_lives has shape \(2,\), utilities \(1,\)'),
    (lambda: mixed_pools([-0.1], [1.0], 0), 'max_epochs=0 must be at least 1'),
    (lambda: repeated_data_error(0, E, -0.1, 1.0, 1.0, 0.0), 'samples holds 0'),
    (lambda: repeated_data_error(np.nan, E, -0.1, 1.0, 1.0, 0.0), 'samples holds nan'),
    (lambda: repeated_data_error(E, -1, -0.1, 1.0, 1.0, 0.0), 'pool_size holds -1'),
    (lambda: repeated_data_error(E, E, -0.1, -1.0, 1.0, 0.0), 'half_lives holds -1'),
    (
      lambda: repeated_data_error(E, E, -0.1, 1.0, 1.0, 0.0, variant='code'),
      "variant='code' must be one of",
    ),
    (
      lambda: repeated_data_error(9 * E, E, -0.1, 1.0, 1.0, 0.0, max_epochs=8),
      'max_epochs=8 is less than the 9 epochs',
    ),
    (
      lambda: jax.jit(lambda n: repeated_data_error(n, E, -0.1, 1.0, 1.0, 0.0))(E),
      'max_epochs is needed',
    ),
    (lambda: best_prefix([], 1.0, E, E), r'utilities has shape \(0,\)'),
    (lambda: best_prefix([-0.1], 0.0, E, E), 'half_lives holds 0'),
    (lambda: fit_repeated_data_error(SEEN[:3], np.ones(3), E), 'least 4, the number of parameters'),
    (lambda: fit_repeated_data_error(SEEN, np.ones(3), E), r'errors \(3,\)'),
    (
      lambda: fit_repeated_data_error(SEEN, np.ones(10), E, utilities=(-0.1, 0.1)),
      'must be two negative numbers',
    ),
  ],
)
def test_bad_arguments(call, message):
  with pytest.raises(ValueError, match=message):
    call()
