"""GraNd: three ways to the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import scores
from jaxrw.losses import cross_entropy


def _problem(seed=0):
  rng = np.random.default_rng(seed)
  params = {'w': jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), 'b': jnp.zeros(4)}
  batch = jnp.asarray(rng.normal(size=(13, 6)), jnp.float32), jnp.asarray(rng.integers(0, 4, 13))
  return params, batch


def _loss(params, example):
  x, y = example
  return cross_entropy(x @ params['w'] + params['b'], y)


def test_of_a_linear_model_the_closed_form_is_the_whole_gradient():
  params, (x, y) = _problem()
  full = scores.grand(_loss, params, (x, y))
  logits = x @ params['w'] + params['b']
  np.testing.assert_allclose(scores.grand_last_layer(logits, y, x), full, rtol=1e-5)
  by_hand = scores.el2n(logits, y) * np.sqrt(1 + np.sum(np.square(x), axis=1))
  np.testing.assert_allclose(full, by_hand, rtol=1e-5)


@pytest.mark.parametrize('chunk', [1, 5, 13, 100])
def test_chunks_change_nothing(chunk):
  params, batch = _problem()
  whole = scores.grand(_loss, params, batch)
  np.testing.assert_allclose(scores.grand(_loss, params, batch, chunk=chunk), whole, rtol=1e-6)


def test_one_example_is_the_ordinary_gradient():
  params, (x, y) = _problem()
  slope = jax.grad(_loss)(params, (x[3], y[3]))
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(slope)))
  np.testing.assert_allclose(scores.grand(_loss, params, (x[3:4], y[3:4])), [norm], rtol=1e-6)


def test_the_sketch_is_unbiased_and_as_exact_as_it_says():
  params, batch = _problem()
  full = np.asarray(scores.grand(_loss, params, batch), np.float64)
  losses = lambda p: jax.vmap(_loss, (None, 0))(p, batch)
  sketch = jax.jit(lambda key: scores.grand_sketch(key, losses, params, directions=32))
  ratios = np.stack([np.asarray(sketch(jax.random.key(i))) ** 2 / full**2 for i in range(200)])
  error = np.sqrt(2 / 32 / 200)
  assert np.all(np.abs(ratios.mean(axis=0) - 1) < 4.5 * error)
  np.testing.assert_allclose(ratios.std(axis=0), np.sqrt(2 / 32), rtol=0.25)


def test_errors():
  params, batch = _problem()
  with pytest.raises(ValueError, match='chunk=0 must be greater than 0'):
    scores.grand(_loss, params, batch, chunk=0)
  with pytest.raises(ValueError, match='directions=0 must be greater than 0'):
    scores.grand_sketch(jax.random.key(0), lambda p: p, jnp.ones(2), directions=0)
