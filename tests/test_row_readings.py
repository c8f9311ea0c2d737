"""What the backward pass of a step says of every row, against gradients of one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw
from experiments.models import gpt2, lm

CFG = gpt2.GPT2Config(vocab_size=64, max_len=16, n_layer=1, n_head=2, n_embd=16, attention='xla')
B = 8
RW, TX = jaxrw.linupper(0.4), optax.sgd(1.0)


def _setup():
  params = lm.init(jax.random.key(0), CFG)
  tokens = jax.random.randint(jax.random.key(1), (B, 17), 0, 64)
  base = jnp.ones((B, 16)).at[2, 5:].set(0).at[3].set(0)
  direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), params)
  return params, {'tokens': tokens, 'base': base}, direction


def _make(**options):
  return jaxrw.make_train_step(
    None,
    TX,
    RW,
    batched_loss=lambda p, b: lm.token_losses(p, b, CFG),
    probed_loss=lambda p, b, probe: lm.token_losses(p, b, CFG, probe=probe),
    **options,
  )


MODES = [{}, {'microbatches': 2}]


@pytest.mark.parametrize('options', MODES, ids=str)
def test_readings_are_those_of_the_rows_own_terms(options):
  params, batch, direction = _setup()
  state = jaxrw.TrainState.create(params, TX, RW)
  new, metrics = jax.jit(_make(**options))(state, batch, {'direction': direction})
  measure = metrics['base'] * metrics['weights'] / metrics['base_sum']

  def term(params, i):
    row = jax.tree.map(lambda x: x[i][None], batch)
    losses = lm.token_losses(params, row, CFG)[0]
    return jnp.sum(jnp.where(measure[i] != 0, measure[i] * losses, 0))

  gradients = jax.jit(jax.vmap(jax.grad(term), in_axes=(None, 0)))(params, jnp.arange(B))
  squares, products = 0, 0
  for g, u in zip(jax.tree.leaves(gradients), jax.tree.leaves(direction)):
    g = np.asarray(g, np.float64).reshape(B, -1)
    squares, products = squares + np.sum(g**2, 1), products + g @ np.asarray(u, float).ravel()
  np.testing.assert_allclose(metrics['row_grad_norms'], np.sqrt(squares), rtol=1e-4)
  np.testing.assert_allclose(metrics['row_alignment'], products, rtol=1e-3, atol=1e-5)
  step_gradient = jax.tree.map(jnp.subtract, params, new.params)
  whole = sum(
    float(jnp.vdot(g, u))
    for g, u in zip(jax.tree.leaves(step_gradient), jax.tree.leaves(direction))
  )
  assert np.sum(metrics['row_alignment']) == pytest.approx(whole, rel=1e-3)
  assert metrics['row_grad_norms'][3] == 0  # nothing but padding


def test_the_step_itself_is_the_same_with_a_probe():
  params, batch, _ = _setup()
  state = jaxrw.TrainState.create(params, TX, RW)
  probed, metrics = jax.jit(_make())(state, batch)
  plain, _ = jax.jit(
    jaxrw.make_train_step(None, TX, RW, batched_loss=lambda p, b: lm.token_losses(p, b, CFG))
  )(state, batch)
  for a, b in zip(jax.tree.leaves(probed.params), jax.tree.leaves(plain.params)):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
  assert 'row_alignment' not in metrics


@pytest.mark.parametrize('options', [{'keep': jaxrw.Keep(rows=2)}, {'scope': 'online'}], ids=str)
def test_rows_without_a_backward_pass_of_their_own_have_no_readings(options):
  rw = jaxrw.kl_dro(1.0)
  with pytest.raises(ValueError, match='probed_loss needs a backward pass of all rows'):
    jaxrw.make_train_step(lambda p, e: p, TX, rw, probed_loss=lambda p, b, probe: p, **options)
