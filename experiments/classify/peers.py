"""Co-teaching: two networks, each of which chooses what the other one is trained on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from experiments.classify.arms import Facts
from experiments.classify.model import Params, adam, forward, initial, moved
from experiments.classify.sources import Examples
from experiments.classify.tasks import Task
from jaxrw import Weighting
from jaxrw.losses import cross_entropy


def descend(
  task: Task, rw: Weighting, facts: Facts, data: Examples, key: jax.Array, rate: Any
) -> Params:
  """The first of two networks that see the same batches; the peer's losses are `ref_losses`."""
  optimizer = adam(task.decay)
  draw = lambda key: initial(key, data.x.shape[1], task.hidden, task.classes)
  params = draw(key), draw(jax.random.fold_in(key, facts.steps))

  def step(carry, t):
    params, moments = carry
    rows = jax.random.randint(jax.random.fold_in(key, t), (task.batch,), 0, len(data.y))

    def objective(params):
      a, b = (cross_entropy(forward(p, data.x[rows]), data.y[rows]) for p in params)
      weigh = lambda own, peer: rw.update(
        jnp.ones_like(own), rw.init(), losses=own, ref_losses=jax.lax.stop_gradient(peer), step=t
      )[0]
      return jnp.mean(weigh(a, b) * a + weigh(b, a) * b)

    return moved(optimizer, rate, jax.grad(objective)(params), moments, params), None

  carry = params, optimizer.init(params)
  return jax.lax.scan(step, carry, jnp.arange(facts.steps))[0][0][0]
