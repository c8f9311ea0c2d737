"""Weighting state through Orbax: what comes back continues as if nothing had happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxrw

ocp = pytest.importorskip('orbax.checkpoint').v1

ROWS = 8


def _moving_average():
  """Stateful: multiplies by losses over their moving average."""

  def init():
    return {'mean': jnp.ones(()), 'count': jnp.zeros((), jnp.int32)}

  def update(weights, state, *, losses, base, **_):
    mean = 0.9 * state['mean'] + 0.1 * jnp.sum(base * losses) / jnp.sum(base)
    return weights * losses / mean, {'mean': mean, 'count': state['count'] + 1}

  return jaxrw.Weighting(init, update)


AVERAGE, LINUPPER, CAP = _moving_average(), jaxrw.linupper(0.4), jaxrw.cap(10.0)
BEFORE = {'average': AVERAGE, 'loss': LINUPPER}
AFTER = {
  'unchanged': BEFORE,
  'stateless stage added': {'average': AVERAGE, 'loss': LINUPPER, 'cap': CAP},
  'stateless stage added in front': {'start': jaxrw.uniform(), **BEFORE},
  'stateless stage removed': {'average': AVERAGE},
}
TX = optax.adam(0.01)


def _loss(params, example):
  return (example['x'] @ params - example['y']) ** 2


def _batch(step):
  rng = np.random.default_rng(step)
  return {
    'x': jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32),
    'y': jnp.asarray(rng.normal(size=ROWS), jnp.float32),
  }


def _create(rw):
  return jaxrw.TrainState.create(jnp.zeros(3), TX, rw)


def _target(rw):
  """The abstract state to restore into."""
  sharding = jnp.zeros(()).sharding
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(lambda: _create(rw)),
  )


def _continue(rw, state, steps):
  step = jax.jit(jaxrw.make_train_step(_loss, TX, rw))
  for i in steps:
    state, metrics = step(state, _batch(i))
  return state, metrics


@pytest.mark.parametrize('change', AFTER)
def test_a_restored_run_continues_bit_for_bit(change, tmp_path):
  saved, _ = _continue(jaxrw.chain(**BEFORE), _create(jaxrw.chain(**BEFORE)), range(3))
  ocp.save(tmp_path / 'state', saved)
  rw = jaxrw.chain(**AFTER[change])
  restored = ocp.load(tmp_path / 'state', _target(rw))
  assert isinstance(restored, jaxrw.TrainState)
  assert int(restored.weighting['average']['count']) == 3
  jax.tree.map(np.testing.assert_array_equal, restored, saved)
  from_disk, metrics = _continue(rw, restored, range(3, 6))
  from_memory, expected = _continue(rw, saved, range(3, 6))
  jax.tree.map(np.testing.assert_array_equal, from_disk, from_memory)
  np.testing.assert_array_equal(metrics['weights'], expected['weights'])
  assert int(from_disk.weighting['average']['count']) == int(from_disk.step) == 6


def test_a_run_whose_only_stages_are_stateless_saves_and_restores(tmp_path):
  rw = jaxrw.chain(loss=LINUPPER, cap=CAP)
  saved, _ = _continue(rw, _create(rw), range(2))
  ocp.save(tmp_path / 'state', saved)
  restored = ocp.load(tmp_path / 'state', _target(rw))
  assert restored.weighting == {}
  final, _ = _continue(rw, restored, range(2, 4))
  expected, _ = _continue(rw, saved, range(2, 4))
  np.testing.assert_array_equal(final.params, expected.params)


def test_a_stateful_stage_that_was_not_saved_is_not_made_up(tmp_path):
  saved = _create(jaxrw.chain(loss=LINUPPER))
  ocp.save(tmp_path / 'state', saved)
  rw = jaxrw.chain(average=AVERAGE, loss=LINUPPER)
  with pytest.raises(ValueError, match='weighting'):
    ocp.load(tmp_path / 'state', _target(rw))
  with pytest.raises(KeyError, match="no state for stage 'average'"):
    _continue(rw, saved, range(1))


def test_tables_and_group_weights_come_back_sharded_and_continue_bit_for_bit(tmp_path):
  """A table of one row per example, its rows over eight devices, beside a replicated state."""
  rw = jaxrw.chain(terms=jaxrw.adawac(64, rate=0.5), groups=jaxrw.group_dro(3, rate=0.1))
  mesh = Mesh(np.asarray(jax.devices()), ('data',), axis_types=(AxisType.Auto,))
  rows, everywhere = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in (('data',), ()))

  def two_losses(params, batch):
    error = (batch['x'] @ params - batch['y']) ** 2
    return jnp.stack([error, jnp.abs(batch['x'] @ params)], axis=1)

  def batch_of(step):
    ids = np.random.default_rng(step).integers(-1, 64, ROWS).astype(np.int32)
    return jax.device_put(_batch(step) | {'example_id': ids, 'domain_id': ids % 3}, rows)

  create = lambda: _create(rw)
  shardings = jax.tree.map(lambda _: everywhere, jax.eval_shape(create))
  shardings.weighting['terms'] = rows
  step = jax.jit(
    jaxrw.make_train_step(None, TX, rw, batched_loss=two_losses),
    out_shardings=(shardings, None),
  )

  def run(state, steps):
    for i in steps:
      state, metrics = step(state, batch_of(i))
    return state, metrics

  saved, _ = run(jax.jit(create, out_shardings=shardings)(), range(3))
  ocp.save(tmp_path / 'state', saved)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), saved, shardings
  )
  restored = ocp.load(tmp_path / 'state', target)
  assert restored.weighting['terms'].sharding.is_equivalent_to(rows, 2)
  assert len(np.unique(np.asarray(saved.weighting['terms']), axis=0)) > 8, 'hardly a row moved'
  jax.tree.map(np.testing.assert_array_equal, restored, saved)
  from_disk, metrics = run(restored, range(3, 6))
  from_memory, expected = run(saved, range(3, 6))
  jax.tree.map(np.testing.assert_array_equal, from_disk, from_memory)
  np.testing.assert_array_equal(metrics['weights'], expected['weights'])
