"""Fitting a line by least squares: a problem whose every gradient can be put together by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrw
from jaxrw import steps

B, T, D, M = 16, 5, 3, 4
SGD = optax.sgd(1.0)  # new parameters = old - gradient
UNIFORM, LINUPPER = jaxrw.uniform(), jaxrw.linupper(0.4)  # one object each: compiled once


def loss(params, example):
  """Squared error of a line; `base` and the ids in the example are none of its business."""
  return (example['x'] @ params - example['y']) ** 2


def token_loss(params, batch):
  """[B, T] losses of T targets for each input."""
  return (batch['x'] @ params - batch['y']) ** 2


def data(tokens=False, seed=0):
  """(params, batch) with base: uneven padding, one whole row of it in the first microbatch."""
  rng = np.random.default_rng(seed)
  shape = (B, T) if tokens else (B,)
  batch = {
    'x': rng.normal(size=(B, D)),
    'y': rng.normal(size=shape),
    'base': (rng.random(shape) < 0.75).astype(float),
  }
  batch['base'][:2], batch['base'][8] = 1, 0
  params = rng.normal(size=(D, T) if tokens else (D,))
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


@functools.cache
def step(rw, loss=loss, **options):
  return jax.jit(steps.make_train_step(loss, SGD, rw, **options))


def run(rw, params, batch, signals=None, loss=loss, **options):
  """(gradient, metrics) of one step."""
  state = steps.TrainState.create(params, SGD, rw)
  new, metrics = step(rw, loss, **options)(state, batch, signals)
  return np.asarray(params - new.params), jax.tree.map(np.asarray, metrics)


@jax.jit
def row_gradients(params, batch):
  """(losses [B], gradients [B, D]) of the examples, one by one."""
  return jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0))(params, batch)


@functools.cache
def by_hand(seed=0):
  params, batch = data(seed=seed)
  losses, gradients = map(np.asarray, row_gradients(params, batch))
  return params, batch, losses.astype(float), gradients.astype(float), np.asarray(batch['base'])


def counting():
  """State counts the updates; a weight is 1 + the count before it."""
  update = lambda weights, count, **_: (weights * (1 + count), count + 1)
  return jaxrw.Weighting(lambda: jnp.zeros((), jnp.float32), update)
