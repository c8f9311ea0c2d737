"""ADAPT against a loop over examples and anchors, and its corner cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxrw
from jaxrw import weights
from jaxrw.weights import adapt

B, T, H, M = 16, 5, 7, 3

# Compiled as a whole: dispatched one by one, their operations take seconds.
adapt_weights = jax.jit(weights.adapt_weights, static_argnames=('temperature', 'normalize'))
anchor_mean = jax.jit(weights.anchor_mean)
pool_positions = jax.jit(weights.pool_positions)


def _data(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.normal(size=(B, H)) * rng.lognormal(0, 2, (B, 1)),
    rng.normal(size=(M, H)) * rng.lognormal(0, 2, (M, 1)),
    rng.integers(0, 3, B).astype(float),
    rng.uniform(0.5, 2, B),
  )


def _loop(phi, anchors, tau, base, incoming, normalize=True):
  """Cosine with every anchor, averaged, through the sigmoid, one number at a time."""
  own = []
  for row, b in zip(phi, base):
    cosines = []
    for anchor in anchors:
      dot = sum(x * y for x, y in zip(row, anchor))
      cosines.append(
        dot / math.sqrt(sum(x * x for x in row)) / math.sqrt(sum(y * y for y in anchor))
      )
    s = sum(cosines) / len(cosines)
    own.append(1 / (1 + math.exp(-s / tau)) if b > 0 else 0.0)
  w = np.asarray(own) * incoming
  return w * np.sum(base * incoming) / np.sum(base * w) if normalize else w


@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('tau', [0.02, 0.3, 1.0])
def test_equals_a_loop_over_the_anchors(tau, normalize):
  """So the mean of cosines is the product with the mean anchor, too."""
  phi, anchors, base, incoming = _data()
  with jax.enable_x64(True):
    w = adapt_weights(
      jnp.asarray(phi), anchor_mean(jnp.asarray(anchors)), tau, jnp.asarray(base),
      jnp.asarray(incoming), normalize,
    )  # fmt: skip
  np.testing.assert_allclose(w, _loop(phi, anchors, tau, base, incoming, normalize), rtol=1e-12)


def test_an_infinite_temperature_is_uniform_bit_for_bit():
  phi, anchors, *_ = _data()
  w = adapt_weights(jnp.asarray(phi), anchor_mean(jnp.asarray(anchors)), float('inf'))
  np.testing.assert_array_equal(w, np.ones(B, np.float32))


@pytest.mark.parametrize('scale', [2.0**-100, 2.0**-10, 2.0**110])
def test_the_scale_of_hidden_states_does_not_matter(scale):
  phi, anchors, *_ = (jnp.asarray(x, jnp.float32) for x in _data())
  plain = adapt_weights(phi, anchor_mean(anchors), 0.1)
  np.testing.assert_allclose(
    adapt_weights(phi * scale, anchor_mean(anchors * scale), 0.1), plain, rtol=1e-6
  )


def test_a_sharp_temperature_picks_the_nearest_where_every_sigmoid_underflows():
  phi = jnp.array([[-1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
  w = adapt_weights(phi, jnp.array([1.0, 0.0]), 1e-5)
  np.testing.assert_allclose(w, [0, 1.5, 1.5])


def test_a_zero_representation_has_cosine_zero():
  w = adapt_weights(jnp.zeros((1, 2)), jnp.array([1.0, 0.0]), normalize=False)
  np.testing.assert_array_equal(w, [0.5])
  np.testing.assert_array_equal(anchor_mean(jnp.array([[0.0, 0.0], [0.0, 5.0]])), [0, 0.5])


def test_no_anchors_and_wrong_shapes_are_errors():
  with pytest.raises(ValueError, match='M >= 1 anchors'):
    anchor_mean(jnp.zeros((0, 4)))
  with pytest.raises(ValueError, match='the mean anchor'):
    adapt_weights(jnp.zeros((3, 4)), jnp.zeros((2, 4)))
  with pytest.raises(ValueError, match='representation has shape'):
    adapt_weights(jnp.zeros((3, 4)), jnp.zeros(4), base=jnp.ones(2))
  with pytest.raises(ValueError, match='temperature=0'):
    adapt(0)


def test_pooling_equals_a_loop_and_padding_does_not_matter():
  rng = np.random.default_rng(1)
  hidden = rng.normal(size=(B, T, H)).astype(np.float32)
  valid = rng.random((B, T)) < 0.6
  valid[2] = False
  expected = np.zeros((B, H))
  for i in range(B):
    count = 0
    for t in range(T):
      if valid[i, t]:
        count += 1
        expected[i] += count * hidden[i, t]
    expected[i] /= max(1, count * (count + 1) / 2)
  hidden[~valid] = np.nan
  np.testing.assert_allclose(
    pool_positions(jnp.asarray(hidden), jnp.asarray(valid)), expected, rtol=2e-6, atol=1e-6
  )
  moved = np.roll(hidden, 2, axis=1), np.roll(valid, 2, axis=1)
  rows = valid[:, -2:].sum(axis=1) == 0  # where only padding wrapped around
  assert rows.sum() > 1
  np.testing.assert_array_equal(
    pool_positions(*map(jnp.asarray, moved))[rows],
    pool_positions(jnp.asarray(hidden), jnp.asarray(valid))[rows],
  )


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_pool_and_weigh_as_one(axis_type):
  rng = np.random.default_rng(2)
  hidden = rng.normal(size=(B, T, H)).astype(np.float32)
  valid = (rng.random((B, T)) < 0.7).astype(np.float32)
  anchor = anchor_mean(jnp.asarray(rng.normal(size=(M, H)), jnp.float32))

  def weigh(hidden, valid, anchor):
    return adapt_weights(pool_positions(hidden, valid), anchor, 0.1, valid)

  alone = weigh(hidden, jnp.asarray(valid), anchor)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(axis_type,))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  with jax.set_mesh(mesh):
    anchor = jax.device_put(np.asarray(anchor), NamedSharding(mesh, PartitionSpec()))
    together = jax.jit(weigh)(*jax.device_put((hidden, valid), rows), anchor)
  assert alone.shape == (B, T)
  np.testing.assert_allclose(together, alone, rtol=2e-5)


def test_the_train_step_feeds_it_from_its_own_forward_pass():
  """Weights from the training forward are those of a second forward; and one pass over microbatches
  ('online') has the gradient of the two passes of 'global'."""
  import optax

  rng = np.random.default_rng(3)
  batch = {
    'x': jnp.asarray(rng.normal(size=(B, T, 4)), jnp.float32),
    'base': jnp.asarray(rng.random((B, T)) < 0.8, jnp.float32),
  }
  params = {'inner': jnp.asarray(rng.normal(size=(4, H)), jnp.float32), 'out': jnp.ones(H)}

  def batched_loss(params, batch):
    hidden = jnp.tanh(batch['x'] @ params['inner'])
    losses = (hidden @ params['out'] - 1) ** 2
    return losses, {'representation': pool_positions(hidden, batch['base'])}

  anchor = anchor_mean(jnp.asarray(rng.normal(size=(M, H)), jnp.float32))
  tx, rw = optax.sgd(0.1), jaxrw.chain(near=adapt(0.05))
  state = jaxrw.TrainState.create(params, tx, rw)
  results = []
  for microbatches, scope in ((1, 'global'), (4, 'global'), (4, 'online')):
    step = jaxrw.make_train_step(
      None, tx, rw, batched_loss=batched_loss, microbatches=microbatches, scope=scope
    )
    results.append(jax.jit(step)(state, batch, {'anchor': anchor}))
  _, signals = batched_loss(params, batch)
  expected = adapt_weights(
    signals['representation'], anchor, 0.05, jaxrw.base_measure(batch['base'], batch['base'])
  )
  assert np.ptp(expected[expected > 0]) > 0.5
  for new, metrics in results:
    np.testing.assert_allclose(metrics['weights'], expected, rtol=1e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new.params, results[0][0].params
    )
