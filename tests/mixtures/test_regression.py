"""Swarm regression: planted laws, scipy's optimizers and statistics, counts of a design."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

from jaxrw.mixtures.regression import (
  MixingLaw,
  best_mixture,
  decision_accuracy,
  expand_reuse,
  fit_mixing_law,
  predict_losses,
  repetition_subsample,
  sample_mixtures,
  spearman,
)

INF, NAN = float('inf'), float('nan')
PRIOR = np.array([0.45, 0.3, 0.15, 0.08, 0.02])
KEY = jax.random.key(0)


def sampled(count=64, prior=PRIOR, seed=0, **options):
  return sample_mixtures(jax.random.key(seed), prior, count, **options)


# The swarm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('max_ratio', 'min_share'), [(15.0, 2e-4), (3.0, 0.02), (INF, 0.0)])
def test_a_swarm_keeps_what_it_promises(max_ratio, min_share):
  p = sampled(512, max_ratio=max_ratio, min_share=min_share)
  assert p.shape == (512, 5)
  assert p.dtype == np.float32
  np.testing.assert_allclose(p.sum(1, dtype=np.float64), 1, atol=1e-6)
  assert np.all(p <= np.float32(max_ratio * PRIOR))
  assert np.all((p == 0) | (p >= min_share))
  unit = max(min_share, 1e-6)
  assert len(np.unique(np.rint(p / unit), axis=0)) == 512


def test_the_domain_without_prior_gets_nothing():
  p = sampled(32, [0.5, 0, 0.5])
  np.testing.assert_array_equal(p[:, 1], 0)
  np.testing.assert_allclose(p, np.insert(sampled(32, [1, 1]), 1, 0, axis=1))


def test_a_longer_swarm_begins_with_the_shorter_one():
  np.testing.assert_array_equal(sampled(300)[:7], sampled(7))
  assert not np.array_equal(sampled(7), sampled(7, seed=1))


@pytest.mark.parametrize('temperature', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('strength', [2.0, 5.0])
def test_moments_are_those_of_a_dirichlet_distribution(temperature, strength):
  count = 20_000
  p = sampled(
    count, min_strength=strength, max_strength=strength, temperature=temperature, max_ratio=INF,
    min_share=0.0,
  )  # fmt: skip
  mean = PRIOR**temperature / np.sum(PRIOR**temperature)
  variance = mean * (1 - mean) / (strength + 1)
  np.testing.assert_allclose(p.mean(0), mean, atol=5 * np.sqrt(variance.max() / count))
  np.testing.assert_allclose(p.var(0), variance, rtol=0.06)


def test_all_fifteen_strengths_are_used():
  """The largest share, in equal parts from 15 Dirichlet distributions, doubles left out."""
  p = sampled(8000, max_ratio=INF, min_share=0.0)
  tempered = np.sqrt(PRIOR) / np.sqrt(PRIOR).sum()
  rng = np.random.default_rng(1)
  strengths = np.logspace(np.log10(0.1), np.log10(5), 15)
  other = np.concatenate([rng.dirichlet(s * tempered, 620) for s in strengths])
  other = other[np.unique(np.rint(other * 1e6), axis=0, return_index=True)[1]]
  np.testing.assert_allclose(p.max(1).mean(), other.max(1).mean(), atol=0.01)
  np.testing.assert_allclose(p.max(1).std(), other.max(1).std(), atol=0.01)


def test_one_domain_has_one_mixture():
  np.testing.assert_array_equal(sampled(1, [3.0]), [[1]])
  with pytest.raises(ValueError, match='found only 1 of count=2'):
    sampled(2, [3.0])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'count': 0}, 'count=0'),
    ({'min_strength': 0.0}, 'min_strength=0.0'),
    ({'min_strength': 6.0}, 'at most max_strength=5.0'),
    ({'max_strength': INF}, 'max_strength=inf'),
    ({'temperature': 1.5}, 'temperature=1.5'),
    ({'min_share': 1.0}, 'min_share=1.0'),
    ({'max_ratio': 1.0}, 'max_ratio=1.0'),
    ({'max_ratio': NAN}, 'max_ratio=nan'),
    ({'prior': [0, 0]}, 'prior are all 0'),
    ({'prior': [1, NAN]}, 'prior holds nan'),
    ({'prior': [[1]]}, 'shape'),
  ],
)
def test_a_swarm_refuses(options, message):
  with pytest.raises(ValueError, match=message):
    sampled(**{'count': 3, **options})


# The law ------------------------------------------------------------------------------------------

LAW = MixingLaw(
  np.log([2.0, 0.5, 3.0]),
  np.array([[0.5, -1, 0.2, -2, 0.1], [1.5, 1, -3, 1, 0.0], [-0.5, -2, 0.3, 0.5, -6]]),
)
P, HELD_OUT = np.split(sampled(160, max_ratio=INF), [96])
_fit = jax.jit(fit_mixing_law, static_argnames=('starts', 'steps'))


def values(law, p):
  """The formula, in float64."""
  c, t = (np.asarray(x, np.float64) for x in law)
  return np.exp(c) + np.exp(np.asarray(p, np.float64) @ t.T)


def huber(residuals, delta):
  size = np.abs(residuals)
  return np.mean(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)), axis=0)


def test_prediction():
  found = jax.jit(predict_losses)(jax.tree.map(jnp.float32, LAW), P)
  np.testing.assert_allclose(found, values(LAW, P), rtol=1e-5)
  np.testing.assert_allclose(predict_losses(LAW, P[0]), values(LAW, P)[0], rtol=1e-5)


def test_a_planted_law_is_found():
  law = _fit(P, values(LAW, P).astype(np.float32))
  assert law.log_floor.shape == (3,)
  assert law.slopes.shape == (3, 5)
  np.testing.assert_allclose(values(law, P), values(LAW, P), atol=1e-3)
  np.testing.assert_allclose(values(law, HELD_OUT), values(LAW, HELD_OUT), atol=3e-3)
  np.testing.assert_allclose(law.log_floor, LAW.log_floor, atol=0.02)
  np.testing.assert_allclose(law.slopes, LAW.slopes, atol=0.15)


def test_noise_and_outliers_cost_no_more_than_scipy_pays():
  rng = np.random.default_rng(0)
  losses = values(LAW, P) + rng.normal(0, 0.01, (96, 3))
  losses[::17] += 0.8
  law = _fit(P, losses.astype(np.float32))
  for i in range(3):
    objective = lambda z, y=losses[:, i]: huber(np.exp(z[0]) + np.exp(P @ z[1:]) - y, 0.02)
    truth = np.array([LAW.log_floor[i], *LAW.slopes[i]])
    best = optimize.minimize(objective, truth, method='BFGS', options={'gtol': 1e-9}).fun
    found = np.array([law.log_floor[i], *law.slopes[i]], np.float64)
    assert objective(found) < best * 1.002
  # Squares would chase the outliers, half a unit above.
  assert np.abs(values(law, HELD_OUT) - values(LAW, HELD_OUT)).max() < 0.05


def test_domains_may_be_listed_in_any_order():
  order = np.array([3, 0, 4, 2, 1])
  losses = values(LAW, P).astype(np.float32)
  one, other = _fit(P, losses), _fit(P[:, order], losses)
  np.testing.assert_allclose(values(one, P), values(other, P[:, order]), atol=2e-3)


def test_a_domain_that_is_never_sampled_gets_a_guess_within_reason():
  p = P + np.outer(P[:, 2], [0.25, 0.25, -1, 0.25, 0.25])
  law = _fit(p.astype(np.float32), values(LAW, p).astype(np.float32))
  np.testing.assert_allclose(values(law, p), values(LAW, p), atol=5e-3)
  losses = values(LAW, p)
  pure = values(law, np.eye(5)[2])
  assert np.all((pure > losses.min(0)) & (pure < 1.2 * losses.max(0)))


def test_a_constant_column_and_a_nan():
  losses = values(LAW, P).astype(np.float32)
  losses[:, 0] = 2.5
  losses[3, 1] = NAN
  law = _fit(P, losses)
  np.testing.assert_allclose(values(law, HELD_OUT)[:, 0], 2.5, atol=1e-3)
  assert np.all(np.isnan(law.slopes[1]))
  assert np.isnan(law.log_floor[1])
  np.testing.assert_allclose(values(law, HELD_OUT)[:, 2], values(LAW, HELD_OUT)[:, 2], atol=3e-3)


@pytest.mark.parametrize(
  ('arguments', 'options', 'message'),
  [
    ((P, np.ones((95, 3))), {}, r'losses \(95, 3\)'),
    ((P[:5], np.ones((5, 3))), {}, 'K above G'),
    ((P, np.ones(96)), {}, 'losses has shape'),
    ((P * 2, np.ones((96, 3))), {}, r'mixtures\[0\] sums to 2'),
    ((P, np.full((96, 3), NAN)), {}, 'losses holds nan'),
    ((P, np.zeros((96, 3))), {}, 'losses holds 0'),
    ((P, np.ones((96, 3))), {'starts': 0}, 'starts=0'),
    ((P, np.ones((96, 3))), {'steps': -1}, 'steps=-1'),
    ((P, np.ones((96, 3))), {'delta': 0.0}, 'delta=0.0'),
  ],
)
def test_a_fit_refuses(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    fit_mixing_law(*arguments, **options)


# The answer ---------------------------------------------------------------------------------------


def objective(p, slopes, weights, prior, strength):
  return weights @ np.exp(slopes @ p) + strength * np.sum(special.rel_entr(p, prior))


def by_scipy(slopes, weights, prior, strength, caps):
  gradient = lambda p: (
    slopes.T @ (weights * np.exp(slopes @ p))
    + strength * (np.log(np.maximum(p, 1e-300) / prior) + 1)
  )
  start = caps / caps.sum()
  return optimize.minimize(
    objective,
    start,
    (slopes, weights, prior, strength),
    'SLSQP',
    jac=lambda p, *_: gradient(p),
    bounds=[(1e-12, cap) for cap in caps],
    constraints={'type': 'eq', 'fun': lambda p: p.sum() - 1, 'jac': lambda p: np.ones_like(p)},
    options={'ftol': 1e-15, 'maxiter': 500},
  )


@pytest.mark.parametrize('capped', [False, True])
@pytest.mark.parametrize('strength', [0.01, 0.05, 1.0])
@pytest.mark.parametrize(('seed', 'domains', 'losses'), [(0, 3, 1), (1, 8, 5), (2, 20, 13)])
def test_as_good_as_scipy(seed, domains, losses, strength, capped):
  rng = np.random.default_rng(seed)
  slopes = rng.normal(0, 2, (losses, domains))
  weights, prior = rng.dirichlet(np.ones(losses)), rng.dirichlet(np.ones(domains))
  caps = np.minimum(4 * prior, 1) if capped else np.ones(domains)
  law = MixingLaw(np.zeros(losses), slopes)
  p = best_mixture(law, weights, prior, strength, caps if capped else None)
  assert p.dtype == np.float32
  assert abs(p.sum(dtype=np.float64) - 1) < 1e-6
  assert np.all((p >= 0) & (p <= caps + 1e-6))
  theirs = by_scipy(slopes, weights, prior, strength, caps)
  ours = objective(p.astype(np.float64), slopes, weights, prior, strength)
  assert ours < theirs.fun + 1e-6
  np.testing.assert_allclose(p, theirs.x, atol=2e-3)


def test_conditions_of_optimality():
  """The gradient is equal where a share is free, and lower at a cap."""
  rng = np.random.default_rng(5)
  slopes, prior, strength = rng.normal(0, 1.5, (4, 10)), rng.dirichlet(np.ones(10)), 0.1
  law, weights = MixingLaw(np.zeros(4), slopes), np.full(4, 0.25)
  free = best_mixture(law, weights, prior, strength)
  caps = np.where(np.arange(10) % 2, free * 0.7, free + 0.3)
  p = best_mixture(law, weights, prior, strength, caps).astype(np.float64)
  gradient = slopes.T @ (weights * np.exp(slopes @ p)) + strength * np.log(p / prior)
  at_cap = p > caps - 1e-6
  assert 3 <= at_cap.sum() <= 5
  np.testing.assert_allclose(gradient[~at_cap], gradient[~at_cap].mean(), atol=1e-4)
  assert np.all(gradient[at_cap] < gradient[~at_cap].mean())


def test_a_cap_is_active_exactly_if_it_binds():
  law, weights = MixingLaw(LAW.log_floor, LAW.slopes), np.full(3, 1 / 3)
  free = best_mixture(law, weights, PRIOR, 0.1)
  for g, factor in itertools.product(range(5), (0.3, 0.99, 1.01, 3.0)):
    caps = np.ones(5)
    caps[g] = factor * free[g]
    p = best_mixture(law, weights, PRIOR, 0.1, caps)
    if factor < 1:
      np.testing.assert_allclose(p[g], caps[g], rtol=1e-6)
    else:
      np.testing.assert_allclose(p, free, atol=1e-6)


def test_limits_of_the_strength():
  law, weights = MixingLaw(LAW.log_floor, LAW.slopes), np.array([0.2, 0.3, 0.5])
  for strength in (1e7, INF):
    np.testing.assert_allclose(best_mixture(law, weights, PRIOR, strength), PRIOR, atol=1e-6)
  # Without it, the best of a fine grid.
  grid = np.array([x for x in itertools.product(range(21), repeat=4) if sum(x) <= 20]) / 20
  grid = np.column_stack([grid, 1 - grid.sum(1)])
  p = best_mixture(law, weights, PRIOR, 0.0).astype(np.float64)
  reached = weights @ np.exp(LAW.slopes @ p)
  best = np.exp(grid @ LAW.slopes.T) @ weights
  assert reached <= best.min() + 1e-7
  assert reached > best.min() - 0.02


def test_a_pull_within_caps_is_to_the_nearest_mixture():
  p = best_mixture(LAW, [1, 1, 1], PRIOR, INF, caps=[0.2, 1, 1, 1, 1])
  np.testing.assert_allclose(p, [0.2, *(PRIOR[1:] / PRIOR[1:].sum() * 0.8)], atol=1e-6)


def test_a_single_loss_without_pull_takes_the_best_domain():
  p = best_mixture(LAW, [0, 1, 0], PRIOR, 0.0)
  np.testing.assert_allclose(p, [0, 0, 1, 0, 0], atol=1e-6)
  p = best_mixture(LAW, [0, 1, 0], PRIOR, 0.0, caps=[1, 1, 0.6, 1, 0.3])
  np.testing.assert_allclose(p[[2, 4]], [0.6, 0.3], atol=1e-5)


def test_domains_without_prior_and_single_points():
  prior = np.array([0.5, 0, 0.3, 0.2, 0])
  p = best_mixture(LAW, [1, 1, 1], prior, 0.1)
  np.testing.assert_array_equal(p[[1, 4]], 0)
  keep = [0, 2, 3]
  alone = best_mixture(MixingLaw(LAW.log_floor, LAW.slopes[:, keep]), [1, 1, 1], prior[keep], 0.1)
  np.testing.assert_allclose(p[keep], alone, atol=1e-6)
  assert best_mixture(MixingLaw(np.zeros(1), np.ones((1, 1))), [1.0], [2.0]).tolist() == [1]
  caps = [0.1, 0.2, 0.3, 0.4, 0]
  np.testing.assert_allclose(best_mixture(LAW, [1, 1, 1], PRIOR, caps=caps), caps, atol=1e-6)


def test_large_slopes_and_permutations():
  slopes = np.array([[30.0, -30, 5, 0, 1]])
  law = MixingLaw(np.zeros(1), slopes)
  p = best_mixture(law, [1.0], PRIOR)
  theirs = by_scipy(slopes, np.ones(1), PRIOR, 0.05, np.ones(5))
  assert objective(p.astype(np.float64), slopes, np.ones(1), PRIOR, 0.05) < theirs.fun + 1e-6
  order = np.array([4, 2, 0, 1, 3])
  other = best_mixture(MixingLaw(np.zeros(1), slopes[:, order]), [1.0], PRIOR[order])
  np.testing.assert_allclose(other, p[order], atol=1e-6)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'target_weights': [1, 1]}, r'target_weights \(2,\)'),
    ({'target_weights': [1, -1, 1]}, 'target_weights holds -1'),
    ({'prior': [1, 1]}, r'prior \(2,\)'),
    ({'prior': np.zeros(5)}, 'prior are all 0'),
    ({'strength': -0.1}, 'strength=-0.1'),
    ({'strength': NAN}, 'strength=nan'),
    ({'caps': [0.2, 0.2, 0.2, 0.2, 0.1]}, 'total share of 0.9'),
    ({'caps': [1, 1, 1, 1, 1], 'prior': [1, 0, 0, 0, 0], 'law': None}, ''),
    ({'caps': [0.5, 1, 1, 1, 1], 'prior': [1, 0, 0, 0, 0]}, 'total share of 0.5'),
    ({'caps': [1, 1, 1, 1, -1]}, 'caps holds -1'),
    ({'caps': [1, 1, 1, 1, NAN]}, 'caps holds nan'),
    ({'caps': [1, 1]}, r'caps \(2,\)'),
    ({'law': MixingLaw(np.zeros(3), np.full((3, 5), NAN))}, 'not finite'),
  ],
)
def test_an_answer_refuses(changes, message):
  arguments = {'law': LAW, 'target_weights': [1, 1, 1], 'prior': PRIOR, **changes}
  if arguments['law'] is None:
    np.testing.assert_array_equal(best_mixture(**{**arguments, 'law': LAW}), [1, 0, 0, 0, 0])
    return
  with pytest.raises(ValueError, match=message):
    best_mixture(**arguments)


# Reuse and repetition -----------------------------------------------------------------------------


def test_reuse_finds_the_whole_answer_where_the_frozen_shares_are_the_best():
  rng = np.random.default_rng(3)
  slopes, prior, weights = rng.normal(0, 1, (4, 6)), rng.dirichlet(np.ones(6)), np.ones(4)
  whole = best_mixture(MixingLaw(np.zeros(4), slopes), weights, prior, 0.2).astype(np.float64)
  rho, frozen = whole[:3].sum(), whole[:3] / whole[:3].sum()
  # KL(expanded || prior) = KL over [rho, new] + rho KL(frozen || prior's relative shares).
  divergence = np.sum(special.rel_entr(frozen, prior[:3] / prior[:3].sum()))
  reduced_prior = np.array([prior[:3].sum() * np.exp(-divergence), *prior[3:]])
  reduced = MixingLaw(np.zeros(4), np.column_stack([slopes[:, :3] @ frozen, slopes[:, 3:]]))
  answer = best_mixture(reduced, weights, reduced_prior, 0.2)
  np.testing.assert_allclose(answer[0], rho, atol=1e-5)
  np.testing.assert_allclose(expand_reuse(frozen, answer), whole, atol=1e-5)


def test_reuse_of_a_whole_swarm():
  swarm = sampled(10, [0.5, 0.3, 0.2])
  p = expand_reuse([0.25, 0.75], swarm)
  assert p.shape == (10, 4)
  np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
  np.testing.assert_allclose(p[:, 0] * 3, p[:, 1], rtol=1e-6)
  with pytest.raises(ValueError, match='frozen sums to 2'):
    expand_reuse([1, 1], swarm)
  with pytest.raises(ValueError, match='mixture sums to'):
    expand_reuse([1.0], [0.5, 0.2])


@pytest.mark.parametrize('share', [0.0, 1 / 16, 0.5, 0.9, 1.0])
def test_a_subsample_keeps_the_share(share):
  kept = repetition_subsample(range(20_000), share)
  assert kept.dtype == bool
  assert abs(kept.mean() - share) <= 4 * np.sqrt(share * (1 - share) / 20_000)


def test_a_subsample_goes_by_the_id_alone():
  ids = [f'doc/{i}' for i in range(2000)]
  kept = repetition_subsample(ids, 0.3)
  np.testing.assert_array_equal(repetition_subsample(ids[::-1], 0.3)[::-1], kept)
  np.testing.assert_array_equal(repetition_subsample(ids[500:600], 0.3), kept[500:600])
  assert np.all(kept <= repetition_subsample(ids, 0.5))
  other = repetition_subsample(ids, 0.3, seed=1)
  assert abs(np.mean(kept & other) - 0.09) < 0.03
  assert repetition_subsample([], 0.5).shape == (0,)
  for share in (-0.1, 1.1, NAN):
    with pytest.raises(ValueError, match='share='):
      repetition_subsample(ids, share)


def test_repetition_matches_for_every_mixture():
  sizes, large, small = np.array([4000, 900, 20_000]), 32_000.0, 2000.0
  kept = np.array(
    [repetition_subsample((f'{g}/{i}' for i in range(n)), small / large).sum() for g, n in
     enumerate(sizes)]
  )  # fmt: skip
  for p in sampled(5, [1, 1, 1]):
    np.testing.assert_allclose(p * small / kept, p * large / sizes, rtol=0.25)


# Ranks --------------------------------------------------------------------------------------------

_spearman, _accuracy = jax.jit(spearman), jax.jit(decision_accuracy)


@pytest.mark.parametrize('levels', [2, 5, 10_000])
@pytest.mark.parametrize('count', [2, 3, 50])
def test_spearman_is_scipys(count, levels):
  for seed in range(20):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, levels, count).astype(float)
    b = np.rint(a + rng.normal(0, levels / 2, count))
    if np.ptp(a) and np.ptp(b):
      np.testing.assert_allclose(_spearman(a, b), stats.spearmanr(a, b)[0], atol=2e-6)
    else:
      assert np.isnan(_spearman(a, b))


@pytest.mark.parametrize('levels', [3, 10_000])
def test_decision_accuracy_counts_pairs(levels):
  rng = np.random.default_rng(levels)
  a = rng.integers(0, levels, 40).astype(float)
  b = np.rint(a + rng.normal(0, levels / 3, 40))
  right = total = 0.0
  for i, j in itertools.combinations(range(40), 2):
    if b[i] != b[j]:
      total += 1
      right += 0.5 if a[i] == a[j] else float((a[i] < a[j]) == (b[i] < b[j]))
  np.testing.assert_allclose(_accuracy(a, b), right / total, rtol=1e-6)


def test_decision_accuracy_is_kendalls_tau_without_ties():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(2, 60))
  tau = stats.kendalltau(a, b)[0]
  np.testing.assert_allclose(_accuracy(a, b), (1 + tau) / 2, rtol=1e-5)


@pytest.mark.parametrize('function', [spearman, decision_accuracy])
def test_ranks_of_odd_input(function):
  x = np.arange(4.0)
  assert float(function(x, x * 3 + 1)) == 1
  assert float(function(x, -x)) in (-1, 0)
  assert np.isnan(function(x, [0, 1, NAN, 2]))
  assert np.isnan(function([0, 1, NAN, 2], x))
  assert np.isnan(function(x, np.ones(4)))
  for a, b in ((x, x[:3]), (x[:1], x[:1]), (x[None], x[None])):
    with pytest.raises(ValueError, match='expected'):
      function(a, b)
