"""Influence against retrained models, solvers against dense inverses, kernels, in-run values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import attribution, valuation
from jaxrw.losses import cross_entropy


def _ridge(seed=0, n=60, d=4, penalty=0.1):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(n, d)), rng.normal(size=n)
  fit = lambda rows: np.linalg.solve(
    x[rows].T @ x[rows] / n + penalty * np.eye(d), x[rows].T @ y[rows] / n
  )
  losses = lambda w: (jnp.asarray(x) @ w - jnp.asarray(y)) ** 2 / 2
  whole = lambda w: jnp.mean(losses(w)) + penalty / 2 * jnp.sum(w**2)
  return x, y, fit, losses, whole


def test_leaving_one_out_of_ridge_regression():
  """The target loss without i is that with i, plus score / n, up to second order."""
  x, y, fit, losses, whole = _ridge()
  rng = np.random.default_rng(1)
  point, value = rng.normal(size=4), 0.3
  target = lambda w: (w @ point - value) ** 2 / 2
  with jax.enable_x64(True):
    w = jnp.asarray(fit(np.arange(60)))
    solved = attribution.hessian_solve(whole, w, jax.grad(target)(w), damping=0.0, tolerance=1e-12)
    scores = np.asarray(attribution.influence(losses, w, solved))
    changes = [float(target(jnp.asarray(fit(np.delete(np.arange(60), i)))) - target(w))
               for i in range(60)]  # fmt: skip
  np.testing.assert_allclose(
    np.asarray(solved),
    np.linalg.solve(x.T @ x / 60 + 0.1 * np.eye(4), (fit(np.arange(60)) @ point - value) * point),
    rtol=1e-8,
  )
  assert np.corrcoef(scores / 60, changes)[0, 1] > 0.99
  np.testing.assert_allclose(scores / 60, changes, atol=0.35 * np.abs(changes).max())
  # An infinitesimal part of an example is exact.
  for i in (0, 17, 42):
    ends = []
    for sign in (1, -1):
      share = 1 + sign * 1e-5 * (np.arange(60) == i)
      w_i = np.linalg.solve(
        x.T @ (share[:, None] * x) / 60 + 0.1 * np.eye(4), x.T @ (share * y) / 60
      )
      ends.append((w_i @ point - value) ** 2 / 2)
    np.testing.assert_allclose((ends[1] - ends[0]) / 2e-5, scores[i] / 60, rtol=1e-5, atol=1e-10)


def _sgd_step(w, example, rate):
  x, y = example
  return w - rate * x * (x @ w - y)


def test_lookahead_is_the_loss_after_each_step():
  """Least squares by SGD, in closed form, any number at a time."""
  x, y, *_ = _ridge()
  w = np.random.default_rng(5).normal(size=4)
  target = lambda w: np.mean((x[:9] @ w - y[:9]) ** 2) / 2
  expected = [target(w) - target(w - 0.1 * x[i] * (x[i] @ w - y[i])) for i in range(60)]
  with jax.enable_x64(True):
    reference, values = jnp.asarray(x[:9]), jnp.asarray(y[:9])
    for together in (1, 7, 60):
      found = attribution.lookahead(
        lambda w, e: _sgd_step(w, e, 0.1),
        lambda w: jnp.mean((reference @ w - values) ** 2) / 2,
        jnp.asarray(w), (jnp.asarray(x), jnp.asarray(y)), together=together,
      )  # fmt: skip
      np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-14)


def test_lookahead_is_influence_to_first_order():
  x, y, _, losses, _ = _ridge()
  w = np.random.default_rng(6).normal(size=4)
  target = lambda w: jnp.mean(jnp.tanh(w) ** 2)
  with jax.enable_x64(True):
    w, data = jnp.asarray(w), (jnp.asarray(x), jnp.asarray(y))
    first = np.asarray(attribution.influence(losses, w, jax.grad(target)(w)))
    errors = []
    for rate in (1e-3, 1e-4):
      step = functools.partial(_sgd_step, rate=rate)
      found = np.asarray(attribution.lookahead(step, target, w, data))
      errors.append(np.abs(found - rate * first).max())
  assert 50 < errors[0] / errors[1] < 200  # second order: a hundredth at a tenth of the rate


def test_gauss_newton_is_the_dense_product():
  rng = np.random.default_rng(2)
  x, y = jnp.asarray(rng.normal(size=(20, 3))), jnp.asarray(rng.integers(0, 4, 20))
  with jax.enable_x64(True):
    params = {'w': jnp.asarray(rng.normal(size=(3, 4))), 'b': jnp.zeros(4)}
    outputs = lambda p: jnp.tanh(x @ p['w'] + p['b'])
    loss = lambda z: jnp.mean(cross_entropy(z, y))
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    found = attribution.gauss_newton_solve(
      outputs, loss, params, direction, damping=0.01, tolerance=1e-12, steps=500
    )
    flat, back = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(lambda f: outputs(back(f)).reshape(-1))(flat)
    curved = jax.hessian(lambda z: loss(z.reshape(20, 4)))(outputs(params).reshape(-1))
    dense = jacobian.T @ curved @ jacobian + 0.01 * jnp.eye(flat.size)
    expected = jnp.linalg.solve(dense, jax.flatten_util.ravel_pytree(direction)[0])
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found)[0], expected, rtol=1e-7)


def test_large_damping_leaves_products_of_gradients():
  *_, losses, whole = _ridge()
  w = jnp.ones(4)
  target = jax.grad(lambda w: jnp.sum(w**2))(w)
  solved = attribution.hessian_solve(whole, w, target, damping=1e6)
  plain = attribution.tracin(losses, lambda w: jnp.sum(w**2), [w], [1.0])
  np.testing.assert_allclose(attribution.influence(losses, w, solved) * 1e6, plain, rtol=1e-4)


def test_tokens_add_up_to_their_example():
  rng = np.random.default_rng(3)
  x, y = jnp.asarray(rng.normal(size=(5, 6, 3))), jnp.asarray(rng.normal(size=(5, 6)))
  tokens = lambda w: (x @ w - y) ** 2
  direction = jnp.asarray(rng.normal(size=3), jnp.float32)
  each = attribution.influence(tokens, jnp.ones(3), direction)
  whole = attribution.influence(lambda w: tokens(w).sum(axis=1), jnp.ones(3), direction)
  np.testing.assert_allclose(each.sum(axis=1), whole, rtol=1e-5)


def test_tracin_is_what_small_steps_take_off():
  """Steps on one example after the other: the losses' decrease, example by example."""
  _x, _y, _, losses, _ = _ridge(4, n=6)
  target = lambda w: jnp.sum((w - 1) ** 2) / 2
  with jax.enable_x64(True):
    w, rate, total = jnp.zeros(4), 1e-4, np.zeros(6)
    checkpoints = []
    for i in range(6):
      checkpoints.append(w)
      after = w - rate * jax.grad(lambda w, i=i: losses(w)[i])(w)
      total[i] = target(w) - target(after)
      w = after
    scores = attribution.tracin(losses, target, checkpoints[:1], [rate])
  np.testing.assert_allclose(scores, total, rtol=0.05, atol=1e-8)


