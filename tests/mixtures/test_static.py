"""Static mixtures against the published closed forms, float64 NumPy, bisection and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw.mixtures import Planner
from jaxrw.mixtures.static import (
  cooldown,
  dense_cooldown,
  fixed,
  importance_mixture,
  scalarization_weights,
  scheduled,
  second_moment_ratio,
  stratified,
  temperature_probs,
  unimax_probs,
)

SIZES = np.array([1000.0, 100.0, 10.0])
INF = float('inf')

_probs = jax.jit(temperature_probs)
_weights = jax.jit(scalarization_weights)
_ratio = jax.jit(second_moment_ratio)
_unimax = jax.jit(unimax_probs)


def _powers(counts, tau):
  """p(tau) as printed, in float64, with an empty domain left at 0."""
  counts = np.asarray(counts, np.float64)
  powers = np.zeros(len(counts))
  for g, n in enumerate(counts):
    if n > 0:
      powers[g] = (n / counts.max()) ** (1 / tau)
  return powers / powers.sum()


# Temperature sampling and scalarization


@pytest.mark.parametrize('tau', [0.3, 1.0, 2.0, 5.0, 100.0, INF])
@pytest.mark.parametrize(
  'counts',
  [SIZES, [7.0], [0.0, 3.0, 0.0, 12.0], [1e30, 1e20, 1.0, 0.0], [3, 6_000_000_000, 29 * 10**12]],
  ids=['three', 'one', 'empty', 'huge', 'integers'],
)
def test_temperature_probs_are_powers_of_the_sizes(counts, tau):
  p = _probs(np.asarray(counts, np.float32), tau)
  assert p.dtype == jnp.float32
  np.testing.assert_allclose(p, _powers(counts, tau), rtol=3e-5, atol=1e-37)
  np.testing.assert_array_equal(np.asarray(p)[np.asarray(counts) == 0], 0)
  np.testing.assert_allclose(np.sum(p), 1, rtol=1e-6)


def test_two_temperatures_have_names():
  np.testing.assert_allclose(_probs(SIZES, 1.0), SIZES / SIZES.sum(), rtol=1e-6)
  np.testing.assert_array_equal(
    temperature_probs([5, 0, 10**12, 2], INF), np.float32([1, 0, 1, 1]) / 3
  )


@pytest.mark.parametrize('tau', [1e-3, 1e-30])
def test_a_low_temperature_leaves_the_largest_domain(tau):
  np.testing.assert_array_equal(temperature_probs([10, 1000, 0, 10], tau), [0, 1, 0, 0])


def test_the_order_of_domains_does_not_matter():
  rng = np.random.default_rng(0)
  counts, order = np.float32(rng.integers(0, 10**6, 20)), rng.permutation(20)
  all_of = jax.jit(
    lambda n: (temperature_probs(n, 3.0), scalarization_weights(n, 3.0), unimax_probs(n, 1e6, 1.5))
  )
  for a, b in zip(all_of(counts[order]), all_of(counts)):
    np.testing.assert_allclose(a, b[order], rtol=1e-6)


@pytest.mark.parametrize('tau', [0.3, INF])
def test_jit_changes_nothing(tau):
  np.testing.assert_allclose(temperature_probs(SIZES, tau), _probs(SIZES, tau), rtol=1e-6)
  np.testing.assert_allclose(scalarization_weights(SIZES, tau), _weights(SIZES, tau), rtol=1e-6)
  np.testing.assert_allclose(unimax_probs(SIZES, 1e3, 3.0), _unimax(SIZES, 1e3, 3.0), rtol=1e-6)


@pytest.mark.parametrize('tau', [0.5, 1.0, 5.0, INF])
def test_scalarization_weights_turn_proportional_into_temperature_sampling(tau):
  counts = np.array([1000.0, 0.0, 100.0, 10.0])
  w, p1 = _weights(counts, tau), _powers(counts, 1.0)
  np.testing.assert_allclose(w * p1, _powers(counts, tau), rtol=1e-5)
  np.testing.assert_allclose(np.sum(w * p1), 1, rtol=1e-6)
  assert w[1] == 0
  if tau == 1:
    np.testing.assert_array_equal(w, counts > 0)


@pytest.mark.parametrize('bad', [[1.0, np.nan], [1.0, -1.0], [0.0, 0.0]])
@pytest.mark.parametrize('f', [_probs, lambda n, tau: _unimax(n, 10.0, tau)])
def test_traced_counts_without_a_mixture_give_nan(f, bad):
  assert np.all(np.isnan(f(jnp.array(bad), 2.0)))


def test_a_nan_temperature_stays_visible():
  assert np.all(np.isnan(_probs(SIZES, np.nan)))


# Theorem 1: the expected gradient


def _regression(seed):
  """Rows of three domains, and a point at which their squared errors have gradients."""
  rng = np.random.default_rng(seed)
  sizes = np.array([60, 12, 4])
  domain = np.repeat(np.arange(3), sizes)
  x = rng.normal(size=(sizes.sum(), 4)) * (1 + domain[:, None])
  y = x @ rng.normal(size=4) + domain
  theta = rng.normal(size=4)
  return sizes, domain, jnp.asarray(x), jnp.asarray(y), jnp.asarray(theta)


def _rows(theta, x, y):
  """The gradient of every row's squared error, [N, D]."""
  return np.asarray(2 * (x @ theta - y)[:, None] * x)


