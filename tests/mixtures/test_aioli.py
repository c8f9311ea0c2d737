"""Aioli against its equations, closed forms, and a whole run written as a loop in float64."""

import collections
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw.mixtures.aioli import (
  aioli,
  aioli_measures,
  normalize_interactions,
  smoothed_one_hot,
  solve_interactions,
)

G = 3
STEPS = 64
SCHEDULE = dict(round_steps=17, rounds_of_bursts=2, burst_steps=2)


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def world(seed, size=G):
  """float32[G, G]: by how much a step on each domain lowers each loss, and can raise it."""
  return np.random.default_rng(seed).normal(0.05, 0.05, (size, size)).astype(np.float32)


@functools.cache
def _program(**static):
  """64 steps in a linear world, compiled once for each schedule; numbers are arguments of it.

  The batch of step t is drawn by the head of a queue of mixtures and lowers the losses by
  effect decay^t q. The mixture is told these losses, or `told` where that is not -inf.
  """
  lag, averages = static.get('lag', 1), static.pop('averages', False)

  def build(rate, ema, start):
    # Rates before and from a switch: one program for constants and for schedules.
    schedule = lambda step: jnp.where(step < rate[0], rate[1], rate[2])
    average = ema if averages else None
    return aioli(rate=schedule, ema=average, start=start, **static)

  @jax.jit
  def run(numbers, carry, first, effect, decay, told):
    mixture = build(*numbers)

    def one(carry, x):
      losses, state, queue = carry
      step, told_now = x
      losses = losses - effect * decay**step @ queue[0]
      seen = jnp.where(jnp.isneginf(told_now), losses, told_now)
      state = mixture.update(state, step=step, domain_eval_losses=seen)
      queue = jnp.concatenate([queue[1:], mixture.proportions(state)[None]])
      return (losses, state, queue), (losses, state, queue)

    drawn = lambda queues: jnp.concatenate([carry[2][:1], queues[:-1, 0]])
    out = jax.lax.scan(one, carry, (first + jnp.arange(STEPS), told))[1]
    return drawn(out[2]), out

  def begin(numbers):
    state = build(*numbers).init()
    first = jnp.exp(state.log_weights)
    return jnp.full(static['num_domains'], 4.0, jnp.float32), state, jnp.tile(first, (lag, 1))

  return run, begin


class Run(NamedTuple):
  """What was drawn for step t, and what there was after it; `carry` continues."""

  drawn: np.ndarray  # [T, G]
  losses: np.ndarray  # [T, G]
  states: Any
  carry: Any  # leaves [T, ...]


def train(
  effect, *, rate=1.0, ema=None, start=None, decay=1.0, told=None, first=0, carry=None, **options
):
  static = {'num_domains': len(effect), 'share': 0.6, **SCHEDULE, **options}
  run, begin = _program(**static, averages=ema is not None)
  size = static['num_domains']
  start = np.full(size, 1 / size) if start is None else start
  rate = (0, rate, rate) if np.ndim(rate) == 0 else rate
  numbers = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32), (rate, 0.0 if ema is None else ema, np.asarray(start))
  )
  told = np.full((STEPS, size), -np.inf, np.float32) if told is None else told
  carry = begin(numbers) if carry is None else carry
  drawn, out = run(numbers, carry, first, effect, decay, told)
  return Run(np.asarray(drawn), np.asarray(out[0]), out[1], out)


def sweeps(seed, round_index, rounds_of_bursts, size=G):
  """The order of a round's bursts."""
  bits = jax.random.bits(
    jax.random.fold_in(jax.random.key(seed), round_index), (rounds_of_bursts, size)
  )
  return [g for row in bits.tolist() for g in sorted(range(size), key=row.__getitem__)]


def make(**change):
  return aioli(**{'num_domains': G, 'rate': 1.0, 'share': 0.6, **SCHEDULE, **change})


