"""The model, a perceptron in plain JAX, and its optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = dict[str, jax.Array]


def initial(key: jax.Array, features: int, hidden: int, classes: int) -> Params:
  """One hidden layer of ReLUs with He's initial weights, or, with hidden = 0, a linear model."""
  if not hidden:
    return {'out': jnp.zeros((features, classes)), 'out_bias': jnp.zeros(classes)}
  keys = jax.random.split(key)
  draw = lambda key, size, width: jax.random.normal(key, (size, width)) * np.sqrt(2 / size)
  return {
    'in': draw(keys[0], features, hidden),
    'in_bias': jnp.zeros(hidden),
    'out': draw(keys[1], hidden, classes),
    'out_bias': jnp.zeros(classes),
  }


def forward(params: Params, x: jax.Array, cosine: bool = False) -> jax.Array:
  """Logits [n, C]; with `cosine`, of directions: cos(angle between x and the class's weights)."""
  if 'in' in params:
    x = jax.nn.relu(x @ params['in'] + params['in_bias'])
  if not cosine:
    return x @ params['out'] + params['out_bias']
  unit = lambda a, axis: a * jax.lax.rsqrt(jnp.sum(a**2, axis=axis, keepdims=True) + 1e-6)
  return unit(x, -1) @ unit(params['out'], 0)


def adam(decay: float) -> optax.GradientTransformation:
  """Adam with decoupled weight decay, for a rate that is a traced number: see `moved`."""
  return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(decay))


def moved(
  optimizer: optax.GradientTransformation, rate: Any, slope: Params, moments: Any, params: Params
) -> tuple[Params, Any]:
  """(parameters, moments) after one step against the slope."""
  move, moments = optimizer.update(slope, moments, params)
  return jax.tree.map(lambda p, m: p - rate * m, params, move), moments
