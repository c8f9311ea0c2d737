"""The train step for weights that answer to a trusted ("meta") set.

Every step asks: were this example's weight a little larger, would the loss on the meta batch after
the update be lower? A weighting without learned parameters gets the answer for plain SGD as the
signal `alignment`; learned parameters get their exact gradient through one step of the real
optimizer. Neither differentiates a gradient with respect to parameters: with

  G = sum(base * w * gradient of loss) / sum(base)       theta' = theta + update(G)

the meta gradient at theta' is pulled back through the optimizer's update (elementwise work) to a
direction like G, and one forward-mode pass of the losses along that direction gives

  d meta / d w_i = base_i / sum(base) * <direction, gradient of loss_i>     for all i at once,

which then goes back through the small map from learned parameters to weights. No second-order tape
over the model exists, and the activations of one gradient at a time suffice. (The CPU compiler by
default overlaps the gradients of a step all the same, and holds those of two or three.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrw import gradients, masked, steps
from jaxrw.core import Weighting
from jaxrw.steps import Batch, ExampleBase, TrainState


def make_bilevel_step(
  loss: Callable[[Any, Any], jax.Array] | None,
  tx: optax.GradientTransformation,
  rw: Weighting,
  meta_loss: Callable[[Any, Any], jax.Array],
  meta_tx: optax.GradientTransformation | None = None,
  *,
  batched_loss: Callable[[Any, Batch], Any] | None = None,
  example_base: ExampleBase = 'any',
  seed: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Builds `step(state, batch, meta_batch, signals=None) -> (state, metrics)`.

  Without `meta_tx` (learning_to_reweight) a step costs one gradient on the meta batch and one
  forward-mode pass (about 3 forward passes) on top of an ordinary step; the meta gradient is that
  at the current parameters. With it (meta_weight_net) it costs one gradient more: the look-ahead
  and the real update both need theirs, because the weights change in between.

  Args:
    loss, tx, rw, batched_loss, example_base, seed: as in `make_train_step`. The loss must allow
      forward-mode differentiation: no `jax.custom_vjp` inside (fused attention kernels have one).
      With `meta_tx`, `tx` is differentiated: an optimizer that divides by sqrt(v) needs its epsilon
      inside the root (`optax.adam(..., eps_root=1e-8)`), or a parameter without gradient so far,
      such as an unused embedding row, makes the meta gradient NaN.
    meta_loss: (params, meta batch) -> scalar: what should be low after the step, e.g. the mean loss
      of the trusted examples. Both arguments are passed to it as they are.
    meta_tx: optimizer of the learned parameters of `rw`: a subtree {'params', 'opt_state'} anywhere
      in its state, of which there must be one.

  Returns:
    The step, pure; you jit it. Metrics as in `make_train_step`, and `meta_loss`: at the parameters
    the meta gradient was taken at (with `meta_tx` those of the look-ahead); with `meta_tx` also
    `meta_grad_norm`, of the learned parameters.

  Raises:
    ValueError: no learned parameters for `meta_tx`, or several, or an optimizer state that is not
      one of `meta_tx`; learned parameters without `meta_tx`.
    TypeError: on tracing, for a loss that cannot be differentiated in forward mode.

  Example:
    >>> import jax, jax.numpy as jnp, optax, jaxrw
    >>> loss = lambda w, example: (example['x'] @ w - example['y']) ** 2
    >>> meta_loss = lambda w, batch: jnp.mean(jax.vmap(loss, (None, 0))(w, batch))
    >>> tx, rw = optax.sgd(0.1), jaxrw.learning_to_reweight()
    >>> step = jax.jit(jaxrw.make_bilevel_step(loss, tx, rw, meta_loss))
    >>> batch = {'x': jnp.ones((2, 1)), 'y': jnp.array([1.0, -1.0])}    # the second label is wrong
    >>> meta_batch = {'x': jnp.ones((1, 1)), 'y': jnp.array([1.0])}
    >>> state = jaxrw.TrainState.create(jnp.zeros(1), tx, rw)
    >>> state, metrics = step(state, batch, meta_batch)
    >>> metrics['weights'].tolist(), state.params.tolist()
    ([2.0, 0.0], [0.20000000298023224])
  """
  found = _learned(jax.eval_shape(rw.init))
  if meta_tx is None:
    if found:
      raise ValueError('the weighting has learned parameters: give meta_tx, their optimizer')
    return _aligned_step(loss, tx, rw, meta_loss, batched_loss, example_base, seed)
  if len(found) != 1:
    raise ValueError(
      f'meta_tx needs one stage with learned parameters in the weighting, found {len(found)}; its '
      "state is a dict {'params', 'opt_state'}, see meta_weight_net"
    )
  expected = jax.eval_shape(meta_tx.init, found[0]['params'])
  if jax.tree.structure(expected) != jax.tree.structure(found[0]['opt_state']):
    raise ValueError('the weighting was built with an optimizer that is not meta_tx')
  return _learned_step(loss, tx, rw, meta_loss, meta_tx, batched_loss, example_base, seed)


