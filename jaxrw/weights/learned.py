"""Weights that a small trusted ("meta") set decides: learning to reweight, and Meta-Weight-Net.

Both ask how a training example's weight in this step changes the loss on the meta set after it.
With g_i the gradient of loss i, and g the gradient of the meta loss, for plain SGD

  d meta loss / d w_i = - learning rate * <g, g_i> / B

`learning_to_reweight` takes the positive part of <g, g_i> as the weight, at once and without
memory. `meta_weight_net` learns a function from a loss to its weight with that derivative.
`jaxrw.make_bilevel_step` computes what both need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxrw import masked
from jaxrw.core import Weighting, declare, stateless
from jaxrw.weights._rows import fill_in

_L2RW = 'Ren et al., Learning to Reweight Examples for Robust Deep Learning, ICML 2018'
_MWN = 'Shu et al., Meta-Weight-Net, NeurIPS 2019 (official code)'


def learning_to_reweight_weights(
  alignment: jax.Array, *, base: jax.Array | None = None, weights: jax.Array | None = None
) -> jax.Array:
  """w ∝ max(<meta gradient, gradient of the example>, 0).

  Args:
    alignment: float[B], the inner product of the gradient of each example's loss with the gradient
      of the meta loss; positive means that training on the example lowers the meta loss.
    base: float[B] or float[B, T]: how much each entry counts, 0 for padding. Default: ones [B].
    weights: float, shape of the base: weights so far, multiplied in; the result keeps
      sum(base * weights). Default: ones.

  Returns:
    float32 (float64 for float64 alignments), shape of the base. All 0 if no alignment is positive:
    then no example helps, and the step changes nothing.

  Raises:
    ValueError: shapes that do not match.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> w = jaxrw.learning_to_reweight_weights(jnp.array([3.0, 1.0, -2.0, 0.0]))
    >>> [float(x) for x in w]
    [3.0, 1.0, 0.0, 0.0]

  Source: Ren et al., ICML 2018.
  """
  alignment, base, weights = fill_in(alignment, base, weights, 'alignment')
  measure = masked.example_level(base, base * weights)[1]
  own = jnp.where(masked.example_level(base, base)[1] > 0, jnp.maximum(alignment, 0), 0)
  mass, helpful = jnp.sum(jnp.stack([measure, measure * own]), axis=1)
  return weights * masked.over_tokens(own * masked.divide(mass, helpful), weights)


@declare('normalized', 'example', 'official_code', _L2RW)
def learning_to_reweight() -> Weighting:
  """Stage of `learning_to_reweight_weights`; needs the signal `alignment`, which
  `make_bilevel_step` provides. The sum of the weights is kept, or 0 if no example helps."""

  def update(weights, *, alignment, base=None, **_):
    new = learning_to_reweight_weights(alignment, base=base, weights=weights)
    return new.astype(weights.dtype)

  return stateless(update)


def meta_weight_net_weights(
  params: Mapping[str, jax.Array],
  losses: jax.Array,
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """w = sigmoid(V(loss)), V a perceptron with one hidden ReLU layer. Absolute, in (0, 1).

  Differentiable in `params`; the losses are constants.

  Args:
    params: `in_weight`, `in_bias`, `out_weight` float[H] and `out_bias` float[].
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    base: float, same shape: how much each entry counts, 0 for padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in. Default: ones.

  Returns:
    Shape of the losses, at least float32; 0 for an example without base.

  Source: official code of Shu et al., NeurIPS 2019. It divides the weighted sum by B and nothing
    else, so weights that are all 1/2 halve the learning rate: that is its scale, and part of what V
    learns. Follow it by `unit_mean()` for weights of mean 1.
  """
  losses, base, weights = masked.fill_in(losses, base, weights)
  example_losses, example_base = masked.example_level(losses, base)
  valid = example_base > 0
  x = jnp.where(valid, example_losses, 0)[:, None]
  hidden = jax.nn.relu(x * params['in_weight'] + params['in_bias'])
  logits = jnp.sum(hidden * params['out_weight'], axis=1) + params['out_bias']
  own = jnp.where(valid, jax.nn.sigmoid(logits), 0)
  return weights * masked.over_tokens(own, weights)


@declare('absolute', 'example', 'official_code', _MWN)
def meta_weight_net(
  meta_tx: optax.GradientTransformation, hidden: int = 100, seed: int = 0
) -> Weighting:
  """Stage of `meta_weight_net_weights`: weights in (0, 1) from a network that is learned.

  Only `make_bilevel_step`, given the same `meta_tx`, trains the network; on its own this stage is a
  fixed function. The official optimizer is Adam, 1e-3, with 1e-4 * params added to the gradient:
  `optax.chain(optax.add_decayed_weights(1e-4), optax.adam(1e-3))`.

  Args:
    meta_tx: optimizer of the network, for its part of the state.
    hidden: H, hidden units.
    seed: of the initial parameters, uniform in ± 1/sqrt(inputs) (torch's default, as published).

  Returns:
    A weighting with state {'params', 'opt_state'}.
  """

  def init():
    keys = jax.random.split(jax.random.key(seed), 4)
    draw = lambda key, shape, inputs: jax.random.uniform(
      key, shape, jnp.float32, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs)
    )
    params = {
      'in_weight': draw(keys[0], (hidden,), 1),
      'in_bias': draw(keys[1], (hidden,), 1),
      'out_weight': draw(keys[2], (hidden,), hidden),
      'out_bias': draw(keys[3], (), hidden),
    }
    return {'params': params, 'opt_state': meta_tx.init(params)}

  def update(weights: jax.Array, state: dict[str, Any], *, losses, base=None, **_):
    new = meta_weight_net_weights(state['params'], losses, base=base, weights=weights)
    return new.astype(weights.dtype), state

  return Weighting(init, update)
