"""ShrinkMatch (ICCV 2023): weights for unlabeled examples; FixMatch is its limit.

With p the class probabilities of an example's weak view, in descending order p_0 >= p_1 >= ...:

  certain     p_0 >= threshold: the example has its ordinary consistency loss, with weight 1
  otherwise   the strongest rivals 1 .. c - 1 are removed, c >= 2 the smallest at which
              p_0 / (p_0 + p_c + p_{c+1} + ...) >= threshold, or C - 1 if there is none; its loss is
              cross entropy over the classes left (`losses.shrunk_cross_entropy`), with weight

  p_0 * 1[confidence in the shrunk space >= threshold] * r

where r is a running mean of the share of certain examples: the shrunk loss counts more as the model
gets better. Both losses are divided by the number of all examples, certain or not. With r = 0, or
two classes, what is left is FixMatch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, declare

_PAPER = 'ShrinkMatch, ICCV 2023 (arXiv 2308.06777)'


class CertainShare(NamedTuple):
  """float32[], running mean of the share of certain examples; bool[], whether any was seen yet."""

  share: jax.Array
  seen: jax.Array


def shrink_mask(probabilities: jax.Array, threshold: float = 0.95) -> tuple[jax.Array, jax.Array]:
  """The classes left when the strongest rivals of the likeliest are removed, and its confidence.

  Args:
    probabilities: float[..., C] of sum 1, C >= 2. Of ties the class of the lowest index is first.
    threshold: confidence wanted, in (0, 1).

  Returns:
    (keep bool[..., C], confidence float[...] of the likeliest class among the kept). At least one
    rival is removed, however certain the example is; with two classes only the likeliest is left,
    whose confidence of 1 then says nothing.

  Raises:
    ValueError: fewer than 2 classes, a threshold outside (0, 1).

  Example:
    >>> import jax.numpy as jnp
    >>> from jaxrw.weights import shrink_mask
    >>> keep, confidence = shrink_mask(jnp.array([0.5, 0.3, 0.18, 0.02]), threshold=0.95)
    >>> keep, round(float(confidence), 4)
    (Array([ True, False, False,  True], dtype=bool), 0.9615)

  Source: official code of ShrinkMatch.
  """
  _check(threshold)
  classes = probabilities.shape[-1]
  if classes < 2:
    raise ValueError(f'probabilities have shape {probabilities.shape}; expected at least 2 classes')
  p = jax.lax.stop_gradient(probabilities)
  order = jnp.argsort(-p, axis=-1, stable=True)
  ranked = jnp.take_along_axis(p, order, axis=-1)
  tail = jnp.cumsum(ranked[..., ::-1], axis=-1)[..., ::-1]  # of the classes from each rank on
  confident = ranked[..., :1] / (ranked[..., :1] + tail)  # if the ranks 1 .. c - 1 are removed
  rank = jnp.arange(classes)
  last = max(classes - 1, 1)
  enough = ((confident >= threshold) & (rank >= 2)) | (rank == last)
  cut = jnp.argmax(enough, axis=-1)[..., None]
  kept = (rank == 0) | ((rank >= cut) if classes > 2 else False)
  keep = jnp.take_along_axis(jnp.broadcast_to(kept, p.shape), jnp.argsort(order, axis=-1), axis=-1)
  if classes == 2:
    return keep, jnp.ones(p.shape[:-1], p.dtype)
  return keep, jnp.take_along_axis(confident, cut, axis=-1)[..., 0]


def shrinkmatch_weights(
  probabilities: jax.Array, certain_share: float | jax.Array, threshold: float = 0.95
) -> jax.Array:
  """(weight of the consistency loss, weight of the shrunk loss) of each example.

  Args:
    probabilities: float[B, C] of the weak views, aligned with the classes' distribution or not.
    certain_share: r, in [0, 1]. 0 is FixMatch.
    threshold: in (0, 1).

  Returns:
    float32[B, 2] (float64 for float64 probabilities). At most one of a row is not 0. Not
    normalized: mean over all examples, as FixMatch does.

  Raises:
    ValueError: fewer than 2 classes, a threshold outside (0, 1).

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> p = jnp.array([[0.96, 0.02, 0.01, 0.01], [0.5, 0.3, 0.18, 0.02], [0.25, 0.25, 0.25, 0.25]])
    >>> jaxrw.shrinkmatch_weights(p, certain_share=0.5)
    Array([[1.  , 0.  ],
           [0.  , 0.25],
           [0.  , 0.  ]], dtype=float32)

  Source: official code of ShrinkMatch.
  """
  p = probabilities.astype(jnp.promote_types(jnp.float32, probabilities.dtype))
  p = jax.lax.stop_gradient(p)
  _, confidence = shrink_mask(p, threshold)
  top = jnp.max(p, axis=-1)
  certain = top >= threshold
  usable = ~certain & (confidence >= threshold) & (p.shape[-1] > 2)
  return jnp.stack([jnp.where(certain, 1, 0 * top), jnp.where(usable, top * certain_share, 0)], -1)


@declare('absolute', 'token', 'official_code', _PAPER)
def shrinkmatch(threshold: float = 0.95, decay: float = 0.999) -> Weighting:
  """Weights for losses [B, 2]: each example's consistency loss and its shrunk loss.

  Needs the signal `logits`, float[B, C], of the weak views (add the log of a distribution alignment
  to them, if there is one). Let the loss of the step be

    losses = stack([cross_entropy(strong, top), shrunk_cross_entropy(strong, keep, top)], axis=1)

  with top the likeliest class of the weak view and keep from `shrink_mask`. State: `CertainShare`,
  r over all devices; the first batch sets it. With base 1/2 for each of the two terms (the step's
  `example_base='any'`) the loss is half of FixMatch's: double the learning rate or the losses.

  Args:
    threshold: in (0, 1).
    decay: of r, in [0, 1).

  Raises:
    ValueError: an argument out of its range; on tracing, losses that are not [B, 2].
  """
  _check(threshold)
  if not 0 <= decay < 1:
    raise ValueError(f'decay={decay} must be in [0, 1)')

  def update(weights, state, *, losses, logits, base=None, **_):
    if losses.ndim != 2 or losses.shape[1] != 2 or logits.shape[:1] != losses.shape[:1]:
      raise ValueError(
        f'losses {losses.shape} must be [B, 2]: consistency and shrunk loss of each row; logits '
        f'{logits.shape} [B, C]'
      )
    losses, base, weights = masked.fill_in(losses, base, weights)
    p = jax.nn.softmax(jax.lax.stop_gradient(logits.astype(losses.dtype)), axis=-1)
    valid = jnp.sum(base, axis=1) > 0
    p = jnp.where(valid[:, None], p, 1 / p.shape[1])
    certain = valid & (jnp.max(p, axis=1) >= threshold)
    number, share = jnp.sum(jnp.stack([valid, certain]).astype(jnp.float32), axis=1)
    now = masked.divide(share, number)
    followed = jnp.where(state.seen, decay * state.share + (1 - decay) * now, now)
    # A broken prediction is no uncertain one.
    counts = (number > 0) & ~jnp.any(jnp.isnan(p))
    state = CertainShare(jnp.where(counts, followed, state.share), state.seen | counts)
    own = shrinkmatch_weights(p, state.share, threshold)
    # A broken prediction or loss must not pass for an uncertain one.
    own = own + 0 * jnp.where(base > 0, losses, 0) + 0 * jnp.sum(p, axis=1, keepdims=True)
    return jnp.where(base > 0, weights * own, 0), state

  return Weighting(lambda: CertainShare(jnp.zeros(()), jnp.zeros((), bool)), update)


def _check(threshold: float) -> None:
  if not 0 < threshold < 1:
    raise ValueError(f'threshold={threshold} must be in (0, 1)')
