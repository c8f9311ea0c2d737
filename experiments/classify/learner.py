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

from experiments.classify import consistency, ladder, peers
from experiments.classify.arms import UNIFORM, Arm, Facts
from experiments.classify.model import Params, adam, forward, initial, moved
from experiments.classify.sources import Examples
from experiments.classify.tasks import Problem, Task
from jaxrw import gradients
from jaxrw.losses import cross_entropy

# Optimized code is twice as fast here, and takes five times as long to compile as to run.
_QUICK = {'xla_backend_optimization_level': 0}


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

  def one(problems, seed, rate):  # arguments: constants of this size would slow compilation
    sets = jax.tree.map(lambda a: a[seed], problems)
    params = fit(task, arm, known, sets, jax.random.key(seed), rate)
    return tuple(forward(params, e.x, arm.cosine) for e in (sets.validation, sets.test))

  many = jax.jit(jax.vmap(one, (None, 0, 0)), compiler_options=_QUICK)
  out = many(problems, jnp.asarray(seeds), jnp.asarray(rates, jnp.float32))
  return np.asarray(out[0]), np.asarray(out[1])


def fit(task: Task, arm: Arm, known: Facts, sets: Problem, key: jax.Array, rate: Any) -> Params:
  """The model of one run, with what has to be trained before it."""
  if arm.loop == 'co_teaching':
    return peers.descend(task, arm.weighting(known), known, sets.train, key, rate)
  if arm.loop == 'presto':
    return ladder.fit(task, sets.train, rate)
  if arm.loop:
    return consistency.descend(task, arm.loop, known, sets.train, key, rate)
  data = sets.trusted if arm.alone else sets.train
  ref_losses = None
  if arm.reference:
    params = descend(task, UNIFORM, known, sets.trusted, sets.trusted, None, key, rate)
    ref_losses = cross_entropy(forward(params, data.x), data.y)
  return descend(task, arm, known, data, sets.trusted, ref_losses, key, rate)


def descend(
  task: Task,
  arm: Arm,
  known: Facts,
  data: Examples,
  trusted: Examples,
  ref_losses: jax.Array | None,
  key: jax.Array,
  rate: Any,
) -> Params:
  """Adam on batches drawn with replacement."""
  with jax.ensure_compile_time_eval():  # tables by class are numbers, not part of the program
    rw, loss = arm.weighting(known), arm.loss(known)
  optimizer = adam(task.decay)
  params = initial(key, data.x.shape[1], task.hidden, task.classes)
  start, first = (params, optimizer.init(params)), round(arm.restart * known.steps)

  def step(carry, t):
    params, moments, state = carry
    params, moments = jax.tree.map(
      lambda old, now: jnp.where(t == first, old, now), start, (params, moments)
    )
    now = jax.random.fold_in(key, t)
    rows = jax.random.randint(now, (task.batch,), 0, len(data.y))
    x, labels = data.x[rows], data.y[rows]
    signals = {'labels': labels, 'group_ids': data.group[rows], 'example_ids': rows}
    signals |= {'step': t, 'key': now}
    if ref_losses is not None:
      signals['ref_losses'] = ref_losses[rows]
    if arm.aligned:
      helped = gradients.target_direction(
        lambda p, e: jnp.mean(loss(forward(p, e.x, arm.cosine), e.y)), params, trusted
      )
      losses_of = lambda p: loss(forward(p, x, arm.cosine), labels)
      signals['alignment'] = gradients.alignment(losses_of, params, helped)

    def objective(params):
      logits = forward(params, x, arm.cosine)
      losses = loss(logits, labels)
      seen = jax.lax.stop_gradient(logits)
      w, new = rw.update(jnp.ones_like(losses), state, losses=losses, logits=seen, **signals)
      return jnp.mean(w * losses), new

    slope, state = jax.grad(objective, has_aux=True)(params)
    params, moments = moved(optimizer, rate, slope, moments, params)
    return (params, moments, state), None

  steps = jnp.arange(first + known.steps)
  return jax.lax.scan(step, (*start, rw.init()), steps)[0][0]
