"""p^q on cross entropy has the gradient of the generalized cross entropy, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw import weights

LABELS = jnp.array([0, 2, 1, 3, 0])


def _logits():
  return jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)) * 3)


@pytest.mark.parametrize('q', [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize('truncation', [0.0, 0.5])
def test_gradient_is_that_of_the_loss(q, truncation):
  def generalized(logits):  # by its definition, with the truncated ones constant
    p = jnp.take_along_axis(jax.nn.softmax(logits), LABELS[:, None], 1)[:, 0]
    loss = (1 - p**q) / q if q else -jnp.log(p)
    return jnp.sum(jnp.where(p > truncation, loss, 0))

  def weighted(logits):
    losses = jaxrw.losses.cross_entropy(logits, LABELS)
    return jnp.sum(weights.generalized_cross_entropy_weights(losses, q, truncation) * losses)

  with jax.enable_x64(True):
    logits = _logits()
    np.testing.assert_allclose(
      jax.jit(jax.grad(weighted))(logits), jax.grad(generalized)(logits), rtol=1e-10, atol=1e-13
    )


def test_limits():
  losses = jnp.array([0.0, 0.1, 2.0, 80.0])
  incoming = jnp.array([1.0, 2.0, 3.0, 4.0])
  w = weights.generalized_cross_entropy_weights(losses, 0.0, weights=incoming)
  np.testing.assert_array_equal(w, incoming)
  w = weights.generalized_cross_entropy_weights(losses, 1.0)
  np.testing.assert_allclose(w, np.exp(-losses), rtol=1e-6)


def test_errors():
  with pytest.raises(ValueError, match=r'q=-0\.1 must be at least 0'):
    weights.generalized_cross_entropy(-0.1)
  with pytest.raises(ValueError, match=r'truncation=1 must be in \[0, 1\)'):
    weights.generalized_cross_entropy(0.7, truncation=1)
