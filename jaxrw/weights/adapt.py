"""ADAPT: an example counts by how close the model finds it to a few anchor examples.

The representation of an example comes from the forward pass of the model in training, so the
weights follow the model and cost nothing beyond a pooling of the hidden states:

  phi_i = representation_i / |representation_i|      pooled over positions, later ones count more
  A     = mean over the anchors of their phi         [H]; refreshed every some dozen steps
  s_i   = phi_i . A                                  the mean cosine to the anchors
  w_i   = sigmoid(s_i / temperature) / Z             Z such that sum(base * w) = sum(base)

Only the mean of the anchors matters, so [H] numbers are kept and not [M, H]. At temperature 1 the
weights before Z lie in (0.27, 0.73): nearly uniform. The temperature is the knob.

Return the representation from the loss and pass the anchor mean with the step:

  def batched_loss(params, batch):
    hidden, losses = ...
    return losses, {'representation': pool_positions(hidden, batch['base'])}
  state, metrics = step(state, batch, signals={'anchor': anchor})

Anchors must not be examples the model is tested on.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, at_step, check_positive, declare, stateless
from jaxrw.weights._rows import fill_in
from jaxrw.weights._tilt import tilt

_SOURCE = 'ADAPT, ICLR 2026 (arXiv 2605.05227; the abstract, and third-party code of the method)'


def adapt_weights(
  representation: jax.Array,
  anchor: jax.Array,
  temperature: float | jax.Array = 1.0,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
  normalize: bool = True,
) -> jax.Array:
  """w ∝ sigmoid(mean cosine to the anchors / temperature).

  Args:
    representation: float[B, H], one vector per example; its length does not matter, and a zero
      vector has cosine 0.
    anchor: float[H] from `anchor_mean`.
    temperature: > 0; inf gives uniform weights.
    base: float[B] or float[B, T]: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones [B].
    weights: float, shape of the base: weights so far, multiplied in. Default: ones.
    normalize: keep sum(base * weights). False leaves the absolute weights in (0, 1) of the
      third-party code, which amount to a smaller learning rate.

  Returns:
    float32 (float64 for float64 representations), shape of the base; 0 for an example without base.

  Raises:
    ValueError: shapes that do not match, or a temperature <= 0.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> anchor = jnp.array([1.0, 0.0])
    >>> phi = jnp.array([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    >>> w = jaxrw.weights.adapt_weights(phi, anchor, temperature=0.5)
    >>> [round(float(x), 3) for x in w]
    [1.762, 1.0, 0.238]

  Provenance: reconstructed. Source: the abstract of arXiv 2605.05227 and a description of
    third-party code; neither the paper's body nor official code was at hand.
  """
  check_positive(temperature=temperature)
  representation, base, weights = fill_in(representation, base, weights, 'representation')
  score = _log_sigmoid(representation, anchor, temperature)
  _, mass = masked.example_level(base, base)
  if normalize:
    return tilt(score, 1.0, mass > 0, base, weights, shift=True)
  return weights * masked.over_tokens(jnp.where(mass > 0, jnp.exp(score), 0), weights)


def anchor_mean(representations: jax.Array) -> jax.Array:
  """The mean of the L2-normalized representations of the anchor examples.

  Args:
    representations: float[M, H], M >= 1.

  Returns:
    float[H], of length at most 1, at least float32.

  Raises:
    ValueError: no anchors.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.weights.anchor_mean(jnp.array([[3.0, 0.0], [0.0, 0.1]]))
    Array([0.5, 0.5], dtype=float32)
  """
  if representations.ndim != 2 or representations.shape[0] == 0:
    raise ValueError(
      f'representations have shape {representations.shape}; expected [M, H] with M >= 1 anchors'
    )
  return jnp.mean(_unit(representations), axis=0)


def pool_positions(hidden: jax.Array, valid: jax.Array) -> jax.Array:
  """Mean over the valid positions, the t-th of them weighted by t: later ones have seen more.

  Args:
    hidden: float[B, T, H], the last hidden states.
    valid: [B, T], not 0 where a position counts; a batch's `base` will do.

  Returns:
    float[B, H], at least float32; 0 for a row without valid positions.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> hidden = jnp.array([[[3.0], [6.0], [99.0]]])
    >>> jaxrw.weights.pool_positions(hidden, jnp.array([[1, 1, 0]]))    # (1 * 3 + 2 * 6) / (1 + 2)
    Array([[5.]], dtype=float32)
  """
  hidden = hidden.astype(jnp.promote_types(jnp.float32, hidden.dtype))
  valid = valid != 0
  # Counted over valid positions, so that padding on the left changes nothing.
  position = jnp.where(valid, jnp.cumsum(valid, axis=1), 0).astype(hidden.dtype)
  weighted = jnp.where(valid[..., None], hidden * position[..., None], 0)
  return masked.divide(jnp.sum(weighted, axis=1), jnp.sum(position, axis=1)[:, None])


def _log_sigmoid(
  representation: jax.Array, anchor: jax.Array, temperature: float | jax.Array
) -> jax.Array:
  """log sigmoid(cosine / temperature) [B], without gradient."""
  if representation.ndim != 2 or anchor.shape != representation.shape[1:]:
    raise ValueError(
      f'representation has shape {representation.shape}, anchor {anchor.shape}; expected [B, H] '
      'and [H] (the mean anchor, see anchor_mean)'
    )
  unit, anchor = jax.lax.stop_gradient((_unit(representation), anchor))
  cosine = jnp.sum(unit * anchor.astype(unit.dtype), axis=1)
  inverse = 1 / jnp.asarray(temperature, cosine.dtype)
  inverse = jnp.minimum(inverse, jnp.finfo(cosine.dtype).max)  # 0 * inf would be NaN
  return jax.nn.log_sigmoid(cosine * inverse)


def _unit(vectors: jax.Array) -> jax.Array:
  """vectors / length, row by row; 0 for a zero row."""
  vectors = vectors.astype(jnp.promote_types(jnp.float32, vectors.dtype))
  # Squares of entries below 1e-23 or above 1e19 leave float32.
  vectors = masked.divide(vectors, jnp.max(jnp.abs(vectors), axis=1, keepdims=True))
  return masked.divide(vectors, jnp.sqrt(jnp.sum(vectors**2, axis=1, keepdims=True)))


@declare('normalized', 'example', 'reconstructed', _SOURCE)
def adapt(
  temperature: float | jax.Array | Callable[[jax.Array], jax.Array] = 1.0, normalize: bool = True
) -> Weighting:
  """Stage of `adapt_weights`; needs the row signal `representation` [B, H] and the whole-step
  signal `anchor` [H].

  The temperature may be a schedule. Normalized, it is of the softmax type (log w is log sigmoid):
  one pass over microbatches gives its exact global gradient. `normalize=False` makes it absolute.
  """
  check_positive(temperature=temperature)

  def update(weights, *, representation, anchor, base=None, step=None, **_):
    tau = at_step(temperature, step, 'temperature')
    new = adapt_weights(representation, anchor, tau, base, weights, normalize)
    return new.astype(weights.dtype)

  def log_weights(*, representation, anchor, base=None, step=None, **_):
    score = _log_sigmoid(representation, anchor, at_step(temperature, step, 'temperature'))
    if base is None:
      return score
    return jnp.where(masked.example_level(base, base)[1] > 0, score, -jnp.inf)

  return stateless(update, log_weights if normalize else None)
