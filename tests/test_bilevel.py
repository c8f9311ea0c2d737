"""The bilevel step: its derivatives against other ways to get them, what it learns, its cost."""

import json
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxrw
from experiments import compiled

D, K, B, M = 4, 3, 16, 8

OPTIMIZERS = {
  'sgd': optax.sgd(0.5),
  'momentum': optax.sgd(0.5, momentum=0.9, nesterov=True),
  'adam': optax.adam(0.1, eps_root=1e-6),
  'clipped_adamw': optax.chain(
    optax.clip_by_global_norm(0.05), optax.adamw(0.1, eps_root=1e-6, weight_decay=0.1)
  ),
}


def _loss(params, example):
  hidden = jnp.tanh(example['x'] @ params['inner'])
  return jaxrw.losses.cross_entropy(hidden @ params['out'], example['y'])


def _meta_loss(params, batch):
  return jnp.mean(jax.vmap(_loss, (None, 0))(params, batch))


def _params(seed=0):
  rng = np.random.default_rng(seed)
  return {'inner': rng.normal(size=(D, 5)) / 2, 'out': rng.normal(size=(5, K)) / 2}


def _rows(seed, rows, noise=0.0):
  """Labels from a fixed linear rule, a share of them drawn anew; which ones, too."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, D))
  y = np.argmax(x @ np.random.default_rng(99).normal(size=(D, K)), axis=1)
  flipped = rng.random(rows) < noise
  return {'x': x, 'y': np.where(flipped, (y + rng.integers(1, K, rows)) % K, y)}, flipped


def _double(tree):
  """Float leaves as float64."""
  wide = lambda x: jnp.asarray(x, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)
  return jax.tree.map(wide, jax.tree.map(jnp.asarray, tree))


def _problem(tx, rw, warm=True):
  """State, batch and meta batch in float64; optimizer state that has seen a gradient."""
  batch, _ = _rows(1, B)
  batch['base'] = np.arange(B) % 5 != 3
  batch['weights'] = np.linspace(0.5, 1.5, B)
  batch, meta_batch = _double(batch | {'base': batch['base'] * 1.0}), _double(_rows(2, M)[0])
  state = jaxrw.TrainState.create(_double(_params()), tx, rw)
  state = state._replace(weighting=_double(state.weighting))
  if warm:
    gradient = jax.grad(_meta_loss)(state.params, batch)
    state = state._replace(opt_state=tx.update(gradient, state.opt_state, state.params)[1])
  return state, batch, meta_batch


def _after_step(by_weights, state, batch, meta_batch, tx):
  """The meta loss after one weighted step, differentiable in whatever the weights come from."""

  def weighted(params):
    losses = jax.vmap(_loss, (None, 0))(params, batch)
    w = by_weights(jax.lax.stop_gradient(losses))
    return jnp.sum(batch['base'] * w * losses) / jnp.sum(batch['base'])

  updates, _ = tx.update(jax.grad(weighted)(state.params), state.opt_state, state.params)
  return _meta_loss(optax.apply_updates(state.params, updates), meta_batch)


def _net(params, losses):
  """Meta-Weight-Net once more, as matrices."""
  hidden = jnp.maximum(losses[:, None] * params['in_weight'][None] + params['in_bias'], 0)
  return jax.nn.sigmoid(hidden @ params['out_weight'] + params['out_bias'])


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_hypergradient_equals_differentiating_through_the_step(name):
  """meta_tx = sgd(1) hands the gradient out; the oracle is reverse over reverse mode."""
  tx, meta_tx = OPTIMIZERS[name], optax.sgd(1.0)
  rw = jaxrw.chain(before=jaxrw.cap(1.4), net=jaxrw.meta_weight_net(meta_tx, hidden=20))
  with jax.enable_x64(True):
    state, batch, meta_batch = _problem(tx, rw)
    step = jaxrw.make_bilevel_step(_loss, tx, rw, _meta_loss, meta_tx)
    new, metrics = jax.jit(step)(state, batch, meta_batch)
    old = state.weighting['net']['params']
    incoming = jaxrw.cap_weights(batch['weights'], 1.4, base=batch['base'])

    @jax.jit
    def ahead(params):
      weigh = lambda losses: incoming * _net(params, losses)
      return _after_step(weigh, state, batch, meta_batch, tx)

    value, expected = jax.value_and_grad(ahead)(old)
    found = jax.tree.map(jnp.subtract, old, new.weighting['net']['params'])
    size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11 * size)
    np.testing.assert_allclose(metrics['meta_loss'], value, rtol=1e-12)
    np.testing.assert_allclose(metrics['meta_grad_norm'], optax.tree.norm(expected), rtol=1e-9)

    # Differences of the meta loss itself, along a few directions.
    for seed in range(3):
      rng = np.random.default_rng(seed)
      direction = jax.tree.map(lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape)), old)
      up, down = (jax.tree.map(lambda p, d, h=h: p + h * d, old, direction) for h in (1e-5, -1e-5))
      slope = (ahead(up) - ahead(down)) / 2e-5
      np.testing.assert_allclose(optax.tree.vdot(found, direction), slope, rtol=1e-5, atol=1e-9)

    # And the real step: an ordinary one with the new network's weights.
    losses = jax.vmap(_loss, (None, 0))(state.params, batch)
    w = jnp.where(batch['base'] > 0, incoming * _net(new.weighting['net']['params'], losses), 0)
    np.testing.assert_allclose(metrics['weights'], w, rtol=1e-12)
    assert np.max(np.abs(w - incoming * _net(old, losses))) > 1e-6
    plain = jaxrw.make_train_step(_loss, tx, jaxrw.uniform())
    reference = state._replace(weighting=())
    expected, _ = jax.jit(plain)(reference, batch | {'weights': w})
    chex.assert_trees_all_close(new.params, expected.params, rtol=1e-10)
    chex.assert_trees_all_close(new.opt_state, expected.opt_state, rtol=1e-10)
    assert new.step == 1


def test_learning_to_reweight_is_the_derivative_of_the_meta_loss():
  """w ∝ max(0, - d meta(theta - eta sum_i eps_i grad l_i) / d eps_i / eta) at eps = 0."""
  tx, rw, eta = optax.sgd(0.3), jaxrw.learning_to_reweight(), 0.07
  with jax.enable_x64(True):
    state, batch, meta_batch = _problem(tx, rw)
    del batch['weights']
    step = jaxrw.make_bilevel_step(_loss, tx, rw, _meta_loss)
    new, metrics = jax.jit(step)(state, batch, meta_batch)

    def ahead(eps):
      weighted = lambda p: jnp.sum(eps * jax.vmap(_loss, (None, 0))(p, batch))
      gradient = jax.grad(weighted)(state.params)
      return _meta_loss(jax.tree.map(lambda p, g: p - eta * g, state.params, gradient), meta_batch)

    own = np.maximum(-jax.jit(jax.grad(ahead))(jnp.zeros(B)) / eta, 0) * batch['base']
    expected = own * jnp.sum(batch['base']) / jnp.sum(own)
    assert 2 < np.sum(own == 0) < B - 2
    np.testing.assert_allclose(metrics['weights'], expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(metrics['meta_loss'], _meta_loss(state.params, meta_batch))
    plain = jax.jit(jaxrw.make_train_step(_loss, tx, jaxrw.uniform()))
    reference, _ = plain(state, batch | {'weights': expected})
    chex.assert_trees_all_close(new.params, reference.params, rtol=1e-10)


METHODS = {
  'learning_to_reweight': (jaxrw.learning_to_reweight(), None),
  'meta_weight_net': (jaxrw.meta_weight_net(optax.adam(0.05), hidden=20), optax.adam(0.05)),
}


def _build(method, tx, **options):
  """The bilevel step, and its first state."""
  rw, meta_tx = METHODS[method]
  rw = jaxrw.chain(learned=rw, cap=jaxrw.cap(3.0))
  step = jaxrw.make_bilevel_step(_loss, tx, rw, _meta_loss, meta_tx, **options)
  return step, jaxrw.TrainState.create(jax.tree.map(jnp.float32, _params()), tx, rw)


def _single(tree):
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), tree)


@pytest.mark.parametrize('method', METHODS)
def test_token_losses_equal_their_base_means(method):
  """[B, T] losses with padding give the weights, and the step, of the examples' base-means."""
  rng = np.random.default_rng(5)
  valid = (rng.random((B, 4)) < 0.7) * 1.0
  valid[:, 0] = 1
  batch = {'x': rng.normal(size=(B, 4, D)), 'y': rng.integers(0, K, (B, 4)), 'base': valid}

  def example_losses(params, batch):
    kept = jnp.sum(batch['base'] * _loss(params, batch), axis=1)
    return kept / jnp.sum(batch['base'], axis=1)

  with jax.enable_x64(True):
    batch, meta_batch = _double(batch), _double(_rows(2, M)[0])
    results = []
    for batched_loss in (_loss, example_losses):
      step, state = _build(method, optax.sgd(0.5), batched_loss=batched_loss)
      results.append(jax.jit(step)(_double(state), batch, meta_batch))
    (by_token, metrics), (by_example, expected) = results
    chex.assert_trees_all_close(by_token, by_example, rtol=1e-9, atol=1e-12)
    weights = np.asarray(metrics['weights'])
    np.testing.assert_allclose(weights[:, 0], expected['weights'], rtol=1e-9)
    assert np.ptp(weights[:, 0]) > 1e-4


