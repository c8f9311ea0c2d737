"""Groups by membership: ids are its special case, and a proxy need not be thresholded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw
from jaxrw import core, diagnostics

IDS = np.array([0, 2, -1, 1, 1, 0, 2, 0])
LOSSES = jnp.array([1.0, 2.0, 5.0, 3.0, 0.5, 4.0, 1.5, 2.5])


def _one_hot(ids):
  return jnp.asarray(ids[:, None] == np.arange(3), jnp.float32)


STAGES = {
  'group_dro': jaxrw.group_dro(3, 0.5),
  'group_cvar': jaxrw.group_cvar((0.5, 0.3, 0.2), 0.4),
  'fair_error_bound': jaxrw.fair_error_bound(3),
  'importance': jaxrw.importance(),
  'tilted_groups': jaxrw.tilted_groups(3, 0.8, -0.5),
}


@pytest.mark.parametrize('name', STAGES)
def test_ids_are_memberships_of_one(name):
  """An unknown id is a row of zeros."""
  rw, base = STAGES[name], jnp.array([1.0, 1, 1, 2, 0, 1, 1, 1])
  more = {'sampling_prob': jnp.full(8, 0.4), 'objective_prob': jnp.array([0.5, 0.3, 0.2])}
  more |= {'losses': LOSSES, 'base': base}
  of = jax.jit(lambda ids: rw.update(jnp.ones(8), rw.init(), group_ids=ids, **more))
  jax.tree.map(np.testing.assert_array_equal, of(jnp.asarray(IDS)), of(_one_hot(IDS)))


def test_a_row_between_two_groups_gets_the_average_of_their_factors():
  member = _one_hot(IDS).at[0].set(jnp.array([0.25, 0.5, 0.0]))  # a quarter of it is unknown
  rw = jaxrw.group_dro(3, 0.5)
  w, _ = rw.update(jnp.ones(8), rw.init(), losses=LOSSES, group_ids=member)
  np.testing.assert_allclose(w[0], 0.25 * w[5] + 0.5 * w[3] + 0.25, rtol=1e-5)
  known = member.sum(axis=1)
  np.testing.assert_allclose(jnp.sum(w), 8, rtol=1e-6)  # sum(base * w) stays
  assert (float(known[2]), float(w[2])) == (0, 1)


@pytest.mark.parametrize('given', ['proxy', 'group'])
def test_what_a_calibrated_proxy_estimates(given):
  """Mean losses of the two groups. Unbiased if the loss depends on the proxy alone, when its
  threshold is biased; if it depends on the group itself, nothing that sees the proxy is."""
  rng, errors = np.random.default_rng(0), {'soft': [], 'hard': []}
  for _ in range(100):
    chance = rng.beta(0.7, 2.0, 1000)
    group = rng.random(1000) < chance
    losses = (chance if given == 'proxy' else group) + 0.1 * rng.normal(size=1000)
    columns = jnp.asarray(np.stack([losses, np.ones(1000)], axis=1), jnp.float32)
    truth = np.array([losses[~group].mean(), losses[group].mean()])
    soft = jnp.asarray(np.stack([1 - chance, chance], axis=1), jnp.float32)
    for name, told in (('soft', soft), ('hard', jnp.asarray(chance > 0.5, jnp.int32))):
      sums = np.asarray(diagnostics.group_sums(columns, told, 2))
      errors[name].append(sums[:, 0] / sums[:, 1] - truth)
  mean = {name: np.abs(np.mean(e, axis=0)) for name, e in errors.items()}
  four = {name: 4 * np.std(e, axis=0) / 10 for name, e in errors.items()}
  if given == 'proxy':
    np.testing.assert_array_less(mean['soft'], four['soft'])
  else:
    assert np.all(mean['soft'] > 0.1)
  assert mean['hard'][1] > four['hard'][1]


def test_the_train_step_splits_memberships_as_it_splits_rows():
  rng = np.random.default_rng(1)
  batch = {
    'x': jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
    'y': LOSSES,
    'group_ids': jnp.asarray(rng.dirichlet(np.ones(3), 8), jnp.float32),
  }
  rw, tx = jaxrw.group_dro(3, 0.1), optax.sgd(0.1)
  loss = lambda w, example: (example['x'] @ w - example['y']) ** 2
  one, four = (
    jax.jit(jaxrw.make_train_step(loss, tx, rw, microbatches=m))(
      jaxrw.TrainState.create(jnp.zeros(2), tx, rw), batch
    )
    for m in (1, 4)
  )
  np.testing.assert_allclose(one[0].params, four[0].params, rtol=1e-5)
  np.testing.assert_allclose(one[1]['weights'], four[1]['weights'], rtol=1e-5)


def test_memberships_that_are_no_shares():
  for wrong in ([0.7, 0.7, 0.0], [-0.1, 0.5, 0.0]):
    member = _one_hot(IDS).at[4].set(jnp.array(wrong))
    with pytest.raises(ValueError, match=r'group_ids\[4\] = .* must be at least 0'):
      core.check_groups(member, 3, 8)
    rw = jaxrw.group_dro(3)
    w, _ = jax.jit(lambda m, rw=rw: rw.update(jnp.ones(8), rw.init(), losses=LOSSES, group_ids=m))(
      member
    )
    np.testing.assert_array_equal(np.isnan(w), np.arange(8) == 4)
  with pytest.raises(ValueError, match=r'expected ids \[8\] or memberships \[8, 3\]'):
    core.check_groups(jnp.ones((8, 2)), 3, 8)
  with pytest.raises(ValueError, match=r'group_ids \(8, 3\); expected \[B\] for both'):
    jaxrw.weights.group_advantage_weights(LOSSES, _one_hot(IDS), 3)