@pytest.mark.parametrize('tau', [1.0, 2.0, 5.0, INF])
def test_theorem_1_the_full_batch_objectives_are_one(tau):
  sizes, domain, x, y, theta = _regression(0)
  w = np.asarray(_weights(np.float32(sizes), tau))[domain]
  p = _powers(sizes, tau)
  losses = lambda theta: (x @ theta - y) ** 2
  weighted = lambda theta: jnp.mean(w * losses(theta))
  sampled = lambda theta: sum(p[g] * jnp.mean(losses(theta)[domain == g]) for g in range(3))
  both = jax.jit(lambda theta: [jax.value_and_grad(f)(theta) for f in (weighted, sampled)])
  for a, b in zip(*both(theta)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('mode', 'sampled'), [('sample', None), ('weigh', None), ('weigh', [1.0, 1.0, 2.0])]
)
def test_both_modes_have_the_same_expected_gradient(mode, sampled):
  """Summed over every row with its probability: q_g / n_g to be drawn, weight p_g / q_g."""
  sizes, domain, x, y, theta = _regression(1)
  rows = _rows(theta, x, y)
  mixture = scheduled(sizes, 3.0, mode=mode, sampled=sampled)
  q, p = (np.asarray(f(jax.jit(mixture.init)())) for f in (mixture.proportions, mixture.objective))
  expected = np.sum((q / sizes * p / q)[domain, None] * rows, axis=0)
  full = sum(_powers(sizes, 3.0)[g] * np.mean(rows[domain == g], axis=0) for g in range(3))
  np.testing.assert_allclose(expected, full, rtol=2e-5, atol=1e-5)
  if mode == 'sample':
    np.testing.assert_array_equal(q, p)
  else:
    wanted = sizes / sizes.sum() if sampled is None else np.array([0.25, 0.25, 0.5])
    np.testing.assert_allclose(q, wanted, rtol=1e-6)


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_planned_batches_of_both_modes_agree_in_the_mean(seed):
  sizes, domain, x, y, theta = _regression(seed)
  rows = _rows(theta, x, y)
  full = sum(_powers(sizes, 5.0)[g] * np.mean(rows[domain == g], axis=0) for g in range(3))
  first, steps = np.r_[0, np.cumsum(sizes)[:-1]], 200
  for mode in ('sample', 'weigh'):
    mixture = scheduled(sizes, 5.0, mode=mode)
    q, p = (
      np.asarray(f(jax.jit(mixture.init)())) for f in (mixture.proportions, mixture.objective)
    )
    planner = Planner(sizes, 8, q, seed)
    state, gradients = planner.init(), []
    for _ in range(steps):
      plan, state = planner.plan(state)
      w = p[plan.domain] / plan.sampling_prob
      gradients.append(np.mean(w[:, None] * rows[first[plan.domain] + plan.index], axis=0))
    error = np.std(gradients, axis=0) / np.sqrt(steps)
    assert np.all(np.abs(np.mean(gradients, axis=0) - full) < 4.5 * error)


# Theorems 2 and 3: the noise


@pytest.mark.parametrize(
  ('tau', 'expected'), [(1, 1), (2, 1.6603), (3, 3.0675), (5, 5.6159), (100, 13.1361)]
)
def test_f_has_the_published_closed_form(tau, expected):
  ratio = second_moment_ratio(temperature_probs(SIZES, tau), temperature_probs(SIZES, 1.0))
  np.testing.assert_allclose(ratio, expected, atol=6e-5)
  p, p1 = _powers(SIZES, tau), _powers(SIZES, 1)
  np.testing.assert_allclose(ratio, np.sum(p**2 / p1), rtol=1e-5)


