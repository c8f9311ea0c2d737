"""Few labels and many examples without: FixMatch, and ShrinkMatch on top of it.

An unlabeled example is seen twice, hardly disturbed and much. Where the model is certain of the
first view, its class becomes the label of the second; ShrinkMatch also uses the others, in a space
of fewer classes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.classify.arms import Facts
from experiments.classify.model import Params, adam, forward, initial, moved
from experiments.classify.sources import Examples
from experiments.classify.tasks import Task
from jaxrw import losses, weights
from jaxrw.losses import cross_entropy

CERTAIN = 0.95
LABELED = 64  # rows of a batch; the rest is unlabeled


def descend(
  task: Task, kind: str, facts: Facts, data: Examples, key: jax.Array, rate: Any
) -> Params:
  """Adam on batches of both; returns the moving average of the parameters.

  Args:
    kind: 'labels only', 'fixmatch' or 'shrinkmatch'.
    data: y is -1 where there is no label.
  """
  labeled = round(facts.class_counts.sum())
  known = jnp.argsort(data.y < 0)[:labeled]
  optimizer = adam(task.decay)
  params = initial(key, data.x.shape[1], task.hidden, task.classes)
  terms = {'labels only': 0, 'fixmatch': 1, 'shrinkmatch': 2}[kind]  # losses that count
  rw = weights.shrinkmatch(CERTAIN, decay=0.99)

  def unlabeled_loss(params, state, near, far):
    weak, strong = jax.lax.stop_gradient(forward(params, near)), forward(params, far)
    top = jnp.argmax(weak, axis=-1)
    keep, _ = weights.shrink_mask(jax.nn.softmax(weak), CERTAIN)
    both = jnp.stack(
      [cross_entropy(strong, top), losses.shrunk_cross_entropy(strong, keep, top)], axis=1
    )
    w, state = rw.update(jnp.ones_like(both), state, losses=both, logits=weak)
    return jnp.sum((w * both)[:, :terms]) / len(both), state

  def step(carry, t):
    params, moments, average, state = carry
    keys = jax.random.split(jax.random.fold_in(key, t), 5)
    rows = known[jax.random.randint(keys[0], (LABELED,), 0, labeled)]
    others = jax.random.randint(keys[1], (task.batch - LABELED,), 0, len(data.y))
    weak = lambda key, x: x + 0.1 * jax.random.normal(key, x.shape)
    near, far = weak(keys[2], data.x[others]), disturbed(keys[3], data.x[others])

    def objective(params):
      logits = forward(params, weak(keys[4], data.x[rows]))
      loss, new = unlabeled_loss(params, state, near, far)
      return jnp.mean(cross_entropy(logits, data.y[rows])) + loss, new

    slope, state = jax.grad(objective, has_aux=True)(params)
    params, moments = moved(optimizer, rate, slope, moments, params)
    average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, params)
    return (params, moments, average, state), None

  carry = params, optimizer.init(params), params, rw.init()
  return jax.lax.scan(step, carry, jnp.arange(facts.steps))[0][2]


def disturbed(key: jax.Array, x: jax.Array) -> jax.Array:
  """The strong view: noise, and a quarter of the (standardized) features at their mean, 0."""
  noise, mask = jax.random.split(key)
  x = x + 0.5 * jax.random.normal(noise, x.shape)
  return jnp.where(jax.random.bernoulli(mask, 0.25, x.shape), 0, x)
