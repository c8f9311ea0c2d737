"""Sampled values against exact ones, within the errors they state; truncation; merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import valuation
from jaxrw.valuation import sampled

N = 6
TABLE = np.random.default_rng(0).normal(size=2**N)


def random_game(present):
  return jnp.asarray(TABLE, jnp.float32)[jnp.sum(present.astype(int) * 2 ** jnp.arange(N))]


def saturating(present):
  """Grows with the number present, and is full with five of twenty."""
  return jnp.minimum(jnp.sum(present), 5.0) / 5


def _within(estimate, exact, errors=4.5):
  assert np.all(np.abs(estimate.mean - exact) < errors * estimate.standard_error + 1e-6)


@pytest.mark.parametrize('antithetic', [False, True])
@pytest.mark.parametrize('chunk', [2, 4, 6])
def test_permutations_are_unbiased(antithetic, chunk):
  found = valuation.permutation_values(
    jax.random.key(0), random_game, N,
    permutations=400, together=50, chunk=chunk, antithetic=antithetic,
  )  # fmt: skip
  _within(found, valuation.exact_values(TABLE))
  np.testing.assert_allclose(found.mean.sum(), TABLE[-1] - TABLE[0], rtol=1e-5)
  assert found.calls == 400 * N + 2
  assert np.all(found.count == (200 if antithetic else 400))


def test_other_semivalues_by_permutations():
  for coefficients in (
    valuation.banzhaf_coefficients(N),
    valuation.beta_coefficients(N, 4.0, 1.0),
    valuation.loo_coefficients(N),
  ):
    found = valuation.permutation_values(
      jax.random.key(1), random_game, N,
      permutations=1000, together=200, chunk=N, coefficients=coefficients,
    )  # fmt: skip
    _within(found, valuation.exact_values(TABLE, coefficients))


def test_subsets_are_unbiased():
  found = valuation.subset_values(jax.random.key(2), random_game, N, subsets=3001, together=256)
  _within(found, valuation.exact_values(TABLE, valuation.banzhaf_coefficients(N)))
  assert found.calls == 3002
  assert np.all(found.standard_error < 0.05)


def test_standard_errors_are_honest():
  """Of 40 repetitions the means scatter as much as each one says."""
  runs = [
    valuation.permutation_values(
      jax.random.key(100 + i), random_game, N, permutations=40, together=40, chunk=N
    )
    for i in range(40)
  ]
  scatter = np.std([r.mean for r in runs], axis=0, ddof=1)
  said = np.mean([r.standard_error for r in runs], axis=0)
  np.testing.assert_allclose(scatter.mean(), said.mean(), rtol=0.2)


def test_truncation_saves_training_and_says_how_much():
  full, short = (
    valuation.permutation_values(
      jax.random.key(3), saturating, 20,
      permutations=32, together=8, chunk=4, truncation=truncation, patience=2,
    )
    for truncation in (0.0, 0.01)
  )  # fmt: skip
  np.testing.assert_allclose(short.mean, full.mean)
  np.testing.assert_allclose(short.mean.sum(), 1, rtol=1e-6)
  assert full.calls == 32 * 20 + 2
  assert short.calls == 32 * 8 + 2  # full at the 5th place; three more are near, then none


def test_truncation_is_a_loop():
  """A game that comes near its end, goes away, and comes back."""
  worth = jnp.asarray(np.random.default_rng(5).normal(size=N), jnp.float32)
  game = lambda present: jnp.sum(present * worth) / 3 + 1

  def loop(order, truncation, patience):
    gains, still, before, full = np.zeros(N), 0, float(game(jnp.zeros(N))), float(game(jnp.ones(N)))
    for place, i in enumerate(order):
      now = float(game(jnp.asarray(np.isin(np.arange(N), order[: place + 1]), jnp.float32)))
      gains[i], before = now - before, now
      still = still + 1 if abs(now - full) <= truncation * abs(full) else 0
      if still > patience:
        break
    return gains

  key = jax.random.key(8)
  found = valuation.permutation_values(
    key, game, N, permutations=16, together=16, chunk=1, truncation=0.2, patience=1
  )
  orders = sampled._orders(jax.random.fold_in(key, 0), N, 16, False)
  expected = np.mean([loop(order, 0.2, 1) for order in orders], axis=0)
  np.testing.assert_allclose(found.mean, expected, atol=1e-6)


def test_an_estimate_goes_on_where_it_was():
  draw = lambda seed, number, start=None: valuation.permutation_values(
    jax.random.key(seed), random_game, N, permutations=number, together=10, chunk=N, start=start
  )
  one, two = draw(0, 20), draw(1, 30)
  both = draw(1, 30, start=one)
  for a, b in zip(one.merge(two)[:3], both[:3]):
    np.testing.assert_allclose(a, b, rtol=1e-10)
  assert np.all(both.count == 50)
  swapped = two.merge(one)
  np.testing.assert_allclose(swapped.mean, both.mean, rtol=1e-10)
  np.testing.assert_allclose(swapped.squares, both.squares, rtol=1e-10)


def test_chunks_of_growing_memory_count_early_samples_twice():
  """The official code appends each chunk to the memory and averages the memory's means."""
  chunks = [np.array([1.0, 1.0]), np.array([0.0, 0.0])]
  naive = np.mean([chunks[0].mean(), np.concatenate(chunks).mean()])
  one = lambda values: sampled.Estimate(
    np.array([values.mean()]), np.array([values.var() * 2]), np.array([2.0])
  )
  assert one(chunks[0]).merge(one(chunks[1])).mean == 0.5
  assert naive == 0.75