@pytest.mark.parametrize('method', METHODS)
def test_scan_equals_a_loop_compiled_once_and_a_saved_state_continues(method, tmp_path):
  ocp = pytest.importorskip('orbax.checkpoint').v1
  step, start = _build(method, optax.adam(0.02, eps_root=1e-8))
  batches = [(_single(_rows(i, B)[0]), _single(_rows(100 + i, M)[0])) for i in range(4)]
  traces = []

  @jax.jit
  def compiled_step(*args):
    traces.append(1)
    return step(*args)

  state = start
  for i, batch in enumerate(batches):
    state, metrics = compiled_step(state, *batch)
    if i == 1:
      ocp.save(tmp_path / 'state', state)
  assert len(traces) == 1
  assert {'loss_sum', 'weighted_loss_sum', 'base_sum', 'grad_norm', 'meta_loss'} <= set(metrics)
  assert metrics['weights'].shape == metrics['losses'].shape == (B,)
  np.testing.assert_allclose(
    metrics['weighted_loss_sum'], np.sum(metrics['weights'] * metrics['losses']), rtol=1e-5
  )

  stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
  scanned, more = jax.lax.scan(lambda state, batch: step(state, *batch), start, stacked)
  chex.assert_trees_all_close(scanned, state, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(more['meta_loss'][-1], metrics['meta_loss'], rtol=1e-5)

  place = jax.tree.leaves(start)[0].sharding
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  restored = ocp.load(tmp_path / 'state', jax.tree.map(like, start))
  for batch in batches[2:]:
    restored, _ = compiled_step(restored, *batch)
  chex.assert_trees_all_equal(restored, state)
  if method == 'meta_weight_net':
    moved = jax.tree.map(jnp.subtract, state.weighting, start.weighting)['learned']
    assert all(np.any(x != 0) for x in jax.tree.leaves(moved))


@pytest.mark.parametrize('method', METHODS)
def test_eight_devices_equal_one(method):
  step, state = _build(method, optax.sgd(0.5, momentum=0.9))
  step = jax.jit(step)
  batch, meta_batch = _single(_rows(1, B)[0]), _single(_rows(2, M)[0])
  alone, expected = step(state, batch, meta_batch)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))
  with jax.set_mesh(mesh):
    together, metrics = step(place(state), place(batch, 'data'), place(meta_batch, 'data'))
  chex.assert_trees_all_close(together, alone, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(metrics['weights'], expected['weights'], rtol=1e-4, atol=1e-5)


def test_whole_step_signals_reach_the_other_stages():
  rw = jaxrw.chain(learned=jaxrw.learning_to_reweight(), near=jaxrw.weights.adapt(1e-3))
  forward = lambda w, batch: ((batch['x'] @ w - 1) ** 2, {'representation': batch['x']})
  step = jaxrw.make_bilevel_step(
    None, optax.sgd(0.1), rw, lambda w, batch: jnp.sum(forward(w, batch)[0]), batched_loss=forward
  )
  state = jaxrw.TrainState.create(jnp.zeros(2), optax.sgd(0.1), rw)
  batch = {'x': jnp.array([[1.0, 0.0], [0.0, 1.0]])}
  _, metrics = step(state, batch, {'x': jnp.ones((1, 2))}, {'anchor': jnp.array([1.0, 0.0])})
  np.testing.assert_allclose(metrics['weights'], [4 / 3, 2 / 3], rtol=1e-6)


def test_misuse_is_named_when_the_step_is_built():
  tx, meta_tx = optax.sgd(0.1), optax.adam(0.1)
  net = jaxrw.meta_weight_net(meta_tx, hidden=3)
  build = lambda rw, *args: jaxrw.make_bilevel_step(_loss, tx, rw, _meta_loss, *args)
  with pytest.raises(ValueError, match='give meta_tx'):
    build(jaxrw.chain(net=net))
  with pytest.raises(ValueError, match='found 0'):
    build(jaxrw.linupper(0.4), meta_tx)
  with pytest.raises(ValueError, match='found 2'):
    build(jaxrw.chain(one=net, two=net), meta_tx)
  with pytest.raises(ValueError, match='not meta_tx'):
    build(net, optax.sgd(0.1))
  with pytest.raises(ValueError, match='give loss'):
    jaxrw.make_bilevel_step(None, tx, net, _meta_loss, meta_tx)
  with pytest.raises(ValueError, match='give loss'):
    jaxrw.make_bilevel_step(None, tx, jaxrw.learning_to_reweight(), _meta_loss)


@pytest.mark.parametrize('method', METHODS)
def test_a_loss_without_forward_mode_is_named(method):
  @jax.custom_vjp
  def fused(x):
    return x**2

  fused.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
  rw, meta_tx = METHODS[method]
  loss = lambda w, example: fused(example['x'] * w)
  step = jaxrw.make_bilevel_step(
    loss, optax.sgd(0.1), rw, lambda w, batch: jnp.sum((batch['x'] * w) ** 2), meta_tx
  )
  state = jaxrw.TrainState.create(jnp.float32(1), optax.sgd(0.1), rw)
  batch = {'x': jnp.ones(4)}
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jit(step)(state, batch, batch)


@pytest.mark.parametrize('method', METHODS)
def test_clean_rows_weigh_more_than_noisy_ones(method):
  """40% of 400 labels are wrong, 40 rows are trusted; mean weights over steps 300 to 399.

  Meta-Weight-Net as published but of mean 1: its own scale, (0, 1), first learns a learning rate,
  and on this problem saturates at 1 for every row.
  """
  tx, meta_tx = optax.sgd(0.3), optax.adam(1e-3)
  rw, meta_tx = {
    'learning_to_reweight': (jaxrw.learning_to_reweight(), None),
    'meta_weight_net': (
      jaxrw.chain(net=jaxrw.meta_weight_net(meta_tx), mean=jaxrw.unit_mean()), meta_tx
    ),
  }[method]  # fmt: skip
  step = jaxrw.make_bilevel_step(_loss, tx, rw, _meta_loss, meta_tx)
  start = jaxrw.TrainState.create(_single(_params()), tx, rw)

  @jax.jit
  def train(state, rows, noisy, trusted, key):
    def body(state, key):
      chosen = jax.random.choice(key, 400, (64,), replace=False)
      state, metrics = step(state, jax.tree.map(lambda x: x[chosen], rows), trusted)
      w, bad = metrics['weights'], noisy[chosen]
      return state, (jnp.sum(w * ~bad) / jnp.sum(~bad), jnp.sum(w * bad) / jnp.sum(bad))

    return jax.lax.scan(body, state, jax.random.split(key, 400))[1]

  ratios = []
  for seed in range(5):
    rows, noisy = _rows(10 + seed, 400, noise=0.4)
    trusted, _ = _rows(20 + seed, 40)
    clean, bad = train(start, *map(_single, (rows, noisy, trusted)), jax.random.key(seed))
    ratios.append(float(np.mean(clean[-100:]) / np.mean(bad[-100:])))
  print(method, 'clean / noisy:', [round(r, 2) for r in ratios])
  assert min(ratios) > {'learning_to_reweight': 1.5, 'meta_weight_net': 4}[method]


def _deep_losses(params, batch):
  """A residual network of 8 scanned layers, and its losses [B]."""

  def layer(x, weight):
    return x + jnp.tanh(jax.nn.relu(x @ weight) @ weight.T), None

  x, _ = jax.lax.scan(layer, batch['x'], params['layers'])
  return jaxrw.losses.cross_entropy(x @ params['out'], batch['y'])


def _compiled_sizes():
  """Bytes of compiled temporaries: an ordinary step, the whole bilevel step, and the
  hypergradient alone by reverse-over-reverse mode."""
  rows, width = 512, 32
  shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
  params = {'layers': shape(8, width, width), 'out': shape(width, K)}
  batch = {'x': shape(rows, width), 'y': shape(rows, dtype=jnp.int32), 'base': shape(rows)}
  tx, meta_tx = optax.adam(1e-3, eps_root=1e-8), optax.adam(1e-3)
  rw = jaxrw.meta_weight_net(meta_tx, hidden=4)
  meta_loss = lambda params, batch: jnp.mean(_deep_losses(params, batch))
  state = jax.eval_shape(lambda p: jaxrw.TrainState.create(p, tx, rw), params)

  def naive(state, batch, meta_batch):
    def ahead(net):
      def weighted(params):
        losses = _deep_losses(params, batch)
        return jnp.mean(_net(net, jax.lax.stop_gradient(losses)) * losses)

      updates, _ = tx.update(jax.grad(weighted)(state.params), state.opt_state, state.params)
      return meta_loss(optax.apply_updates(state.params, updates), meta_batch)

    return jax.grad(ahead)(state.weighting['params'])

  steps = {
    'ordinary': jaxrw.make_train_step(None, tx, rw, batched_loss=_deep_losses),
    'bilevel': jaxrw.make_bilevel_step(None, tx, rw, meta_loss, meta_tx, batched_loss=_deep_losses),
    'naive': naive,
  }
  size = {}
  for name, step in steps.items():
    batches = (batch,) if name == 'ordinary' else (batch, batch)
    lowered = jax.jit(step).lower(state, *batches)
    size[name] = compiled.costs(lowered.compile()).temp_bytes
  return size


@pytest.mark.slow
def test_memory_stays_near_that_of_an_ordinary_step():
  """Where the compiler runs things in the order of the program.

  The CPU compiler drops the barrier between the two gradients, merges their forward passes, and
  looks for concurrency before memory: then activations of both live at a time, and nothing is won.
  So it is told not to.
  """
  program = 'import json, tests.test_bilevel as t; print(json.dumps(t._compiled_sizes()))'
  flags = '--xla_disable_hlo_passes=cse --xla_cpu_enable_concurrency_optimized_scheduler=false'
  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=pathlib.Path(__file__).parent.parent,
    env={**os.environ, 'XLA_FLAGS': flags, 'JAX_NUM_CPU_DEVICES': '1'},
    capture_output=True,
    text=True,
    check=True,
  )
  size = json.loads(done.stdout.splitlines()[-1])
  print('temporaries:', size)
  assert size['bilevel'] < 0.75 * size['naive']
  assert size['bilevel'] < 1.5 * size['ordinary']
