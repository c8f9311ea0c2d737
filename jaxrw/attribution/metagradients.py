"""Metagradients: the derivative of what training ends with, by the weights of what it trained on.

With training s_{t+1} = step(s_t, x_t, w_t), and Phi a held-out loss of the last state, -dPhi/dw is
the exact first-order value of every use of every example: no approximation of the curvature, but
one backward pass through the whole run. Two things make it affordable:

  replay        recomputes states instead of storing them: k log_k T states in memory for T steps,
                and at most 1 + log_k T times the work
  mixed_grad    the gradient inside the step, whose own derivative is taken forwards over backwards:
                no tape of a backward pass

The step must be deterministic, in float32, and smooth: with Adam give optax's `eps_root` > 0, or
the derivative of sqrt at 0 makes everything NaN. Long runs at ordinary learning rates often have
derivatives that say nothing about finite changes; check a few against real ones, by `predicted` and
`experiments/value`, before believing the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxrw.core import check_positive, check_range


def replay(
  step: Callable[[Any, Any], Any], state: Any, xs: Any, *, branching: int | None = 4
) -> Any:
  """The last state of T steps, differentiable with few states in memory.

  The T steps are cut into `branching` equal parts, each of them again, and so on; backwards, a
  part is recomputed from the state at its start.

  Args:
    step: (state, x) -> state.
    state: a tree.
    xs: a tree whose leaves have a leading axis T, any T >= 1.
    branching: k >= 2: k log_k T states are held. None: all T states are, nothing is recomputed.

  Returns:
    The state after the last step. The value is that of `jax.lax.scan`.

  Raises:
    ValueError: no steps, a branching below 2.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> product = lambda xs: attribution.replay(lambda s, x: s * x, 1.0, xs, branching=2)
    >>> jax.grad(product)(jnp.array([2.0, 3.0, 4.0]))
    Array([12.,  8.,  6.], dtype=float32)

  Source: Engstrom et al., Optimizing ML Training with Metagradient Descent (arXiv 2503.13751), as
    recalled: the tree of checkpoints; nested scans are ours.
  """
  leaves = jax.tree.leaves(xs)
  length = len(leaves[0]) if leaves else 0
  if length < 1:
    raise ValueError('xs must have at least one step along their leading axis')
  if branching is None:
    return jax.lax.scan(lambda s, x: (step(s, x), None), state, xs)[0]
  if branching < 2:
    raise ValueError(f'branching={branching} must be at least 2, or None to store every state')
  return _replay(step, state, xs, length, branching)


def _replay(step, state, xs, length: int, branching: int):
  # prevent_cse is for code outside of scans; all of this runs inside of one.
  remember = functools.partial(jax.checkpoint, prevent_cse=False)
  if length <= branching:
    return jax.lax.scan(remember(lambda s, x: (step(s, x), None)), state, xs)[0]
  part = length // branching
  cut = branching * part
  head = jax.tree.map(lambda a: a[:cut].reshape(branching, part, *a.shape[1:]), xs)
  run = lambda s, x: (_replay(step, s, x, part, branching), None)
  state = jax.lax.scan(remember(run), state, head)[0]
  if cut == length:
    return state
  return _replay(step, state, jax.tree.map(lambda a: a[cut:], xs), length - cut, branching)


def mixed_grad(loss: Callable[[Any, Any, Any], jax.Array]) -> Callable[[Any, Any, Any], Any]:
  """`jax.grad(loss)` by params, whose derivative is computed forwards over backwards.

  For a cotangent v of the gradient, jvp of (params -> gradient by params and weights) along v gives
  (H v, d<gradient, v>/dweights) in one pass, since mixed derivatives commute.

  Args:
    loss: (params, weights, data) -> scalar. Whatever is to be differentiated must come in through
      `params` and `weights`, nothing through a closure; `data` is constant.

  Returns:
    (params, weights, data) -> gradient by params. Itself it differentiates backwards only.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> loss = lambda p, w, x: jnp.sum(w * (p - x) ** 2) / 2
    >>> slope = attribution.mixed_grad(loss)
    >>> after_step = lambda w: 1.0 - 0.1 * slope(1.0, w, jnp.array([0.0, 3.0]))
    >>> jax.grad(after_step)(jnp.ones(2))
    Array([-0.1,  0.2], dtype=float32)

  Source: Kemaev et al., MixFlow-MG, ICML 2025 (arXiv 2505.00793), derived.
  """

  @jax.custom_vjp
  def gradient(params, weights, data):
    return jax.grad(loss)(params, weights, data)

  def forwards(params, weights, data):
    return gradient(params, weights, data), (params, weights, data)

  def backwards(saved, v):
    params, weights, data = saved
    both = lambda p: jax.grad(loss, argnums=(0, 1))(p, weights, data)
    _, (of_params, of_weights) = jax.jvp(both, (params,), (v,))
    return of_params, of_weights, None

  gradient.defvjp(forwards, backwards)
  return gradient


def metagradient(
  step: Callable[[Any, Any, Any], Any],
  objective: Callable[[Any], jax.Array],
  state: Any,
  weights: jax.Array,
  xs: Any,
  *,
  branching: int | None = 4,
) -> tuple[jax.Array, jax.Array]:
  """(Phi, dPhi/dweights) of a training run, Phi = objective(last state).

  Args:
    step: (state, w float[B], x) -> state: one step on batch x whose losses count w.
    objective: state -> scalar, a held-out loss.
    state: parameters and whatever the optimizer keeps.
    weights: float[T, B], of every use of an example; ones for an ordinary run.
    xs: a tree of batches, leaves [T, ...].
    branching: see `replay`.

  Returns:
    (float[], float[T, B]). Leaving out use (t, b) changes Phi by about -dPhi/dw[t, b], so that
    -dPhi/dw is positive = helpful. `add_up` sums over the uses of an example.

  Raises:
    ValueError: weights that do not have one row for each step.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> def step(w, weights, x):
    ...   return w - 0.5 * jax.grad(lambda w: jnp.mean(weights * (w - x) ** 2) / 2)(w)
    >>> xs = jnp.array([[1.0, -1.0], [1.0, -1.0]])
    >>> phi, slope = attribution.metagradient(
    ...   step, lambda w: (w - 1) ** 2 / 2, jnp.zeros(()), jnp.ones((2, 2)), xs)
    >>> -slope
    Array([[ 0.125, -0.125],
           [ 0.25 , -0.25 ]], dtype=float32)

  Source: Engstrom et al. (arXiv 2503.13751); Ilyas and Engstrom, MAGIC (arXiv 2504.16430), as
    recalled.
  """
  steps = len(jax.tree.leaves(xs)[0])
  if weights.ndim < 1 or len(weights) != steps:
    raise ValueError(f'weights have shape {weights.shape} for {steps} steps; give [T, B]')

  def final(weights):
    return objective(replay(lambda s, x: step(s, *x), state, (weights, xs), branching=branching))

  return jax.value_and_grad(final)(weights)


def add_up(values: jax.Array, example_ids: jax.Array, size: int) -> jax.Array:
  """Sum of the values of all uses of each example; 0 for one that was never used.

  Args:
    values: float[T, B].
    example_ids: int[T, B]; -1 is passed over.
    size: N.

  Returns:
    float[N].

  Raises:
    IndexError: a concrete id out of range.
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> attribution.add_up(jnp.array([[1.0, 2.0], [3.0, 9.0]]), jnp.array([[0, 2], [0, -1]]), 3)
    Array([4., 0., 2.], dtype=float32)
  """
  check_positive(size=size)
  if values.shape != example_ids.shape:
    raise ValueError(f'values have shape {values.shape}, example_ids {example_ids.shape}')
  ids = example_ids.reshape(-1)
  check_range(ids, size, 'example_ids')
  into = jnp.where(ids >= 0, ids, size)
  return jnp.zeros(size, values.dtype).at[into].add(values.reshape(-1), mode='drop')