def test_theorem_2_turns_around_when_large_domains_have_the_large_gradients():
  moments = np.array([100.0, 1.0, 0.01])
  new, old = temperature_probs(SIZES, 5.0), temperature_probs(SIZES, 1.0)
  w = scalarization_weights(SIZES, 5.0)
  weighting, sampling = np.sum(old * w**2 * moments), np.sum(new * moments)
  np.testing.assert_allclose([weighting, sampling], [28.1, 49.6], atol=0.05)
  np.testing.assert_allclose(
    second_moment_ratio(new, old, moments), 28.0767613 / 49.5967169, rtol=1e-5
  )
  assert second_moment_ratio(new, old) > 1
  assert second_moment_ratio(new, old, moments[::-1]) > second_moment_ratio(new, old)


@pytest.mark.parametrize('moments', [(1.0, 1.0, 1.0), (100.0, 1.0, 0.01), (1.0, 4.0, 9.0)])
def test_second_moments_are_those_of_drawn_gradients(moments):
  """Single-example gradients with E g^2 = G in each domain, half of it from the mean."""
  new, old = np.asarray(_powers(SIZES, 5.0)), np.asarray(_powers(SIZES, 1.0))
  ratios = []
  for seed in range(5):
    rng = np.random.default_rng(seed)

    def draw(q, rng=rng):
      domain = rng.choice(3, size=300_000, p=q)
      return domain, np.sqrt(np.array(moments)[domain] / 2) * (1 + rng.normal(size=domain.size))

    domain, g = draw(old)
    weighting = np.mean((np.asarray(scalarization_weights(SIZES, 5.0))[domain] * g) ** 2)
    _, g = draw(new)
    ratios.append(weighting / np.mean(g**2))
  error = np.std(ratios, ddof=1) / np.sqrt(len(ratios))
  ratio = second_moment_ratio(new, old, moments)
  assert abs(np.mean(ratios) - ratio) < 5 * error + 1e-3 * ratio
  np.testing.assert_allclose(ratios, ratio, rtol=0.05)


def _f(tau, counts):
  return second_moment_ratio(temperature_probs(counts, tau), temperature_probs(counts, 1.0))


_f_and_slope = jax.jit(jax.vmap(jax.value_and_grad(_f), (0, None)))


@pytest.mark.parametrize('counts', [(1000, 100, 10), (5, 0, 6), (1e9, 1, 0), (1, 2, 3)])
def test_theorem_3_f_never_falls(counts):
  taus = np.concatenate([np.linspace(1.05, 10, 40), [30.0, 100.0]])
  f, slopes = _f_and_slope(np.float32(taus), np.float32(counts))
  assert np.all(slopes > 0)
  at = lambda tau: sum(a**2 / b for a, b in zip(_powers(counts, tau), _powers(counts, 1)) if b > 0)
  np.testing.assert_allclose(f, [at(tau) for tau in taus], rtol=1e-4)
  difference = [(at(tau * (1 + 1e-5)) - at(tau * (1 - 1e-5))) / (2e-5 * tau) for tau in taus]
  np.testing.assert_allclose(slopes, difference, rtol=2e-3)


def test_f_is_flat_at_tau_1_and_where_sizes_are_equal():
  taus = jnp.array([1.0, 3.0, INF])
  f, slopes = _f_and_slope(taus, np.float32(SIZES))
  np.testing.assert_allclose([f[0], slopes[0], slopes[2]], [1, 0, 0], atol=2e-6)
  f, slopes = _f_and_slope(taus, np.float32([7, 7, 0]))
  np.testing.assert_allclose(f, 1, rtol=1e-6)
  np.testing.assert_array_equal(slopes, 0)


