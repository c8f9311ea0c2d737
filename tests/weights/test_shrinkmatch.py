"""ShrinkMatch against a loop over classes, and FixMatch as its limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw
from jaxrw import losses
from jaxrw.weights import shrink_mask


def _by_hand(p, threshold):
  """(kept classes, confidence) of one example, by trying c = 2, 3, ..."""
  order = sorted(range(len(p)), key=lambda k: -p[k])
  for c in [*range(2, len(p)), len(p) - 1]:
    kept = [order[0], *order[c:]]
    confidence = p[order[0]] / sum(p[k] for k in kept)
    if confidence >= threshold:
      return set(kept), confidence
  return set(kept), confidence


@pytest.mark.parametrize('classes', [3, 10])
def test_equals_a_loop(classes):
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.full(classes, 0.4), 1000)
  p[::7] = np.round(p[::7], 1) + 0.1  # ties
  p /= p.sum(axis=1, keepdims=True)
  with jax.enable_x64(True):
    keep, confidence = jax.jit(shrink_mask, static_argnums=1)(jnp.asarray(p), 0.95)
    w = jax.jit(jaxrw.shrinkmatch_weights)(jnp.asarray(p), 0.7)
  for row, own_keep, own_confidence, own in zip(p, keep, confidence, w):
    kept, expected = _by_hand(row.tolist(), 0.95)
    assert set(np.flatnonzero(own_keep)) == kept
    np.testing.assert_allclose(own_confidence, expected, rtol=1e-9)
    assert own_keep[np.argmax(row)]
    certain = row.max() >= 0.95
    usable = not certain and expected >= 0.95
    np.testing.assert_allclose(own, [certain, 0.7 * row.max() * usable], rtol=1e-9)


def test_limits():
  p = jnp.asarray(np.random.default_rng(1).dirichlet(np.full(5, 0.3), 200))
  fixmatch = (p.max(axis=1) >= 0.95).astype(float)
  w = jaxrw.shrinkmatch_weights(p, 0.0)
  np.testing.assert_array_equal(w, np.stack([fixmatch, np.zeros(200)], axis=1))
  two = jaxrw.shrinkmatch_weights(jnp.array([[0.6, 0.4], [0.99, 0.01]]), 1.0)
  np.testing.assert_array_equal(two, [[0, 0], [1, 0]])
  even = jaxrw.shrinkmatch_weights(jnp.full((1, 4), 0.25), 1.0)
  np.testing.assert_array_equal(even, [[0, 0]])
  _, confidence = shrink_mask(jnp.full(4, 0.25))
  assert confidence == 0.5


def test_the_running_share_is_that_of_all_examples():
  rw = jaxrw.shrinkmatch(0.9, decay=0.5)
  state = rw.init()
  sure, unsure = [9.0, 0, 0], [0.0, 0, 0]
  base = jnp.array([[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]])
  signals = {'losses': jnp.ones((3, 2)), 'base': base}
  _, state = rw.update(jnp.ones((3, 2)), state, logits=jnp.array([sure, unsure, sure]), **signals)
  np.testing.assert_allclose(state.share, 0.5)  # the first batch sets it, without its padding
  _, state = rw.update(jnp.ones((3, 2)), state, logits=jnp.array([sure, sure, unsure]), **signals)
  np.testing.assert_allclose(state.share, 0.75)
  signals['base'] = jnp.zeros((3, 2))
  _, after = rw.update(jnp.ones((3, 2)), state, logits=jnp.array([sure] * 3), **signals)
  assert after.share == state.share


def test_shrunk_cross_entropy_sees_the_kept_classes_only():
  rng = np.random.default_rng(2)
  logits, labels = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
  keep = rng.random((6, 5)) < 0.5
  keep[np.arange(6), labels] = True
  expected = [np.log(np.sum(np.exp(z[k]))) - z[label] for z, k, label in zip(logits, keep, labels)]
  with jax.enable_x64(True):
    loss = lambda z: losses.shrunk_cross_entropy(z, jnp.asarray(keep), jnp.asarray(labels))
    value, pull = jax.vjp(loss, jnp.asarray(logits))
    gradient = pull(jnp.ones(6))[0]
  np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-15)
  assert np.all(np.asarray(gradient)[~keep] == 0)
  assert np.all(np.isfinite(gradient))
  everything = losses.shrunk_cross_entropy(jnp.asarray(logits), jnp.ones((6, 5), bool), labels)
  np.testing.assert_allclose(
    everything, losses.cross_entropy(jnp.asarray(logits), labels), rtol=1e-6
  )


def test_a_broken_prediction_is_not_an_uncertain_one():
  rw = jaxrw.shrinkmatch()
  w, _ = rw.update(
    jnp.ones((1, 2)), rw.init(), losses=jnp.ones((1, 2)), logits=jnp.full((1, 3), jnp.nan)
  )
  assert np.all(np.isnan(w))


def test_errors():
  with pytest.raises(ValueError, match=r'threshold=1 must be in \(0, 1\)'):
    jaxrw.shrinkmatch(1)
  with pytest.raises(ValueError, match='decay=1 must be in'):
    jaxrw.shrinkmatch(decay=1)
  with pytest.raises(ValueError, match='at least 2 classes'):
    shrink_mask(jnp.ones((3, 1)))
  with pytest.raises(ValueError, match=r'must be \[B, 2\]: consistency and shrunk loss'):
    rw = jaxrw.shrinkmatch()
    rw.update(jnp.ones(3), rw.init(), losses=jnp.ones(3), logits=jnp.ones((3, 4)))
  with pytest.raises(ValueError, match='keep has shape'):
    losses.shrunk_cross_entropy(jnp.ones((2, 3)), jnp.ones((2, 2), bool), jnp.zeros(2, int))
