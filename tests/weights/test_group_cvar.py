"""Greedy Group DRO against the sorted form of the official code, its limits, and absent groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxrw

SHARES = np.array([0.4, 0.3, 0.2, 0.1])


def _greedy(score, shares, share):
  """Groups from the worst on, each by its share of the data until `share` is reached."""
  q, left = np.zeros(len(score)), share
  for g in sorted(range(len(score)), key=lambda g: -score[g]):
    q[g] = min(shares[g], max(left, 0)) / share
    left -= shares[g]
  return q


@pytest.mark.parametrize('share', [0.05, 0.25, 0.6, 1.0])
def test_loss_is_that_of_the_greedy_sort_over_steps(share):
  rng = np.random.default_rng(0)
  rw = jaxrw.group_cvar(SHARES, share, decay=0.7, adjustment=2 / np.sqrt([400, 300, 200, 100]))
  update, state, means = jax.jit(rw.update), rw.init(), None
  for _ in range(4):
    ids = rng.permutation(np.repeat(np.arange(4), 3))
    losses = rng.gamma(2.0, 1.0, 12)
    now = np.array([losses[ids == g].mean() for g in range(4)])
    means = now if means is None else 0.7 * means + 0.3 * now
    w, state = update(jnp.ones(12), state, losses=jnp.asarray(losses), group_ids=jnp.asarray(ids))
    q = _greedy(means + 2 / np.sqrt([400, 300, 200, 100]), SHARES, share)
    np.testing.assert_allclose(np.mean(w * losses), q @ now, rtol=1e-5)
    np.testing.assert_allclose(state.losses, means, rtol=1e-5)  # without the adjustment


def test_limits():
  ids, losses = jnp.array([0, 1, 2, 3, 0]), jnp.array([1.0, 4.0, 3.0, 2.0, 1.5])
  of = lambda share: np.asarray(
    (rw := jaxrw.group_cvar(SHARES, share)).update(
      jnp.ones(5), rw.init(), losses=losses, group_ids=ids
    )[0]
  )
  np.testing.assert_allclose(of(1.0), [1, 1.5, 1, 0.5, 1], rtol=1e-5)  # shares over the batch's
  np.testing.assert_allclose(of(0.01), [0, 5, 0, 0, 0], rtol=1e-5)  # the worst group alone


def test_an_absent_group_keeps_its_mean_and_takes_no_mass():
  """The naive mean of no examples is 0 or NaN; here the group is left as it was."""
  rw = jaxrw.group_cvar((0.5, 0.5), share=1.0, decay=0.5)
  state = rw.init()
  signals = {'losses': jnp.array([1.0, 3.0]), 'group_ids': jnp.array([0, 1])}
  _, state = rw.update(jnp.ones(2), state, **signals)
  w, state = rw.update(
    jnp.ones(2), state, losses=jnp.array([5.0, 7.0]), group_ids=jnp.zeros(2, int)
  )
  np.testing.assert_allclose(state.losses, [3.5, 3.0])
  np.testing.assert_allclose(w, [1, 1])


def test_adjustments_of_zero_for_some_groups_still_count():
  """The official code drops all of them unless every one is positive, and writes them into the
  losses it reports; both change which group is the worst."""
  rw = jaxrw.group_cvar((0.5, 0.5), share=0.5, adjustment=(0.0, 2.0))
  losses, ids = jnp.array([2.0, 1.0]), jnp.array([0, 1])
  w, means = rw.update(jnp.ones(2), rw.init(), losses=losses, group_ids=ids)
  np.testing.assert_allclose(w, [0, 2])
  np.testing.assert_allclose(means.losses, losses)
  log_q = jnp.log(jnp.array([0.5, 0.5]))
  moved = jaxrw.group_dro_weights(log_q, ids, losses, 1.0, adjustment=np.array([0.0, 2.0]))[1]
  np.testing.assert_allclose(jnp.exp(moved), jax.nn.softmax(jnp.array([2.0, 3.0])), rtol=1e-5)


def test_a_broken_step_is_seen_and_forgotten():
  rw = jaxrw.group_cvar((0.5, 0.5), share=0.5)
  w, means = rw.update(
    jnp.ones(2), rw.init(), losses=jnp.array([jnp.nan, 1.0]), group_ids=jnp.array([0, 1])
  )
  assert np.all(np.isnan(w))
  np.testing.assert_array_equal(means.seen, [False, True])
  assert np.all(np.isfinite(means.losses))


def test_errors():
  for arguments, message in (
    (((0.5, 0.6),), r'group_shares=\(0.5, 0.6\) must be \[G\]'),
    (((0.5, 0.5), 0), 'share=0 must be in'),
    (((0.5, 0.5), 0.5, 1.0), r'decay=1\.0 must be in'),
    (((0.5, 0.5), 0.5, 0.9, (1, 2, 3)), r'adjustment has shape \(3,\)'),
  ):
    with pytest.raises(ValueError, match=message):
      jaxrw.group_cvar(*arguments)