def test_second_moment_ratio_at_the_edges():
  assert second_moment_ratio([1.0], [1.0], [3.0]) == 1
  two = lambda *args: _ratio(*map(jnp.array, args))
  assert two([0.5, 0.5], [1.0, 0.0]) == INF  # nothing is drawn there to be weighed
  assert two([0.5, 0.5], [1.0, 0.0], [1.0, 0.0]) == 0.5
  assert two([1.0, 0.0], [0.5, 0.5], [1.0, np.nan]) == 2  # no part of the mixture
  assert np.isnan(two([0.5, 0.5], [0.5, 0.5], [1.0, np.nan]))
  assert np.isnan(two([0.5, 0.5], [0.5, 0.5], [0.0, 0.0]))
  gradient = jax.jit(jax.grad(second_moment_ratio))(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
  assert np.all(np.isfinite(gradient))


# Schedules of the temperature


def test_cooldown_changes_once():
  tau = jax.jit(jax.vmap(cooldown(tau_high=5, switch_step=7, tau_low=1)))(jnp.arange(12))
  assert tau.dtype == jnp.float32
  np.testing.assert_array_equal(tau, [5] * 7 + [1] * 5)
  assert cooldown(0)(0) == 1
  assert cooldown(3, tau_high=INF)(jnp.int32(2)) == INF


@pytest.mark.parametrize('shape', ['linear', 'cosine'])
@pytest.mark.parametrize(('high', 'low'), [(5.0, 1.0), (1.0, 3.0)])
def test_dense_cooldown_interpolates_in_tau(shape, high, low):
  steps = np.arange(0, 40)
  tau = jax.jit(jax.vmap(dense_cooldown(20, high, low, begin=10, shape=shape)))(steps)
  done = np.clip((steps - 10) / 20, 0, 1)
  done = np.sin(np.pi / 2 * done) ** 2 if shape == 'cosine' else done
  np.testing.assert_allclose(tau, high + (low - high) * done, rtol=1e-5)
  np.testing.assert_array_equal(tau[:11], high)
  np.testing.assert_array_equal(tau[30:], low)
  assert np.all(np.diff(tau) * (low - high) >= 0)


# UniMax


def _visit_in_order(counts, budget, epochs):
  """The published procedure: smallest first, each an equal part of what is left, or its cap."""
  left, amounts = budget, np.zeros(len(counts))
  for i, g in enumerate(np.argsort(counts)):
    amounts[g] = min(left / (len(counts) - i), epochs * counts[g])
    left -= amounts[g]
  return amounts / amounts.sum()


def _bisect(counts, budget, epochs):
  """The water level by bisection."""
  caps = np.asarray(counts, np.float64) * epochs
  if caps.sum() <= budget:
    return caps / caps.sum()
  low, high = 0.0, budget
  for _ in range(200):
    level = (low + high) / 2
    low, high = (level, high) if np.minimum(caps, level).sum() < budget else (low, level)
  return np.minimum(caps, high) / np.minimum(caps, high).sum()


@pytest.mark.parametrize('seed', range(12))
def test_unimax_fills_to_one_level(seed):
  rng = np.random.default_rng(seed)
  counts = np.floor(np.exp(rng.uniform(0, 14, 24)))
  counts[rng.random(24) < rng.uniform(0, 0.9)] = 0
  counts[7] = 1000
  for part in (1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 3.0):
    epochs = rng.uniform(0.5, 5)
    budget = part * epochs * counts.sum()
    p = np.asarray(_unimax(counts.astype(np.float32), budget, epochs))
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, _bisect(counts, budget, epochs), rtol=2e-4)
    np.testing.assert_allclose(p, _visit_in_order(counts, budget, epochs), rtol=2e-4)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    np.testing.assert_array_equal(p[counts == 0], 0)
    if part < 1:
      assert np.all(p * budget <= epochs * counts * (1 + 1e-4))


def test_unimax_equals_the_numbers_of_a_public_package():
  """The example in the readme of unimax_sampling on PyPI: five languages, 4 epochs."""
  counts = [179955884499, 184595788282, 42541080893, 10027573389, 549707867]
  expected = [0.2769211666, 0.2769211666, 0.2769211666, 0.160441174224, 0.008795325872]
  np.testing.assert_allclose(unimax_probs(counts, 250_000_000_000, 4), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ('counts', 'budget', 'epochs', 'expected'),
  [
    ([10, 20, 70], 1000, 2, [0.1, 0.2, 0.7]),  # cannot be met: all at their caps
    ([10, 20, 70], 200, 2, [0.1, 0.2, 0.7]),  # just met
    ([10, 20, 70], 1e-6, 1, [1 / 3] * 3),  # no cap is reached
    ([10, 0, 70], 1000, INF, [0.5, 0, 0.5]),
    ([10, 20, 70], 60, 1, [1 / 6, 1 / 3, 1 / 2]),
    ([5], 1000, 1, [1]),
    ([4, 4, 4, 4], 8, 1, [0.25] * 4),
  ],
)
def test_unimax_by_hand(counts, budget, epochs, expected):
  p = _unimax(np.float32(counts), float(budget), float(epochs))
  np.testing.assert_allclose(p, expected, rtol=1e-5)


