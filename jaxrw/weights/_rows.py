"""What weights made from a row signal other than the losses have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
