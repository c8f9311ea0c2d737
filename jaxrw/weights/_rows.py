"""What weights made from scores of rows have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrw import masked
from jaxrw.core import number_of


def fill_in(
  signal: jax.Array, base: jax.Array | None, weights: jax.Array | None, name: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(signal, base, weights), the latter ones where None; a base `[B, T]` may go with a signal [B].

  Args:
    signal: float[B] or [B, H]; becomes a constant for differentiation, in at least float32.
    base: float[B] or [B, T], or None.
    weights: the shape of the base, or None.
    name: of the signal, for the message.

  Raises:
    ValueError: shapes that do not match.
  """
  signal = jax.lax.stop_gradient(signal.astype(jnp.promote_types(jnp.float32, signal.dtype)))
  if base is None:
    base = jnp.ones(signal.shape[:1], signal.dtype) if weights is None else jnp.ones_like(weights)
  weights = jnp.ones_like(base) if weights is None else weights
  if weights.shape != base.shape or base.ndim > 2 or base.shape[:1] != signal.shape[:1]:
    raise ValueError(
      f'{name} has shape {signal.shape}, base {base.shape}, weights {weights.shape}; '
      'the latter two must be alike, [B] or [B, T], with one row for each of the first'
    )
  return signal, base, weights


def keep_top(
  score: jax.Array, share: float | jax.Array, base: jax.Array, weights: jax.Array
) -> jax.Array:
  """weights * total / kept for the `share` of highest scores, 0 for the others.

  total and kept are the masses sum(base * weights) of all and of the kept. Kept are at least k =
  max(1, ceil(share * number valid)), and all that tie with the k-th.

  Args:
    score: float[B], one for each row, or float[B, T], one for each entry; padding may hold
      anything.
    share: in (0, 1].
    base: float[B] or [B, T].
    weights: the shape of the base.

  Returns:
    The shape of the base; the kept ones are NaN if a valid score is NaN or inf.
  """
  within = tuple(range(score.ndim, base.ndim))
  valid = jnp.sum(base, axis=within) > 0
  score = jnp.where(valid, score, 0)
  keep = masked.top_share(score, valid, share)
  measure = jnp.sum(base * weights, axis=within)
  terms = jnp.stack([measure, jnp.where(keep, measure, 0), score * 0])  # 0, or NaN
  total, kept, broken = jnp.sum(terms, axis=tuple(range(1, terms.ndim)))  # one collective
  factor = jnp.where(keep, masked.divide(total, kept) + broken, 0)
  factor = factor if factor.ndim == weights.ndim else masked.over_tokens(factor, weights)
  return jnp.where(base > 0, weights * factor, 0)


def check_share(share: object) -> None:
  """Holds a share that is a number to (0, 1]; schedules, vectors and traced values pass.

  Raises:
    ValueError: a share outside (0, 1].
  """
  if (number := number_of(share)) is not None and not 0 < number <= 1:
    raise ValueError(f'share={share} must be in (0, 1]')
