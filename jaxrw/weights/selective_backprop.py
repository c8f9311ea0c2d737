"""Selective backprop (Jiang et al., 2019): keep an example with a chance that grows with its loss.

  percentile_i = share of the last `history` losses that are strictly below l_i
  P(keep i)    = max(least, percentile_i ^ power)
  w_i          = total / kept            for the examples kept, 0 for the others

with total and kept the masses sum(base * incoming) of all and of the kept examples: the step is the
mean over the kept ones, as if a full batch of them had been collected. It is biased towards high
losses on purpose; `Keep(sampled=True)` of the train step is the unbiased relative, and
`make_train_step(keep=Keep(...))` skips the backward pass of what has weight 0.

The history holds losses, not the order they came in, of the steps before this one, so that a weight
depends on its own example and not on its neighbors in the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import Weighting, check_positive, declare

_PAPER = 'Jiang et al., Accelerating Deep Learning by Focusing on the Biggest Losers (1910.00762)'


class LossHistory(NamedTuple):
  """A ring of losses: float32[H], NaN where nothing was written yet; int32[], the next place."""

  losses: jax.Array
  next: jax.Array


def selective_backprop_weights(
  history: LossHistory,
  losses: jax.Array,
  key: jax.Array,
  *,
  power: float | jax.Array = 3.0,
  least: float | jax.Array = 0.0,
  example_ids: jax.Array | None = None,
  base: jax.Array | None = None,
  weights: jax.Array | None = None,
) -> tuple[jax.Array, LossHistory]:
  """total / kept for examples drawn with probability max(least, percentile^power), 0 for the rest.

  Args:
    history: the losses seen so far. While it is empty every example is kept.
    losses: float[B], or float[B, T], whose base-mean over T is the loss of an example.
    key: of the step.
    power: >= 0; 0 keeps all.
    least: smallest probability, in [0, 1].
    example_ids: int[B]. An example's coin is tossed by its id, so that its place in the batch does
      not matter. Default: its place.
    base: float, shape of the losses: how much each entry counts in the ordinary mean, 0 for
      padding. Default: ones.
    weights: float, same shape: weights so far, multiplied in; the result keeps sum(base * weights)
      unless nothing is kept. Default: ones.

  Returns:
    (weights, history). All weights 0 if no example is kept; all NaN if any valid loss is NaN or
    inf, and such a loss is not remembered.

  Raises:
    ValueError: shapes that do not match, a negative power, a `least` outside [0, 1].

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from jaxrw.weights import selective_backprop, selective_backprop_weights
    >>> _, seen = selective_backprop_weights(
    ...   selective_backprop(history=4).init(), jnp.array([1.0, 2.0, 3.0, 4.0]), jax.random.key(0))
    >>> w, seen = selective_backprop_weights(seen, jnp.array([0.5, 9.0]), jax.random.key(1))
    >>> w, seen.losses
    (Array([0., 2.], dtype=float32), Array([0.5, 9. , 3. , 4. ], dtype=float32))

  Source: official code of Jiang et al. (power 3 in its example, 1024 losses).
  """
  _check(power, least)
  if losses.ndim not in (1, 2):
    raise ValueError(f'losses must be [B] or [B, T], got shape {losses.shape}')
  ids = jnp.arange(losses.shape[0]) if example_ids is None else example_ids
  if ids.shape != losses.shape[:1]:
    raise ValueError(f'example_ids has shape {ids.shape}; expected [{losses.shape[0]}]')
  losses, base, weights = masked.fill_in(losses, base, weights)
  loss, example_base = masked.example_level(losses, base)
  valid = example_base > 0
  loss = jnp.where(valid, loss, 0)
  number = jnp.sum(~jnp.isnan(history.losses))
  below = jnp.sum(history.losses < loss[:, None], axis=1)
  chance = jnp.where(number > 0, masked.divide(below, number) ** power, 1)
  coins = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(ids)
  keep = valid & (coins < jnp.maximum(chance, least))
  measure = masked.example_level(base, base * weights)[1]
  total, kept, broken = jnp.sum(jnp.stack([measure, jnp.where(keep, measure, 0), loss * 0]), axis=1)
  # A broken batch must not go by unnoticed, whatever the coins say.
  factor = jnp.where(keep, masked.divide(total, kept), 0) + broken
  factor = masked.over_tokens(factor, weights)
  return jnp.where(base > 0, weights * factor, 0), _remember(history, loss, valid)


def _remember(history: LossHistory, loss: jax.Array, valid: jax.Array) -> LossHistory:
  """The valid finite losses written in order from the next place on; the last H of them."""
  size = history.losses.size
  loss, valid = masked.replicate(loss), masked.replicate(valid & jnp.isfinite(loss))
  rank = jnp.cumsum(valid) - 1
  number = jnp.sum(valid)
  place = jnp.where(valid & (rank >= number - size), (history.next + rank) % size, size)
  losses = history.losses.at[place].set(loss.astype(history.losses.dtype), mode='drop')
  return LossHistory(losses, ((history.next + number) % size).astype(history.next.dtype))


@declare('normalized', 'example', 'official_code', _PAPER)
def selective_backprop(power: float = 3.0, least: float = 0.0, history: int = 1024) -> Weighting:
  """Stage of `selective_backprop_weights`; needs the signal `key`, and tosses by `example_ids`
  where the batch has them. State: the last `history` losses, `LossHistory`.

  Raises:
    ValueError: a negative power, a `least` outside [0, 1], a history of less than 1.
  """
  _check(power, least)
  check_positive(history=history)

  def update(weights, state, *, losses, key, example_ids=None, base=None, **_):
    return selective_backprop_weights(
      state,
      losses,
      key,
      power=power,
      least=least,
      example_ids=example_ids,
      base=base,
      weights=weights,
    )

  def init():
    return LossHistory(jnp.full(history, jnp.nan, jnp.float32), jnp.zeros((), jnp.int32))

  return Weighting(init, update)


def _check(power, least) -> None:
  if isinstance(power, (int, float)) and not 0 <= power < jnp.inf:
    raise ValueError(f'power={power} must be at least 0 and finite')
  if isinstance(least, (int, float)) and not 0 <= least <= 1:
    raise ValueError(f'least={least} must be in [0, 1]')
