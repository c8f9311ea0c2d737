"""Metagradients against finite differences, closed forms, and less memory than a plain scan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrw import attribution, gradients


def _run(tx, steps=6, batch=5, mixed=False, seed=0):
  """(step, objective, state, xs) of a logistic regression in float64."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(steps, batch, 3)))
  y = jnp.asarray(rng.integers(0, 2, (steps, batch)) * 2.0 - 1)
  held = jnp.asarray(rng.normal(size=(20, 3)))
  params = jnp.asarray(rng.normal(size=3)) / 3

  def loss(params, weights, data):
    x, y = data
    return jnp.mean(weights * jax.nn.softplus(-y * (x @ params)))

  slope = attribution.mixed_grad(loss) if mixed else jax.grad(loss)

  def step(state, weights, data):
    params, moments = state
    moves, moments = tx.update(slope(params, weights, data), moments, params)
    return optax.apply_updates(params, moves), moments

  objective = lambda state: jnp.mean(jax.nn.softplus(-held @ state[0]))
  return step, objective, (params, tx.init(params)), (x, y)


OPTIMIZERS = {
  'sgd': optax.sgd(0.3),
  'momentum': optax.sgd(0.3, momentum=0.9),
  'adam': optax.adam(0.1, eps_root=1e-8),
}


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_finite_differences(optimizer, mixed):
  with jax.enable_x64(True):
    step, objective, state, xs = _run(OPTIMIZERS[optimizer], mixed=mixed)
    weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, (6, 5)))
    run = jax.jit(functools.partial(attribution.metagradient, step, objective, branching=2))
    _value, slope = run(state, weights, xs)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=(6, 5)))
    ends = [run(state, weights + sign * 1e-5 * direction, xs)[0] for sign in (1, -1)]
    np.testing.assert_allclose(
      np.sum(slope * direction), (ends[0] - ends[1]) / 2e-5, rtol=1e-6, atol=1e-11
    )


@pytest.mark.parametrize('branching', [2, 3, 4, 7, 100, None])
@pytest.mark.parametrize('steps', [1, 2, 7, 9, 13])
def test_replay_is_the_plain_scan(branching, steps):
  with jax.enable_x64(True):
    xs = jnp.asarray(np.random.default_rng(3).normal(size=(steps, 4)))
    step = lambda s, x: jnp.tanh(s + x) * 1.1

    def final(xs, plain):
      start = jnp.zeros(4)
      if plain:
        return jnp.sum(jax.lax.scan(lambda s, x: (step(s, x), None), start, xs)[0] ** 2)
      return jnp.sum(attribution.replay(step, start, xs, branching=branching) ** 2)

    expected, found = (jax.value_and_grad(final)(xs, plain) for plain in (True, False))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-14)
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-12, atol=1e-15)


def test_memory_grows_with_the_logarithm_of_the_steps():
  size = 20_000
  step = lambda s, x: jnp.tanh(s * x)

  def temporary(steps, branching):
    run = jax.grad(lambda s, xs: jnp.sum(attribution.replay(step, s, xs, branching=branching)))
    shapes = jax.ShapeDtypeStruct((size,), jnp.float32), jax.ShapeDtypeStruct((steps,), jnp.float32)
    return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / (4 * size)

  plain = [temporary(steps, None) for steps in (16, 256)]
  few = [temporary(steps, 4) for steps in (16, 256)]
  assert plain[1] > 250
  assert few[1] < 30
  assert few[1] < few[0] + 3 * 4


def test_sgd_in_closed_form():
  """lambda_t = lambda_{t+1} - rate H_t lambda_{t+1}; by weight, -rate <g_i, lambda_{t+1}> / B."""
  with jax.enable_x64(True):
    step, objective, state, (x, y) = _run(optax.sgd(0.3))
    weights = jnp.ones((6, 5))
    _, slope = attribution.metagradient(step, objective, state, weights, (x, y))
    states = [state]
    for t in range(6):
      states.append(step(states[-1], weights[t], (x[t], y[t])))
    adjoint = jax.grad(lambda p: objective((p, None)))(states[-1][0])
    for t in reversed(range(6)):
      losses = lambda p, t=t: jax.nn.softplus(-y[t] * (x[t] @ p))
      params = states[t][0]
      expected = -0.3 / 5 * gradients.alignment(losses, params, adjoint)
      np.testing.assert_allclose(slope[t], expected, rtol=1e-9, atol=1e-14)
      curve = jax.hessian(lambda p, losses=losses: losses(p).mean())(params)
      adjoint = adjoint - 0.3 * curve @ adjoint


def test_one_step_is_the_product_of_gradients_and_no_rate_is_nothing():
  with jax.enable_x64(True):
    step, objective, state, (x, y) = _run(optax.sgd(0.2), steps=1)
    _, slope = attribution.metagradient(step, objective, state, jnp.ones((1, 5)), (x, y))
    after = step(state, jnp.ones(5), (x[0], y[0]))[0]
    target = jax.grad(lambda p: objective((p, None)))(after)
    losses = lambda p: jax.nn.softplus(-y[0] * (x[0] @ p))
    np.testing.assert_allclose(
      -slope[0], 0.2 / 5 * gradients.alignment(losses, state[0], target), rtol=1e-10
    )
    still = _run(optax.sgd(0.0))
    _, none = attribution.metagradient(*still[:3], jnp.ones((6, 5)), still[3])
    np.testing.assert_array_equal(none, np.zeros((6, 5)))


def test_adam_without_eps_root_is_nan():
  """Documented: a gradient of exactly 0 meets the derivative of sqrt at 0."""
  rates = {}
  for eps_root in (0.0, 1e-8):
    tx = optax.adam(0.1, eps_root=eps_root)

    def step(state, weights, x, tx=tx):
      slope = jax.grad(lambda p: jnp.sum(weights) * (x[0] * p[0] + 0 * p[1]))(state[0])
      moves, moments = tx.update(slope, state[1])
      return optax.apply_updates(state[0], moves), moments

    start = jnp.zeros(2), tx.init(jnp.zeros(2))
    _, rates[eps_root] = attribution.metagradient(
      step, lambda s: s[0].sum(), start, jnp.ones((2, 1)), jnp.ones((2, 1))
    )
  assert np.isnan(rates[0.0]).any()
  assert np.isfinite(rates[1e-8]).all()


def test_uses_of_an_example_add_up():
  values, ids = jnp.arange(6.0).reshape(2, 3), jnp.array([[0, 1, -1], [1, 1, 3]])
  np.testing.assert_array_equal(attribution.add_up(values, ids, 5), [0, 8, 0, 5, 0])


def test_errors():
  ones = jnp.ones((2, 1))
  step = lambda s, w, x: s
  for call, error, message in (
    (lambda: attribution.replay(lambda s, x: s, 0.0, jnp.ones((0, 2))), ValueError, 'one step'),
    (lambda: attribution.replay(lambda s, x: s, 0.0, ones, branching=1), ValueError, 'branching=1'),
    (lambda: attribution.metagradient(step, lambda s: s, 0.0, jnp.ones((3, 1)), ones),
     ValueError, r'weights have shape \(3, 1\) for 2 steps'),
    (lambda: attribution.add_up(ones, jnp.ones(2, int), 3), ValueError, r'example_ids \(2,\)'),
    (lambda: attribution.add_up(ones, jnp.full((2, 1), 3), 3), IndexError, 'example_ids holds 3'),
  ):  # fmt: skip
    with pytest.raises(error, match=message):
      call()
