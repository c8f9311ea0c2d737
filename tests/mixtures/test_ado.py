"""Adaptive data optimization against planted laws, scipy, block means and a float64 loop."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxrw.mixtures.ado import PowerLaw, ado, fit_power_law, learning_potential

G = 4
T = 64
_fit = jax.jit(jax.vmap(fit_power_law))


def curves(seed, noise, size=8):
  """(examples, losses, laws) of power laws whose parameters the points can tell."""
  rng = np.random.default_rng(seed)
  exponent, log_floor = rng.uniform(0.15, 0.6, size), rng.uniform(0.55, 1.1, size)
  n = np.linspace(2e4, 2e6, T)
  log_scale = np.log(rng.uniform(0.5, 2, size)) + exponent * np.log(n[0])
  losses = np.exp(log_floor)[:, None] + np.exp(log_scale)[:, None] * n ** -exponent[:, None]
  losses *= np.exp(noise * rng.normal(size=losses.shape))
  examples = np.broadcast_to(n, losses.shape)
  return examples, losses, np.stack([log_scale, exponent, log_floor], axis=1)


def fitted(examples, losses, mask=None):
  mask = np.ones(losses.shape, bool) if mask is None else mask
  law, value = _fit(np.asarray(examples, np.float32), np.asarray(losses, np.float32), mask)
  return np.stack(law, axis=1), np.asarray(value)


def objective(point, n, losses):
  """The documented objective in float64."""
  a, alpha, e = point
  r = np.abs(np.log(losses) - np.log(np.exp(e) + np.exp(a - alpha * np.log(n))))
  walls = max(a - 6.5, 0) + max(alpha - 0.8, 0) + max(0.001 - alpha, 0) + max(0.5 - e, 0)
  return np.sum(np.where(r < 1e-3, r**2 / 2, 1e-3 * (r - 5e-4))) + walls


# The fit ------------------------------------------------------------------------------------------


def test_planted_laws_are_recovered():
  examples, losses, laws = curves(0, 0.0)
  found, value = fitted(examples, losses)
  np.testing.assert_allclose(found, laws, atol=3e-3)
  assert np.all(value < 1e-9)


def test_noise_and_outliers_move_the_law_little():
  examples, losses, laws = curves(1, 0.002)
  losses[:, ::16] *= 1.5
  found, _ = fitted(examples, losses)
  np.testing.assert_allclose(np.exp(found[:, 2]), np.exp(laws[:, 2]), rtol=0.06)
  slopes = [learning_potential(PowerLaw(*p.T), 2e6) for p in (found, laws)]
  np.testing.assert_allclose(slopes[0], slopes[1], rtol=0.15)


@pytest.mark.parametrize('noise', [0.003, 0.05])
def test_no_worse_than_scipy(noise):
  examples, losses, laws = curves(2, noise)
  found, value = fitted(examples, losses)
  for k in range(3):
    n, curve = examples[k], losses[k]
    center = np.log(n).mean()
    uncentered = lambda p, c=center: (p[0] + p[1] * c, p[1], p[2])
    runs = [
      optimize.minimize(
        lambda p, n=n, curve=curve, of=uncentered: objective(of(p), n, curve),
        (a - alpha * center, alpha, e),
        method='Nelder-Mead',
        options={'maxiter': 2000, 'xatol': 1e-9, 'fatol': 1e-14},
      )
      for a, alpha, e in (laws[k], laws[k] * [1, 0.5, 0.9])
    ]
    best = min(run.fun for run in runs)
    np.testing.assert_allclose(value[k], objective(found[k], n, curve), rtol=1e-3)
    assert objective(found[k].astype(np.float64), n, curve) < best * (1 + 1e-3)


def test_masked_points_may_hold_anything():
  examples, losses, laws = (x.copy() for x in curves(3, 0.0))
  mask = np.arange(T) % 3 > 0
  losses[:, ~mask], examples[:, ::9] = np.nan, 0
  found, _ = fitted(examples, losses, np.broadcast_to(mask, losses.shape))
  np.testing.assert_allclose(found, laws, atol=5e-3)


def test_a_curve_that_cannot_be_fitted_is_nan_alone():
  examples, losses, laws = curves(4, 0.0)
  losses[0, 5], losses[1, 6], losses[2, 7] = np.nan, -1, np.inf
  found, _ = fitted(examples, losses)
  assert np.all(np.isnan(found[:3]))
  np.testing.assert_allclose(found[3:], laws[3:], atol=3e-3)


def test_walls_hold_and_degenerate_curves_stay_finite():
  examples, losses, _ = curves(5, 0.01)
  losses[0] = 0.3  # below the wall of the floor
  losses[1] = np.linspace(2, 3, T)  # rises
  losses[2] = 2.0
  mask = np.ones(losses.shape, bool)
  mask[3] = False
  found, value = fitted(examples, losses, mask)
  assert np.all(np.isfinite(found))
  assert np.all(np.isfinite(value))
  assert np.all(found[:, 2] > 0.49)
  assert np.all((found[:, 1] > -1e-3) & (found[:, 1] < 0.81) & (found[:, 0] < 6.51))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((np.ones(3), np.ones(4)), 'must be one curve'),
    ((np.ones((2, 3)), np.ones((2, 3))), 'must be one curve'),
    ((np.ones(3), np.ones(3), np.ones(2, bool)), 'must be one curve'),
  ],
)
def test_a_fit_refuses_shapes(arguments, message):
  with pytest.raises(ValueError, match=message):
    fit_power_law(*arguments)


@pytest.mark.parametrize('options', [{'grid': ()}, {'huber_delta': 0.0}, {'max_iterations': 0}])
def test_a_fit_refuses_options(options):
  with pytest.raises(ValueError, match=next(iter(options))):
    fit_power_law(np.ones(3), np.ones(3), **options)


@pytest.mark.parametrize('n', [1.0, 3e2, 1e6, 1e10])
def test_the_potential_is_the_slope(n):
  law = PowerLaw(*np.array([[2.0, 0.3, 0.7], [5.0, 0.6, 1.0], [1.0, 0.01, 0.5]]).T)

  def value(n, exponent):
    return np.exp(law.log_floor) + np.exp(law.log_scale) * n**-exponent

  slope = (value(n * (1 - 1e-4), law.exponent) - value(n * (1 + 1e-4), law.exponent)) / (2e-4 * n)
  tolerance = 1e-3 if n < 1e9 else 2e-2  # of the difference
  np.testing.assert_allclose(learning_potential(law, n, 0.0), slope, rtol=tolerance)
  clipped = np.maximum(law.exponent, 0.05) / law.exponent
  np.testing.assert_allclose(
    learning_potential(law, n), clipped * learning_potential(law, n, 0.0), rtol=1e-5
  )


# The mixture --------------------------------------------------------------------------------------


def batches(seed, steps, domains=G):
  """Falling losses and counts, with domains that are absent now and then."""
  rng = np.random.default_rng(seed)
  n = 8.0 * np.arange(1, steps + 1)[:, None]
  losses = 2 + rng.uniform(3, 9, domains) * n ** -rng.uniform(0.1, 0.6, domains)
  losses = losses * np.exp(0.01 * rng.normal(size=losses.shape))
  counts = rng.multinomial(8, rng.dirichlet(np.ones(domains)), steps)
  return np.where(counts > 0, losses, np.nan).astype(np.float32), counts.astype(np.float32)


@functools.cache
def _jitted(mixture):
  return jax.jit(mixture.update)


def run(mixture, losses, counts, state=None, first=0):
  """(last state, p after each step, all states)."""
  state, states = mixture.init() if state is None else state, []
  for step, (x, c) in enumerate(zip(losses, counts), first):
    state = _jitted(mixture)(state, step=step, domain_losses=x, domain_counts=c)
    states.append(jax.tree.map(np.array, state))
  probs = np.stack([mixture.proportions(s) for s in states])
  return state, probs, jax.tree.map(lambda *x: np.stack(x), *states)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


QUICK = dict(fit_every=20, start_step=40, ignore=4, thinning=1, capacity=60)
REAL = ado(G, max_iterations=20, **QUICK)


def plain_law(n, losses, mask, xp=np):
  """Three numbers of the curve instead of a fit, which compiles at once."""
  weight = mask / xp.sum(mask)
  mean = xp.sum(xp.where(mask, xp.log(losses), 0) * weight)
  return PowerLaw(mean, 0.3 * mean - 0.2 + 0 * n[0], 0 * mean)


@pytest.fixture
def plain(monkeypatch):
  def fit(examples, losses, mask, **_):
    return plain_law(examples, losses, mask & (examples > 0), jnp), jnp.zeros(())

  module = sys.modules['jaxrw.mixtures.ado']  # the package has a function of that name
  monkeypatch.setattr(module, 'fit_power_law', fit)


def block_means(rows, points, length):
  return np.reshape(rows[: points * length], (points, length, -1)).mean(1)


def transcription(
  losses,
  counts,
  prior,
  *,
  fit_every,
  start_step,
  ignore,
  thinning,
  capacity,
  own_counts,
  power,
  floor,
):
  """p after each step, from lists that hold the whole run."""
  t_max, domains = losses.shape
  last = np.full(
    domains, np.sum(np.where(counts[0] > 0, losses[0], 0) * counts[0] / counts[0].sum())
  )
  h, mean, law, out = prior.copy(), prior.copy(), None, []
  n, all_n, all_losses = np.zeros(domains), [], []
  for t in range(t_max):
    last = np.where(counts[t] > 0, losses[t], last)
    n = n + (counts[t] if own_counts else counts[t].sum())
    h = 0.9 * h + 0.1 * counts[t] / counts[t].sum()
    if t >= ignore:
      all_losses.append(last)
      all_n.append(n)
    length = thinning
    while len(all_losses) // length >= capacity:
      length *= 2
    points = len(all_losses) // length
    if t >= start_step and t % fit_every == 0 and points >= 30:
      pairs = zip(*(block_means(rows, points, length).T for rows in (all_n, all_losses)))
      law = [plain_law(x, y, x > 0) for x, y in pairs]
    rho, p = prior, prior
    if law:
      a, alpha, _ = np.array(law).T
      rho = prior * h**power * np.maximum(alpha, 0.05) * np.exp(a) * n**-alpha / n
      rho = np.maximum(rho / rho.sum(), floor)
      rho = rho / rho.sum()
      p = 0.9 * mean + 0.1 * rho
    mean = (1 - 1 / (t + 1)) * mean + rho / (t + 1)
    out.append(p)
  return np.array(out)


@pytest.mark.parametrize(
  ('own_counts', 'power', 'floor', 'thinning'),
  [(False, 0.5, 0.01, 1), (True, 0.5, 0.1, 2), (True, 0.0, 0.0, 1)],
)
def test_many_steps_in_float64(plain, own_counts, power, floor, thinning):
  prior = np.array([0.4, 0.3, 0.2, 0.1])
  losses, counts = batches(0, 500)
  counts[0] = [2, 2, 2, 2]
  losses[0] = [3, 4, 5, 6]
  settings = dict(QUICK, thinning=thinning, own_counts=own_counts, floor=floor)
  mixture = ado(G, prior, credit_power=power, **settings)
  state, probs, _ = run(mixture, losses, counts)
  expected = transcription(losses.astype(np.float64), counts, prior, power=power, **settings)
  np.testing.assert_allclose(probs, expected, rtol=3e-4)
  assert state.fits > 15
  assert np.abs(probs[-1] - prior).max() > 0.02
  np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
  assert np.all(probs > 0)


def test_the_history_is_block_means_of_the_whole_run(plain):
  losses, counts = batches(1, 500)
  _, _, states = run(_history_mixture(), losses, counts)
  all_n = np.cumsum(counts.sum(1))
  for steps in (3, 4, 5, 63, 64, 65, 250, 490):
    history = jax.tree.map(lambda x, last=steps - 1: x[last], states.history)
    rows = np.array(states.last[4:steps], np.float64)
    size, length = int(history.filled), int(history.interval)
    assert length & (length - 1) == 0
    assert size == len(rows) // length < 60
    assert size >= 30 or length == 1
    if not size:
      continue
    blocks, n = (block_means(x, size, length) for x in (rows, all_n[4:steps]))
    np.testing.assert_allclose(history.losses[:size], blocks, rtol=1e-5)
    np.testing.assert_allclose(history.examples[:size], n, rtol=1e-5)
    np.testing.assert_array_equal(history.losses[size:], 0)


@functools.cache
def _history_mixture():
  return ado(G, **QUICK)


@pytest.mark.slow
def test_real_fits_move_the_shares_and_restart_bit_for_bit():
  losses, counts = batches(2, 90)
  steps = [(losses[t : t + 1], counts[t : t + 1]) for t in range(90)]
  states, state = [], None
  for t, (x, c) in enumerate(steps):
    state, probs, _ = run(REAL, x, c, state, t)
    states.append(jax.tree.map(np.array, state))
    if t < 40:
      np.testing.assert_array_equal(probs[0], np.full(G, 0.25, np.float32))
  assert [int(s.fits) for s in states[::20]] == [0, 0, 1, 2, 3]
  assert np.abs(states[-1].probs - 0.25).max() > 0.005
  for stop in (20, 39, 40, 63, 64, 79):  # in the history, around fits and a merge
    state = jax.tree.map(jnp.asarray, states[stop])
    for t in range(stop + 1, stop + 4):
      state, _, _ = run(REAL, *steps[t], state, t)
      same(states[t], jax.tree.map(np.asarray, state))

  # One bad loss among the points of a fit: the last laws stay. Then a permutation of the domains.
  broken = states[59]
  broken.history.losses[3, 1] = np.nan
  state, _, _ = run(REAL, *steps[60], jax.tree.map(jnp.asarray, broken), 60)
  same(jax.tree.map(np.asarray, state.law), broken.law)
  assert state.fits == broken.fits
  order = np.array([2, 0, 3, 1])
  state = None
  for t, (x, c) in enumerate(steps[:44]):
    state, _, _ = run(REAL, x[:, order], c[:, order], state, t)
  np.testing.assert_allclose(state.law.exponent, states[43].law.exponent[order], rtol=2e-3)
  np.testing.assert_allclose(state.probs, states[43].probs[order], rtol=1e-4)


def test_equal_slopes_give_the_prior(plain):
  prior = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
  counts = np.tile(np.array([2.0, 2.0, 2.0, 2.0], np.float32), (100, 1))
  losses = np.tile(np.linspace(5, 3, 100, dtype=np.float32)[:, None], (1, G))
  state, probs, _ = run(ado(G, prior, credit_power=0.0, **QUICK), losses, counts)
  assert state.fits > 0
  np.testing.assert_allclose(probs, np.tile(prior, (100, 1)), rtol=1e-5)


def test_with_a_shared_count_its_unit_is_nothing(plain):
  losses, counts = batches(3, 100)
  mixture = _history_mixture()
  # Dividing by n is common to all; n^-exponent is not, so the law is scaled along.
  state, _, _ = run(mixture, losses, counts)
  law = state.law
  scaled = PowerLaw(law.log_scale + law.exponent * np.log(64.0), law.exponent, law.log_floor)
  other = state._replace(examples=64 * state.examples, law=scaled)
  ends = [run(mixture, losses[:1], counts[:1] * c, s, 101)[1] for s, c in ((state, 1), (other, 64))]
  np.testing.assert_allclose(*ends, rtol=1e-5)


def test_one_domain_and_a_prior_of_zero(plain):
  losses, counts = batches(4, 80, 1)
  _, probs, _ = run(ado(1, **QUICK), losses, counts)
  np.testing.assert_array_equal(probs, np.ones((80, 1)))
  losses, counts = batches(4, 100)
  counts[:, 2], losses[:, 2] = 0, np.nan
  state, probs, _ = run(ado(G, [1, 1, 0, 2], floor=0.1, **QUICK), losses, counts)
  assert state.fits > 0
  np.testing.assert_array_equal(probs[:, 2], 0)
  np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)


def test_absent_domains_keep_their_loss(plain):
  losses = np.array([[3, np.nan, 5, np.nan], [np.nan, 2, np.nan, np.nan]], np.float32)
  counts = np.array([[6, 0, 2, 0], [0, 8, 0, 0]], np.float32)
  _, _, states = run(_history_mixture(), losses, counts)
  np.testing.assert_allclose(states.last, [[3, 3.5, 5, 3.5], [3, 2, 5, 3.5]])
  np.testing.assert_allclose(states.credit[0], [0.3, 0.225, 0.25, 0.225], rtol=1e-6)


@pytest.mark.parametrize('bad', ['loss', 'inf', 'count', 'empty'])
def test_a_bad_batch_changes_nothing(plain, bad):
  losses, counts = batches(5, 61)
  mixture = _history_mixture()
  state, _, _ = run(mixture, losses[:60], counts[:60])
  x, c = np.full((1, G), 2, np.float32), np.full((1, G), 2, np.float32)
  if bad == 'empty':
    c[:] = 0
  else:
    (c if bad == 'count' else x)[0, 1] = np.inf if bad == 'inf' else np.nan
  same(run(mixture, x, c, state, 60)[0], state)


def test_a_long_absence_is_no_end(plain):
  losses, counts = batches(6, 1200)
  counts[60:, 0], losses[60:, 0] = 0, np.nan
  counts[:, 1] += 1
  losses = np.where(np.isnan(losses) & (counts > 0), 3, losses).astype(np.float32)
  state, probs, _ = run(_history_mixture(), losses, counts)
  assert state.credit[0] == 0
  assert np.all(np.isfinite(probs))
  assert np.all(probs > 0.009)


def test_the_count_is_exact_beyond_float32(plain):
  mixture = _history_mixture()
  state = mixture.init()._replace(examples=jnp.full(1, 2.0**26))
  _, counts = batches(7, 1000)
  state, _, _ = run(mixture, np.full((1000, G), 3, np.float32), counts / 8, state)
  assert float(state.examples[0] - np.float32(2**26)) == 1000


def test_no_two_entries_of_the_state_share_a_buffer(plain):
  state = _history_mixture().init()
  jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)


def test_views_and_mode(plain):
  losses, counts = batches(8, 60)
  mixture = ado(G, mode='weigh', sampled=[1, 1, 1, 5], **QUICK)
  state, q, _ = run(mixture, losses, counts)
  np.testing.assert_array_equal(q, np.tile(np.array([1, 1, 1, 5], np.float32) / 8, (60, 1)))
  np.testing.assert_array_equal(mixture.objective(state), state.probs)
  plainly = _history_mixture()
  state = run(plainly, losses, counts)[0]
  same(plainly.objective(state), plainly.proportions(state))
  with pytest.raises(ValueError, match=r'domain_losses has shape \(3,\)'):
    plainly.update(state, step=0, domain_losses=np.ones(3), domain_counts=np.ones(G))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'floor': 0.25}, 'floor=0.25 for 4 domains'),
    ({'floor': -0.1}, 'floor=-0.1'),
    ({'mix': 1.5}, 'mix=1.5'),
    ({'credit_decay': -1.0}, 'credit_decay=-1.0'),
    ({'credit_power': -1.0}, 'credit_power=-1.0'),
    ({'capacity': 61}, 'capacity=61'),
    ({'capacity': 40}, 'capacity=40'),
    ({'thinning': 0}, 'thinning=0'),
    ({'fit_every': 0}, 'fit_every=0'),
    ({'prior': [1.0, 2.0]}, 'prior has 2 entries'),
    ({'prior': [1.0, -2.0, 1.0, 1.0]}, 'prior holds -2'),
    ({'mode': 'both'}, "mode='both'"),
    ({'sampled': [1.0] * 4}, 'sampled is what'),
    ({'mode': 'weigh', 'sampled': [1.0, 1.0, 1.0, 0.0]}, r'sampled\[3\]=0 but prior\[3\]'),
  ],
)
def test_bad_arguments(options, message):
  with pytest.raises(ValueError, match=message):
    ado(G, **options)
