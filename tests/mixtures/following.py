"""What the tests of mixtures that follow a run share."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np

G = 4


def softmax(x):
  e = np.exp(x - np.max(x))
  return e / e.sum()


def simplex(seed, size=G):
  return np.random.default_rng(seed).dirichlet(np.ones(size))


traced = collections.Counter()


@functools.cache
def jitted(mixture):
  def update(state, **signals):
    traced[mixture] += 1
    return mixture.update(state, **signals)

  return jax.jit(update)


def run(mixture, signals, state=None, first=0):
  """All states of the steps from `first` on, one for each dict of signals."""
  state, states = mixture.init() if state is None else state, []
  for step, values in enumerate(signals, first):
    state = jitted(mixture)(state, step=step, **{k: jnp.asarray(v) for k, v in values.items()})
    states.append(state)
  return states


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
