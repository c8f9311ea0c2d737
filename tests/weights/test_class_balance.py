"""Class weights against scikit-learn, published numbers and their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw


def test_inverse_frequency_is_scikit_learns():
  class_weight = pytest.importorskip('sklearn.utils.class_weight')
  labels = np.random.default_rng(0).choice(4, 500, p=[0.6, 0.3, 0.08, 0.02])
  expected = class_weight.compute_class_weight('balanced', classes=np.arange(4), y=labels)
  w = jaxrw.inverse_frequency_weights(np.bincount(labels))
  np.testing.assert_allclose(w, expected, rtol=1e-6)
  np.testing.assert_allclose(np.mean(np.asarray(w)[labels]), 1, rtol=1e-6)


@pytest.mark.parametrize('beta', [0.0, 0.9, 0.9999, 1 - 1e-9])
def test_effective_number_is_its_formula(beta):
  counts = np.array([10_000_000, 5000, 500, 50, 1])
  volume = np.array([1 - beta ** float(n) if beta else 1.0 for n in counts])
  if beta > 0.9999:
    volume = -np.expm1(counts * np.log(beta))
  expected = 5 / volume / np.sum(1 / volume)
  np.testing.assert_allclose(jaxrw.effective_number_weights(counts, beta), expected, rtol=2e-6)


def test_published_value():
  np.testing.assert_allclose(
    jaxrw.effective_number_weights([5000, 500, 50]), [0.0341, 0.2752, 2.6907], atol=5e-5
  )


def test_limits():
  counts = [900, 90, 9]
  np.testing.assert_array_equal(jaxrw.effective_number_weights(counts, 0.0), np.ones(3))
  inverse = np.asarray(jaxrw.inverse_frequency_weights(counts))
  near_one = jaxrw.effective_number_weights(counts, 1 - 1e-8)
  np.testing.assert_allclose(near_one, inverse / inverse.mean(), rtol=1e-5)


def test_a_class_that_does_not_occur_has_weight_zero_and_no_part():
  """The naive formulas divide by zero, and one infinite weight takes the scale of all others."""
  with np.errstate(divide='ignore'):
    naive = 1 / (1 - 0.9 ** np.array([10.0, 0.0]))
  assert not np.all(np.isfinite(2 * naive / naive.sum()) & (naive / naive.sum() > 0))
  np.testing.assert_allclose(jaxrw.effective_number_weights([10, 0], 0.9), [1, 0])
  np.testing.assert_allclose(jaxrw.inverse_frequency_weights([10, 0]), [1, 0])


def test_deferred_reweighting_is_after():
  """LDAM-DRW: uniform before the step, effective numbers from it on."""
  stage = jaxrw.effective_number([90, 10])
  deferred = jaxrw.after(100, stage)
  signals = {'losses': jnp.ones(3), 'labels': jnp.array([0, 1, -1])}
  now = lambda rw, step: rw.update(jnp.ones(3), (), step=step, **signals)[0]
  np.testing.assert_array_equal(now(deferred, 99), np.ones(3))
  np.testing.assert_array_equal(now(deferred, 100), now(stage, 0))
  assert now(stage, 0)[2] == 1


def test_labels_of_tokens():
  rw = jaxrw.inverse_frequency([3, 1])
  w, _ = rw.update(
    jnp.ones((2, 2)), (), losses=jnp.ones((2, 2)), labels=jnp.array([[0, 1], [1, -1]])
  )
  np.testing.assert_allclose(w, [[2 / 3, 2], [2, 1]], rtol=1e-6)


def test_a_stage_made_inside_jit():
  """Counts are numbers; the table is made of them before the program runs."""
  labels, losses = jnp.array([0, 1, 1]), jnp.ones(3)
  for make in (jaxrw.inverse_frequency, jaxrw.effective_number):

    def weigh(labels, make=make):
      return make([6, 3]).update(jnp.ones(3), (), losses=losses, labels=labels)[0]

    np.testing.assert_array_equal(jax.jit(weigh)(labels), weigh(labels))


def test_errors():
  for counts in ([1, -1], [0, 0], [[1, 2]], [np.nan, 1]):
    with pytest.raises(ValueError, match=r'counts=.* must be \[C\], finite, at least 0'):
      jaxrw.inverse_frequency(counts)
  with pytest.raises(ValueError, match=r'beta=1.0 must be in \[0, 1\); for 1 / n_c use'):
    jaxrw.effective_number([1, 2], 1.0)
  with pytest.raises(IndexError, match='labels holds 2, but there are 2'):
    jaxrw.inverse_frequency([1, 2]).update(
      jnp.ones(1), (), losses=jnp.ones(1), labels=jnp.array([2])
    )
  with pytest.raises(ValueError, match=r'labels have shape \(2,\), losses \(3,\)'):
    jaxrw.inverse_frequency([1, 2]).update(
      jnp.ones(3), (), losses=jnp.ones(3), labels=jnp.zeros(2, int)
    )