# Pieces -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('size', 'share'), [(2, 0.625), (3, 0.1), (3, 1.0), (7, 0.75)])
def test_interactions_are_recovered(size, share):
  mixtures = smoothed_one_hot(size, share)
  assert mixtures.dtype == jnp.float32
  for axis in (0, 1):
    np.testing.assert_allclose(np.sum(mixtures, axis=axis), 1, rtol=1e-6)
  np.testing.assert_allclose(np.diag(mixtures), share, rtol=1e-6)
  exact = np.random.default_rng(size).normal(size=(size, size))
  wide = np.asarray(mixtures, np.float64)
  drops = np.array([[mixture @ row for mixture in wide] for row in exact])
  solve = jax.jit(lambda drops: solve_interactions(drops, mixtures))
  found = solve(jnp.asarray(drops, jnp.float32))
  np.testing.assert_allclose(found, exact, atol=2e-5)
  if share == 1:
    same(found, jnp.asarray(drops, jnp.float32))
  order = np.roll(np.arange(size), 1)
  permuted = solve(jnp.asarray(drops[order][:, order], jnp.float32))
  np.testing.assert_allclose(permuted, found[order][:, order], atol=1e-5)


def test_interactions_of_any_mixtures():
  """Not only of smoothed ones, which are symmetric and hide a transposition."""
  rng = np.random.default_rng(0)
  mixtures = np.array([[0.7, 0.2, 0.1], [0.0, 0.9, 0.1], [0.3, 0.3, 0.4]])
  exact = rng.normal(size=(3, 3))
  drops = np.array([[mixture @ row for mixture in mixtures] for row in exact])
  found = solve_interactions(jnp.asarray(drops), jnp.asarray(mixtures))
  np.testing.assert_allclose(found, exact, atol=1e-5)


def test_mixtures_that_are_alike_tell_nothing():
  for size in (2, 3):
    alike = smoothed_one_hot(size, 1 / size)
    with pytest.raises(ValueError, match='mixtures is singular'):
      solve_interactions(jnp.ones((size, size)), alike)
    drops = jnp.eye(size)
    traced = np.asarray(jax.jit(solve_interactions)(drops, jnp.full((size, size), 0.5)))
    assert not np.all(np.isfinite(traced))
  assert smoothed_one_hot(1, 0.3).tolist() == [[1.0]]


