"""Learning to reweight and Meta-Weight-Net as functions; with the bilevel step: test_bilevel."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxrw


def test_learning_to_reweight_equals_a_loop():
  rng = np.random.default_rng(0)
  alignment, incoming = rng.normal(size=20), rng.uniform(0.5, 2, (20, 3))
  base = rng.integers(0, 2, (20, 3)).astype(float)
  base[4] = 0
  positive = [max(a, 0.0) for a in alignment]
  mass = sum(b * w for b, w in zip(base.ravel(), incoming.ravel()))
  helpful = sum(base[i, t] * incoming[i, t] * positive[i] for i in range(20) for t in range(3))
  with jax.enable_x64(True):
    w = jaxrw.learning_to_reweight_weights(
      *map(jnp.asarray, (alignment,)), base=jnp.asarray(base), weights=jnp.asarray(incoming)
    )
  rows = np.arange(20) != 4
  expected = incoming * np.asarray(positive)[:, None] * mass / helpful
  np.testing.assert_allclose(np.asarray(w)[rows], expected[rows], rtol=1e-12)
  assert np.all(np.asarray(w)[4] == 0)


def test_no_helpful_example_gives_zeros_and_the_scale_does_not_matter():
  np.testing.assert_array_equal(jaxrw.learning_to_reweight_weights(jnp.array([-1.0, 0.0])), 0)
  alignment = jnp.array([3.0, -1.0, 0.5])
  np.testing.assert_allclose(
    jaxrw.learning_to_reweight_weights(alignment * 1e-20),
    jaxrw.learning_to_reweight_weights(alignment),
    rtol=1e-6,
  )


def test_a_broken_alignment_is_not_hidden_but_padding_is():
  alignment = jnp.array([1.0, jnp.nan, 2.0])
  assert np.all(np.isnan(jaxrw.learning_to_reweight_weights(alignment)))
  w = jaxrw.learning_to_reweight_weights(alignment, base=jnp.array([1.0, 0.0, 1.0]))
  np.testing.assert_allclose(w, [2 / 3, 0, 4 / 3], rtol=1e-6)


def _perceptron(params, loss):
  """One example, one hidden unit at a time."""
  out = float(params['out_bias'])
  for a, b, c in zip(params['in_weight'], params['in_bias'], params['out_weight']):
    out += c * max(a * loss + b, 0.0)
  return 1 / (1 + np.exp(-out))


def test_meta_weight_net_equals_a_loop():
  rw = jaxrw.meta_weight_net(optax.sgd(0.1), hidden=9, seed=4)
  rng = np.random.default_rng(1)
  losses, incoming = rng.gamma(2.0, 1.0, 12), rng.uniform(0.5, 2, 12)
  base = (np.arange(12) != 5).astype(float)
  state = rw.init()
  with jax.enable_x64(True):
    state = jax.tree.map(lambda x: x.astype(jnp.float64), state)
    w, new = rw.update(
      jnp.asarray(incoming), state, losses=jnp.asarray(losses).at[5].set(jnp.nan),
      base=jnp.asarray(base),
    )  # fmt: skip
  params = jax.tree.map(np.asarray, state['params'])
  expected = [i * _perceptron(params, x) if b else 0 for i, x, b in zip(incoming, losses, base)]
  np.testing.assert_allclose(w, expected, rtol=1e-12)
  assert new is state


def test_meta_weight_net_differentiates_through_its_parameters_only():
  rw = jaxrw.meta_weight_net(optax.sgd(0.1), hidden=5)
  state, losses = rw.init(), jnp.array([0.5, 2.0])

  def total(params, losses):
    return jnp.sum(rw.update(jnp.ones(2), {**state, 'params': params}, losses=losses)[0])

  by_params, by_losses = jax.grad(total, argnums=(0, 1))(state['params'], losses)
  np.testing.assert_array_equal(by_losses, [0, 0])
  assert all(np.any(np.asarray(g) != 0) for g in jax.tree.leaves(by_params))


def test_meta_weight_net_starts_as_published():
  """Uniform in ± 1/sqrt(inputs); a function of the seed; its optimizer's state beside it."""
  rw = jaxrw.meta_weight_net(optax.adam(1e-3), hidden=400, seed=1)
  params = rw.init()['params']
  for name, bound in dict(in_weight=1, in_bias=1, out_weight=1 / 20).items():
    assert bound * 0.97 < np.max(np.abs(params[name])) <= bound, name
    assert abs(np.mean(params[name])) < 0.15 * bound, name
  jax.tree.map(np.testing.assert_array_equal, rw.init()['params'], params)
  other = jaxrw.meta_weight_net(optax.adam(1e-3), hidden=400, seed=2).init()['params']
  assert not np.allclose(other['in_weight'], params['in_weight'])
  expected = jax.tree.structure(optax.adam(1e-3).init(params))
  assert jax.tree.structure(rw.init()['opt_state']) == expected


def test_shapes_are_checked():
  with pytest.raises(ValueError, match='alignment has shape'):
    jaxrw.learning_to_reweight_weights(jnp.ones(3), base=jnp.ones(4))
