"""Weights are next to free: exact counts of compiled programs on 8 devices."""

import jax
import jax.numpy as jnp
import pytest

from experiments import compiled
from tests import weighting_cost

PARAMETERS = 10_000_000
STEP = 6 * PARAMETERS * weighting_cost.ROWS // 8  # FLOPs of a device: forward 2, backward 4


@pytest.mark.parametrize('name', ['linupper', 'trimmed', 'chi_square_dro'])
def test_the_dearest_ones_are_below_a_percent_of_a_step(name):
  cost = weighting_cost.count(name)
  assert cost.stateless
  assert 0 < cost.operations < STEP / 100


@pytest.mark.slow
def test_no_stateless_weighting_is_above_a_percent_of_a_step():
  steps = {level: weighting_cost.step(rows) for level, rows in (
    ('example', weighting_cost.ROWS), ('token', weighting_cost.ROWS * weighting_cost.TOKENS)
  )}  # fmt: skip
  for name in weighting_cost.cases():
    cost = weighting_cost.count(name)
    level = weighting_cost.test_contract.claims(name).get('level')
    whole = steps['token' if level == 'token' else 'example']
    if cost.stateless:
      assert cost.operations < whole.operations / 100, cost
      # A CPU's compiler writes out what it compares before it sums; others fuse the two.
      assert cost.bytes < whole.bytes / (20 if level == 'token' else 100), cost
      assert cost.collective_bytes < whole.collective_bytes / 100, cost


def test_work_counts_every_turn_of_a_loop():
  """A matmul, a sum and an exponential, one by one and in a scan of 7."""
  x = jnp.ones((16, 16))
  once = compiled.work(jax.jit(lambda x: jnp.sum(jnp.exp(x @ x))).lower(x).compile())
  assert 2 * 16**3 + 2 * 16**2 <= once.operations <= 2 * 16**3 + 3 * 16**2
  looped = jax.jit(lambda x: jax.lax.scan(lambda c, _: (jnp.exp(c @ c), None), x, length=7)[0])
  many = compiled.work(looped.lower(x).compile())
  assert 7 * (2 * 16**3 + 16**2) <= many.operations <= 7 * (2 * 16**3 + 2 * 16**2)
  assert many.bytes >= 7 * once.bytes / 2


def test_work_that_depends_on_the_data_is_refused():
  endless = jax.jit(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c * 2, x))
  with pytest.raises(compiled.UncountableError, match='how often it runs is not known'):
    compiled.work(endless.lower(jnp.ones(3)).compile())