@pytest.mark.parametrize('seed', range(4))
def test_normalized_interactions(seed):
  raw = np.random.default_rng(seed).normal(seed, 1.0, (5, 5))
  out = np.asarray(normalize_interactions(jnp.asarray(raw)))
  shifted = raw - raw.min() if raw.min() < 0 else raw
  np.testing.assert_allclose(out, shifted / shifted.sum(), rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(out.sum(), 1, rtol=1e-6)
  assert (out.min() == 0) == (raw.min() < 0)
  np.testing.assert_allclose(normalize_interactions(jnp.asarray(raw * 64)), out, rtol=1e-5)


@pytest.mark.parametrize('value', [0.0, -2.0, 3.0])
def test_equal_interactions_prefer_nothing(value):
  np.testing.assert_allclose(normalize_interactions(jnp.full((3, 3), value)), 1 / 9, rtol=1e-6)


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_bad_interactions_stay_visible(value):
  out = normalize_interactions(jnp.eye(3).at[0, 1].set(value))
  assert not np.all(np.isfinite(out))


# A whole run --------------------------------------------------------------------------------------


def loop(effect, steps, *, rate, share, rounds_of_bursts, burst_steps, round_steps, **more):
  """The method as a program that trains and evaluates, in float64: mixtures of batches, weights."""
  lag, warmup, seed = more.get('lag', 1), more.get('warmup_steps', 0), more.get('seed', 0)
  ema, diagonal, decay = more.get('ema'), more.get('diagonal', False), more['decay']
  size = len(effect)
  others = (1 - share) / (size - 1)
  burst = np.full((size, size), others) + (share - others) * np.eye(size)
  start = np.asarray(more.get('start', np.full(size, 1 / size)), np.float64)
  losses, drawn = np.full(size, 4.0), []
  average = None

  def fit(mixture, count):
    nonlocal losses
    for _ in range(count):
      losses = losses - effect.astype(np.float64) * decay ** len(drawn) @ mixture
      drawn.append(mixture)

  weights = start
  fit(weights, max(lag, warmup))
  r = 0
  while len(drawn) < steps:
    previous, graph = losses, np.zeros((size, size))
    for domain in sweeps(seed, r, rounds_of_bursts, size):
      fit(burst[domain], burst_steps)
      graph[:, domain] += previous - losses
      previous = losses
    graph /= rounds_of_bursts
    if diagonal:
      graph = np.diag(np.diag(graph)) / share
    else:
      graph = np.stack([np.linalg.solve(burst, row) for row in graph])
    if graph.min() < 0:
      graph = graph - graph.min()
    graph = graph / graph.sum()
    old = weights
    if ema is None:
      weights = weights * np.exp(rate * graph.sum(axis=0))
    else:
      average = graph if average is None else (1 - ema) * graph + ema * average
      weights = np.exp(rate * average.sum(axis=0))
    weights = weights / weights.sum()
    rest = round_steps - size * rounds_of_bursts * burst_steps
    fit(old, lag - 1)
    fit(weights, rest - (lag - 1))
    r += 1
  return np.array(drawn[:steps])


RUNS = [
  dict(),
  dict(lag=4, warmup_steps=2, seed=3, start=(0.1, 0.2, 0.7)),
  dict(ema=0.3),
  dict(ema=0.8, lag=3, share=1.0, warmup_steps=5, start=(0.1, 0.2, 0.7)),
  dict(diagonal=True, ema=0.5, rounds_of_bursts=1, share=0.75),
  dict(size=5, round_steps=20, burst_steps=1, rounds_of_bursts=3, lag=4),
]


@pytest.mark.parametrize('options', RUNS)
def test_a_run_with_rounds_bursts_and_lag(options):
  options = {'rate': 3.0, 'decay': 0.99, **options}
  effect = world(7, options.pop('size', G))
  ours = train(effect, **options)
  expected = loop(effect, STEPS, **{'share': 0.6, **SCHEDULE, **options})
  np.testing.assert_allclose(ours.drawn, expected, atol=5e-4)  # float32 losses, subtracted
  assert np.ptp(expected, axis=0).max() > 0.1
  np.testing.assert_allclose(np.exp(ours.states.log_weights).sum(axis=1), 1, rtol=1e-5)
  same(ours.states.step, np.arange(STEPS))


def test_each_sweep_is_a_random_order_of_its_own():
  rounds = [sweeps(0, r, 4) for r in range(150)]
  orders = [tuple(order[i : i + G]) for order in rounds for i in range(0, 4 * G, G)]
  assert all(sorted(order) == list(range(G)) for order in orders)
  counts = collections.Counter(orders)
  assert set(counts) == set(itertools.permutations(range(G)))
  assert all(60 < n < 140 for n in counts.values())  # 600 / 6, four standard deviations
  pairs = collections.Counter(zip(orders[::4], orders[1::4]))
  assert len(pairs) > 30  # of 36
  assert sweeps(1, 0, 4) != sweeps(0, 0, 4)


@pytest.mark.parametrize('options', [RUNS[0], RUNS[1], RUNS[5]])
def test_measures_says_which_losses_are_used(options):
  """Where it says no, any values do, NaN included; where it says yes, they change the state."""
  options = {**options}
  size = options.pop('size', G)
  schedule = {k: v for k, v in {**SCHEDULE, **options}.items() if k not in ('start', 'seed')}
  asks = functools.partial(aioli_measures, num_domains=size, **schedule)
  steps = [step for step in range(STEPS) if asks(step)]
  first = max(schedule.get('lag', 1), schedule.get('warmup_steps', 0))
  bursts = range(schedule['rounds_of_bursts'] * size + 1)
  expected = [
    first + schedule['round_steps'] * r + schedule['burst_steps'] * k - 1
    for r in range(4)
    for k in bursts
  ]
  assert steps == [step for step in expected if step < STEPS]
  assert isinstance(asks(3), bool)
  used = np.isin(np.arange(STEPS), steps)
  same(asks(np.arange(STEPS)), used)
  losses = np.random.default_rng(0).normal(size=(STEPS, size)).astype(np.float32)
  spoiled = np.where(used[:, None], losses, np.float32(np.nan))
  plain = train(world(0, size), told=losses, **options)
  same(train(world(0, size), told=spoiled, **options).states, plain.states)
  for step in (steps[0], steps[3], steps[-1]):
    other = losses.copy()
    other[step] += 1
    moved = train(world(0, size), told=other, **options).states
    assert not np.array_equal(moved.losses[step], plain.states.losses[step])


# Weights ------------------------------------------------------------------------------------------


def measured(effect, **options):
  """Weights at the end of the rounds, float64[3, G]."""
  states = train(effect, **options).states
  return np.exp(np.asarray(states.log_weights, np.float64))[17::17]


@pytest.mark.parametrize('start', [None, (0.6, 0.3, 0.1)])
def test_without_ema_it_is_mirror_descent_on_the_sum_of_losses(start):
  effect = world(1)
  graph = effect.astype(np.float64) - min(effect.min(), 0)
  gain = graph.sum(axis=0) / graph.sum()
  weights = measured(effect, rate=0.7, start=start)
  origin = np.log(np.full(G, 1 / G) if start is None else start)
  for t, row in enumerate(weights, 1):
    np.testing.assert_allclose(row, softmax(origin + t * 0.7 * gain), atol=1e-4)


@pytest.mark.parametrize('ema', [0.0, 0.1, 0.9])
def test_ema_and_no_ema_agree_after_one_round_only(ema):
  """And in a world that stays, ema stays as well, within its bound."""
  effect = world(2)
  plain, averaged = measured(effect), measured(effect, ema=ema)
  np.testing.assert_allclose(averaged[0], plain[0], atol=1e-6)
  np.testing.assert_allclose(averaged, np.tile(averaged[0], (3, 1)), atol=1e-4)
  assert np.abs(averaged[1] - plain[1]).max() > 0.01
  assert np.all(averaged <= np.e / (np.e + G - 1) + 1e-6)


def test_one_domain_that_helps_all_reaches_the_bound_of_ema():
  effect = np.zeros((G, G), np.float32)
  effect[:, 1] = 0.125
  weights = measured(effect, ema=0.5)
  np.testing.assert_allclose(weights[:, 1], np.e / (np.e + G - 1), rtol=1e-4)


def test_rate_0_and_a_world_without_preferences_change_nothing():
  np.testing.assert_allclose(measured(world(3), rate=0.0), 1 / G, rtol=1e-6)
  flat = np.full((G, G), 0.125, np.float32)
  np.testing.assert_allclose(measured(flat), 1 / G, rtol=1e-5)
  np.testing.assert_allclose(measured(0 * flat), 1 / G, rtol=1e-5)


def test_the_rate_may_be_a_schedule():
  effect = world(4)
  weights = measured(effect, rate=(17, 0.0, 1.0))  # bursts end at steps 12 and 29
  np.testing.assert_allclose(weights[0], 1 / G, rtol=1e-6)
  np.testing.assert_allclose(weights[1], measured(effect)[0], atol=1e-4)


def test_the_order_of_domains_does_not_matter():
  effect, order = world(5), np.array([2, 0, 1])
  plain, other = measured(effect), measured(effect[order][:, order])
  np.testing.assert_allclose(other, plain[:, order], atol=1e-4)


def test_a_share_of_zero_stays_although_it_is_measured():
  weights = measured(world(6), start=(0.5, 0.0, 0.5))
  assert np.all(weights[:, 1] == 0)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)


