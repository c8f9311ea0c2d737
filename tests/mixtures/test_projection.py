"""Projection from pilots against closed forms, NumPy in float64 and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw.mixtures.projection import (
  MixtureResponse,
  fit_mixture_response,
  improve_mixture,
  performance_gradient,
  predict_performance,
  project_log,
  transport_mixture_gradient,
)

M = 3
_fit = jax.jit(fit_mixture_response)
_predict = jax.jit(predict_performance)
_gradient = jax.jit(performance_gradient)
_calibrated = jax.jit(transport_mixture_gradient, static_argnums=2)
_improve = jax.jit(improve_mixture, static_argnames='maximize')


def f32(*arrays):
  return tuple(np.asarray(x, np.float32) for x in arrays)


def pilots(seed, k=60, m=M):
  rng = np.random.default_rng(seed)
  p = rng.dirichlet(np.ones(m), k)
  return p, 5 + 0.5 * rng.normal(size=k)


def design(p, distances):
  """As documented: squares and shares times the distance, squares and shares."""
  terms = np.concatenate([p**2, p], axis=1)
  return np.concatenate([distances[:, None] * terms, terms], axis=1)


def planted(seed=0, m=M):
  rng = np.random.default_rng(seed)
  return MixtureResponse(*f32(0.1 * rng.normal(size=(2, m)), rng.normal(size=(2, m))))


def performance(response, p, distance):
  """The formula, term by term."""
  total = 0.0
  for i, share in enumerate(p):
    total += (response.slope[0][i] * share**2 + response.slope[1][i] * share) * distance
    total += response.level[0][i] * share**2 + response.level[1][i] * share
  return total


# Stage 1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(3))
def test_least_squares_are_those_of_numpy(seed):
  p, distances = pilots(seed)
  noisy = 0.8 + 0.1 * np.random.default_rng(seed + 10).normal(size=len(p))
  fit = _fit(*f32(p, distances, noisy))
  expected = np.linalg.lstsq(design(p, distances), noisy, rcond=None)[0].reshape(2, 2, M)
  np.testing.assert_allclose(fit.slope, expected[0], rtol=2e-3, atol=2e-4)
  np.testing.assert_allclose(fit.level, expected[1], rtol=2e-3, atol=1e-3)
  np.testing.assert_allclose(
    _predict(fit, *f32(p, distances)), design(p, distances) @ expected.ravel(), atol=2e-5
  )


def test_constants_beside_the_quadratic_forms_add_nothing():
  p, distances = pilots(3)
  y = np.random.default_rng(4).normal(size=len(p))
  ones = np.ones((len(p), 1))
  wide = np.concatenate([design(p, distances), distances[:, None], ones], axis=1)
  expected = wide @ np.linalg.lstsq(wide, y, rcond=None)[0]
  np.testing.assert_allclose(_predict(_fit(*f32(p, distances, y)), *f32(p, distances)), expected,
                             atol=2e-4)  # fmt: skip


def test_a_planted_response_is_recovered():
  p, distances = pilots(5)
  true = planted()
  y = [performance(true, *row) for row in zip(p, distances)]
  fit = _fit(*f32(p, distances, y))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), fit, true)
  new, at = pilots(6, 10)
  expected = [performance(true, *row) for row in zip(new, at)]
  np.testing.assert_allclose(_predict(fit, *f32(new, at)), expected, atol=1e-4)


@pytest.mark.parametrize('m', [1, 2, 4])
def test_other_numbers_of_sources(m):
  p, distances = pilots(7, m=m)
  true = planted(1, m)
  y = np.array([performance(true, *row) for row in zip(p, distances)])
  np.testing.assert_allclose(
    _predict(_fit(*f32(p, distances, y)), *f32(p, distances)), y, atol=1e-4
  )


@pytest.mark.parametrize('distance', [0.0, 5.0])
def test_equal_distances_leave_the_level_only(distance):
  p, _ = pilots(8)
  y = 0.5 + 0.3 * p[:, 0] - 0.2 * p[:, 1] ** 2
  fit = _fit(*f32(p, np.full(len(p), distance), y))
  np.testing.assert_array_equal(fit.slope, 0)
  np.testing.assert_allclose(_predict(fit, *f32(p, np.full(len(p), distance))), y, atol=1e-5)


def test_sources_in_another_order():
  p, distances = pilots(9)
  y = np.random.default_rng(9).normal(size=len(p))
  order = np.array([2, 0, 1])
  fit, moved = _fit(*f32(p, distances, y)), _fit(*f32(p[:, order], distances, y))
  np.testing.assert_allclose(moved.slope, np.asarray(fit.slope)[:, order], atol=1e-3)
  np.testing.assert_allclose(moved.level, np.asarray(fit.level)[:, order], atol=5e-3)


@pytest.mark.parametrize('where', [1, 2])
def test_nan_stays_visible_in_a_fit(where):
  arrays = list(f32(*pilots(10), np.ones(60)))
  arrays[where] = arrays[where].copy()
  arrays[where][3] = np.nan
  assert all(np.isnan(x).all() for x in _fit(*arrays))


def test_jit_equals_eager():
  p, distances = pilots(11)
  arrays = f32(p, distances, np.sin(distances))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    _fit(*arrays),
    fit_mixture_response(*arrays),
  )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((np.full((12, 3), 0.5), np.ones(12), np.ones(12)), r'mixtures\[0\] sums to 1.5'),
    ((np.full((11, 3), 1 / 3), np.ones(11), np.ones(11)), '11 rows; expected at least 12'),
    ((np.full((12, 3), 1 / 3), np.ones(11), np.ones(12)), r'distances has shape \(11,\)'),
    ((np.full((12, 3), 1 / 3), np.ones(12), np.ones((12, 1))), r'performance \(12, 1\)'),
    ((np.ones(3) / 3, np.ones(12), np.ones(12)), 'mixtures has shape'),
  ],
)
def test_bad_pilots(arguments, message):
  with pytest.raises(ValueError, match=message):
    fit_mixture_response(*arguments)


def test_another_number_of_sources_is_an_error():
  with pytest.raises(ValueError, match='mixture has 2 sources, the response 3'):
    predict_performance(planted(), np.ones(2) / 2, 1.0)
  with pytest.raises(ValueError, match='distance_gradient has 2 sources'):
    performance_gradient(planted(), np.ones(3) / 3, 1.0, np.ones(2))


# Stage 2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [50, 200, 250, 300, 900, 1e6])
def test_a_line_in_log_n_is_projected_exactly(size):
  a, b = np.array([0.2, 1.0, -3.0]), np.array([0.05, -0.2, 1.0])
  law = lambda n: a - b * np.log(n)
  np.testing.assert_allclose(
    project_log(law(200), law(300), 200, 300, size), law(size), rtol=1e-5, atol=2e-5
  )


def test_the_pilot_sizes_give_the_pilots():
  low, high = f32([0.3, 0.7], [0.5, 0.6])
  np.testing.assert_array_equal(project_log(low, high, 200, 300, 200), low)
  np.testing.assert_allclose(project_log(low, high, 200, 300, 300), high, rtol=1e-7)


def test_the_published_form():
  n0, n1, n, low, high = 200, 300, 900, 0.81, 0.86
  expected = (np.log(n / n0) * high - np.log(n / n1) * low) / np.log(n1 / n0)
  assert float(project_log(low, high, n0, n1, n)) == pytest.approx(expected, abs=1e-6)


def test_sizes_broadcast_and_trace():
  sizes = jnp.array([200.0, 300.0, 900.0])
  out = jax.jit(project_log)(0.8, 0.84, 200, 300, sizes)
  np.testing.assert_allclose(out, project_log(0.8, 0.84, 200, 300, sizes), rtol=1e-6)
  assert out.shape == (3,)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [((0, 300, 900), 'size_low=0'), ((200, 200, 900), 'must differ'), ((200, 300, -1), 'size=-1')],
)
def test_bad_sizes(sizes, message):
  with pytest.raises(ValueError, match=message):
    project_log(0.8, 0.9, *sizes)


# Gradients ----------------------------------------------------------------------------------------


def published(potentials, ids, m):
  """(1 / n_i) [sum in source i - n_i / (N - n_i) sum of the others]."""
  out = []
  for i in range(m):
    own, rest = potentials[ids == i], potentials[ids != i]
    n = len(own)
    out.append((own.sum() - n / (len(ids) - n) * rest.sum()) / n if n and len(rest) else 0.0)
  return np.array(out)


@pytest.mark.parametrize('seed', range(3))
def test_calibrated_gradient_term_by_term(seed):
  rng = np.random.default_rng(seed)
  potentials, ids = rng.normal(size=50), rng.choice(M, 50, p=[0.6, 0.3, 0.1])
  np.testing.assert_allclose(
    _calibrated(*f32(potentials), ids, M), published(potentials, ids, M), atol=1e-5
  )


@pytest.mark.parametrize('shift', [-3.0, 1e3, 1e6])
def test_a_constant_changes_nothing(shift):
  rng = np.random.default_rng(0)
  # Multiples of 1 / 8 up to 1e6 are exact in float32.
  potentials, ids = rng.integers(-8, 9, 40) / 8, rng.integers(0, M, 40)
  np.testing.assert_allclose(
    _calibrated(*f32(potentials + shift), ids, M), _calibrated(*f32(potentials), ids, M), atol=0.1
    if shift > 1e5 else 1e-3,
  )  # fmt: skip


def test_equal_sources_have_equal_gradients():
  own, other = np.random.default_rng(1).normal(size=(2, 8))
  potentials, ids = np.concatenate([own, own, other]), np.repeat(np.arange(3), 8)
  a, b, c = _calibrated(*f32(potentials), ids, 3)
  assert float(a) == pytest.approx(float(b), abs=1e-6)
  assert abs(float(a - c)) > 1e-3


def test_empty_only_and_unknown_sources():
  potentials, ids = f32([1.0, 3.0, 50.0])[0], np.array([0, 1, -1])
  np.testing.assert_allclose(_calibrated(potentials, ids, 4), [-2, 2, 0, 0], atol=1e-5)
  np.testing.assert_array_equal(_calibrated(potentials, np.zeros(3, int), 3), 0)
  np.testing.assert_array_equal(_calibrated(potentials, np.zeros(3, int), 1), 0)


def test_nan_and_foreign_ids():
  ids = np.array([0, 1, 1])
  assert np.isnan(_calibrated(*f32([np.nan, 1, 2]), ids, 2)).all()
  assert np.isnan(_calibrated(*f32([0, 1, 2]), np.array([0, 1, 2]), 2)).all()
  with pytest.raises(IndexError, match='holds 2'):
    transport_mixture_gradient(np.ones(3), np.array([0, 1, 2]), 2)
  with pytest.raises(TypeError, match='expected integers'):
    transport_mixture_gradient(np.ones(3), np.ones(3), 2)
  with pytest.raises(ValueError, match='expected'):
    transport_mixture_gradient(np.ones(3), ids[:2], 2)
  with pytest.raises(ValueError, match='num_sources=0'):
    transport_mixture_gradient(np.ones(3), ids, 0)


def give_way(p, i, h):
  """p_i grows by h, the others shrink in proportion."""
  out = p * (1 - p[i] - h) / (1 - p[i])
  out[i] = p[i] + h
  return out


def gradient_of(distance_at, p):
  """dD/dp along the simplex by central differences in float64."""
  h = 1e-5
  return np.array(
    [(distance_at(give_way(p, i, h)) - distance_at(give_way(p, i, -h))) / (2 * h) for i in range(M)]
  )


@pytest.mark.parametrize('seed', range(3))
def test_performance_gradient_is_the_finite_difference(seed):
  rng = np.random.default_rng(seed)
  p, response, directions = rng.dirichlet(np.ones(M)), planted(seed), rng.normal(size=M)
  distance_at = lambda q: 4 + q @ directions + np.sin(3 * q[0])
  exact = jax.tree.map(lambda x: np.asarray(x, np.float64), response)
  expected = gradient_of(lambda q: performance(exact, q, distance_at(q)), p)
  ours = _gradient(response, *f32(p, distance_at(p), gradient_of(distance_at, p)))
  np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_source_that_is_everything_has_no_own_part():
  out = _gradient(planted(), *f32([1.0, 0.0, 0.0], 2.0, np.zeros(3)))
  assert float(out[0]) == 0
  assert np.isfinite(out).all()


def test_a_gradient_is_projected_like_a_performance():
  p, low, high = np.array([0.5, 0.3, 0.2]), planted(1), planted(2)
  both = lambda q: (performance(low, q, 4.0) * -np.log(900 / 300)
                    + performance(high, q, 3.0) * np.log(900 / 200)) / np.log(1.5)  # fmt: skip
  slopes = [_gradient(r, *f32(p, d, np.zeros(M))) for r, d in ((low, 4.0), (high, 3.0))]
  np.testing.assert_allclose(
    project_log(*slopes, 200, 300, 900), gradient_of(both, p), rtol=2e-3, atol=2e-3
  )


# Steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('maximize', [True, False])
def test_a_step_is_one_of_theta(maximize):
  p, target = np.array([0.5, 0.3, 0.2]), np.array([0.2, -0.4, 0.1])
  objective = lambda theta: jnp.sum(jnp.asarray(target) * jax.nn.softmax(theta) ** 2)
  theta = jnp.log(jnp.asarray(p))
  sign = 1 if maximize else -1
  expected = jax.nn.softmax(theta + sign * 2.0 * jax.grad(objective)(theta))
  gradient = gradient_of(lambda q: target @ q**2, p)
  ours = _improve(*f32(p, gradient), 2.0, maximize=maximize)
  np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_steps_stay_on_the_simplex_and_end_at_the_maximum():
  best = np.array([0.6, 0.3, 0.1])

  def step(p, _):
    d = -2 * (p - best)
    return improve_mixture(p, (d - p @ d) / (1 - p), 2.0), None

  p, _ = jax.jit(lambda p: jax.lax.scan(step, p, length=400))(jnp.ones(3) / 3)
  np.testing.assert_allclose(p, best, atol=1e-3)
  far = _improve(*f32([0.4, 0.3, 0.3], [1e6, -1e6, 0]), 5.0)
  np.testing.assert_allclose(far, [1, 0, 0], atol=1e-6)


def test_neutral_zero_and_nan_steps():
  p = f32([0.5, 0.5, 0.0])[0]
  gradient = f32([1.0, -1.0, np.nan])[0]
  np.testing.assert_allclose(_improve(p, gradient, 0.0), p, atol=1e-7)
  assert np.isnan(_improve(p, gradient[::-1], 1.0)).any()
  np.testing.assert_array_equal(improve_mixture([1.0], [3.0], 1.0), [1.0])
  with pytest.raises(ValueError, match='they must agree'):
    improve_mixture(p, np.ones(2), 1.0)
  with pytest.raises(ValueError, match='sums to'):
    improve_mixture([0.5, 0.4], np.ones(2), 1.0)
  with pytest.raises(ValueError, match='rate=-1'):
    improve_mixture(p, np.ones(3), -1)


def test_a_share_of_zero_ignores_its_gradient():
  out = _improve(*f32([0.5, 0.5, 0.0], [0.2, -0.2, np.nan]), 1.0)
  assert np.isfinite(out).all()
  assert float(out[2]) == 0
