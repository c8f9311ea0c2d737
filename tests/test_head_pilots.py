"""Do they help? Aligned rows in class-incremental learning, weights over quantile models.

Each prints its table (`pytest -m slow -s`) and asserts the direction only.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrw import heads, losses, quantiles

pytestmark = pytest.mark.slow
SEEDS = 3

# --- class-incremental learning: five old classes with ten exemplars each, five new ones


def _class_data(key, counts):
  means = 1.6 * jax.random.normal(jax.random.key(7), (10, 12))
  mix = jax.random.normal(jax.random.key(8), (12, 12)) / 3
  y = jnp.repeat(jnp.arange(10), jnp.array(counts), total_repeat_length=sum(counts))
  return jnp.tanh((means[y] + jax.random.normal(key, (y.size, 12))) @ mix), y


def _fit(params, x, y, tx, key, steps, classes):
  def step(carry, t):
    params, state = carry
    rows = jax.random.randint(jax.random.fold_in(key, t), (64,), 0, y.size)

    def loss(params):
      logits = _logits(params, x[rows])[:, :classes]
      return jnp.mean(losses.cross_entropy(logits, y[rows]))

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]


def _logits(params, x):
  a, b, head = params
  return jax.nn.relu(jax.nn.relu(x @ a) @ b) @ head


def _incremental(seed, tx):
  """(accuracy before, after aligning, gamma) over all ten classes."""
  keys = jax.random.split(jax.random.key(seed), 6)
  draw = lambda k, s: jax.random.normal(k, s) * np.sqrt(2 / s[0])
  params = tuple(map(draw, jax.random.split(keys[0], 3), ((12, 64), (64, 64), (64, 10))))
  params = _fit(params, *_class_data(keys[1], (300,) * 5 + (0,) * 5), tx, keys[2], 3000, 5)
  params = _fit(params, *_class_data(keys[3], (10,) * 5 + (300,) * 5), tx, keys[4], 3000, 10)
  x, y = _class_data(keys[5], (200,) * 10)
  head, gamma = heads.align_rows(params[2], jnp.arange(10) < 5)
  accuracy = lambda head: jnp.mean(jnp.argmax(_logits((*params[:2], head), x), axis=1) == y)
  return accuracy(params[2]), accuracy(head), gamma


def test_aligning_helps_where_new_rows_are_longer_and_hurts_where_they_are_not():
  decayed = lambda rate: optax.chain(optax.add_decayed_weights(rate), optax.sgd(0.05, momentum=0.9))
  found = {}
  for name, tx in (('adam', optax.adam(1e-3)), ('5e-4', decayed(5e-4)), ('5e-3', decayed(5e-3))):
    run = jax.jit(jax.vmap(partial(_incremental, tx=tx)))
    found[name] = np.mean(run(jnp.arange(SEEDS)), axis=1)
    before, after, gamma = found[name]
    print(f'{name}: before {before:.3f}, after {after:.3f}, gamma {gamma:.3f}')
  for name, (before, after, gamma) in found.items():
    assert (gamma > 1.1 and after < before) if name == 'adam' else (gamma < 0.9 and after > before)


# --- quantile aggregation: three models that are each right in a part of the inputs

LEVELS = np.linspace(0.05, 0.95, 19)


def _quantile_data(key, n):
  x = jax.random.uniform(key, (n,), minval=-3, maxval=3)
  noise = jax.random.normal(jax.random.fold_in(key, 1), (n,))
  y = jnp.sin(2 * x) + (0.2 + 0.3 * jnp.abs(x)) * noise
  z = jax.scipy.stats.norm.ppf(jnp.asarray(LEVELS, jnp.float32))
  # Base models: the right mean left, in the middle, right; spreads too small, right, too large.
  centers = jnp.stack([jnp.where(x < -1, 1, 0.2), jnp.where(jnp.abs(x) < 1, 1, 0.2), x > 1], 1)
  mean = centers * jnp.sin(2 * x)[:, None]
  spread = (0.2 + 0.3 * jnp.abs(x))[:, None] * jnp.array([0.6, 1.0, 1.5])
  return x, y, mean[..., None] + spread[..., None] * z


def _aggregated(seed, kind, local):
  """Held-out pinball loss of one way to aggregate."""
  key = jax.random.key(seed)
  x, y, q = _quantile_data(key, 1500)
  start = quantiles.init_aggregation(kind, 3, 19)

  def params_of(net, x):
    if not local:
      return net
    hidden = jnp.tanh(jnp.stack([x, x**2, x**3], axis=1) @ net['a'] + net['b'])
    return start + (hidden @ net['c']).reshape(-1, *start.shape)

  net = start
  if local:
    net = {
      'a': 0.5 * jax.random.normal(key, (3, 32)),
      'b': jnp.zeros(32),
      'c': jnp.zeros((32, start.size)),
    }
  tx = optax.adam(1e-2)

  def loss(net, x, y, q):
    return jnp.mean(quantiles.pinball(y, quantiles.aggregate(q, params_of(net, x), kind), LEVELS))

  def step(carry, _):
    net, state = carry
    updates, state = tx.update(jax.grad(loss)(net, x, y, q), state)
    return (optax.apply_updates(net, updates), state), None

  (net, _), _ = jax.lax.scan(step, (net, tx.init(net)), length=300)
  test = _quantile_data(jax.random.key(1000 + seed), 3000)
  return loss(net, *test), loss(start, *test) if not local else 0.0


def test_local_weights_beat_global_ones_and_fine_ones_need_not_win():
  found = {}
  for local in (False, True):
    for kind in ('coarse', 'medium', 'fine'):
      run = jax.jit(jax.vmap(partial(_aggregated, kind=kind, local=local)))
      found[local, kind], start = np.mean(run(jnp.arange(2)), axis=1)
      print('local' if local else 'global', kind, round(float(found[local, kind]), 4), start)
  for kind in ('coarse', 'medium'):
    assert found[True, kind] < found[False, kind]
  assert found[True, 'fine'] > found[True, 'medium'] - 0.01