@pytest.mark.parametrize('order', [1, 2])
def test_in_run_values_are_shapley_values_of_the_step(order):
  """All 2^6 subsets of a batch; exact at order 2 if the target loss is quadratic."""
  rng = np.random.default_rng(5)
  x, y = rng.normal(size=(6, 4)), rng.normal(size=6)
  curve = np.cov(rng.normal(size=(4, 9)))
  with jax.enable_x64(True):
    target = lambda w: w @ jnp.asarray(curve) @ w / 2 - w[0]
    losses = lambda w: (jnp.asarray(x) @ w - jnp.asarray(y)) ** 2 / 2
    w, rate = jnp.asarray(rng.normal(size=4)), 0.05
    each = np.asarray(jax.jacobian(losses)(w))
    utility = lambda present: float(target(w) - target(w - rate * (present @ each)))
    exact = valuation.exact_values(valuation.all_utilities(utility, 6))
    direction = attribution.in_run_direction(target, w, jnp.asarray(each.sum(0)), rate, order=order)
    found = np.asarray(attribution.influence(losses, w, direction))
  if order == 2:
    np.testing.assert_allclose(found, exact, rtol=1e-10, atol=1e-15)
  else:
    assert np.abs(found - exact).max() > 1e-4
    assert np.corrcoef(found, exact)[0, 1] > 0.9


