"""A mixture as a stage of the train step: what it is told, when it acts, and on what."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw
from jaxrw import mixtures

G = 3
IDS = np.array([0, 2, 0, -1, 2, 2, 0, 2])
RNG = np.random.default_rng(0)
LOSSES = RNG.gamma(2.0, size=(8, 5)).astype('f')
BASE = (RNG.random((8, 5)) < 0.7).astype('f')
BASE[4] = 0  # a row of padding
REFERENCE = RNG.gamma(2.0, size=(8, 5)).astype('f')


def by_hand(losses, base, ref=None):
  """domain_signals, row by row."""
  counts, sums, mass, excess = (np.zeros(G) for _ in range(4))
  for i, g in enumerate(IDS):
    if g < 0 or base[i].sum() == 0:
      continue
    counts[g] += 1
    sums[g] += (base[i] * losses[i]).sum()
    mass[g] += base[i].sum()
    if ref is not None:
      excess[g] += (base[i] * np.maximum(losses[i] - ref[i], 0)).sum()
  safe = np.maximum(mass, 1e-9)
  return counts, sums / safe, excess / safe


@pytest.mark.parametrize('shape', ['tokens', 'examples'])
def test_signals_of_the_domains(shape):
  losses, base, ref = LOSSES, BASE, REFERENCE
  if shape == 'examples':
    losses, base, ref = losses[:, :1], base[:, :1], ref[:, :1]
  counts, means, excess = by_hand(losses, base, ref)
  squeeze = lambda x: jnp.asarray(x[:, 0] if shape == 'examples' else x)
  told = jax.jit(mixtures.domain_signals, static_argnums=3)(
    squeeze(losses), squeeze(base), jnp.asarray(IDS), G, squeeze(ref)
  )
  np.testing.assert_array_equal(told['domain_counts'], counts)
  np.testing.assert_allclose(told['domain_losses'], means, rtol=1e-5)
  np.testing.assert_allclose(told['domain_excess'], excess, rtol=1e-5)
  assert told['domain_counts'][1] == told['domain_losses'][1] == 0  # an absent domain


def test_padding_may_hold_anything():
  broken = np.where(BASE == 0, np.nan, LOSSES)
  told = mixtures.domain_signals(jnp.asarray(broken), jnp.asarray(BASE), jnp.asarray(IDS), G)
  np.testing.assert_allclose(told['domain_losses'], by_hand(LOSSES, BASE)[1], rtol=1e-5)


@pytest.mark.parametrize(
  ('ids', 'error', 'message'),
  [
    (np.array([0, 1, 3]), IndexError, 'group_ids holds 3'),
    (np.array([0, 1]), ValueError, 'group_ids has shape'),
  ],
)
def test_signals_refuse(ids, error, message):
  with pytest.raises(error, match=message):
    mixtures.domain_signals(jnp.ones(3), None, jnp.asarray(ids), G)


def recorder(num_domains=G):
  """A mixture that moves by a known amount: alpha_0 grows with every update it hears of."""

  def view(state):
    share = state['updates'] / 100
    return jnp.concatenate(
      [share[None], jnp.full(num_domains - 1, (1 - share) / (num_domains - 1))]
    )

  def update(state, *, step, domain_losses, domain_counts, **signals):
    heard = jnp.sum(signals.get('own', jnp.zeros(1)))
    return {'updates': state['updates'] + 1, 'step': jnp.asarray(step), 'heard': heard}

  init = lambda: {'updates': jnp.ones(()), 'step': jnp.zeros((), jnp.int32), 'heard': jnp.zeros(())}
  return mixtures.Mixture(init, update, view, view)


def follow(stage, steps, **signals):
  """Weights and states of some steps."""
  state, found = stage.init(), []
  for step in range(steps):
    w, state = stage.update(
      jnp.ones(2), state, losses=jnp.ones(2), group_ids=jnp.array([0, 1]), step=step, **signals
    )
    found.append((w, state))
  return found


@pytest.mark.parametrize('lag', [1, 2, 5])
def test_the_queue_holds_q_of_the_coming_batches(lag):
  """With S steps done, row i of the queue is for the batch of step S + i."""
  q_after = lambda step: (max(step, -1) + 2) / 100  # of domain 0; step -1 is before the first
  for step, (_, state) in enumerate(follow(mixtures.mixing(recorder(), lag=lag), 6)):
    done = step + 1
    expected = [q_after(done + i - lag) for i in range(lag)]
    np.testing.assert_allclose(state.queue[:, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(state.queue.sum(1), 1, rtol=1e-6)


def test_updates_come_at_the_multiples_of_every_with_their_step_and_what_is_in_extra():
  stage = mixtures.mixing(recorder(), every=3)
  states = [s.mixture for _, s in follow(stage, 7, extra={'own': jnp.full(4, 0.5)})]
  assert [int(s['updates']) for s in states] == [2, 2, 2, 3, 3, 3, 4]
  assert [int(s['step']) for s in states] == [0, 0, 0, 3, 3, 3, 6]
  assert float(states[0]['heard']) == 2


def test_weights_are_p_over_q_of_the_moment_the_row_was_drawn():
  stage = mixtures.mixing(recorder(2), weigh=True)
  q = jnp.array([0.4, 0.8])
  for step, (w, _) in enumerate(follow(stage, 3, sampling_prob=q)):
    p = (step + 2) / 100  # already updated
    np.testing.assert_allclose(w, [p / 0.4, (1 - p) / 0.8], rtol=1e-5)


def test_a_stage_that_samples_leaves_the_weights_alone():
  for w, _ in follow(mixtures.mixing(recorder()), 3):
    np.testing.assert_array_equal(w, 1)


def test_weighing_needs_the_sampling_probabilities():
  with pytest.raises(TypeError, match='sampling_prob'):
    follow(mixtures.mixing(recorder(2), weigh=True), 1)


@pytest.mark.parametrize('arguments', [{'lag': 0}, {'every': 0}])
def test_impossible_arguments(arguments):
  with pytest.raises(ValueError, match='must be at least 1'):
    mixtures.mixing(recorder(), **arguments)


# Inside the train step


def make(weigh, sampled=None, microbatches=1):
  mixture = mixtures.group_dro_mixture(
    2, rate=0.5, mode='weigh' if weigh else 'sample', sampled=sampled if weigh else None
  )
  rw = jaxrw.chain(mixture=mixtures.mixing(mixture, lag=2, weigh=weigh))
  tx = optax.sgd(0.1)
  step = jaxrw.make_train_step(
    lambda w, e: (w @ e['x'] - e['y']) ** 2, tx, rw, microbatches=microbatches
  )
  return rw, jax.jit(step), jaxrw.TrainState.create(jnp.zeros(3), tx, rw)


def batch(ids, q, seed=1):
  rng = np.random.default_rng(seed)
  return {
    'x': jnp.asarray(rng.normal(size=(len(ids), 3)), jnp.float32),
    'y': jnp.asarray(rng.normal(size=len(ids)) + np.asarray(ids), jnp.float32),
    'domain_id': jnp.asarray(ids),
    'sampling_prob': jnp.asarray(np.asarray(q)[ids], jnp.float32),
  }


def test_the_gradient_is_that_of_the_objective_when_the_whole_population_is_the_batch():
  """sum_g p_g L_g by hand, with domains drawn in shares q: weighting is exact at full batch."""
  ids = np.array([0] * 6 + [1] * 2)
  rows = batch(ids, q=[0.75, 0.25])
  _, step, state = make(True, sampled=[0.75, 0.25])
  before = state.params
  state, metrics = step(state, rows)
  losses = (rows['x'] @ before - rows['y']) ** 2
  means = np.array([losses[:6].mean(), losses[6:].mean()])
  p = np.array([0.5, 0.5]) * np.exp(0.5 * means)
  p /= p.sum()

  def objective(w):
    losses = (rows['x'] @ w - rows['y']) ** 2
    return p[0] * losses[:6].mean() + p[1] * losses[6:].mean()

  np.testing.assert_allclose(
    state.params, before - 0.1 * jax.grad(objective)(before), rtol=1e-4, atol=1e-6
  )
  np.testing.assert_allclose(metrics['weighted_loss_sum'] / 8, objective(before), rtol=1e-5)


def test_microbatches_of_a_global_step_are_one_step():
  ids = np.array([0, 1, 1, 0, 1, 0, 0, 0])
  rows = batch(ids, q=[0.5, 0.5])
  (_, one, a), (_, four, b) = make(True), make(True, microbatches=4)
  for _ in range(2):
    (a, _), (b, _) = one(a, rows), four(b, rows)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), a, b)


def test_eight_devices_compute_the_same_mixture():
  ids = np.array([0, 1] * 8)
  rows = batch(ids, q=[0.5, 0.5])
  _, step, state = make(True)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P('data')))
  one, _ = step(state, rows)
  many, _ = step(state, jax.tree.map(place, rows))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), one.weighting, many.weighting
  )


def test_a_restored_state_goes_on_bit_for_bit():
  rows = [batch(np.array([0, 1, 1, 0]), q=[0.5, 0.5], seed=s) for s in range(6)]
  _, step, state = make(True)
  for r in rows[:3]:
    state, _ = step(state, r)
  restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
  for r in rows[3:]:
    (state, _), (restored, _) = step(state, r), step(restored, r)
  jax.tree.map(np.testing.assert_array_equal, state, restored)


def test_sampling_and_weighting_have_the_same_expected_gradient_and_the_predicted_noise():
  """Monte Carlo: drawing by p, against drawing by q and weighing by p/q; means agree, and so does
  the ratio of second moments with `second_moment_ratio`."""
  rng = np.random.default_rng(5)
  p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
  mean, spread = np.array([1.0, -2.0]), np.array([1.0, 3.0])
  n = 400_000
  draw = lambda shares: (ids := rng.choice(2, n, p=shares), rng.normal(mean[ids], spread[ids]))
  _, sampled = draw(p)
  ids, values = draw(q)
  weights = np.asarray(
    jaxrw.importance_weights(jnp.asarray(p), jnp.asarray(q[ids]), jnp.asarray(ids))
  )
  error = 4 * np.sqrt((weights * values).var() / n)
  np.testing.assert_allclose((weights * values).mean(), sampled.mean(), atol=error)
  moments = mean**2 + spread**2
  ratio = float(mixtures.second_moment_ratio(p, q, moments))
  np.testing.assert_allclose(
    ((weights * values) ** 2).mean() / (sampled**2).mean(), ratio, rtol=0.02
  )