# What is not finite, and restarts -----------------------------------------------------------------


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('ema', [None, 0.5])
@pytest.mark.parametrize('at', [0, 4, 12])  # before the bursts, after one, after the last
@pytest.mark.parametrize('first', [0, 17])  # when nothing is known yet, and later
def test_a_bad_evaluation_costs_its_round_and_no_more(bad, ema, at, first):
  told = np.random.default_rng(0).normal(4, 0.2, (STEPS, G)).astype(np.float32)
  told[first + at, 1] = bad
  states = train(world(8), ema=ema, told=told).states
  pick = lambda step: jax.tree.map(lambda leaf: np.asarray(leaf[step]), states)
  before, after, later = pick(first), pick(first + 16), pick(first + 17 + 12)
  same((after.log_weights, after.interactions), (before.log_weights, before.interactions))
  assert not np.all(np.isfinite(after.drops))
  assert all(np.all(np.isfinite(leaf)) for leaf in later)
  assert np.abs(later.log_weights - before.log_weights).max() > 1e-2


@pytest.mark.parametrize('options', [RUNS[1], RUNS[3]])
@pytest.mark.parametrize('stop', [1, 8, 16, 21, 31])
def test_a_restored_state_continues_bit_for_bit(options, stop):
  """In a burst, between two, at an evaluation, between rounds."""
  whole = train(world(9), decay=0.99, **options)
  on_host = jax.tree.map(lambda leaf: np.asarray(leaf[stop - 1]), whole.carry)
  restored = jax.tree.map(jnp.asarray, on_host)
  rest = train(world(9), decay=0.99, carry=restored, first=stop, **options)
  for now, then in ((rest.drawn, whole.drawn), (rest.carry, whole.carry)):
    same(
      jax.tree.map(lambda leaf: leaf[: STEPS - stop], now),
      jax.tree.map(lambda leaf: leaf[stop:], then),
    )
  assert np.ptp(whole.drawn[stop:]) > 0.1


