"""Training: a perceptron in plain JAX, all runs of an arm at once.

A run is a pair (seed, learning rate); `train` maps one ordinary training loop over the runs. A step
uses the public interface only: losses, the weights from them, mean(weight * loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.classify import consistency
from experiments.classify.arms import ARMS, Arm, Facts
from experiments.classify.model import Params, forward, initial
from experiments.classify.sources import Examples
from experiments.classify.tasks import Problem, Task
from jaxrw import gradients
from jaxrw.losses import cross_entropy


def stack(problems: Sequence[Problem]) -> Problem:
  """The sets of all seeds with a leading axis."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)


def facts(task: Task, problems: Problem) -> Facts:
  """What the stacked training sets tell the arms in advance."""
  seeds, examples = problems.train.y.shape
  mean_counts = lambda ids, size: np.bincount(ids[ids >= 0], minlength=size) / seeds
  labels, groups = np.asarray(problems.train.y), np.asarray(problems.train.group)
  return Facts(
    mean_counts(labels, task.classes), mean_counts(groups, task.groups), examples, task.steps
  )


def train(
  task: Task, arm: Arm, problems: Problem, seeds: Sequence[int], rates: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
  """Logits [K, n, C] of K models on their validation and test sets.

  Args:
    problems: the sets of all seeds, stacked.
    seeds: K positions among the problems: whose sets a run uses. Also the key of its parameters and
      batches, so that runs of two arms with the same seed are a pair.
    rates: K learning rates.
  """
  known = facts(task, problems)

  def one(seed, rate):
    sets = jax.tree.map(lambda a: a[seed], problems)
    params = fit(task, arm, known, sets, jax.random.key(seed), rate)
    return tuple(forward(params, e.x, arm.cosine) for e in (sets.validation, sets.test))

  out = jax.jit(jax.vmap(one))(jnp.asarray(seeds), jnp.asarray(rates, jnp.float32))
  return np.asarray(out[0]), np.asarray(out[1])


def fit(task: Task, arm: Arm, known: Facts, sets: Problem, key: jax.Array, rate: Any) -> Params:
  """The model of one run, with what has to be trained before it."""
  data = sets.trusted if arm.alone else sets.train
  if arm.unlabeled:
    labeled = round(known.class_counts.sum())
    return consistency.descend(task, arm.unlabeled, known.steps, labeled, data, key, rate)
  uniform = ARMS['uniform']
  table = None
  if arm.prelude == 'reference':
    params = descend(task, uniform, known, sets.trusted, sets.trusted, None, key, rate)
    table = cross_entropy(forward(params, data.x), data.y)
  elif arm.prelude == 'errors':
    first = known._replace(steps=max(1, known.steps // 10))
    params = descend(task, uniform, first, data, sets.trusted, None, key, rate)
    table = jnp.argmax(forward(params, data.x), axis=-1) != data.y
  return descend(task, arm, known, data, sets.trusted, table, key, rate)


def descend(
  task: Task,
  arm: Arm,
  known: Facts,
  data: Examples,
  trusted: Examples,
  table: jax.Array | None,
  key: jax.Array,
  rate: Any,
) -> Params:
  """Adam on batches drawn with replacement."""
  rw, loss = arm.weighting(known, table), arm.loss(known)
  optimizer = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(task.decay))
  params = initial(key, data.x.shape[1], task.hidden, task.classes)

  def step(carry, t):
    params, moments, state = carry
    now = jax.random.fold_in(key, t)
    rows = jax.random.randint(now, (task.batch,), 0, len(data.y))
    x, labels = data.x[rows], data.y[rows]
    signals = {'labels': labels, 'group_ids': data.group[rows], 'example_ids': rows}
    signals |= {'step': t, 'key': now}
    if arm.prelude == 'reference':
      signals['ref_losses'] = table[rows]
    if arm.trusted:
      helped = gradients.target_direction(
        lambda p, e: jnp.mean(loss(forward(p, e.x, arm.cosine), e.y)), params, trusted
      )
      losses_of = lambda p: loss(forward(p, x, arm.cosine), labels)
      signals['alignment'] = gradients.alignment(losses_of, params, helped)

    def objective(params):
      logits = forward(params, x, arm.cosine)
      losses = loss(logits, labels)
      seen = jax.lax.stop_gradient(logits)
      norms = gradients.last_layer_grad_norms(seen, labels)
      w, new = rw.update(
        jnp.ones_like(losses), state, losses=losses, logits=seen, grad_norms=norms, **signals
      )
      return jnp.mean(w * losses), new

    slope, state = jax.grad(objective, has_aux=True)(params)
    move, moments = optimizer.update(slope, moments, params)
    params = jax.tree.map(lambda p, m: p - rate * m, params, move)
    return (params, moments, state), None

  carry = params, optimizer.init(params), rw.init()
  return jax.lax.scan(step, carry, jnp.arange(known.steps))[0][0]
