"""Scores of predictions: closed forms, and agreement with each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw import scores
from jaxrw.losses import cross_entropy


def _case(shape=(50,), classes=5, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(3 * rng.normal(size=(*shape, classes))), rng.integers(0, classes, shape)


def _loop(logits, labels):
  p = np.exp(np.float64(logits))
  p /= p.sum(axis=-1, keepdims=True)
  return p, np.eye(p.shape[-1])[labels]


@pytest.mark.parametrize('shape', [(50,), (4, 7)])
def test_a_numpy_loop(shape):
  logits, labels = _case(shape)
  p, y = _loop(logits, labels)
  np.testing.assert_allclose(
    scores.el2n(logits, labels), np.linalg.norm(p - y, axis=-1), rtol=1e-5, atol=1e-6
  )
  for order in (1, 3, np.inf):
    expected = np.linalg.norm(p - y, ord=order, axis=-1)
    np.testing.assert_allclose(
      scores.error_norm(logits, labels, order), expected, rtol=1e-5, atol=1e-6
    )
  wrong = np.where(y > 0, -1, p).max(axis=-1)
  own = (p * y).sum(axis=-1)
  np.testing.assert_allclose(scores.margin_error(logits, labels), wrong - own, atol=1e-6)
  np.testing.assert_allclose(
    scores.logit_margin(logits, labels), np.log(own / (1 - own)), rtol=1e-3, atol=1e-4
  )


def test_bounds_and_limits():
  logits, labels = _case((1000,))
  found = scores.el2n(logits, labels)
  assert found.min() >= 0
  assert found.max() <= np.sqrt(2)
  sure = jnp.array([[200.0, -200.0]])
  assert scores.el2n(sure, jnp.array([0])) == 0
  np.testing.assert_allclose(scores.el2n(sure, jnp.array([1])), np.sqrt(2), rtol=1e-6)
  np.testing.assert_allclose(scores.margin_error(sure, jnp.array([0])), -1)


def test_two_classes():
  """sqrt(2) |p - y|."""
  z = jnp.linspace(-4, 4, 9)
  two = jnp.stack([jnp.zeros(9), z], axis=1)
  p = jax.nn.sigmoid(z)
  np.testing.assert_allclose(
    scores.el2n(two, jnp.ones(9, int)), np.sqrt(2) * (1 - p), rtol=1e-5, atol=1e-7
  )


def test_the_gradient_by_the_logits_has_this_length():
  logits, labels = _case()
  loss = lambda z: jnp.sum(cross_entropy(z, labels))
  np.testing.assert_allclose(
    scores.el2n(logits, labels), jnp.linalg.norm(jax.grad(loss)(logits), axis=1), rtol=1e-5
  )


def test_perplexity_passes_over_padding():
  losses = jnp.log(jnp.array([[2.0, 8.0, 999.0], [1.0, 1.0, 1.0], [5.0, 5.0, 5.0]]))
  base = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
  np.testing.assert_allclose(scores.perplexity(losses, base), [4, 1, 1], rtol=1e-6)


def test_broken_logits_are_seen():
  for score in (scores.el2n, scores.margin_error, scores.logit_margin):
    assert np.isnan(score(jnp.array([[jnp.nan, 1.0]]), jnp.array([0]))[0])


def test_errors():
  logits, labels = _case()
  for call, message in (
    (lambda: scores.el2n(logits, labels[:3]), r'labels have shape \(3,\), logits \(50, 5\)'),
    (lambda: scores.error_norm(logits, labels, 0.5), r'order=0\.5 must be at least 1'),
    (lambda: scores.margin_error(logits[:, :1], labels * 0), 'needs two classes'),
    (lambda: scores.logit_margin(logits[:, :1], labels * 0), 'needs two classes'),
    (lambda: scores.perplexity(jnp.ones(3)), r'expected \[B, T\]'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
