"""L-BFGS with static shapes, to be vmapped over many starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

_TOLERANCE = 1e-5  # of the gradient's norm
_LINE_SEARCH = 10  # steps; all starts wait for the longest, and 20 reached the same minima


def minimize(objective, start, max_iterations):
  """L-BFGS until the gradient is small: (point, value). NaN ends it, too."""
  optimizer = optax.lbfgs(
    memory_size=4,  # more than the parameters only makes compilation longer
    linesearch=optax.scale_by_zoom_linesearch(_LINE_SEARCH, initial_guess_strategy='one'),
  )
  value_and_grad = optax.value_and_grad_from_state(objective)

  def goes_on(carry):
    _, _, size, iteration = carry
    return (iteration < max_iterations) & (size > _TOLERANCE)

  def move(carry):
    point, state, _, iteration = carry
    value, grad = value_and_grad(point, state=state)
    step, state = optimizer.update(grad, state, point, value=value, grad=grad, value_fn=objective)
    return point + step, state, optax.tree.norm(grad), iteration + 1

  infinite = jnp.asarray(jnp.inf, start.dtype)
  carry = start, optimizer.init(start), infinite, 0
  point, *_ = jax.lax.while_loop(goes_on, move, carry)
  return point, objective(point)
