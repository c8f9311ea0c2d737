"""The attack against the exact adversary of a linear model, its ball, and other batches."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrw.adversarial import pgd_linf

ROWS, WIDTH = 16, 5
ANYWHERE = (-np.inf, np.inf)


def logistic(params, x, y):
  w, b = params
  return jax.nn.softplus(-y * (x @ w + b))


@pytest.fixture(scope='module')
def problem():
  rng = np.random.default_rng(0)
  params = rng.normal(size=WIDTH).astype(np.float32), np.float32(0.3)
  x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32)
  y = rng.choice([-1.0, 1.0], ROWS).astype(np.float32)
  return params, x, y


@partial(jax.jit, static_argnames=('steps', 'bounds'))
def attack(params, x, y, eps, step, steps=8, bounds=ANYWHERE, seed=0):
  key = jax.random.key(seed)
  return pgd_linf(logistic, params, x, y, eps=eps, step=step, steps=steps, key=key, bounds=bounds)


def test_reaches_the_exact_adversary_of_a_linear_model(problem):
  """margin y(w.x + b) - eps |w|_1, from any start, once steps * step >= 2 eps."""
  (w, b), x, y = problem
  for seed in range(3):
    found = attack((w, b), x, y, 0.4, 0.1, seed=seed)
    margin = y * (found @ w + b)
    np.testing.assert_allclose(margin, y * (x @ w + b) - 0.4 * np.abs(w).sum(), rtol=2e-5)
  short = attack((w, b), x, y, 0.4, 0.1, steps=4)
  assert np.all(y * (short @ w + b) >= margin - 1e-6)
  assert np.any(y * (short @ w + b) > margin + 0.01), 'half the way sufficed from everywhere'


def test_never_lowers_the_loss_of_a_linear_model(problem):
  params, x, y = problem
  losses = jax.vmap(logistic, (None, 0, 0))
  found = attack(params, x, y, 0.4, 0.1)
  assert np.all(losses(params, found, y) >= losses(params, jnp.asarray(x), y))


def test_stays_in_the_ball_and_in_the_bounds(problem):
  params, x, y = problem
  x = np.clip(x, 0, 1)
  found = np.asarray(attack(params, x, y, 0.3, 0.2, bounds=(0.0, 1.0)))
  assert np.abs(found - x).max() <= 0.3 + 1e-6
  assert found.min() >= 0
  assert found.max() <= 1
  free = np.asarray(attack(params, x, y, 0.3, 0.2))
  np.testing.assert_allclose(found, np.clip(free, 0, 1), atol=1e-6)


def test_a_ball_of_radius_0_is_the_input(problem):
  params, x, y = problem
  np.testing.assert_array_equal(attack(params, x, y, 0.0, 0.1), x)


def test_no_attack_depends_on_the_rest_of_the_batch(problem):
  params, x, y = problem
  whole = attack(params, x, y, 0.4, 0.03)
  np.testing.assert_array_equal(attack(params, x[:6], y[:6], 0.4, 0.03), whole[:6])
  broken = x.copy()
  broken[-1] = np.nan
  np.testing.assert_array_equal(attack(params, broken, y, 0.4, 0.03)[:-1], whole[:-1])


def test_noise_is_uniform_in_the_ball_and_differs_between_rows():
  x = np.zeros((500, 4), np.float32)
  noise = attack((np.zeros(4, np.float32), 0.0), x, np.ones(500), 0.5, 0.1, steps=0)
  assert len(np.unique(noise)) > 1900
  assert 0.49 < np.max(noise) <= 0.5
  np.testing.assert_allclose(np.std(noise), 0.5 / np.sqrt(3), rtol=0.05)


def test_the_result_is_a_constant(problem):
  params, x, y = problem
  loss = lambda params, x: jnp.sum(attack(params, x, y, 0.4, 0.1) ** 2)
  for slope in jax.tree.leaves(jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(x))):
    np.testing.assert_array_equal(slope, jnp.zeros_like(slope))


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_find_what_one_finds(problem, axis_type):
  params, x, y = problem
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(axis_type,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  alone = attack(params, x, y, 0.4, 0.03)
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    together = attack(placed, *jax.device_put((x, y), rows), 0.4, 0.03)
  np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
  'change',
  [{'eps': -0.1}, {'step': 0.0}, {'steps': -1}, {'bounds': (1.0, 0.0)}, {'eps': float('nan')}],
)
def test_bad_settings_are_named(problem, change):
  settings = {'eps': 0.1, 'step': 0.1, 'steps': 1, 'bounds': ANYWHERE, **change}
  name = next(iter(change))
  with pytest.raises(ValueError, match=f'{name}='):
    pgd_linf(logistic, *problem, **settings, key=jax.random.key(0))


def test_token_ids_cannot_be_attacked(problem):
  params, _, y = problem
  with pytest.raises(TypeError, match='dtype int32'):
    attack(params, np.zeros((2, WIDTH), np.int32), y, 0.1, 0.1)
