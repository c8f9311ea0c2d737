"""Trimming: train on the part of the batch with the highest losses, or with the lowest.

High losses are what selective backprop and online hard-example mining train on; low losses are what
is left when examples that may be mislabeled are dropped. With weights 0 or total / kept both are
plain means over the kept examples, and `make_train_step(keep=Keep(...))` can skip the backward pass
of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax

from jaxrw import masked
from jaxrw.core import Weighting, at_step, declare, stateless
from jaxrw.weights._rows import check_share, keep_top

Share = float | jax.Array | Callable[[jax.Array], jax.Array]
Side = Literal['high', 'low']


def trimmed_weights(
  losses: jax.Array,
  share: float | jax.Array = 0.5,
  side: Side = 'high',
  *,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> jax.Array:
  """The `share` of examples with the highest (or lowest) losses, alike; the others get weight 0.

  k = max(1, ceil(share * number of valid examples)) are kept, and all that tie with the k-th.

  Args:
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    share: in (0, 1]. 1 passes the incoming weights of all examples unchanged.
    side: 'high' or 'low'.
    base: float, same shape: how much each entry counts in the ordinary mean, 0 for padding.
      Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights).
      Default: ones.

  Returns:
    float32 (float64 for float64 losses), shape of the losses; 0 for an example without base. The
    kept ones are NaN if any valid loss is NaN or inf.

  Raises:
    ValueError: shapes that do not match, a share outside (0, 1], an unknown side.

  Example:
    >>> import jax.numpy as jnp, jaxrw
    >>> jaxrw.trimmed_weights(jnp.array([1.0, 4.0, 2.0, 3.0]), share=0.5)
    Array([0., 2., 0., 2.], dtype=float32)

  Source: the common core of many methods (small-loss selection, online hard example mining, top-k
    selective backprop); none of their samplers or schedules.
  """
  _check(share, side)
  losses, base, weights = masked.fill_in(losses, base, weights)
  example_losses, _ = masked.example_level(losses, base)
  return keep_top(example_losses if side == 'high' else -example_losses, share, base, weights)


@declare(
  'normalized', 'example', 'ours', 'the common core of small-loss and hard-example selection'
)
def trimmed(share: Share = 0.5, side: Side = 'high') -> Weighting:
  """Stage of `trimmed_weights`; the share may be a schedule, a function of the step."""
  _check(share, side)

  def update(weights, *, losses, base=None, step=None, **_):
    now = at_step(share, step, 'share')
    return trimmed_weights(losses, now, side, base=base, weights=weights)

  return stateless(update)


def _check(share: Share, side: str) -> None:
  check_share(share)
  if side not in ('high', 'low'):
    raise ValueError(f"side={side!r} must be 'high' or 'low'")