def _aligned_step(loss, tx, rw, meta_loss, batched_loss, example_base, seed):
  """An ordinary step whose weighting gets <gradient of the row's loss, meta gradient>."""
  forward = steps.forward_fn(loss, batched_loss, example_base)

  def row_signals(params, batch, signals):
    example_losses = lambda p: masked.example_level(*forward(p, batch, signals)[:2])[0]
    return {'alignment': gradients.alignment(example_losses, params, signals['direction'])}

  train_step = steps.make_train_step(
    loss,
    tx,
    rw,
    batched_loss=batched_loss,
    row_signals=row_signals,
    example_base=example_base,
    seed=seed,
  )

  def step(
    state: TrainState, batch: Batch, meta_batch: Any, signals: Mapping[str, Any] | None = None
  ):
    value, direction = jax.value_and_grad(meta_loss)(state.params, meta_batch)
    params, direction = _one_after_the_other(state.params, direction)
    signals = {**(signals or {}), 'direction': direction}
    state, metrics = train_step(state._replace(params=params), batch, signals)
    return state, metrics | {'meta_loss': value}

  return step


def _learned_step(loss, tx, rw, meta_loss, meta_tx, batched_loss, example_base, seed):
  """Look ahead, learn, then take the real step with the new weights."""
  forward = steps.forward_fn(loss, batched_loss, example_base)
  weigh = steps.weigh_fn(rw, seed)

  def gradient(params, batch, signals, weights_of):
    """Gradient of sum(base * w * loss), and (losses, w, base), row signals."""

    def objective(params):
      losses, base, rows = forward(params, batch, signals)
      w = jax.lax.stop_gradient(weights_of(losses, base, rows))
      return masked.total(losses, base * w), ((losses, w, base), rows)

    return jax.grad(objective, has_aux=True)(params)

  def step(
    state: TrainState, batch: Batch, meta_batch: Any, signals: Mapping[str, Any] | None = None
  ):
    signals = dict(signals or {})
    steps._check_step_signals(signals)
    steps._check_rows(batch, 1, None)
    (old,) = _learned(state.weighting)

    def weigh_with(learned, losses, base, rows):
      weighting = _replace_learned(state.weighting, learned)
      return weigh(weighting, losses, base, batch, rows, state.step, signals)

    grads, (examples, rows) = gradient(
      state.params, batch, signals, lambda *row: weigh_with(old, *row)[0]
    )
    losses, _, base = examples

    look_ahead = lambda grads: steps.finish(tx, state, grads, state.weighting, *examples)[0].params
    ahead, pull_back = jax.vjp(look_ahead, grads)
    value, meta_grads = jax.value_and_grad(meta_loss)(ahead, meta_batch)
    (direction,) = pull_back(meta_grads)
    losses_of = lambda params: forward(params, batch, signals)[0]
    slopes = gradients.alignment(losses_of, state.params, direction)

    weights_of = lambda params: weigh_with({**old, 'params': params}, losses, base, rows)[0]
    weights, pull_back = jax.vjp(weights_of, old['params'])
    by_weight = jnp.where(base != 0, base * slopes, 0).astype(weights.dtype)
    (learned_grads,) = pull_back(by_weight)
    updates, opt_state = meta_tx.update(learned_grads, old['opt_state'], old['params'])
    new = {'params': optax.apply_updates(old['params'], updates), 'opt_state': opt_state}

    weights, weighting = weigh_with(new, losses, base, rows)
    params, weights = _one_after_the_other(state.params, weights)
    grads, _ = gradient(params, batch, signals, lambda *_: weights)
    state, metrics = steps.finish(tx, state, grads, weighting, losses, weights, base)
    more = {'meta_loss': value, 'meta_grad_norm': optax.tree.norm(learned_grads)}
    return state, metrics | more

  return step


def _one_after_the_other(params: Any, earlier: Any) -> tuple[Any, Any]:
  """Both arguments; what reads the parameters from here on waits for `earlier`.

  The real gradient's forward pass needs nothing of what comes before it, so the compiler may run it
  first and hold its activations all the while: twice the memory.
  """
  return jax.lax.optimization_barrier((params, earlier))


def _is_learned(node: Any) -> bool:
  return isinstance(node, Mapping) and set(node) == {'params', 'opt_state'}


def _learned(weighting: Any) -> list[Any]:
  """The subtrees {'params', 'opt_state'} of a weighting's state."""
  return [node for node in jax.tree.leaves(weighting, is_leaf=_is_learned) if _is_learned(node)]


def _replace_learned(weighting: Any, new: Any) -> Any:
  return jax.tree.map(
    lambda node: new if _is_learned(node) else node, weighting, is_leaf=_is_learned
  )
