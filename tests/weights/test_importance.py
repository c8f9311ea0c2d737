"""Importance weights: unbiased for any q, by enumeration; and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

P = np.array([0.5, 0.3, 0.2])


@pytest.mark.parametrize('q', [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1 / 3] * 3])
def test_the_expectation_under_q_is_the_mean_under_p(q):
  """All that can be drawn, each with its probability: sum_g q_g w_g L_g = sum_g p_g L_g."""
  losses = np.array([1.0, -4.0, 7.0])
  w = jaxrw.importance_weights(jnp.asarray(P), jnp.asarray(q), jnp.arange(3))
  np.testing.assert_allclose(np.sum(np.asarray(q) * w * losses), np.sum(P * losses), rtol=1e-6)
  np.testing.assert_allclose(np.sum(np.asarray(q) * w), 1, rtol=1e-6)


def test_every_row_has_the_q_of_when_it_was_drawn():
  w = jaxrw.importance_weights(jnp.asarray(P), jnp.array([0.25, 0.5]), jnp.array([0, 0]))
  np.testing.assert_allclose(w, [2.0, 1.0])


def test_unknown_domains_keep_weight_one():
  w = jaxrw.importance_weights(jnp.asarray(P), jnp.array([0.1, 0.5]), jnp.array([-1, 2]))
  np.testing.assert_allclose(w, [1.0, 0.4])


def test_a_row_that_cannot_have_been_drawn_is_nan_and_one_out_of_range_is_an_error():
  w = jaxrw.importance_weights(jnp.asarray(P), jnp.array([0.0, 0.5]), jnp.array([0, 2]))
  assert np.isnan(w[0])
  with pytest.raises(IndexError, match='group_ids holds 3'):
    jaxrw.importance_weights(jnp.asarray(P), jnp.ones(1), jnp.array([3]))
  traced = jax.jit(jaxrw.importance_weights)(jnp.asarray(P), jnp.ones(1), jnp.array([3]))
  assert np.isnan(traced[0])


@pytest.mark.parametrize(
  ('p', 'q', 'ids'), [((3, 1), (2,), (2,)), ((3,), (2, 1), (2,)), ((3,), (2,), (3,))]
)
def test_shapes(p, q, ids):
  with pytest.raises(ValueError, match=r'must be|expected ids'):
    jaxrw.importance_weights(jnp.ones(p), jnp.ones(q), jnp.zeros(ids, jnp.int32))


def test_the_stage_multiplies_what_came_before_and_leaves_padding_out():
  w, _ = jaxrw.importance().update(
    jnp.full((2, 2), 3.0),
    (),
    losses=jnp.ones((2, 2)),
    base=jnp.array([[1.0, 0.0], [1.0, 1.0]]),
    objective_prob=jnp.asarray(P),
    sampling_prob=jnp.array([0.25, 0.4]),
    group_ids=jnp.array([0, 2]),
  )
  np.testing.assert_allclose(w, [[6.0, 0.0], [1.5, 1.5]])