def test_one_domain_has_everything_compiled_and_eager():
  mixture = aioli(1, 1.0, round_steps=2, rounds_of_bursts=1, burst_steps=1, share=0.5)
  update = jax.jit(lambda state, step, x: mixture.update(state, step=step, domain_eval_losses=x))
  eager = compiled = mixture.init()
  for step, losses in enumerate(np.random.default_rng(1).normal(size=(3, 1))):
    eager = mixture.update(eager, step=step, domain_eval_losses=losses, a_signal_of_others=None)
    compiled = update(compiled, step, jnp.asarray(losses))
  same(mixture.objective(eager), mixture.proportions(eager))
  np.testing.assert_allclose(mixture.proportions(eager), [1.0], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), eager, compiled)
  assert update._cache_size() == 1


def test_a_state_is_arrays_and_can_be_donated():
  leaves = jax.tree.leaves(make().init())
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(num_domains=0), 'num_domains=0 must be at least 1'),
    (dict(rate=-1.0), 'rate=-1.0 must be finite'),
    (dict(share=1 / 3), 'share=0.333.* must be above 1 / num_domains = 0.3333'),
    (dict(share=1.5), 'share=1.5 must be'),
    (dict(share=np.nan), 'share=nan must be'),
    (dict(ema=1.5), 'ema=1.5 must be from 0 to 1'),
    (dict(lag=0), 'lag=0 must be at least 1'),
    (dict(warmup_steps=-1), 'warmup_steps=-1 must be at least 0'),
    (dict(burst_steps=0), 'burst_steps=0 must be at least 1'),
    (dict(rounds_of_bursts=0), 'rounds_of_bursts=0 must be at least 1'),
    (dict(round_steps=12), 'round_steps=12 must be at least 13: 12 steps of bursts, and lag=1'),
    (dict(lag=6), 'round_steps=17 must be at least 18'),
    (dict(start=[0.5, 0.5]), 'start has 2 entries'),
    (dict(start=[1.0, -1.0, 1.0]), 'start holds -1'),
  ],
)
def test_the_factory_refuses(change, message):
  with pytest.raises(ValueError, match=message):
    make(**change)


def test_errors_name_the_argument():
  for matrix in (jnp.ones((2, 3)), jnp.ones(3)):
    with pytest.raises(ValueError, match=r'interactions has shape'):
      normalize_interactions(matrix)
    with pytest.raises(ValueError, match=r'drops has shape'):
      solve_interactions(matrix, jnp.eye(3))
  with pytest.raises(ValueError, match=r'drops has shape \(2, 2\), mixtures \(3, 3\)'):
    solve_interactions(jnp.eye(2), jnp.eye(3))
  with pytest.raises(ValueError, match=r'share=1\.5'):
    smoothed_one_hot(3, 1.5)
  with pytest.raises(ValueError, match='round_steps=12'):
    aioli_measures(0, G, **{**SCHEDULE, 'round_steps': 12})
  mixture = make()
  with pytest.raises(TypeError, match='domain_eval_losses'):
    mixture.update(mixture.init(), step=0)
  with pytest.raises(TypeError, match='step'):
    mixture.update(mixture.init(), domain_eval_losses=jnp.ones(G))
  with pytest.raises(ValueError, match=r'domain_eval_losses has shape \(2,\); expected \(3,\)'):
    mixture.update(mixture.init(), step=0, domain_eval_losses=jnp.ones(2))


def test_it_is_declared():
  assert aioli.declaration.provenance == 'official_code'