def test_unimax_of_many_domains():
  counts = np.exp(np.random.default_rng(0).normal(0, 3, 5000))
  for part in (0.01, 0.7, 0.99):
    budget = part * counts.sum()
    np.testing.assert_allclose(
      _unimax(counts.astype(np.float32), budget, 1.0), _bisect(counts, budget, 1.0), rtol=1e-3
    )


# Mixtures from a target set and from a basis


def test_importance_mixture_is_a_histogram():
  ids = np.random.default_rng(0).integers(0, 6, 1000)
  expected = [np.mean(ids == g) for g in range(8)]
  p = jax.jit(importance_mixture, static_argnums=1)(ids, 8)
  assert p.dtype == jnp.float32
  np.testing.assert_allclose(p, expected, rtol=1e-6)
  np.testing.assert_array_equal(importance_mixture([0, 0], 1), [1])


@pytest.mark.parametrize('wrong', [-1, 4])
def test_importance_mixture_refuses_ids_out_of_range(wrong):
  with pytest.raises(IndexError, match=f'ids holds {wrong}, but ids of 4 domains are 0 to 3'):
    importance_mixture([0, wrong, 1], 4)
  traced = jax.jit(importance_mixture, static_argnums=1)(jnp.array([0, wrong, 1]), 4)
  assert np.all(np.isnan(traced))


# The factories


@pytest.mark.parametrize('num_domains', [1, 5])
def test_stratified_is_uniform(num_domains):
  mixture = stratified(num_domains)
  state = mixture.update(mixture.init(), step=3, domain_losses=jnp.ones(num_domains))
  assert jax.tree.leaves(state) == []
  np.testing.assert_array_equal(
    mixture.proportions(state), np.full(num_domains, 1 / num_domains, 'f')
  )
  np.testing.assert_array_equal(mixture.objective(state), mixture.proportions(state))


def test_fixed_normalizes_and_stays():
  mixture = fixed([3, 1, 0], objective=np.array([1.0, 3.0, 0.0]))
  state = jax.jit(mixture.update)(mixture.init(), step=3)
  np.testing.assert_array_equal(jax.jit(mixture.proportions)(state), [0.75, 0.25, 0])
  np.testing.assert_array_equal(jax.jit(mixture.objective)(state), [0.25, 0.75, 0])
  alone = fixed(jnp.array([3.0, 1.0]))
  np.testing.assert_array_equal(alone.objective(()), [0.75, 0.25])
  np.testing.assert_array_equal(fixed([0.5, 0.5], [1, 0]).objective(()), [1, 0])
  np.testing.assert_array_equal(jax.jit(lambda p: fixed(p).objective(()))(np.ones(2)), [0.5, 0.5])


@pytest.mark.parametrize('mode', ['sample', 'weigh'])
def test_scheduled_holds_the_mixture_of_the_step(mode):
  counts = [1000, 0, 100, 10]
  mixture = scheduled(counts, cooldown(4, tau_high=5.0), mode=mode)
  update, state = jax.jit(mixture.update), jax.jit(mixture.init)()
  for step in range(8):
    if step:
      state = update(state, step=step, domain_counts=jnp.ones(4))
    p = _powers(counts, 5.0 if step < 4 else 1.0)
    assert state.dtype == jnp.float32
    np.testing.assert_allclose(mixture.objective(state), p, rtol=1e-5)
    q = p if mode == 'sample' else _powers(counts, 1.0)
    np.testing.assert_allclose(mixture.proportions(state), q, rtol=1e-5)
  np.testing.assert_allclose(mixture.update(None, step=step), state, rtol=1e-6)


def test_scheduled_goes_on_from_host_arrays():
  mixture = scheduled(SIZES, dense_cooldown(20))
  update, state = jax.jit(mixture.update), jax.jit(mixture.init)()
  restored = jax.tree.map(np.asarray, update(state, step=5))
  for step in range(1, 12):
    state = update(state, step=jnp.int32(step))
    if step > 5:
      restored = update(restored, step=jnp.int32(step))
      np.testing.assert_array_equal(restored, state)
      np.testing.assert_array_equal(mixture.proportions(restored), mixture.proportions(state))


