"""Class weights from confusion matrices against loops; tiers over all score vectors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrw.weights import error_log


def test_confusion_counts_fractions_and_leaves_out_padding():
  """An average that casts its mask to whole numbers would lose the halves."""
  rng = np.random.default_rng(0)
  labels, guesses = rng.integers(-1, 3, (2, 40))
  base = rng.choice([0, 0.5, 1], 40)
  expected = np.zeros((3, 3))
  for label, guess, b in zip(labels, guesses, base):
    if label >= 0 and guess >= 0:
      expected[label, guess] += b
  found = jax.jit(error_log.confusion_matrix, static_argnums=2)(labels, guesses, 3, base)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert np.abs(expected - np.round(expected)).max() == 0.5


def test_weights_equal_a_loop_for_every_head():
  confusion = np.random.default_rng(1).integers(0, 50, (5, 4, 4)).astype(float)
  found = error_log.error_log_class_weights(jnp.asarray(confusion), jnp.ones((5, 4)))
  for matrix, own in zip(confusion, found):
    errors = [matrix[c].sum() + matrix[:, c].sum() - 2 * matrix[c, c] for c in range(4)]
    raw = np.log1p(errors)
    np.testing.assert_allclose(own, 4 * raw / raw.sum(), rtol=1e-5)
  assert np.ptp(found[:, 0]) > 0.01  # one head's weights are not another's


def test_limits():
  previous = jnp.array([0.5, 1.5])
  perfect = jnp.diag(jnp.array([9.0, 1.0]))
  for by in ('count', 'rate'):
    kept = error_log.error_log_class_weights(perfect, previous, by)
    np.testing.assert_array_equal(kept, previous)  # 0 / 0 in the published code
  equal = jnp.array([[5.0, 2.0], [2.0, 5.0]])
  np.testing.assert_allclose(error_log.error_log_class_weights(equal, previous), [1, 1])


def test_the_published_rule_can_favor_the_common_classes():
  """Ninety, five, four and one percent; rarer classes are missed more often, and weigh less."""
  confusion = np.array([[870, 20, 9, 1], [30, 18, 2, 0], [25, 2, 13, 0], [6, 1, 1, 2]], np.float32)
  count = error_log.error_log_class_weights(jnp.asarray(confusion), jnp.ones(4))
  assert np.argmin(count) == 3
  assert np.all(np.diff(count) < 0)
  rate = error_log.error_log_class_weights(jnp.asarray(confusion), jnp.ones(4), 'rate')
  assert np.argmin(rate) == 0
  assert np.argmax(rate) == 3


def test_every_score_vector_has_the_tier_of_the_rule():
  scores = np.array(list(itertools.product(range(4), repeat=5)))
  tiers = error_log.severity_tiers(scores)
  expected = []
  for vector in scores.tolist():
    total, three = sum(vector), 3 in vector
    none = total <= 3 and not three
    mild = 4 <= total <= 6 or (total == 3 and three)
    toxic = total >= 7
    assert none + mild + toxic == 1, vector
    expected.append(1 * mild + 2 * toxic)
  np.testing.assert_array_equal(tiers, expected)


def test_errors():
  with pytest.raises(ValueError, match='scores must be whole numbers of 0 to 3, got 4'):
    error_log.severity_tiers([[4, 0]])
  with pytest.raises(ValueError, match="by='f1' must be"):
    error_log.error_log_class_weights(jnp.ones((2, 2)), jnp.ones(2), 'f1')
  with pytest.raises(ValueError, match=r'expected \[..., C, C\]'):
    error_log.error_log_class_weights(jnp.ones((2, 3)), jnp.ones(2))
  with pytest.raises(ValueError, match='labels have shape'):
    error_log.confusion_matrix(jnp.zeros(2, int), jnp.zeros(3, int), 2)
