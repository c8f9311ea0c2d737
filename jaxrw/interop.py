"""Weights inside other people's training loops: a loss to differentiate, an optax aggregator.

Most loops need neither: three lines do (see the documentation's page of recipes). These are for
loops that carry the state of a weighting, and for optimizers that want one gradient per example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrw import masked
from jaxrw.core import SIGNALS, Weighting, check_signals


def weighted_loss(
  losses_of: Callable[..., jax.Array], rw: Weighting
) -> Callable[..., tuple[jax.Array, tuple[Any, jax.Array]]]:
  """The loss of a step, sum(base * w * losses) / sum(base), for `jax.value_and_grad(has_aux=True)`.

  Args:
    losses_of: (params, *args) -> losses [B] or [B, T], one per example or token; `params` may be
      whatever your framework differentiates.
    rw: weighting.

  Returns:
    (params, *args, state, **signals) -> (loss, (new state, losses)). `state` is the weighting's,
    `rw.init()` at first; `base` and further signals are keywords. Nothing is differentiated through
    the weights.

  Raises:
    TypeError: on tracing, for a signal of an unknown name.

  Example:
    >>> import jax, jax.numpy as jnp, jaxrw
    >>> rw = jaxrw.linupper(0.4)
    >>> loss = jaxrw.interop.weighted_loss(lambda w, x: (x - w) ** 2, rw)
    >>> step = jax.value_and_grad(loss, has_aux=True)
    >>> (value, (state, losses)), gradient = step(0.0, jnp.array([1.0, 2.0]), state=rw.init())
    >>> round(float(value), 3), round(float(gradient), 3)
    (3.772, -3.848)
  """

  def loss(params: Any, *args: Any, state: Any, base: jax.Array | None = None, **signals: Any):
    check_signals(signals)
    losses = losses_of(params, *args)
    base = jnp.ones(losses.shape, jnp.float32) if base is None else base
    ones = jnp.ones(losses.shape, jnp.promote_types(jnp.float32, losses.dtype))
    weights, state = rw.update(ones, state, losses=losses, base=base, **signals)
    kept = base * jax.lax.stop_gradient(weights)
    return masked.divide(masked.total(losses, kept), jnp.sum(base)), (state, losses)

  return loss


def weighted_aggregator(rw: Weighting) -> optax.GradientTransformationExtraArgs:
  """Per-example gradients in, their weighted mean out: the middle of an optax aggregation.

    update = sum(base * w * gradient) / sum(base)

  For `optax.experimental.aggregating.process`, behind something that must see the gradients one by
  one (clipping them, noise). Where nothing does, `weighted_loss` gives the same update in a
  fraction of the memory: gradients of B examples take B times that of the parameters.

  Args:
    rw: weighting. Its state is the transformation's.

  Returns:
    A transformation of gradients with a leading axis B. `update` needs the keyword `losses`
    float[B], and takes `base` float[B] and the weighting's other signals; keywords that are no
    signals are left to the optimizer's other parts.

  Example:
    >>> import jax, jax.numpy as jnp, optax, jaxrw
    >>> from optax.experimental import aggregating
    >>> one = jax.value_and_grad(lambda w, x: (x - w) ** 2)
    >>> losses, gradients = jax.vmap(one, (None, 0))(0.0, jnp.array([1.0, 2.0]))
    >>> tx = aggregating.process(
    ...   optax.with_extra_args_support(optax.identity()),
    ...   jaxrw.interop.weighted_aggregator(jaxrw.linupper(0.4)),
    ...   optax.with_extra_args_support(optax.sgd(1.0)))
    >>> updates, state = tx.update(gradients, tx.init(0.0), losses=losses)
    >>> round(float(updates), 3)
    3.848
  """

  def update(
    updates: Any,
    state: Any,
    params: Any = None,
    **others: Any,
  ) -> tuple[Any, Any]:
    del params
    if 'losses' not in others:
      raise TypeError('weighted_aggregator needs update(..., losses=), one per gradient')
    losses, base = others.pop('losses'), others.pop('base', None)
    if losses.ndim != 1:
      raise ValueError(f'losses have shape {losses.shape}; expected [B], as the gradients are')
    base = jnp.ones(losses.shape, jnp.float32) if base is None else base
    signals = {name: value for name, value in others.items() if name in SIGNALS}
    ones = jnp.ones(losses.shape, jnp.float32)
    weights, state = rw.update(ones, state, losses=losses, base=base, **signals)
    shares = base * weights / jnp.maximum(jnp.sum(base), jnp.finfo(jnp.float32).tiny)

    def mean(gradient: jax.Array) -> jax.Array:
      share = shares.reshape((-1,) + (1,) * (gradient.ndim - 1))
      return jnp.sum(jnp.where(share != 0, share * gradient, 0), axis=0).astype(gradient.dtype)

    return jax.tree.map(mean, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: rw.init(), update)