def test_scheduled_takes_other_schedules_and_constants():
  mixture = scheduled(SIZES, jaxrw.temperature_schedule(INF, 1.0, steps=10))
  np.testing.assert_allclose(mixture.init(), np.full(3, 1 / 3), rtol=1e-6)
  np.testing.assert_allclose(mixture.update(mixture.init(), step=5), _powers(SIZES, 2.0), rtol=1e-5)
  constant = scheduled(SIZES, 3.0)
  np.testing.assert_array_equal(constant.update(constant.init()), constant.init())
  np.testing.assert_array_equal(scheduled([4], 3.0).init(), [1])


def test_a_schedule_needs_the_step():
  mixture = scheduled(SIZES, cooldown(5))
  with pytest.raises(TypeError, match='tau is a schedule'):
    mixture.update(mixture.init())


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: temperature_probs([1, -2], 1.0), 'counts holds -2; expected finite numbers'),
    (lambda: temperature_probs([1, np.nan], 1.0), 'counts holds nan'),
    (lambda: temperature_probs([1, INF], 1.0), 'counts holds inf'),
    (lambda: temperature_probs([0, 0], 1.0), 'counts are all 0'),
    (lambda: temperature_probs([], 1.0), r'counts has shape \(0,\)'),
    (lambda: temperature_probs([[1.0]], 1.0), r'counts has shape \(1, 1\); expected \[G\]'),
    (lambda: _probs(jnp.ones((2, 2)), 1.0), r'counts has shape \(2, 2\)'),
    (lambda: temperature_probs([1], 0.0), 'tau=0.0 must be greater than 0'),
    (lambda: scalarization_weights([1], -1), 'tau=-1 must be greater'),
    (lambda: cooldown(-1), 'switch_step=-1'),
    (lambda: cooldown(1, tau_high=0), 'tau_high=0 must be greater'),
    (lambda: dense_cooldown(5, INF), 'tau_high=inf must be finite; jaxrw.temperature_schedule'),
    (lambda: dense_cooldown(0), 'steps=0'),
    (lambda: dense_cooldown(5, begin=-1), 'begin=-1'),
    (lambda: dense_cooldown(5, shape='cubic'), "shape='cubic' must be"),
    (lambda: unimax_probs([1], 0, 1), 'budget=0 must be greater'),
    (lambda: unimax_probs([1], INF, 1), 'budget=inf must be finite'),
    (lambda: unimax_probs([1], 1, 0), 'max_epochs=0'),
    (lambda: unimax_probs([0], 1, 1), 'counts are all 0'),
    (lambda: second_moment_ratio([1, 1], [0.5, 0.5]), 'p_new sums to 2; expected 1'),
    (lambda: second_moment_ratio([0.5, 0.5], [1.0]), r'p_old has shape \(1,\)'),
    (lambda: second_moment_ratio([1.0], [1.0], [1, 1]), r'second_moments has shape \(2,\)'),
    (lambda: importance_mixture([], 3), r'ids has shape \(0,\)'),
    (lambda: importance_mixture([0], 0), 'num_domains=0'),
    (lambda: stratified(0), 'num_domains=0'),
    (lambda: fixed([0, 0]), 'proportions are all 0'),
    (lambda: fixed([1, -1]), 'proportions holds -1'),
    (lambda: fixed([1, 1], [1]), r'proportions has shape \(2,\), objective \(1,\)'),
    (lambda: fixed([1, 0], [1, 1]), r'proportions\[1\]=0 but objective\[1\]=0.5'),
    (lambda: scheduled([1, 1], mode='both'), "mode='both' must be one of"),
    (lambda: scheduled([1, 1], sampled=[1, 1]), "sampled is what mode='weigh' draws"),
    (lambda: scheduled([1, 1], mode='weigh', sampled=[1]), r'sampled has shape \(1,\)'),
    (lambda: scheduled([1, 1], mode='weigh', sampled=[0, 1]), r'sampled\[0\]=0 but counts\[0\]=1'),
    (lambda: scheduled([1, 1], 0.0), 'tau=0.0'),
  ],
)
def test_errors_say_what_to_do(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_ids_must_be_integers():
  with pytest.raises(TypeError, match='ids has dtype float64; expected integers'):
    importance_mixture([0.0, 1.0], 3)


@pytest.mark.parametrize('factory', [stratified, fixed, scheduled])
def test_factories_declare_what_they_promise(factory):
  assert factory.declaration.scale == 'absolute'
  assert factory.declaration.level == 'example'
