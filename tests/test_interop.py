"""The recipes of docs/interop.md run, and agree with each other; the adapters against by hand."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw

PAGE = (Path(__file__).parent.parent / 'docs/interop.md').read_text()
BLOCKS = dict(re.findall(r'## ([^\n]+)\n.*?```python\n(.*?)```', PAGE, re.S))
START = re.search(r'```python\n(.*?)```', PAGE, re.S)[1]
NEEDS = {'Equinox': 'equinox', 'Haiku': 'haiku'}
SAME = ['Plain JAX and optax', 'Flax nnx, with a weighting that has a state', 'Flax linen', *NEEDS]


@functools.cache
def run(title, uniform=False):
  """What a recipe ends with; `uniform` weights instead of its own."""
  for name, package in NEEDS.items():
    if name == title:
      pytest.importorskip(package)
  scope, code = {}, START + BLOCKS[title]
  if uniform:
    code = code.replace('rw = jaxrw.linupper(0.4)', 'rw = jaxrw.uniform()')
    code = code.replace('jaxrw.linupper_weights(losses, 0.4) * losses', 'losses')
    code = code.replace('w * losses', 'losses')
  exec(code, scope)
  return np.asarray(scope['params']), scope


def by_hand(uniform=False, steps=5):
  """The same training with gradients from the formula, and the library's weights alone."""
  scope = {}
  exec(START, scope)
  x, y, tx = (np.asarray(scope[n]) if n != 'tx' else scope[n] for n in ('x', 'y', 'tx'))
  params = jnp.zeros((4, 3))
  state = tx.init(params)
  for _ in range(steps):
    p = np.asarray(jax.nn.softmax(x @ params))
    losses = -np.log(p[np.arange(32), y])
    w = np.ones(32) if uniform else np.asarray(jaxrw.linupper_weights(jnp.asarray(losses), 0.4))
    gradient = x.T @ (w[:, None] * (p - np.eye(3)[y])) / 32
    updates, state = tx.update(jnp.asarray(gradient, jnp.float32), state)
    params = optax.apply_updates(params, updates)
  return np.asarray(params)


@pytest.mark.parametrize('title', SAME)
def test_frameworks_agree(title):
  np.testing.assert_allclose(run(title)[0], by_hand(), atol=2e-4)


@pytest.mark.parametrize('title', SAME)
def test_uniform_is_the_loop_without_weights(title):
  np.testing.assert_allclose(run(title, uniform=True)[0], by_hand(uniform=True), atol=2e-4)


def test_every_recipe_is_tested():
  assert set(BLOCKS) == {
    *SAME,
    'Inside `optax.MultiSteps`',
    'An optax aggregator: one gradient per example',
    'A large trainer: Tunix 0.1.7',
  }


def test_multi_steps_are_microbatches_of_the_train_step():
  params, scope = run('Inside `optax.MultiSteps`')
  loss = lambda params, example: scope['losses_of'](params, example['x'][None], example['y'][None])[
    0
  ]
  tx, rw = scope['tx'], scope['rw']
  step = jax.jit(jaxrw.make_train_step(loss, tx, rw, microbatches=4, scope='microbatch'))
  state = jaxrw.TrainState.create(jnp.zeros((4, 3)), tx, rw)
  for _ in range(5):
    state, _ = step(state, {'x': scope['x'], 'y': scope['y']})
  np.testing.assert_allclose(params, state.params, rtol=1e-4, atol=1e-5)


def test_multi_steps_take_a_mean_of_means_where_bases_differ():
  """Two microbatches of 3 and 1 valid examples: 1/6 and 1/2 each, instead of 1/4."""
  losses, base = jnp.array([1.0, 1, 1, 1]), np.array([[1, 1, 1, 0], [0, 0, 1, 0]], float)
  means = [np.sum(b * losses) / b.sum() for b in base]
  coefficient = [b / b.sum() / 2 for b in base]
  np.testing.assert_allclose(means, [1, 1])
  assert coefficient[0][0] == pytest.approx(1 / 6)
  assert coefficient[1][2] == pytest.approx(1 / 2)

  def loop(token_losses, params, batch):
    def loss(params, rows):
      b = batch['base'][rows]
      return jnp.sum(b * token_losses(params, {'row': rows})) / jnp.sum(b)

    parts = jnp.split(batch['row'], 2)
    return sum(jax.grad(loss)(params, rows) for rows in parts) / 2

  # ... which the diagnosis says of such a loop.
  found = jaxrw.diagnostics.explain_reduction(loop, microbatches=2)
  assert found.scope.startswith('per microbatch')


def test_the_aggregator_is_the_gradient_of_the_weighted_loss():
  rng = np.random.default_rng(1)
  x, y = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.normal(size=8))
  base = jnp.array([1.0, 2, 1, 0, 1, 1, 0.5, 1])
  ids = jnp.arange(8) % 2
  losses_of = lambda p, x, y: (x @ p['a'] + p['b'] - y) ** 2
  params = {'a': jnp.array([0.1, -0.2, 0.3]), 'b': jnp.array(0.5)}
  rw = jaxrw.group_dro(2, 0.3)
  loss = jaxrw.interop.weighted_loss(losses_of, rw)
  grad = jax.grad(loss, has_aux=True)
  expected, (state, losses) = grad(params, x, y, state=rw.init(), base=base, group_ids=ids)
  gradients = jax.vmap(jax.grad(losses_of), (None, 0, 0))(params, x, y)
  gradients['a'] = gradients['a'].at[3].set(jnp.nan)  # padding
  tx = jaxrw.interop.weighted_aggregator(rw)
  update = jax.jit(tx.update)
  mean, moved = update(
    gradients, tx.init(params), losses=losses, base=base, group_ids=ids, value=jnp.ones(())
  )
  for a, b in zip(jax.tree.leaves((mean, moved)), jax.tree.leaves((expected, state))):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_aggregated_steps_with_clipping():
  params, _ = run('An optax aggregator: one gradient per example')
  assert np.all(np.isfinite(params))
  assert np.abs(params).max() > 0.05


@pytest.mark.peers
def test_tunix_with_uniform_weights_is_tunix():
  """Run where it is installed: `pip install google-tunix==0.1.7` (Python 3.12)."""
  pytest.importorskip('tunix')
  params, scope = run('A large trainer: Tunix 0.1.7')
  again = lambda weights_of: (
    scope.update(rng=np.random.default_rng(0)),
    np.asarray(scope['run'](weights_of)),
  )[1]
  plain = again(None)
  uniform = again(lambda losses, base: jnp.ones_like(losses))
  np.testing.assert_allclose(uniform, plain, rtol=1e-5, atol=1e-6)
  assert np.abs(params - plain).max() > 1e-3


def test_errors():
  loss = jaxrw.interop.weighted_loss(lambda w, x: x * w, jaxrw.linupper(0.4))
  with pytest.raises(TypeError, match="did you mean 'group_ids'"):
    loss(1.0, jnp.ones(2), state=(), grup_ids=jnp.zeros(2, int))
  tx = jaxrw.interop.weighted_aggregator(jaxrw.uniform())
  with pytest.raises(ValueError, match=r'losses have shape \(2, 3\); expected \[B\]'):
    tx.update(jnp.ones((2, 4)), (), losses=jnp.ones((2, 3)))
  with pytest.raises(TypeError, match='losses'):
    tx.update(jnp.ones((2, 4)), ())