@pytest.mark.parametrize(('order', 'slope'), [(1, 2), (2, 3)])
def test_the_error_of_in_run_values_falls_with_the_rate(order, slope):
  _x, _y, _, losses, _ = _ridge(6, n=5)
  with jax.enable_x64(True):
    target = lambda w: jnp.sum(jnp.cosh(w - 1))
    w = jnp.asarray([0.1, -0.3, 0.2, 0.5])
    total = jax.grad(lambda w: losses(w).sum())(w)
    errors = []
    for rate in (1e-2, 5e-3):
      direction = attribution.in_run_direction(target, w, total, rate, order=order)
      said = float(attribution.influence(losses, w, direction).sum())
      errors.append(abs(said - float(target(w) - target(w - rate * total))))
  np.testing.assert_allclose(np.log2(errors[0] / errors[1]), slope, atol=0.15)


def test_projections_keep_products():
  rng = np.random.default_rng(7)
  x = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
  params = {'w': jnp.zeros((5, 3)), 'v': jnp.ones(3)}
  outputs = lambda p: (jnp.tanh(x @ p['w'] + 0.3)) @ p['v']
  phi = attribution.projected_gradients(jax.random.key(0), outputs, params, 4000)
  each = jax.vmap(lambda t: jax.flatten_util.ravel_pytree(t)[0])(jax.jacobian(outputs)(params))
  exact = each @ each.T
  np.testing.assert_allclose(phi @ phi.T, exact, atol=4.5 * np.sqrt(2 / 4000) * exact.max())
  with pytest.raises(ValueError, match='dims=0'):
    attribution.projected_gradients(jax.random.key(0), outputs, params, 0)


def test_trak_of_a_linear_model_is_its_newton_step():
  """With the identity as projection: the exact change of a logistic regression by one Newton step
  without the p (1 - p) that TRAK drops."""
  rng = np.random.default_rng(8)
  x, t = rng.normal(size=(30, 4)), rng.normal(size=(3, 4))
  pulls = rng.uniform(size=30)
  with jax.enable_x64(True):
    found = attribution.trak(*map(jnp.asarray, (x, t, pulls)), damping=0.5)
  expected = t @ np.linalg.inv(x.T @ x + 0.5 * np.eye(4)) @ (x * pulls[:, None]).T
  np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_errors():
  f = lambda w: jnp.sum(w**2)
  w = jnp.ones(2)
  for call, message in (
    (lambda: attribution.hessian_solve(f, w, w, damping=-1), 'damping=-1 must be at least 0'),
    (lambda: attribution.hessian_solve(f, w, w, damping=0, steps=0), 'steps=0'),
    (lambda: attribution.gauss_newton_solve(f, f, w, w, damping=0), 'damping=0 must be greater'),
    (lambda: attribution.tracin(f, f, [w], []), '1 checkpoints and 0 rates'),
    (lambda: attribution.in_run_direction(f, w, w, 0.1, order=3), 'order=3 must be 1 or 2'),
    (lambda: attribution.trak(jnp.ones((3, 2)), jnp.ones((1, 4)), jnp.ones(3)), r'\(1, 4\)'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