def test_it_stops_when_the_errors_are_small_enough():
  found = valuation.permutation_values(
    jax.random.key(4), random_game, N, permutations=10_000, together=50, chunk=N, wanted_error=0.1
  )
  assert 100 <= found.count[0] < 2000
  assert found.standard_error.max() <= 0.1


def test_gradient_values():
  rng = np.random.default_rng(6)
  truth = rng.normal(size=4)
  x = rng.normal(size=(20, 4))
  y = x @ truth
  y[:4] = -y[:4]  # wrong
  held_x = rng.normal(size=(50, 4))
  data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
  loss = lambda w, e: (e[0] @ w - e[1]) ** 2 / 2
  score = lambda w: -jnp.mean((jnp.asarray(held_x) @ w - held_x @ truth) ** 2)
  found = valuation.gradient_values(
    jax.random.key(0), loss, score, jnp.zeros(4), data, rate=0.05, permutations=30, together=8
  )
  assert np.all(found.count == 30)
  assert found.mean[:4].max() < np.median(found.mean[4:])
  # The sum is what one pass gains, order by order.
  gains = []
  for batch in range(4):
    orders = sampled._orders(jax.random.fold_in(jax.random.key(0), batch), 20, 8, False)
    for order in orders[: 30 - 8 * batch]:
      w = np.zeros(4)
      for i in order:
        w = w - 0.05 * (x[i] @ w - y[i]) * x[i]
      gains.append(score(jnp.asarray(w)) - score(jnp.zeros(4)))
  np.testing.assert_allclose(found.mean.sum(), np.mean(gains), rtol=1e-4)


def test_the_official_stopping_rule():
  history = np.cumsum(np.random.default_rng(0).normal(1, 0.3, (400, 3)), 0)
  history /= np.arange(1, 401)[:, None]
  expected = max(
    np.mean(np.abs(history[-1 - t] - history[-1]) / np.abs(history[-1])) for t in range(1, 101)
  )
  np.testing.assert_allclose(valuation.unsettled(history), expected, rtol=1e-9)
  assert valuation.unsettled(history[:100]) == np.inf


def test_errors():
  key = jax.random.key(0)
  broken = lambda present: jnp.where(jnp.sum(present) == 0, jnp.nan, 1.0)
  run = lambda game=saturating, players=4, **settings: valuation.permutation_values(
    key, game, players, **({'permutations': 4} | settings)
  )
  for call, message in (
    (lambda: run(permutations=0), 'permutations=0 must be greater than 0'),
    (lambda: run(players=0), 'players=0'),
    (lambda: run(truncation=-0.1), r'truncation=-0\.1'),
    (lambda: run(coefficients=np.ones(3)), r'coefficients have shape \(3,\)'),
    (lambda: run(coefficients=np.ones(4), truncation=0.1), 'other semivalues'),
    (lambda: run(broken), 'not finite for some subset'),
    (lambda: valuation.subset_values(key, saturating, 4, subsets=0), 'subsets=0'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
