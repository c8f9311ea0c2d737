"""EK-FAC against dense Fisher matrices, and its parts against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import attribution
from jaxrw.losses import cross_entropy

SIZES = (4, 5, 3)


def forward(params, layer, batch):
  return layer('out', jnp.tanh(layer('in', batch['x'])))


def _model(seed=0):
  rng = np.random.default_rng(seed)
  weights = lambda a, b: {
    'kernel': jnp.asarray(rng.normal(size=(a, b)) / np.sqrt(a)), 'bias': jnp.zeros(b),
  }  # fmt: skip
  return {'in': weights(4, 5), 'out': weights(5, 3), 'scale': jnp.ones(2)}


def _batch(seed=1, n=400, positions=()):
  rng = np.random.default_rng(seed)
  return {
    'x': jnp.asarray(rng.normal(size=(n, *positions, 4))),
    'labels': jnp.asarray(rng.integers(0, 3, (n, *positions))),
  }


def _example_gradients(params, batch):
  """Of each layer, [B, D + 1, P], by differentiating one example at a time."""

  def loss(params, example):
    one = jax.tree.map(lambda v: v[None], example)
    logits = forward(params, attribution.layers(params), one)
    base = one.get('base', jnp.ones(one['labels'].shape))
    return jnp.sum(base * cross_entropy(logits, one['labels']))

  slopes = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
  rows = lambda g: np.concatenate([g['kernel'], g['bias'][:, None]], axis=1)
  return {name: rows(slopes[name]) for name in ('in', 'out')}


@pytest.mark.parametrize('positions', [(), (3,)])
def test_the_diagonal_is_the_mean_of_squares_in_its_basis(positions):
  with jax.enable_x64(True):
    params, batch = _model(), _batch(n=40, positions=positions)
    if positions:
      batch['base'] = jnp.asarray(np.random.default_rng(2).integers(0, 2, (40, 3)) * 1.0)
    halves = [jax.tree.map(lambda v, s=s: v[s], batch) for s in (np.s_[:20], np.s_[20:])]
    factors = attribution.ekfac(jax.random.key(0), forward, params, halves, labels='given')
    for name, each in _example_gradients(params, batch).items():
      own = factors[name]
      turned = np.einsum('di,bdp,po->bio', own.inputs, each, own.outputs)
      np.testing.assert_allclose(own.diagonal, (turned**2).mean(0), rtol=1e-9, atol=1e-14)


def test_bases_are_those_of_the_covariances():
  with jax.enable_x64(True):
    params, batch = _model(), _batch(n=50)
    factors = attribution.ekfac(jax.random.key(0), forward, params, [batch], labels='given')
    inputs = np.concatenate([batch['x'], np.ones((50, 1))], axis=1)
    turned = factors['in'].inputs.T @ (inputs.T @ inputs / 50) @ factors['in'].inputs
    np.testing.assert_allclose(turned - np.diag(np.diag(turned)), np.zeros((5, 5)), atol=1e-12)
    logits = forward(params, attribution.layers(params), batch)
    d = jax.nn.softmax(logits) - jax.nn.one_hot(batch['labels'], 3)
    turned = factors['out'].outputs.T @ (d.T @ d) @ factors['out'].outputs
    np.testing.assert_allclose(turned - np.diag(np.diag(turned)), np.zeros((3, 3)), atol=1e-10)


def test_it_is_the_best_diagonal_and_better_than_kfac():
  """||F - U diag U^T|| of the dense empirical Fisher matrix of a layer."""
  with jax.enable_x64(True):
    params, batch = _model(), _batch(n=300)
    factors = attribution.ekfac(jax.random.key(0), forward, params, [batch], labels='given')
    for name, each in _example_gradients(params, batch).items():
      own = factors[name]
      flat = each.reshape(len(each), -1)
      fisher = flat.T @ flat / len(flat)
      basis = np.kron(own.inputs, own.outputs)
      error = lambda diagonal, basis=basis, fisher=fisher: np.linalg.norm(
        fisher - basis @ np.diag(np.ravel(diagonal)) @ basis.T
      )
      best = error(own.diagonal)
      rng = np.random.default_rng(3)
      assert all(best < error(own.diagonal * rng.uniform(0.9, 1.1, own.diagonal.shape))
                 for _ in range(10))  # fmt: skip
      # K-FAC: outer products of the eigenvalues of the two covariances.
      a = np.diag(own.inputs.T @ _moment(params, batch, name, 0) @ own.inputs)
      s = np.diag(own.outputs.T @ _moment(params, batch, name, 1) @ own.outputs)
      assert best < error(np.outer(a, s))


def _moment(params, batch, name, which):
  layer = attribution.layers(params)
  hidden = jnp.tanh(layer('in', batch['x']))
  d_out = jax.nn.softmax(layer('out', hidden)) - jax.nn.one_hot(batch['labels'], 3)
  d_in = (d_out @ params['out']['kernel'].T) * (1 - hidden**2)
  a = batch['x'] if name == 'in' else hidden
  a = jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1)
  x = (a, d_in if name == 'in' else d_out)[which]
  return np.asarray(x.T @ x / len(x))


def test_sampled_labels_make_it_the_fisher_matrix():
  """Of softmax regression with one input, F = a a^T (x) (diag p - p p^T), which is exactly of the
  Kronecker form: the solution is the dense one, up to the sampling of labels."""
  with jax.enable_x64(True):
    params = {'out': {'kernel': jnp.asarray(np.random.default_rng(4).normal(size=(2, 3)))}}
    one = lambda params, layer, batch: layer('out', batch['x'])
    x = jnp.tile(jnp.array([[0.6, -1.2]]), (20_000, 1))
    factors = attribution.ekfac(jax.random.key(5), one, params, [{'x': x}])
    p = jax.nn.softmax(x[0] @ params['out']['kernel'])
    fisher = np.kron(np.outer(x[0], x[0]), np.diag(p) - np.outer(p, p))
    direction = np.random.default_rng(6).normal(size=(2, 3))
    tree = {'out': {'kernel': jnp.asarray(direction)}}
    found = attribution.ekfac_solve(factors, tree, damping=0.1)['out']['kernel']
    expected = np.linalg.solve(fisher + 0.1 * np.eye(6), direction.ravel()).reshape(2, 3)
    np.testing.assert_allclose(found, expected, rtol=0.03, atol=0.03)


def test_solving_undoes_the_product():
  with jax.enable_x64(True):
    params, batch = _model(), _batch(n=60)
    factors = attribution.ekfac(jax.random.key(0), forward, params, [batch])
    rng = np.random.default_rng(7)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
    solved = attribution.ekfac_solve(factors, direction, damping=0.3)
    np.testing.assert_array_equal(solved['scale'], [0, 0])  # no linear layer
    for name in ('in', 'out'):
      own = factors[name]
      rows = lambda t, name=name: np.concatenate([t[name]['kernel'], t[name]['bias'][None]])
      turned = own.inputs.T @ rows(solved) @ own.outputs * (own.diagonal + 0.3)
      np.testing.assert_allclose(
        own.inputs @ turned @ own.outputs.T, rows(direction), rtol=1e-9, atol=1e-12
      )
    far = attribution.ekfac_solve(factors, direction, damping=1e9)
    np.testing.assert_allclose(far['in']['kernel'] * 1e9, direction['in']['kernel'], rtol=1e-6)
    # Without a number the damping is a tenth of each layer's mean.
    own = attribution.ekfac_solve({'in': factors['in']}, direction)
    given = attribution.ekfac_solve(
      {'in': factors['in']}, direction, damping=float(0.1 * factors['in'].diagonal.mean())
    )
    np.testing.assert_allclose(own['in']['kernel'], given['in']['kernel'], rtol=1e-12)


def test_errors():
  params, batch = _model(), _batch(n=4)
  fit = lambda forward=forward, batches=(batch,), **settings: attribution.ekfac(
    jax.random.key(0), forward, params, batches, **settings
  )
  shared = lambda params, layer, batch: layer('in', layer('in', batch['x'])[..., :4])
  broken = {**batch, 'x': batch['x'].at[0].set(jnp.nan)}
  for call, message in (
    (lambda: fit(batches=[]), 'batches is empty'),
    (lambda: fit(labels='true'), "labels='true' must be"),
    (lambda: fit(shared), "layer 'in' is called twice"),
    (lambda: fit(batches=[broken]), "layer 'in' are not finite|layer 'out' are not finite"),
    (lambda: attribution.ekfac_solve({}, params, damping=0), 'damping=0 must be greater than 0'),
    (lambda: attribution.ekfac_solve(fit(), {'in': params['in']}), "direction has no layer 'out'"),
  ):
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.parametrize('positions', [(), (3,)])
def test_products_with_many_directions(positions):
  """Against explicit gradients, and `influence` along each solved direction."""
  with jax.enable_x64(True):
    params, batch = _model(), _batch(n=12, positions=positions)
    if positions:
      batch['base'] = jnp.asarray(np.random.default_rng(4).integers(0, 2, (12, 3)) * 1.0)
    rng = np.random.default_rng(5)
    directions = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=(4, *p.shape))), params)
    found = attribution.linear_products(forward, params, batch, directions)
    expected = 0
    for name, each in _example_gradients(params, batch).items():
      v = directions[name]
      rows = np.concatenate([v['kernel'], v['bias'][:, None]], axis=1)
      expected = expected + np.einsum('qdp,bdp->qb', rows, each)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)

    factors = attribution.ekfac(jax.random.key(0), forward, params, [batch], labels='given')
    solve = lambda v: attribution.ekfac_solve(factors, v, damping=0.1)
    found = attribution.linear_products(forward, params, batch, jax.vmap(solve)(directions))

    def losses(p):
      each = cross_entropy(forward(p, attribution.layers(p), batch), batch['labels'])
      return (batch.get('base', 1.0) * each).reshape(12, -1).sum(axis=1)

    one = attribution.influence(losses, params, solve(jax.tree.map(lambda v: v[2], directions)))
    np.testing.assert_allclose(found[2], one, rtol=1e-10, atol=1e-12)
