"""Online mixtures against closed forms, scipy and float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from scipy import optimize

import jaxrw
from experiments import compiled
from jaxrw import gradients
from jaxrw.mixtures import odm, online
from tests.mixtures.following import G, run, same, simplex, softmax

_eg = jax.jit(online.exponentiated_step)
_excess = jax.jit(online.excess_losses, static_argnums=4)


def _step(alpha, score, rate, floor=0.0):
  """`exponentiated_step` of float32 arrays, compiled once for each size."""
  return _eg(*(np.asarray(x, np.float32) for x in (alpha, score, rate, floor)))


# The step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('size', 'rate'), [(2, 0.3), (4, 1.0), (6, 2.5)])
def test_a_step_minimizes_the_proximal_objective(size, rate):
  alpha, score = simplex(size, size), np.random.default_rng(size).normal(size=size)

  def objective(p):
    return -score @ p + np.sum(p * np.log(p / alpha)) / rate

  found = optimize.minimize(
    objective,
    np.full(size, 1 / size),
    jac=lambda p: -score + (np.log(p / alpha) + 1) / rate,
    bounds=[(1e-9, 1)] * size,
    constraints={'type': 'eq', 'fun': lambda p: p.sum() - 1},
    method='SLSQP',
    options={'ftol': 1e-14, 'maxiter': 500},
  )
  ours = np.asarray(_step(jnp.asarray(alpha), jnp.asarray(score), rate), np.float64)
  np.testing.assert_allclose(ours, found.x, atol=2e-5)
  anywhere = np.random.default_rng(9).dirichlet(np.ones(size), 2000)
  assert objective(ours) < min(map(objective, anywhere))


@pytest.mark.parametrize('floor', [0.0, 0.1, 1.0])
def test_a_step_in_float64(floor):
  alpha, score = simplex(0), np.random.default_rng(1).normal(size=G)
  tilted = alpha * np.exp(0.7 * score)
  expected = (1 - floor) * tilted / tilted.sum() + floor / G
  np.testing.assert_allclose(_step(alpha, score, 0.7, floor), expected, rtol=1e-6)
  with jax.enable_x64(True):
    wide = online.exponentiated_step(jnp.asarray(alpha), jnp.asarray(score), 0.7, floor)
    assert wide.dtype == jnp.float64
    np.testing.assert_allclose(wide, expected, rtol=1e-13)


def test_neutral_settings():
  alpha, score = simplex(2), np.random.default_rng(2).normal(size=G)
  np.testing.assert_allclose(_step(alpha, score, 0.0), alpha, rtol=1e-6)
  np.testing.assert_allclose(_step(alpha, np.ones(G), 5.0), alpha, rtol=1e-6)
  score = np.round(score * 64) / 64  # so that adding 4096 is exact in float32
  same(_step(alpha, score + 4096, 2.0), _step(alpha, score, 2.0))


def test_scores_of_any_size():
  alpha = np.full(3, 1 / 3)
  np.testing.assert_allclose(_step(alpha, [1e38, -1e38, 0], 1e3), [1, 0, 0])
  np.testing.assert_allclose(_step(alpha, [0.0, -np.inf, 0.0], 1.0), [0.5, 0, 0.5])


def test_a_share_of_zero_stays_whatever_its_score():
  alpha = np.array([0.5, 0.5, 0.0])
  for score in (9.0, np.nan, np.inf, -np.inf):
    expected = np.append(softmax([0.0, 1.0]), 0)
    np.testing.assert_allclose(_step(alpha, [0, 1, score], 1.0), expected, rtol=1e-6)
    revived = _step(alpha, [0, 1, score], 1.0, 0.3)
    np.testing.assert_allclose(revived, 0.7 * expected + 0.1, rtol=1e-6)
  for bad in (np.nan, np.inf):
    assert np.all(np.isnan(_step(alpha, [0.0, bad, 0.0], 1.0)))  # what counts is visible


def test_a_step_eager_permuted_and_alone():
  alpha, score = simplex(3), np.random.default_rng(3).normal(size=G)
  once = _step(alpha, score, 1.5, 0.1)
  eager = online.exponentiated_step(jnp.asarray(alpha), jnp.asarray(score), 1.5, 0.1)
  np.testing.assert_allclose(eager, once, rtol=1e-6)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(_step(alpha[order], score[order], 1.5, 0.1), once[order], rtol=1e-6)
  np.testing.assert_allclose(_step(np.ones(1), np.array([7.0]), 1.5), [1.0])


@pytest.mark.parametrize(
  ('alpha', 'score', 'rate', 'floor', 'message'),
  [
    ([0.5, 0.5], [1.0, 2.0, 3.0], 1.0, 0.0, r'score has shape \(3,\), alpha \(2,\)'),
    ([0.5, 0.6], [1.0, 2.0], 1.0, 0.0, 'alpha sums to 1.1'),
    ([1.5, -0.5], [1.0, 2.0], 1.0, 0.0, 'alpha holds -0.5'),
    ([0.5, 0.5], [1.0, 2.0], -1.0, 0.0, 'rate=-1.0 must be'),
    ([0.5, 0.5], [1.0, 2.0], 1.0, 1.5, 'floor=1.5 must be'),
  ],
)
def test_a_step_refuses(alpha, score, rate, floor, message):
  with pytest.raises(ValueError, match=message):
    online.exponentiated_step(jnp.array(alpha), jnp.array(score), rate, floor)


# One method by another ----------------------------------------------------------------------------


def test_scores_of_a_matrix_add_up_over_the_run():
  """Linear mixing: alpha_T ∝ alpha_0 exp(rate * sum_t of A_t's column sums)."""
  matrices = np.random.default_rng(4).normal(size=(6, G, G))
  alpha = jnp.asarray(simplex(4))
  expected = softmax(np.log(simplex(4)) + 0.4 * matrices.sum(axis=(0, 1)))
  for matrix in matrices:
    alpha = _step(alpha, matrix.sum(axis=0), 0.4)
  np.testing.assert_allclose(alpha, expected, rtol=1e-5)


def test_a_diagonal_matrix_of_excess_losses_is_doremi_and_group_dro_of_the_excess():
  excess = np.random.default_rng(5).gamma(1.0, 1.0, (5, G)).astype(np.float32)
  counts = np.ones(G)
  doremi = online.doremi(G, 0.3, smoothing=0.0)
  dro = online.group_dro_mixture(G, 0.3)
  ours = run(doremi, [{'domain_excess': e, 'domain_counts': counts} for e in excess])
  other = run(dro, [{'domain_losses': e, 'domain_counts': counts} for e in excess])
  alpha = jnp.full(G, 1 / G)
  for e, a, b in zip(excess, ours, other):
    alpha = _step(alpha, np.diag(e).sum(axis=0), 0.3)
    np.testing.assert_allclose(doremi.objective(a), alpha, rtol=1e-5)
    same(doremi.objective(a), dro.objective(b))


def test_unclipped_doge_is_dga_and_both_are_column_sums_of_gradient_products():
  rng = np.random.default_rng(6)
  lr, mu = 0.02, 0.1
  g = rng.normal(size=(G, 8)) + 1
  targets = rng.normal(size=(3, 8)) + 1  # each product is positive, far from the upper clip
  matrix = targets @ g.T  # A_ij = <target gradient i, gradient j>
  norms = np.linalg.norm(g, axis=1)
  signals = {'domain_alignment': matrix.sum(axis=0), 'domain_grad_norms': norms}
  assert np.all(matrix.sum(axis=0) > 0)
  doge = online.doge(G, lr, mu, clip=100.0)
  rate = lr / mu / (norms.mean() + 1e-6)
  dga = online.dga(G, rate)
  scaled = online.dga(G, lr / mu, normalize='mean_norm')
  expected = softmax(rate * matrix.sum(axis=0) * 3)
  for mixture in (doge, dga, scaled):
    np.testing.assert_allclose(
      mixture.objective(run(mixture, [signals] * 3)[-1]), expected, rtol=1e-5
    )


# DGA ----------------------------------------------------------------------------------------------


def quadratics(seed):
  """Losses |theta - c_k|^2 / 2 of G domains, their centers, and the target's center."""
  rng = np.random.default_rng(seed)
  centers, target = rng.normal(size=(G, 3)), rng.normal(size=3)
  losses = lambda theta: jnp.sum((theta - centers) ** 2, axis=1) / 2
  return losses, centers, target


def test_alignments_of_quadratics():
  losses, centers, target = quadratics(0)
  theta = np.random.default_rng(1).normal(size=3)
  target_loss = lambda theta, _: jnp.sum((theta - target) ** 2) / 2
  direction = gradients.target_direction(target_loss, jnp.asarray(theta), None)
  aligned = gradients.alignment(losses, jnp.asarray(theta), direction)
  products = (theta - centers) @ (theta - target)
  np.testing.assert_allclose(aligned, products, rtol=1e-5, atol=1e-6)
  mixture = online.dga(G, 0.3, start=simplex(7))
  state = run(mixture, [{'domain_alignment': aligned}])[0]
  expected = softmax(np.log(simplex(7)) + 0.3 * products)
  np.testing.assert_allclose(mixture.proportions(state), expected, rtol=1e-5)


def test_dga_finds_the_mixture_that_minimizes_the_target():
  """theta follows sum_k alpha_k c_k, so a target inside the hull is reached, and one on a center by
  that domain alone."""
  centers = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
  for target in (np.array([0.0, 2.0]), np.array([0.5, 0.8])):
    mixture = online.dga(3, 0.05)

    def train(theta_state, step, mixture=mixture, target=target):
      theta, state = theta_state
      aligned = gradients.alignment(
        lambda t: jnp.sum((t - centers) ** 2, axis=1) / 2, theta, theta - target
      )
      state = mixture.update(state, step=step, domain_alignment=aligned)
      theta = theta - 0.2 * mixture.proportions(state) @ (theta - centers)
      return (theta, state), None

    start = (jnp.array([1.0, 1.0]), mixture.init())
    (theta, state), _ = jax.jit(lambda s: jax.lax.scan(train, s, jnp.arange(3000)))(start)
    np.testing.assert_allclose(theta, target, atol=0.05)
    exact = np.linalg.solve(np.vstack([centers.T, np.ones(3)]), np.append(target, 1))
    np.testing.assert_allclose(mixture.proportions(state), exact, atol=0.05)


def alignments(steps, seed=8):
  values = np.random.default_rng(seed).normal(size=(steps, G)).astype(np.float32)
  return [{'domain_alignment': v} for v in values]


def test_the_average_vanishes_at_1_and_freezes_at_0():
  signals = alignments(5)
  plain = run(online.dga(G, 0.5, start=simplex(8)), signals)
  same(run(online.dga(G, 0.5, ema=1.0, start=simplex(8)), signals), plain)
  frozen = online.dga(G, 0.5, ema=0.0, start=simplex(8))
  for state in run(frozen, signals):
    same(state.log_alpha, frozen.init().log_alpha)
  still = online.dga(G, 0.0, ema=0.3, ema_feedback=False, start=simplex(8))
  for state in run(still, signals):
    np.testing.assert_allclose(still.proportions(state), simplex(8), rtol=2e-6)


@pytest.mark.parametrize('feedback', [True, False])
def test_the_average_in_a_loop(feedback):
  signals = alignments(8)
  mixture = online.dga(G, 0.8, ema=0.25, ema_feedback=feedback, floor=0.04)
  alpha = instant = np.full(G, 1 / G)
  for values, state in zip(signals, run(mixture, signals)):
    origin = alpha if feedback else instant
    moved = origin * np.exp(0.8 * values['domain_alignment'].astype(float))
    instant = 0.96 * moved / moved.sum() + 0.04 / G
    alpha = 0.75 * alpha + 0.25 * instant
    np.testing.assert_allclose(mixture.proportions(state), alpha, rtol=1e-5)


def test_between_updates_nothing_moves():
  signals = alignments(7)
  mixture = online.dga(G, 0.5, every=3)
  states = run(mixture, signals)
  dense = online.dga(G, 0.5)
  due = run(dense, signals[::3])
  for step, state in enumerate(states):
    same(state, due[step // 3])
  for step in (1, 2, 4, 5):
    signals[step] = {'domain_alignment': np.full(G, np.nan)}  # what is not used may be anything
  same(run(mixture, signals), states)


def test_normalized_alignments():
  rng = np.random.default_rng(10)
  g, target = rng.normal(size=(G, 5)), rng.normal(size=5)
  norms = np.linalg.norm(g, axis=1)
  products = g @ target
  cosines = products / norms / np.linalg.norm(target)
  cosine, mean_norm = (online.dga(G, 0.5, normalize=name) for name in ('cosine', 'mean_norm'))
  for mixture, score, scale in (
    (cosine, cosines, 3.0),
    (cosine, cosines, 1.0),
    (mean_norm, products / norms.mean(), 3.0),
  ):
    signals = {
      'domain_alignment': scale * products,
      'domain_grad_norms': scale * norms,
      'target_grad_norm': np.linalg.norm(target),
    }
    state = run(mixture, [signals])[0]
    np.testing.assert_allclose(mixture.proportions(state), softmax(0.5 * score), rtol=1e-5)
  signals['domain_grad_norms'] = np.append(norms[1:], 0)
  signals['domain_alignment'] = np.zeros(G)
  np.testing.assert_allclose(cosine.proportions(run(cosine, [signals])[0]), 1 / G, rtol=1e-6)
  for missing in ('domain_grad_norms', 'target_grad_norm'):
    rest = {k: jnp.asarray(v) for k, v in signals.items() if k != missing}
    with pytest.raises(TypeError, match=f"'cosine' needs the signal '{missing}'"):
      cosine.update(cosine.init(), step=0, **rest)


# DoGE ---------------------------------------------------------------------------------------------


def test_doge_in_a_loop():
  """With a learning rate that decays, domains that are not measured, and scores at both clips."""
  rng = np.random.default_rng(11)
  lr = lambda step: 0.1 * 0.9**step
  mixture = online.doge(G, lr, mu=0.05, clip=5.0, floor=0.01, start=simplex(11))
  signals = []
  for step in range(10):
    norms, products = rng.gamma(2.0, 1.0, G), 8 * rng.normal(size=G)
    norms[rng.permutation(G)[: step % 3]] = 0
    signals.append({'domain_alignment': products * (norms > 0), 'domain_grad_norms': norms})
  alpha, scores, history, clips = simplex(11), np.zeros(G), [], set()
  for step, (values, state) in enumerate(zip(signals, run(mixture, signals))):
    norms, rate = values['domain_grad_norms'], lr(step)
    mean = norms[norms > 0].mean()
    for k in np.flatnonzero(norms):
      w = rate * values['domain_alignment'][k] / (mean + 1e-6)
      clips.add(np.sign(w) if not 0 <= w <= 5 * rate else 0)
      scores[k] = min(max(w, 0), 5 * rate)
    moved = alpha * np.exp(scores / 0.05)
    alpha = 0.99 * moved / moved.sum() + 0.01 / G
    history.append(alpha)
    np.testing.assert_allclose(mixture.objective(state), alpha, rtol=2e-5)
    np.testing.assert_allclose(
      online.average_proportions(state), np.mean(history, axis=0), rtol=2e-5
    )
  assert clips == {-1, 0, 1}


# DoReMi -------------------------------------------------------------------------------------------


def test_a_constant_excess_gives_the_softmax_of_all_of_it():
  excess = np.array([0.0, 0.4, 0.0, 0.0])
  mixture = online.doremi(G, 0.5, smoothing=0.0)
  signals = [{'domain_excess': excess, 'domain_counts': np.ones(G)}] * 7
  expected = [softmax(0.5 * t * excess) for t in range(8)]
  for t, state in enumerate(run(mixture, signals), 1):
    np.testing.assert_allclose(mixture.objective(state), expected[t], rtol=1e-5)
    np.testing.assert_allclose(
      online.average_proportions(state), np.mean(expected[: t + 1], axis=0), rtol=1e-5
    )


@pytest.mark.parametrize('initial', [0.0, 2.0])
def test_doremi_in_a_loop(initial):
  """Absent domains, the last of them until half of the run, and smoothing."""
  rng = np.random.default_rng(12)
  mixture = online.doremi(G, 0.7, smoothing=0.02, initial_score=initial, start=simplex(12))
  signals = []
  for step in range(8):
    counts = rng.integers(0, 3, G)
    counts[-1] = step >= 4
    excess = np.where(counts > 0, rng.gamma(1.0, 1.0, G), np.nan)  # a mean of nothing
    signals.append({'domain_excess': excess, 'domain_counts': counts})
  alpha, scores, history = simplex(12), np.full(G, initial), [simplex(12)]
  for values, state in zip(signals, run(mixture, signals)):
    for k in np.flatnonzero(values['domain_counts']):
      scores[k] = values['domain_excess'][k]
    moved = alpha * np.exp(0.7 * scores)
    alpha = 0.98 * moved / moved.sum() + 0.02 / G
    history.append(alpha)
    np.testing.assert_allclose(mixture.objective(state), alpha, rtol=1e-5)
    np.testing.assert_allclose(
      online.average_proportions(state), np.mean(history, axis=0), rtol=1e-5
    )


@pytest.mark.parametrize('shape', [(9,), (9, 5)])
def test_excess_losses_entry_by_entry(shape):
  rng = np.random.default_rng(13)
  losses, reference = rng.gamma(2.0, 1.0, (2, *shape))
  base = rng.integers(0, 3, shape) / 2
  ids = np.array([0, 1, -1, 3, 3, 0, 1, 3, 0])  # nothing of domain 2
  dirty = np.where(base > 0, losses, np.nan)
  excess, mass = _excess(dirty, reference, base, ids, G)
  total, weight = np.zeros(G), np.zeros(G)
  for i, *t in np.ndindex(shape):
    if ids[i] >= 0:
      total[ids[i]] += base[(i, *t)] * max(losses[(i, *t)] - reference[(i, *t)], 0)
      weight[ids[i]] += base[(i, *t)]
  np.testing.assert_allclose(excess, total / np.where(weight, weight, 1), rtol=1e-5)
  np.testing.assert_allclose(mass, weight, rtol=1e-6)
  assert mass[2] == excess[2] == 0


def test_excess_losses_are_cut_before_the_mean_and_carry_no_gradient():
  ids = np.zeros(1, np.int32)
  losses, reference = np.array([[3.0, 1.0]]), np.array([[1.0, 4.0]])
  excess, mass = _excess(losses, reference, None, ids, 2)
  np.testing.assert_array_equal((excess, mass), [[1, 0], [2, 0]])  # the mean difference is below 0
  excess, _ = _excess(np.array([[np.nan, 1.0]]), reference, None, ids, 2)
  np.testing.assert_array_equal(excess, [np.nan, 0])
  total = lambda *arguments: jnp.sum(_excess(*arguments, 2)[0])
  slopes = jax.jit(jax.grad(total, (0, 1)))(losses, reference, None, ids)
  same(slopes, (np.zeros((1, 2)),) * 2)


def test_excess_losses_refuse():
  losses = jnp.ones((2, 3))
  with pytest.raises(ValueError, match=r'group_ids \(3,\)'):
    online.excess_losses(losses, losses, None, jnp.zeros(3, jnp.int32), 2)
  with pytest.raises(ValueError, match=r'ref_losses has shape \(2,\)'):
    online.excess_losses(losses, jnp.ones(2), None, jnp.zeros(2, jnp.int32), 2)
  with pytest.raises(ValueError, match=r'base has shape \(3,\)'):
    online.excess_losses(losses, losses, jnp.ones(3), jnp.zeros(2, jnp.int32), 2)
  with pytest.raises(IndexError, match='group_ids holds 2'):
    online.excess_losses(losses, losses, None, jnp.array([0, 2]), 2)


@pytest.mark.skipif(len(jax.devices()) == 1, reason='needs several devices')
def test_excess_losses_take_one_collective():
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  losses, ids = jax.device_put((jnp.ones((16, 3)), jnp.arange(16) % 5), rows)
  found = compiled.costs(_excess.lower(losses, losses, losses, ids, 5).compile()).collectives
  assert [(c.kind, c.bytes, c.count) for c in found] == [('all-reduce', 5 * 2 * 4, 1)]


# Group DRO ----------------------------------------------------------------------------------------


def test_constant_losses_give_the_softmax_of_all_losses_so_far():
  losses = np.array([0.5, 1.0, 2.0, 1.5])
  mixture = online.group_dro_mixture(G, 0.2)
  signals = [{'domain_losses': losses, 'domain_counts': np.ones(G)}] * 6
  for t, state in enumerate(run(mixture, signals), 1):
    np.testing.assert_allclose(mixture.objective(state), softmax(0.2 * t * losses), rtol=1e-5)


def test_group_dro_as_a_mixture_and_as_a_weighting_agree():
  """Also with an absent domain, whose mean is NaN to the one and unknown to the other."""
  rng = np.random.default_rng(14)
  mixture, weighting = online.group_dro_mixture(G, 0.4), jaxrw.group_dro(G, 0.4)
  state, log_q = mixture.init(), weighting.init()
  update = jax.jit(weighting.update)
  for step in range(4):
    ids = rng.integers(0, G - (step % 2), 12)
    losses = rng.gamma(2.0, 1.0, 12).astype(np.float32)
    counts = np.bincount(ids, minlength=G)
    means = np.array([losses[ids == g].mean() if counts[g] else np.nan for g in range(G)])
    signals = {'domain_losses': means, 'domain_counts': counts}
    state = run(mixture, [signals], state)[0]
    _, log_q = update(jnp.ones(12), log_q, losses=jnp.asarray(losses), group_ids=jnp.asarray(ids))
    np.testing.assert_allclose(state, log_q, rtol=1e-5)


def test_a_domain_that_fell_far_behind_can_come_back():
  mixture = online.group_dro_mixture(2, 1.0)
  counts = np.ones(2)
  far = run(mixture, [{'domain_losses': np.array([300.0, 0.0]), 'domain_counts': counts}])[0]
  assert mixture.objective(far)[1] == 0  # exp(-300) in float32
  back = run(mixture, [{'domain_losses': np.array([0.0, 299.0]), 'domain_counts': counts}], far)[0]
  np.testing.assert_allclose(mixture.objective(back), softmax(np.array([1.0, 0.0])), rtol=1e-5)


# ODM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('decay', 'gain', 'size'), [(0.9, 0.1, 4), (1.0, 0.1, 3), (0.5, 2.0, 1)])
def test_odm_in_a_loop(decay, gain, size):
  rng = np.random.default_rng(15)
  mixture = odm(size, decay, gain)
  steps = 30
  signals = []
  for _ in range(steps):
    counts = rng.integers(0, 3, size)
    losses = np.where(counts > 0, rng.gamma(3.0, 1.0, size), np.nan)
    signals.append({'domain_losses': losses, 'domain_counts': counts})
  rewards, pi, eps = np.zeros(size), np.full(size, 1 / size), 1 / size
  for t, (values, state) in enumerate(zip(signals, run(mixture, signals)), 1):
    for k in np.flatnonzero(values['domain_counts']):
      rewards[k] = decay * rewards[k] + gain * values['domain_losses'][k] / pi[k]
    before, eps = eps, min(1 / size, np.sqrt(np.log(size) / (size * t)))
    pi = (1 - size * eps) * softmax(before * rewards) + eps
    np.testing.assert_allclose(mixture.proportions(state), pi, rtol=2e-5)
    np.testing.assert_allclose(mixture.objective(state), pi, rtol=2e-5)
    if t <= size * np.log(size):
      np.testing.assert_allclose(pi, 1 / size)
    assert np.all(np.asarray(mixture.proportions(state)) >= eps * (1 - 1e-5))


def test_odm_estimates_rewards_without_bias_whatever_it_samples():
  """One domain a step, drawn from pi: the sum of loss / pi has the sum of losses as its mean."""
  steps, seeds, losses = 60, 4000, jnp.array([3.0, 2.0, 1.0])
  mixture = odm(3, decay=1.0, gain=1.0)

  def one(key):
    def step(state, t):
      drawn = jax.random.categorical(
        jax.random.fold_in(key, t), jnp.log(mixture.proportions(state))
      )
      counts = jnp.arange(3) == drawn
      return mixture.update(state, step=t, domain_losses=losses, domain_counts=counts), None

    return jax.lax.scan(step, mixture.init(), jnp.arange(steps))[0].rewards

  rewards = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), seeds)))
  error = rewards.std(axis=0) / np.sqrt(seeds)
  np.testing.assert_array_less(np.abs(rewards.mean(axis=0) - steps * losses), 4 * error)
  assert np.all(error < 0.02 * steps * losses)
