"""Which training examples helped: products of their gradients with one solved direction.

Let g_i be the gradient of the loss of training example i, u that of a target loss (held-out data,
one test example), H the curvature of the training loss. All scores here have the form

  score_i = <g_i, P u>          positive = helpful: training on i lowers the target loss

  P = I                         TracIn, in-run Shapley values to first order
  P = (H + damping)^-1          influence functions
  P by Kronecker factors        `jaxrw.attribution.ekfac`

so that one vector is solved for, and one forward-mode pass (`jaxrw.gradients.alignment`) gives the
scores of all examples, or of all tokens: no gradient of a single example is ever formed. The scale
is that of the influence function: taking example i out of n that are trained to convergence on the
*mean* loss raises the target loss by score_i / n, to first order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrw import gradients
from jaxrw.core import check_positive


def hessian_solve(
  loss: Callable[[Any], jax.Array],
  params: Any,
  direction: Any,
  *,
  damping: float,
  steps: int = 100,
  tolerance: float = 1e-5,
) -> Any:
  """(H + damping I)^-1 direction by conjugate gradients, H the Hessian of `loss` at `params`.

  Args:
    loss: params -> scalar, the mean training loss, regularization included.
    params: a tree, near a minimum: H + damping I must be positive definite.
    direction: a tree like `params`.
    damping: >= 0.
    steps: of conjugate gradients at most; each costs two gradients of the loss.
    tolerance: relative residual to stop at.

  Returns:
    A tree like `params`.

  Raises:
    ValueError: a negative damping, steps <= 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> loss = lambda w: w[0] ** 2 + 2 * w[1] ** 2
    >>> attribution.hessian_solve(loss, jnp.zeros(2), jnp.array([2.0, 4.0]), damping=0.0).round(3)
    Array([1., 1.], dtype=float32)

  Source: Koh and Liang, ICML 2017; textbook form.
  """
  if not damping >= 0:
    raise ValueError(f'damping={damping} must be at least 0')
  product = lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]
  return _solved(product, direction, damping, steps, tolerance)


def gauss_newton_solve(
  outputs: Callable[[Any], jax.Array],
  output_loss: Callable[[jax.Array], jax.Array],
  params: Any,
  direction: Any,
  *,
  damping: float,
  steps: int = 100,
  tolerance: float = 1e-5,
) -> Any:
  """(G + damping I)^-1 direction, G = J^T H_out J the Gauss-Newton matrix.

  Never negative, unlike the Hessian of a network that is not at its minimum; for softmax cross
  entropy it is the Fisher matrix.

  Args:
    outputs: params -> float[...], e.g. logits of the training set.
    output_loss: outputs -> scalar, convex, e.g. the mean cross entropy of the logits.
    params, direction, damping, steps, tolerance: as in `hessian_solve`.

  Returns:
    A tree like `params`.

  Raises:
    ValueError: a damping or steps <= 0.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> attribution.gauss_newton_solve(
    ...   lambda w: x @ w, lambda z: jnp.sum(z**2) / 2, jnp.zeros(2), jnp.array([1.0, 4.0]),
    ...   damping=1e-6).round(3)
    Array([1., 1.], dtype=float32)

  Source: Schraudolph, 2002; textbook form.
  """
  check_positive(damping=damping)
  out, pull = jax.vjp(outputs, params)

  def product(v):
    moved = jax.jvp(outputs, (params,), (v,))[1]
    return pull(jax.jvp(jax.grad(output_loss), (out,), (moved,))[1])[0]

  return _solved(product, direction, damping, steps, tolerance)


def _solved(product, direction, damping, steps, tolerance):
  """(A + damping I)^-1 direction, A given by its product with a tree."""
  check_positive(steps=steps, tolerance=tolerance)
  damped = lambda v: jax.tree.map(lambda a, x: a + damping * x, product(v), v)
  return jax.scipy.sparse.linalg.cg(damped, direction, maxiter=steps, tol=tolerance)[0]


def influence(losses_of_params: Callable[[Any], jax.Array], params: Any, solved: Any) -> jax.Array:
  """<g_i, solved> of every example or token: `gradients.alignment` under its name here.

  Args:
    losses_of_params: params -> float[B] or [B, T], of training examples. With an example's loss the
      sum of its tokens' losses, its influence is the sum of theirs.
    params: a tree.
    solved: (H + damping)^-1 of the gradient of the target loss, from a solver here or from `ekfac`.

  Returns:
    float[B] or [B, T], positive = helpful; see the module for the scale.

  Example:
    Of y = w x with least squares, at w = 0; the target wants a larger w.

    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> x, y = jnp.array([1.0, 1.0, 2.0]), jnp.array([1.0, -1.0, 0.0])
    >>> losses = lambda w: (w * x - y) ** 2 / 2
    >>> target = jax.grad(lambda w: (w - 1) ** 2 / 2)(0.0)
    >>> solved = attribution.hessian_solve(
    ...   lambda w: losses(w).mean(), jnp.zeros(()), target, damping=0.0)
    >>> attribution.influence(losses, jnp.zeros(()), solved)
    Array([ 0.5, -0.5, -0. ], dtype=float32)

  Source: Koh and Liang, ICML 2017. The sign is that of TracIn; Koh and Liang's is the opposite.
  """
  return gradients.alignment(losses_of_params, params, solved)


def tracin(
  losses_of_params: Callable[[Any], jax.Array],
  target_loss: Callable[[Any], jax.Array],
  checkpoints: Sequence[Any],
  rates: Sequence[float],
) -> jax.Array:
  """Sum over checkpoints of rate * <g_i, u>: what SGD steps on i took off the target loss.

  Args:
    losses_of_params: params -> float[B] or [B, T].
    target_loss: params -> scalar.
    checkpoints: trees of parameters.
    rates: learning rate at each.

  Returns:
    float, the shape of the losses; positive = helpful.

  Raises:
    ValueError: no checkpoint, or not one rate for each.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> x = jnp.array([1.0, -1.0])
    >>> attribution.tracin(lambda w: w * x, lambda w: 2 * w, [jnp.zeros(())] * 2, [0.1, 0.2])
    Array([ 0.6, -0.6], dtype=float32)

  Source: Pruthi et al., NeurIPS 2020 (arXiv 2002.08484), TracInCP.
  """
  if not checkpoints or len(checkpoints) != len(rates):
    raise ValueError(
      f'{len(checkpoints)} checkpoints and {len(rates)} rates: give one rate for each'
    )

  def at(params):
    return gradients.alignment(losses_of_params, params, jax.grad(target_loss)(params))

  total = rates[0] * at(checkpoints[0])
  for params, rate in zip(checkpoints[1:], rates[1:]):
    total += rate * at(params)
  return total


def lookahead(
  step: Callable[[Any, Any], Any],
  objective: Callable[[Any], jax.Array],
  state: Any,
  examples: Any,
  *,
  together: int = 16,
) -> jax.Array:
  """objective(state) - objective(step(state, example)): what a step on each example is worth.

  No approximation, whatever the optimizer, and as dear as it looks: a step and an evaluation for
  each example. `influence` along the gradient of the objective is its first order for SGD. Probe a
  few hundred, and fit a scorer that reads the rest (MATES): see `experiments/stages`.

  Args:
    step: (state, example) -> state after one step on that example alone.
    objective: state -> scalar, the loss of reference data.
    state: parameters and whatever the optimizer keeps.
    examples: a tree whose leaves have a leading axis N.
    together: examples at a time.

  Returns:
    float[N], positive = helpful.

  Raises:
    ValueError: together <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> step = lambda w, x: w - 0.5 * (w - x)
    >>> attribution.lookahead(step, lambda w: (w - 1) ** 2, jnp.zeros(()), jnp.array([1.0, -1.0]))
    Array([ 0.75, -1.25], dtype=float32)

  Source: Yu et al., MATES, NeurIPS 2024 (arXiv 2406.06046), official code, which keeps the loss
    after the step (lower = better).
  """
  check_positive(together=together)
  before = objective(state)
  return jax.lax.map(lambda e: before - objective(step(state, e)), examples, batch_size=together)


def in_run_direction(
  target_loss: Callable[[Any], jax.Array],
  params: Any,
  gradient_sum: Any,
  rate: float | jax.Array,
  *,
  order: int = 2,
) -> Any:
  """The direction whose product with g_i is the Shapley value of i in one step of SGD.

  The step params - rate * sum_i g_i lowers the target loss by U; players are the examples of the
  batch. By Taylor's formula

    order 1   phi_i = rate <g_i, u>                                                error O(rate^2)
    order 2   phi_i = rate <g_i, u> - rate^2 / 2 <g_i, H sum_j g_j>                error O(rate^3)

  with u, H of the target loss; the second order shares out what near duplicates do twice, and is
  exact if the target loss is quadratic.

  Args:
    target_loss: params -> scalar.
    params: before the step.
    gradient_sum: sum of the g_i, a tree; of a *mean* loss over B examples use it with rate / B.
    rate: learning rate.
    order: 1 or 2.

  Returns:
    A tree like `params`; pass it to `influence` for phi, positive = helpful.

  Raises:
    ValueError: another order.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> x = jnp.array([1.0, 1.0])
    >>> losses, w = lambda w: (w - x) ** 2 / 2, jnp.zeros(())
    >>> direction = attribution.in_run_direction(
    ...   lambda w: (w - 1) ** 2 / 2, w, jax.grad(lambda w: losses(w).sum())(w), 0.1)
    >>> attribution.influence(losses, w, direction)         # U = (1 - 0.8^2) / 2 in two equal parts
    Array([0.09, 0.09], dtype=float32)

  Source: Wang et al., Data Shapley in One Training Run, ICLR 2025 (arXiv 2406.11011), theorems 3
    and 4, there with the opposite sign; one forward-over-reverse pass in place of their two
    backward passes is ours.
  """
  if order not in (1, 2):
    raise ValueError(f'order={order} must be 1 or 2')
  slope = jax.grad(target_loss)
  if order == 1:
    return jax.tree.map(lambda u: rate * u, slope(params))
  u, curved = jax.jvp(slope, (params,), (gradient_sum,))
  return jax.tree.map(lambda u, h: rate * u - rate**2 / 2 * h, u, curved)


# Kernels of projected gradients -------------------------------------------------------------------


def projected_gradients(
  key: jax.Array,
  outputs_of_params: Callable[[Any], jax.Array],
  params: Any,
  dims: int,
) -> jax.Array:
  """<grad f_i, r_k> / sqrt(dims) for random r_k ~ N(0, I): gradients, projected to `dims` numbers.

  Products of the projections are those of the gradients on average. One forward-mode pass for each
  dimension; nothing of the size of B times the parameters exists.

  Args:
    key: draws the directions, the same for all examples that are to be compared.
    outputs_of_params: params -> float[B], e.g. `scores.logit_margin` of a batch.
    params: a tree.
    dims: k > 0.

  Returns:
    float[B, k].

  Raises:
    ValueError: dims <= 0.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> x = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> phi = attribution.projected_gradients(
    ...   jax.random.key(0), lambda w: x @ w, jnp.zeros(2), 4000)
    >>> (phi @ phi.T).round(1)
    Array([[1., 1.],
           [1., 2.]], dtype=float32)

  Source: Johnson and Lindenstrauss; Park et al., TRAK, ICML 2023.
  """
  check_positive(dims=dims)
  leaves, tree = jax.tree.flatten(params)

  def column(_, key):
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, p.shape, p.dtype) for k, p in zip(keys, leaves)]
    return None, gradients.alignment(outputs_of_params, params, tree.unflatten(drawn))

  _, columns = jax.lax.scan(column, None, jax.random.split(key, dims))
  return columns.T / jnp.sqrt(dims).astype(columns.dtype)


def trak(
  train_features: jax.Array,
  target_features: jax.Array,
  pulls: jax.Array,
  *,
  damping: float = 0.0,
) -> jax.Array:
  """phi_t^T (Phi^T Phi + damping I)^-1 phi_i pull_i: what example i does for the target's output.

  A Newton step of a logistic regression on the projected gradients.

  Args:
    train_features: float[N, k], `projected_gradients` of the outputs of the training set.
    target_features: float[M, k], of the targets, with the same key.
    pulls: float[N], how hard each example pulls at its own output, -dloss/doutput: 1 - p of the
      label for the output `logit_margin`.
    damping: >= 0; needed if N < k.

  Returns:
    float[M, N], positive: i raises the target's output. Unscaled, unlike in the package `traker`,
    which divides by the mean absolute value of the inverse.

  Raises:
    ValueError: shapes that do not match, a negative damping.

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw import attribution
    >>> phi = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> attribution.trak(phi, phi[:1], jnp.array([0.5, 0.5]))
    Array([[0.5, 0. ]], dtype=float32)

  Source: Park et al., TRAK, ICML 2023 (arXiv 2303.14186); the mean over models is the caller's.
  """
  if (
    train_features.ndim != 2
    or pulls.shape != train_features.shape[:1]
    or target_features.shape[1:] != train_features.shape[1:]
  ):
    raise ValueError(
      f'train_features have shape {train_features.shape}, target_features {target_features.shape}, '
      f'pulls {pulls.shape}; expected [N, k], [M, k] and [N]'
    )
  if not damping >= 0:
    raise ValueError(f'damping={damping} must be at least 0')
  kernel = train_features.T @ train_features
  kernel = kernel + damping * jnp.eye(len(kernel), dtype=kernel.dtype)
  solved = jax.scipy.linalg.solve(kernel, target_features.T, assume_a='pos')
  return (train_features @ solved * pulls[:, None]).T
